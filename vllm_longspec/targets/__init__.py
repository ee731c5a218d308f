# SPDX-License-Identifier: Apache-2.0
"""Target models: supported families, and what is refused."""
