# SPDX-License-Identifier: Apache-2.0
"""A node as one integer: how the scheduler, which walks grammars down the trees, learns the nodes' parents.

vLLM copies a step's draft tokens to the scheduler when the batch has requests with structured output, and nothing else
about them. Draft tokens are int64 and token ids need 31 bits, so the upper half carries the row of the parent. On the
device nothing has to be unpacked: vLLM writes draft tokens to the model's int32 input ids, which keeps the lower half.
"""

import torch

from vllm_longspec.tree.state import NO_TOKEN

_TOKEN_BITS = 32
_TOKEN_MASK = (1 << _TOKEN_BITS) - 1


def pack_nodes(
    tokens: torch.Tensor,  # int64 [...]; `NO_TOKEN` in rows that hold no node
    parent_rows: torch.Tensor,  # int32 [...] as in `TreeState`: -1 in rows that hold no node
) -> torch.Tensor:  # int64 [...]
    """Both in one integer. A row that holds no node gives a negative one."""
    return (parent_rows.to(torch.int64) << _TOKEN_BITS) | (tokens & _TOKEN_MASK)


def unpack_node(node: int) -> tuple[int, int]:
    """The token and the parent's row of a packed node, (`NO_TOKEN`, -1) for a row that holds none."""
    return (NO_TOKEN, -1) if node < 0 else (node & _TOKEN_MASK, node >> _TOKEN_BITS)
