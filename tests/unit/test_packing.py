# SPDX-License-Identifier: Apache-2.0
"""Nodes packed with their parents: the scheduler reads both, and the model the token only."""

import pytest
import torch
from vllm.v1.worker.gpu.input_batch import combine_sampled_and_draft_tokens

from tests.unit.test_order import DEVICE
from vllm_longspec.tree.packing import pack_nodes, unpack_node
from vllm_longspec.tree.state import NO_TOKEN

TOKENS = [0, 5, 152_063, 2**31 - 1, 7, NO_TOKEN, 0]
PARENTS = [0, 1, 0, 3, 255, -1, -1]


def packed() -> torch.Tensor:
    return pack_nodes(
        torch.tensor(TOKENS, dtype=torch.int64, device=DEVICE), torch.tensor(PARENTS, dtype=torch.int32, device=DEVICE)
    )


def test_nodes_come_back():
    assert packed().dtype == torch.int64
    # A request in its prompt has zeros for draft tokens, and no parents.
    expected = [*zip(TOKENS[:5], PARENTS[:5], strict=True), (NO_TOKEN, -1), (NO_TOKEN, -1)]
    assert [unpack_node(node) for node in packed().tolist()] == expected
    # What vLLM writes past the last node.
    assert unpack_node(-1) == (NO_TOKEN, -1)


@pytest.mark.parametrize("num_nodes", [1, 4, 7])
def test_the_model_reads_the_tokens(num_nodes):
    """vLLM's kernel stores draft tokens as int32."""

    def int32(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    input_ids = int32(*[-7] * 10)
    combine_sampled_and_draft_tokens(
        input_ids,
        idx_mapping=int32(1),
        last_sampled_tokens=torch.tensor([[3], [11]], device=DEVICE),
        query_start_loc=int32(0, 1 + num_nodes),
        seq_lens=int32(20 + num_nodes),
        prefill_len=int32(4, 4),
        draft_tokens=torch.stack([torch.zeros_like(packed()), packed()]),
        cu_num_logits=int32(0, 1 + num_nodes),
        num_logits=1 + num_nodes,
    )
    assert input_ids.tolist() == [11, *TOKENS[:num_nodes], *[-7] * (9 - num_nodes)]
