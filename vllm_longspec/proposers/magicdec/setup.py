# SPDX-License-Identifier: Apache-2.0
"""MagicDec's `DraftSetup`. There is no draft to find: the user names the method."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_longspec.options import DEFAULT_GAMMA, options_of, times_steps
from vllm_longspec.proposers.interface import ANY_BATCH, SHARED_OPTIONS, DraftSetup, word_of_another_method
from vllm_longspec.proposers.magicdec.cost import MagicDecCost, largest_batch_with_graph

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_longspec.proposers.interface import HfOverrides

# Below vLLM's logger, whose handlers it uses.
logger = init_logger(f"vllm.{__name__}")

# Options of vLLM's that are about a draft with weights.
_DRAFT_OPTIONS = ("model", "revision", "code_revision", "draft_load_config", "quantization")


@dataclass(frozen=True)
class MagicDecSetup(DraftSetup):
    knows_when: bool = False  # which batches draft: the user says it, or steps are timed

    proposer = "vllm_longspec.proposers.magicdec.proposer.MagicDecProposer"
    option_names = (SHARED_OPTIONS - {"tree_shape", "frequent_tokens"}) | {"sinks", "budget", "selection"}
    ways_out = {
        "tree_shape": "it drafts a chain, give the number of tokens as gamma",
        "frequent_tokens": "it drafts with the target's own head, leave it out",
    }
    default_levels = (1,) * DEFAULT_GAMMA

    @classmethod
    def find(cls, options: Mapping[str, Any], own_options: Mapping[str, Any]) -> "MagicDecSetup":
        for name in _DRAFT_OPTIONS:
            if options.get(name) is not None:
                raise ValueError(
                    f"{name}={options[name]!r} is not supported with the method magicdec: the target drafts for "
                    "itself, leave it out"
                )
        adapts = own_options.get("adaptive_verification", own_options.get("adapt_nodes"))
        is_told = options.get("num_speculative_tokens_per_batch_size") is not None or adapts is False
        return cls(is_told or times_steps(own_options))

    def check(self, target: "ModelConfig") -> None:
        without = "serve without --speculative-config"
        if target.is_multimodal_model:
            raise ValueError(
                f"a multimodal target (target {target.model}) is not supported with the method magicdec: {without}"
            )
        if target.is_moe:
            # A step of one row a request reads nearly as many experts as a step of a tree, and its cost is unknown.
            raise ValueError(
                f"a mixture of experts (target {target.model}) is not supported with the method magicdec: {without}"
            )
        if target.quantization is not None and not self.knows_when:
            # Adaptive verification does not know what a step of it costs, and without it every step would draft.
            raise ValueError(
                f"a target of quantization={target.quantization!r} whose steps are not timed is not supported with the "
                "method magicdec alone: serve on a GPU without step_costs, or give "
                "num_speculative_tokens_per_batch_size, the batches that draft and how many tokens"
            )
        if (word := word_of_another_method(target.model)) is not None:
            raise ValueError(
                f"target {target.model} is its own draft with the method magicdec, but vLLM takes any path with "
                f"{word!r} in it for a draft of another kind: move it or link to it under another name"
            )

    @staticmethod
    def schedule(num_nodes: int, most_rows: int | None) -> list[tuple[int, int, int]]:
        if most_rows is None:
            return [(1, ANY_BATCH, num_nodes)]
        # What pays depends on the context more than on the batch, which the cost of a step knows. So a batch may have
        # all of them that its rows leave room for, or fewer.
        ranges: list[tuple[int, int, int]] = []
        first = 1
        for number in sorted({1, num_nodes // 2, num_nodes - 1, num_nodes} - {0}, reverse=True):
            last = most_rows // (1 + number)
            if last >= first:
                ranges.append((first, last, number))
                first = last + 1
        return [*ranges, (first, ANY_BATCH, 0)]

    def num_lookahead_tokens(self, num_nodes: int) -> int:
        # Step i of a draft writes K and V of the root's position + i.
        return num_nodes

    def vllm_options(
        self,
        engine_args: "EngineArgs",
        given: Mapping[str, Any],
        target: "ModelConfig",
        parallel_config: "ParallelConfig",
    ) -> dict[str, Any]:
        if engine_args.enable_lora:
            # A step of drafting has other rows than the batch whose adapters vLLM has laid out.
            raise ValueError(
                "LoRA is not supported with the method magicdec: serve without --enable-lora, or with a GLIDE draft"
            )
        # vLLM wants to be told of a draft model. Its configuration is read again, its weights are not.
        return {
            "method": "draft_model",
            "model": target.model,
            "revision": target.revision,
            "code_revision": target.code_revision,
        }

    def hf_overrides(self, overrides: "HfOverrides", of_target: "HfOverrides | dict[str, Any] | None") -> "HfOverrides":
        # The draft is the target, also as the user changed it.
        return functools.partial(_override, of_target, overrides) if isinstance(of_target, dict) else overrides

    @staticmethod
    def check_engine(vllm_config: "VllmConfig") -> None:
        options = options_of(vllm_config.speculative_config)
        assert options is not None and options.partial_attention is not None
        if options.partial_attention.selection == "scores":
            from vllm_longspec.proposers.magicdec.selection import plan_choice

            # Unless the user gave the size of blocks a worker may still change it, and checks again.
            plan_choice(
                options.partial_attention.budget,
                options.tree_shape.max_depth,
                vllm_config.model_config.max_model_len,
                vllm_config.cache_config.block_size,
            )
        if not options.adaptive_verification:
            return
        largest, most = largest_batch_with_graph(vllm_config), vllm_config.scheduler_config.max_num_seqs
        if largest == 0:
            logger.warning(
                "The method magicdec drafts nothing without full CUDA graphs, where a step of drafting takes as long "
                "as one of decoding: serve without enforce_eager, or give adaptive_verification=false to draft all the "
                "same."
            )
        elif largest < min(most, vllm_config.compilation_config.max_cudagraph_capture_size or 0):
            # A size above the largest batch is a graph of the target only, with cudagraph_mode FULL.
            logger.warning(
                f"The method magicdec drafts nothing in batches of more than {largest} requests, for which its draft "
                f"has no CUDA graph: add {most} (max_num_seqs) to cudagraph_capture_sizes, or give "
                "adaptive_verification=false to draft all the same."
            )

    @staticmethod
    def drafting_cost(vllm_config: "VllmConfig") -> MagicDecCost:
        return MagicDecCost.of(vllm_config)


def _override(
    of_target: Mapping[str, Any], overrides: "HfOverrides", hf_config: "PretrainedConfig"
) -> "PretrainedConfig":
    from transformers import PretrainedConfig

    for name, value in of_target.items():
        nested = getattr(hf_config, name, None)
        if isinstance(value, dict) and isinstance(nested, PretrainedConfig):
            nested.update(value)
        else:
            setattr(hf_config, name, value)
    return overrides(hf_config)
