# SPDX-License-Identifier: Apache-2.0
"""The MagicDec proposer; docs/design.md describes its draft."""
