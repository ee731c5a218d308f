# SPDX-License-Identifier: Apache-2.0
"""Cost of a step with a tree, in steps of plain decoding.

A step of plain decoding takes a constant time plus that of reading the weights and the cached K and V. Drafting adds
the proposer's `DraftingCost`. Verification reads nothing more, unless the target has experts: rows wake further ones.
Every row adds time to the GEMMs, more once they are compute-bound, and to attention. The constants are for an H200;
with GLIDE's they are within 8% of all measurements with contexts of 1k to 128k and batches of 1 to 64, of dense
targets (benchmarks/results/speed.jsonl). They serve where the engine's own steps were not timed
(`vllm_longspec/scheduling/step_times.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_longspec import proposers
from vllm_longspec.options import options_of
from vllm_longspec.proposers.interface import DraftingCost
from vllm_longspec.scheduling.schedule import BATCH_ROWS
from vllm_longspec.scheduling.step_times import MeasuredCost, times_of
from vllm_longspec.targets.families import (
    NO_EXPERTS,
    ExpertWeights,
    cached_token_weights,
    expert_weights,
    target_weights,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import VllmConfig

# Constant time of a step, in weights that could be read meanwhile: 0.8 ms, from plain decoding of two model sizes.
STEP = 1.5e9
# Time of each of the first `BATCH_ROWS` rows of a batch, and of each further row, in readings of the weights that a row
# goes through.
ROW = 0.0013
FURTHER_ROW = 0.0045
# Time of each node of a request, in readings of the request's cached K and V.
NODE = 0.006


@dataclass(frozen=True)
class StepCost:
    """(batch size, nodes per request, cached tokens of all requests) -> cost in steps of plain decoding."""

    target: float  # weights of all layers and the head that each GPU reads, without the experts'
    token: float  # K and V of a cached token in all layers, in weights
    drafting: DraftingCost
    experts: ExpertWeights = NO_EXPERTS

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "StepCost":
        from vllm.v1.kv_cache_interface import is_quantized_kv_cache

        options = options_of(vllm_config.speculative_config)
        assert options is not None
        model_config = vllm_config.model_config
        return cls.of_shape(
            model_config.hf_text_config,
            vocab_size=model_config.get_vocab_size(),
            drafting=proposers.setup_of(options.proposer).drafting_cost(vllm_config),
            cache_is_quantised=is_quantized_kv_cache(vllm_config.cache_config.cache_dtype),
            num_ranks=vllm_config.parallel_config.tensor_parallel_size,
        )

    @classmethod
    def of_shape(
        cls,
        target: "PretrainedConfig",
        *,
        vocab_size: int,
        drafting: DraftingCost,
        cache_is_quantised: bool = False,
        num_ranks: int = 1,
    ) -> "StepCost":
        """As `of`, from sizes. Weights have two bytes, a quantised cache has one; both are split over `num_ranks`."""
        return cls(
            target=target_weights(target, vocab_size, num_ranks),
            token=cached_token_weights(target, num_ranks, cache_is_quantised),
            drafting=drafting,
            experts=expert_weights(target, num_ranks),
        )

    def __call__(self, batch_size: int, num_nodes: int, num_tokens: int) -> float:
        if num_nodes == 0:
            return 1.0
        cache = num_tokens * self.token
        num_rows = batch_size * (1 + num_nodes)
        further = max(0, num_rows - BATCH_ROWS)
        rows = ROW * (num_rows - further) + FURTHER_ROW * further
        verifying = rows * (self.target + self.experts.of_row) + NODE * num_nodes * cache
        awake = self.experts.read(batch_size)
        woken = self.experts.read(num_rows) - awake
        plain = STEP + self.target + awake + cache
        return 1 + (self.drafting(batch_size, num_nodes, cache) + verifying + woken) / plain


def cost_of_steps(vllm_config: "VllmConfig") -> Callable[[int, int, int], float] | None:
    """As its steps were timed, or by the constants; None for a quantised target whose steps were not."""
    constants, times = StepCost.of(vllm_config), times_of(vllm_config.speculative_config)
    if times is not None:
        return MeasuredCost(times, constants.drafting, constants.token, constants)
    # The constants assume weights of two bytes.
    return constants if vllm_config.model_config.quantization is None else None
