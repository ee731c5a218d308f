# SPDX-License-Identifier: Apache-2.0
"""What draws candidate trees. Proposers do not import each other."""
