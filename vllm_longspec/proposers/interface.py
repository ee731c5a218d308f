# SPDX-License-Identifier: Apache-2.0
"""What a proposer is to the rest of the package: a setup, which start-up asks, and a proposer, which each worker asks.

Given the requests of a step a proposer draws candidate trees. Everything else is the core's: which nodes are verified
and in what order, ancestor masks and positions, sampling, the walk, compaction, CUDA graphs, metrics, and how many
nodes are worth their time. See docs/add-a-proposer.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import nn

from vllm_longspec.tree.shape import TreeShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

# (nodes of each request, K and V of all cached tokens as so many weights) -> what drafting takes, as so many weights
# that could be read meanwhile (`vllm_longspec/scheduling/cost.py`)
DraftingCost = Callable[[int, float], float]


class Roots(NamedTuple):
    """Where trees begin: the last token of each request, sampled but not yet seen by the target."""

    tokens: torch.Tensor  # int64 [num_reqs]
    positions: torch.Tensor  # int64 [num_reqs]
    # The tokens before the root, all of which the target has cached: int32 [num_reqs], the same numbers.
    prefix_lens: torch.Tensor


class Requests(NamedTuple):
    """The requests of a step that are drafted for. A CUDA graph holds on to all of these tensors."""

    # int64 [num_reqs] req_state_idx; -1 for a request that only pads the batch: token 0 at position 0
    idx_mapping: torch.Tensor
    roots: Roots
    # int32 [num_reqs] tokens right before the root that the last step settled
    num_new_tokens: torch.Tensor
    # int32 [max_num_reqs, max_model_len] text by req_state_idx
    token_ids: torch.Tensor
    # int32 [num_reqs, max_num_blocks] of the target's cache
    block_table: torch.Tensor
    # A bound on the prefix; for a CUDA graph on that of every batch that it will run.
    max_prefix_len: int


class Candidates(NamedTuple):
    """Drafted nodes, level by level: parents before their children, and those of a level in any order."""

    tokens: torch.Tensor  # int64 [num_reqs, num_drafted]
    # int32 [num_reqs, num_drafted] index of the parent node, -1 for the root; different nodes of a parent differ in
    # their tokens
    parents: torch.Tensor
    # float32 [num_reqs, num_drafted] natural log of each node's probability given the root, the sum along its path
    log_probs: torch.Tensor
    # Nodes at each depth, at least as many in all as were asked for.
    shape: TreeShape


class DraftSetup(ABC):
    """A draft that the user asks for, before any engine is built. Importing a setup must import no model."""

    # Qualified name of the `Proposer`.
    proposer: ClassVar[str]

    @classmethod
    @abstractmethod
    def find(cls, options: Mapping[str, Any], own_options: Mapping[str, Any]) -> "DraftSetup | None":
        """The draft that these options ask for; None if it is none for this proposer.

        Args:
            options: of vLLM's speculative configuration, from wherever the user gave them.
            own_options: those that vLLM does not know (`vllm_longspec.options.OPTION_NAMES`).

        Raises:
            ValueError: in one line, for one of `own_options` that needs this proposer, or a draft that cannot be used.
        """

    def check(self, target: "ModelConfig") -> None:
        """Refuses a target that the draft does not fit.

        Raises:
            ValueError: in one line, with the way out.
        """
        return None

    def frequent_tokens(self, given: Any) -> str | None:
        """The file of the tokens that are drafted; None for all of the vocabulary.

        Args:
            given: the user's `frequent_tokens`, None if there is none.

        Raises:
            ValueError: in one line, for a value that is none, or a proposer that cannot restrict its tokens.
        """
        if given not in (None, False):
            raise ValueError("frequent_tokens needs a draft with a head of its own: leave it out")
        return None

    @abstractmethod
    def vllm_options(
        self,
        engine_args: "EngineArgs",
        given: Mapping[str, Any],
        target: "ModelConfig",
        parallel_config: "ParallelConfig",
        draft_vocab_size: int,
    ) -> dict[str, Any]:
        """What to tell vLLM on top of the user's options, `method` and `model` at least."""

    def hf_overrides(
        self, overrides: "Callable[[PretrainedConfig], PretrainedConfig]"
    ) -> "Callable[[PretrainedConfig], PretrainedConfig]":
        """Changes to the draft's Hugging Face config, on top of vLLM's own; must be picklable."""
        return overrides

    @staticmethod
    def check_other(config: "SpeculativeConfig | None") -> None:
        """Refuses a draft of this proposer's that `find` has not seen, once vLLM has built its own configuration.

        Raises:
            ValueError: in one line, with the way out.
        """
        return None

    @staticmethod
    @abstractmethod
    def drafting_cost(vllm_config: "VllmConfig") -> DraftingCost:
        """What a step takes for drafting, by nodes of each request."""


class Proposer(ABC):
    """Draws candidate trees in a worker. `shape` is that of the tree in the engine's options.

    `propose` runs in a CUDA graph: it reads and writes nothing but tensors that live as long as the engine, waits for
    nothing on the host, and its shapes depend on the numbers of requests and nodes alone.
    """

    def __init__(self, vllm_config: "VllmConfig", shape: TreeShape, device: torch.device):
        self.vllm_config = vllm_config
        self.shape = shape
        self.device = device

    def load(self, target: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        """Loads what the proposer needs besides the target, and returns its model; an empty module if it has none."""
        return nn.Module()

    @abstractmethod
    def propose(self, requests: Requests, num_nodes: int) -> Candidates:
        """Candidates for every request, `num_nodes` or more of which the likeliest `num_nodes` are verified."""

    def skip(self, requests: Requests) -> None:
        """Brings the proposer's own state up to date in a step without nodes."""
        return None

    def start(
        self,
        idx_mapping: torch.Tensor,  # int64 [num_reqs]
        roots: Roots,
        token_ids: torch.Tensor,  # int32 [max_num_reqs, max_model_len]
        max_root_position: int,
    ) -> None:
        """Makes the proposer's own state for requests that leave their prompt, before their first `propose` or `skip`.

        A request enters its place through its prompt, whether it is new, was preempted or found its prefix cached.
        Not part of a CUDA graph.
        """
        return None

    def profile(self, num_reqs: int) -> None:
        """Allocates what the largest draft allocates, for vLLM's memory profiling; there is no KV cache yet."""
        return None

    def renew(self) -> None:
        """The target's weights are others: what was copied from them is copied again."""
        return None

    def describe(self) -> str:
        """For the line that start-up logs."""
        return ""
