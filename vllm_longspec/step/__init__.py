# SPDX-License-Identifier: Apache-2.0
"""The stages of a speculative decoding step: draft, order, verify, sample, walk, compact."""
