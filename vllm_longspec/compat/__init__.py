# SPDX-License-Identifier: Apache-2.0
"""What differs between the versions of vLLM, and which of them are supported. Nothing else in the package knows."""
