# SPDX-License-Identifier: Apache-2.0
"""The `DraftSetup` of capture, the method of the engines that `vllm_longspec/training/teachers/vllm.py` starts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_longspec.proposers.interface import ANY_BATCH, DraftingCost, DraftSetup, word_of_another_method

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig
    from vllm.engine.arg_utils import EngineArgs


class CaptureSetup(DraftSetup):
    """`{"method": "capture", "spool": FOLDER, "copy_length": 0}`: what requests ask for is written to the folder."""

    proposer = "vllm_longspec.proposers.capture.proposer.CaptureProposer"
    option_names = frozenset({"spool", "copy_length", "couple_noise", "adaptive_verification"})
    ways_out = dict.fromkeys(("tree_shape", "gamma"), "it drafts nothing, leave it out")
    default_levels = (1,)

    @classmethod
    def find(cls, options: Mapping[str, Any], own_options: Mapping[str, Any]) -> "CaptureSetup":
        spool = own_options.get("spool")
        if not isinstance(spool, str) or not spool:
            raise ValueError(f"spool must be a folder with the method capture, got {spool!r}: give one to write to")
        if own_options.get("copy_length") != 0:
            raise ValueError("the method capture drafts nothing: give copy_length 0")
        return cls()

    def check(self, target: "ModelConfig") -> None:
        if (word := word_of_another_method(target.model)) is not None:
            raise ValueError(
                f"target {target.model} stands for its own draft with the method capture, but vLLM takes any path with "
                f"{word!r} in it for a draft of another kind: move it or link to it under another name"
            )

    def vllm_options(
        self,
        engine_args: "EngineArgs",
        given: Mapping[str, Any],
        target: "ModelConfig",
        parallel_config: "ParallelConfig",
    ) -> dict[str, Any]:
        if engine_args.enable_prefix_caching is not False:
            # What is found in the cache is not computed, and what is not computed is not seen.
            raise ValueError("prefix caching is not supported with the method capture: give --no-enable-prefix-caching")
        if parallel_config.data_parallel_size > 1:
            # vLLM would draft for every batch.
            raise ValueError(
                f"data_parallel_size={parallel_config.data_parallel_size} is not supported with the method capture: "
                "start an engine for each part of the samples"
            )
        # vLLM wants to be told of a draft model. Its configuration is read again, its weights are not.
        return {
            "method": "draft_model",
            "model": target.model,
            "revision": target.revision,
            "code_revision": target.code_revision,
            "num_speculative_tokens_per_batch_size": [(1, ANY_BATCH, 0)],
            "enforce_eager": True,
        }

    @staticmethod
    def drafting_cost(vllm_config: Any) -> DraftingCost:
        return lambda batch_size, num_nodes, cached_weights: 0.0
