# SPDX-License-Identifier: Apache-2.0
"""The contract of a proposer: a `DraftSetup` at start-up and a `Proposer` in each worker. See docs/add-a-proposer.md.

Errors that these classes document are ValueErrors of one line with the way out.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn

from vllm_longspec.tree.coupling import TargetNoise
from vllm_longspec.tree.shape import TreeShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from vllm_longspec.attention.backend import Observer

    HfOverrides = Callable[[PretrainedConfig], PretrainedConfig]

# (requests, nodes per request, K and V of all cached tokens in weights) -> time of drafting, in weights that could be
# read meanwhile (`vllm_longspec/scheduling/cost.py`)
DraftingCost = Callable[[int, int, float], float]
# More requests than a batch ever has: the last of a range of batch sizes without an end.
ANY_BATCH = 1 << 16
# The plugin's options that every proposer has unless it says otherwise.
SHARED_OPTIONS = frozenset(
    {
        "tree_shape",
        "gamma",
        "copy_length",
        "frequent_tokens",
        "couple_noise",
        "adaptive_verification",
        "adapt_nodes",
        "step_costs",
    }
)


# vLLM takes a draft for another method if its path contains one of these, before it looks at its config.
_NAMES_OF_OTHER_METHODS = ("eagle-", "eagle3", "dflash", "dspark")


def word_of_another_method(model: str) -> str | None:
    """What in a draft's path makes vLLM take it for a draft of another method, if there is such a word."""
    return next((word for word in _NAMES_OF_OTHER_METHODS if word in model.lower()), None)


class Roots(NamedTuple):
    """Roots of the trees: the last sampled token of each request, which the target has not computed yet."""

    tokens: torch.Tensor  # int64 [num_reqs]
    positions: torch.Tensor  # int64 [num_reqs]
    prefix_lens: torch.Tensor  # int32 [num_reqs] cached tokens before the root, the same numbers


class Requests(NamedTuple):
    """The requests of a step that are drafted for. CUDA graphs keep the addresses of all tensors."""

    # int64 [num_reqs] req_state_idx; -1 for padding, whose root is token 0 at position 0
    idx_mapping: torch.Tensor
    roots: Roots
    num_new_tokens: torch.Tensor  # int32 [num_reqs] tokens right before the root that the last step emitted
    max_new_tokens: int  # upper bound of `num_new_tokens`: one more than the depth of the deepest node
    token_ids: torch.Tensor  # int32 [max_num_reqs, max_model_len] by req_state_idx
    block_table: torch.Tensor  # int32 [num_reqs, max_num_blocks] of the target's cache
    max_prefix_len: int  # upper bound; for a CUDA graph, of every batch that it will run
    # With which the target will draw, for a proposer that ranks tokens by it; None if the user turned that off.
    noise: TargetNoise | None


class Candidates(NamedTuple):
    """Drafted nodes, level by level, in any order within a level."""

    tokens: torch.Tensor  # int64 [num_reqs, num_drafted], different for the children of a node
    parents: torch.Tensor  # int32 [num_reqs, num_drafted] index of the parent node, -1 for the root
    log_probs: torch.Tensor  # float32 [num_reqs, num_drafted] cumulative natural log-probability given the root
    shape: TreeShape  # nodes at each depth, num_drafted in all


class ComputedStep(NamedTuple):
    """What a step of the target has computed. Rows of a request follow each other, after those of the one before."""

    req_state_indices: np.ndarray  # int [num_reqs] req_state_idx
    query_start_loc: np.ndarray  # int32 [num_reqs + 1] first row of each request
    # int [num_reqs] position of the first row of a request in its prompt; of others the length of the prompt, since
    # where they are is known on the device only. What a resumed request had emitted is part of its prompt.
    num_computed: np.ndarray
    slot_mapping: torch.Tensor  # int64 [num_rows or more] slots of the target's cache; of this step only
    hidden_states: torch.Tensor  # [num_rows or more, hidden_size] what the head multiplies; of this step only


class DraftSetup(ABC):
    """A draft at start-up, in the user's process. Importing a setup must import no model."""

    # Qualified name of the `Proposer`.
    proposer: ClassVar[str]
    # The draft in error messages, None for "the method NAME", and how to serve without it.
    noun: ClassVar[str | None] = None
    without: ClassVar[str] = "serve without --speculative-config"
    # The plugin's options that this proposer has. One that it lacks is refused by name.
    option_names: ClassVar[frozenset[str]] = SHARED_OPTIONS
    # What to do instead of giving a shared option that it lacks, "leave it out" by default.
    ways_out: ClassVar[Mapping[str, str]] = {}
    # The tree shape if the user gives neither `tree_shape` nor `gamma`; None for the plugin's default.
    default_levels: ClassVar[tuple[int, ...] | None] = None

    @classmethod
    @abstractmethod
    def find(cls, options: Mapping[str, Any], own_options: Mapping[str, Any]) -> "DraftSetup | None":
        """The draft that these options ask for; None if it is not this proposer's.

        Args:
            options: of vLLM's speculative configuration.
            own_options: those of `option_names`, which vLLM does not know (`vllm_longspec.options.OPTION_NAMES`).

        Raises:
            ValueError: one of `own_options` needs this proposer, or the draft cannot be used.
        """

    def check(self, target: "ModelConfig") -> None:
        """Raises ValueError for a target that the draft does not fit."""
        return None

    def frequent_tokens(
        self, given: Any, options: Mapping[str, Any], target: "ModelConfig", parallel_config: "ParallelConfig"
    ) -> str | int | None:
        """The file of the tokens that may be drafted, or how many with a head that learns them; None for all tokens.

        Args:
            given: the user's `frequent_tokens` or None
            options: the user's, of vLLM's speculative configuration

        Raises ValueError for an unsupported value.
        """
        if given not in (None, False):
            raise ValueError("frequent_tokens needs a draft with a head of its own: leave it out")
        return None

    @staticmethod
    def schedule(num_nodes: int, most_rows: int | None) -> list[tuple[int, int, int]] | None:
        """Numbers of nodes by batch size (first, last, number); None for the core's default.

        Args:
            most_rows: rows of a batch, roots included, with adaptive verification, for which the numbers are bounds: it
                chooses among all that are listed. None without it.
        """
        return None

    def num_lookahead_tokens(self, num_nodes: int) -> int:
        """Cache slots, from the root's on, that a draft for `num_nodes` nodes may write; the core reserves them."""
        return 0

    @abstractmethod
    def vllm_options(
        self,
        engine_args: "EngineArgs",
        given: Mapping[str, Any],
        target: "ModelConfig",
        parallel_config: "ParallelConfig",
    ) -> dict[str, Any]:
        """Options of vLLM's speculative configuration on top of the user's: `method` and `model` at least."""

    def hf_overrides(self, overrides: "HfOverrides", of_target: "HfOverrides | dict[str, Any] | None") -> "HfOverrides":
        """Adds changes to the draft's Hugging Face config to vLLM's own; must be picklable.

        Args:
            overrides: vLLM's, which call the user's `--hf-overrides` if those are a function
            of_target: the user's; vLLM applies a dict to the target alone
        """
        return overrides

    @staticmethod
    def check_engine(vllm_config: "VllmConfig") -> None:
        """Raises ValueError for a complete configuration that the proposer cannot run."""
        return None

    @staticmethod
    def check_other(config: "SpeculativeConfig | None") -> None:
        """Raises ValueError for a configuration of vLLM's whose draft is this proposer's, though `find` missed it."""
        return None

    @staticmethod
    @abstractmethod
    def drafting_cost(vllm_config: "VllmConfig") -> DraftingCost:
        """The cost of drafting in an engine with this configuration."""


class Proposer(ABC):
    """Drafts candidate trees in a worker. `shape` is the tree of the engine's options.

    `propose` is captured in CUDA graphs: it uses only persistent tensors, never synchronises with the host, and its
    shapes depend on the numbers of requests and nodes alone.
    """

    def __init__(self, vllm_config: "VllmConfig", shape: TreeShape, device: torch.device):
        self.vllm_config = vllm_config
        self.shape = shape
        self.device = device

    def load(self, target: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        """Loads weights and allocates state. Returns the draft model, or an empty module."""
        return nn.Module()

    def set_cache(self, kv_cache_config: "KVCacheConfig") -> None:
        """Learns how the target's KV cache is laid out, after `load` and before the cache is allocated.

        Called again, before the next `propose`, when vLLM lays the cache out anew. All layers have one group.
        """
        return None

    @abstractmethod
    def propose(self, requests: Requests, num_nodes: int) -> Candidates:
        """Returns at least `num_nodes` candidates per request, of which the most probable `num_nodes` are verified."""

    def add_request(self, req_state_idx: int, sampling_params: "SamplingParams") -> None:
        """A request enters the batch, for the first time or after a preemption, before any step of it."""
        return None

    def observe_step(self, step: ComputedStep) -> None:
        """Sees every step of the target, of prompts too, before `propose` or `skip`. Never part of a CUDA graph.

        Called on every rank, on the stream of the target. What it raises ends the engine.
        """
        return None

    def skip(self, requests: Requests) -> None:
        """Updates the proposer's state in a step without nodes.

        The block table and the noise of `requests` are those of the last step with nodes.
        """
        return None

    def start(
        self,
        idx_mapping: torch.Tensor,  # int64 [num_reqs]
        roots: Roots,
        token_ids: torch.Tensor,  # int32 [max_num_reqs, max_model_len]
        max_root_position: int,
    ) -> None:
        """Initialises the state of requests that leave their prompt, before their first `propose` or `skip`.

        Also called for resumed requests and prefix-cache hits. Never part of a CUDA graph.
        """
        return None

    def observers(self) -> "Mapping[str, Observer]":
        """What sees the target's attention of the rows of trees to their prefixes, by name of the layer.

        Asked for when the KV cache is there; observers run in the CUDA graphs of the target.
        """
        return {}

    def profile(self, num_reqs: int) -> None:
        """Allocates what the largest draft does, for vLLM's memory profiling. There is no KV cache yet."""
        return None

    def renew(self) -> None:
        """Copies the target's weights again, if the proposer has copies, after the target was reloaded."""
        return None

    def describe(self) -> str:
        """The end of the line that start-up logs, without a full stop; may be empty."""
        return ""
