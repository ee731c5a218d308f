# SPDX-License-Identifier: Apache-2.0
"""Trees of draft tokens: their state and the stages of a step that operate on them. Must not import a proposer."""
