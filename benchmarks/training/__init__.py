# SPDX-License-Identifier: Apache-2.0
"""A target and its GLIDE draft in plain PyTorch: text, training and acceptance of the pairs that benchmarks use."""
