# SPDX-License-Identifier: Apache-2.0
"""Short programs that use the plugin; run from the repository root, `python -m examples.offline`."""
