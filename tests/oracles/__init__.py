# SPDX-License-Identifier: Apache-2.0
"""Plain, slow references that the kernels are tested against."""
