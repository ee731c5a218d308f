# SPDX-License-Identifier: Apache-2.0
"""Paths copied from a request's own tokens: where the last tokens occurred before, and how far such copies hold."""
