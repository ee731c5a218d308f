# SPDX-License-Identifier: Apache-2.0
"""GLIDE's `DraftSetup`: recognises a draft by its checkpoint."""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_longspec import proposers
from vllm_longspec.frequent_tokens import FILE_NAME
from vllm_longspec.options import AUTO
from vllm_longspec.proposers.glide.checkpoint import (
    DraftCheckpoint,
    NoGlideDraftError,
    UnseenDraftError,
    find_file,
    read_draft,
)
from vllm_longspec.proposers.glide.cost import GlideCost
from vllm_longspec.proposers.glide.fit import check_fit
from vllm_longspec.proposers.glide.head_size import MIN_HEAD_SIZE, choose_head_size
from vllm_longspec.proposers.glide.loading import draft_load_config
from vllm_longspec.proposers.glide.quantization import default_quantization
from vllm_longspec.proposers.interface import SHARED_OPTIONS, DraftSetup, word_of_another_method
from vllm_longspec.targets.families import FAMILIES
from vllm_longspec.targets.support import check_family

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_longspec.proposers.interface import HfOverrides

# Of drafts whose heads can learn: rows have a scale of their own, or none.
LEARNING_QUANTIZATIONS = (None, "fp8_per_channel")

# Below vLLM's logger, whose handlers it uses.
logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True)
class GlideSetup(DraftSetup):
    proposer = "vllm_longspec.proposers.glide.proposer.GlideProposer"
    noun = "a GLIDE draft"
    without = "serve without --speculative-model"
    option_names = SHARED_OPTIONS | {"cross_attention_budget"}

    checkpoint: DraftCheckpoint
    revision: str | None

    @classmethod
    def find(cls, options: Mapping[str, Any], own_options: Mapping[str, Any]) -> "GlideSetup | None":
        model, revision = options.get("model"), options.get("revision")
        is_named = options.get("method") == proposers.GLIDE
        try:
            if not isinstance(model, str):
                given = "no draft was given" if model is None else f"the model must be a string, got {model!r}"
                raise NoGlideDraftError(f"{given}, add --speculative-model DRAFT")
            return cls(read_draft(model, revision, expected=is_named or bool(own_options)), revision)
        except NoGlideDraftError as error:
            for name in own_options:
                others = proposers.others_with(name, proposers.GLIDE)
                way_out = f"; or give {proposers.ask_for(others)}" if others else ""
                raise ValueError(f"{name} needs a GLIDE draft: {error}{way_out}") from None
            if is_named:
                raise ValueError(f"the method {proposers.GLIDE} needs a GLIDE draft: {error}") from None
            # vLLM needs these options for any other draft, so a user who gave one did not expect a GLIDE draft.
            if isinstance(error, UnseenDraftError) and not options.keys() & {"method", "num_speculative_tokens"}:
                logger.warning("Draft %s. If it is a GLIDE draft, it is not recognised.", error)
            return None

    def check(self, target: "ModelConfig") -> None:
        check_family(target)
        check_fit(self.checkpoint, target)
        if (word := word_of_another_method(self.checkpoint.model)) is not None:
            raise ValueError(
                f"draft {self.checkpoint.model} is a GLIDE draft, but vLLM takes any path with {word!r} in it for "
                "another kind: move it or link to it under another name"
            )

    def frequent_tokens(
        self, given: Any, options: Mapping[str, Any], target: "ModelConfig", parallel_config: "ParallelConfig"
    ) -> str | int | None:
        if given is False:
            return None
        if given is None:
            shipped = find_file(self.checkpoint.model, FILE_NAME, self.revision)
            if shipped is not None:
                return str(shipped)
        if given is None or given == AUTO:
            if options.get("quantization") not in LEARNING_QUANTIZATIONS:
                return None
            return choose_head_size(
                target.hf_text_config, target.get_vocab_size(), parallel_config.tensor_parallel_size
            )
        if not isinstance(given, str):
            raise ValueError(
                f"frequent_tokens must be a file, {AUTO}, {AUTO}:N or false, got {given!r}: make a file with "
                "vllm-longspec frequent-tokens"
            )
        if given.startswith(f"{AUTO}:"):
            return _learned_head_size(given, options.get("quantization"), target.get_vocab_size())
        return os.path.abspath(given)

    def vllm_options(
        self,
        engine_args: "EngineArgs",
        given: Mapping[str, Any],
        target: "ModelConfig",
        parallel_config: "ParallelConfig",
    ) -> dict[str, Any]:
        quantization = given.get("quantization")
        if engine_args.enable_sleep_mode and quantization is not None:
            # Kernels may keep tensors beside a layer's parameters, which are lost when weights are discarded (level 2).
            raise ValueError(
                f"quantization={quantization!r} of a GLIDE draft is not supported with sleep mode: leave it out, or "
                "serve without --enable-sleep-mode"
            )
        if "quantization" not in given and not engine_args.enable_sleep_mode:
            quantization = default_quantization(engine_args, target, parallel_config)
        return {
            # vLLM's method for a draft model that it does not know.
            "method": "draft_model",
            "quantization": quantization,
            "draft_load_config": draft_load_config(engine_args, given.get("draft_load_config"), self.checkpoint),
        }

    def hf_overrides(self, overrides: "HfOverrides", of_target: "HfOverrides | dict[str, Any] | None") -> "HfOverrides":
        return functools.partial(_override, self.checkpoint.architecture, overrides)

    @staticmethod
    def check_other(config: "SpeculativeConfig | None") -> None:
        """Refuses a GLIDE draft that only vLLM found, such as one in object storage.

        Its architecture is registered, so vLLM would run it as an ordinary draft model.
        """
        if config is None or config.draft_model_config is None:
            return
        if not set(config.draft_model_config.architectures) & set(FAMILIES.values()):
            return
        assert config.model is not None
        try:
            read_draft(config.model, config.revision, expected=True)
        except NoGlideDraftError as error:
            raise ValueError(f"a GLIDE draft cannot be served from where it is: {error}") from None
        raise ValueError(f"draft {config.model} is a GLIDE draft, but was not to be seen at first: start vLLM again")

    @staticmethod
    def drafting_cost(vllm_config: "VllmConfig") -> GlideCost:
        return GlideCost.of(vllm_config)


def _learned_head_size(given: str, quantization: Any, vocab_size: int) -> int:
    number = given.removeprefix(f"{AUTO}:")
    if not number.isdecimal() or not MIN_HEAD_SIZE <= int(number) < vocab_size:
        raise ValueError(
            f"frequent_tokens {given!r} must be {AUTO}:N with N from {MIN_HEAD_SIZE} to {vocab_size - 1}, fewer than "
            f"the {vocab_size} tokens of the vocabulary: give {AUTO} for a size that is chosen, or false for all tokens"
        )
    if quantization not in LEARNING_QUANTIZATIONS:
        raise ValueError(
            f"frequent_tokens {given!r} is not supported with a draft of quantization={quantization!r}, which has one "
            "scale for all rows: give fp8_per_channel, or a file of tokens"
        )
    return int(number)


def _override(architecture: str, overrides: "HfOverrides", hf_config: "PretrainedConfig") -> "PretrainedConfig":
    hf_config.architectures = [architecture]
    # config.json may be a copy of a quantised target's, but weights of a draft are never quantised.
    vars(hf_config).pop("quantization_config", None)
    return overrides(hf_config)
