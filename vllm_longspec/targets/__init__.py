# SPDX-License-Identifier: Apache-2.0
"""Target models: the families that are supported, and what is refused."""
