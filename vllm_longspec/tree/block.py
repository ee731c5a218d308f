# SPDX-License-Identifier: Apache-2.0
"""Sizes of the blocks that one warp of a kernel holds."""

from vllm.triton_utils import triton

LANES = 32


def block_of(size: int) -> int:
    """The smallest block for `size` elements that is no less than a warp.

    A smaller one takes as long, and each size of a block is a kernel of its own that has to be compiled: the levels of
    the trees for all numbers of nodes have any number of nodes up to a few.
    """
    return max(LANES, triton.next_power_of_2(size))
