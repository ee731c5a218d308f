# SPDX-License-Identifier: Apache-2.0
"""A proposer without a draft model: it expects the last tokens again. docs/add-a-proposer.md shows this file."""

from collections.abc import Mapping
from typing import Any

import torch

from vllm_longspec.proposers.interface import Candidates, DraftingCost, DraftSetup, Proposer, Requests
from vllm_longspec.tree.shape import TreeShape


class RepeatSetup(DraftSetup):
    """`--speculative-config '{"method": "repeat", "gamma": 4}'`, once registered under that name."""

    proposer = "tests.proposers.repeat.RepeatProposer"

    @classmethod
    def find(cls, options: Mapping[str, Any], own_options: Mapping[str, Any]) -> "RepeatSetup":
        if own_options.get("gamma") is None:
            raise ValueError("the method repeat draws a chain: give its length as gamma")
        return cls()

    def vllm_options(self, engine_args: Any, given: Any, target: Any, *_: Any) -> dict[str, Any]:
        # There is no draft to load. vLLM wants to be told of one, and the target fits itself.
        return {"method": "draft_model", "model": target.model}

    @staticmethod
    def drafting_cost(vllm_config: Any) -> DraftingCost:
        return lambda batch_size, num_nodes, cached_weights: 0.0


class RepeatProposer(Proposer):
    def propose(self, requests: Requests, num_nodes: int) -> Candidates:
        """The last `max_depth` tokens, the root's included, in their order."""
        offset = torch.arange(1 - self.shape.max_depth, 0, device=self.device)
        positions = (requests.roots.positions[:, None] + offset).clamp(min=0)
        before_root = requests.token_ids[requests.idx_mapping.clamp(min=0)[:, None], positions]
        tokens = torch.cat([before_root.long(), requests.roots.tokens[:, None]], dim=1)[:, :num_nodes].contiguous()
        depth = torch.arange(num_nodes, device=self.device)
        parents = (depth - 1).int().expand(tokens.shape).contiguous()
        log_probs = (-0.1 * (1.0 + depth)).expand(tokens.shape).contiguous()
        return Candidates(tokens, parents, log_probs, TreeShape((1,) * num_nodes))
