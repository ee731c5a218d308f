# SPDX-License-Identifier: Apache-2.0
"""The GLIDE proposer; docs/design.md#window describes its draft."""
