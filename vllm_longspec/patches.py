# SPDX-License-Identifier: Apache-2.0
"""Every function of vLLM that this plugin replaces; docs/design.md#patches has the reason for each.

A replacement is called with the original as its first argument and calls it for every engine without trees.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_longspec import cli, configure
from vllm_longspec.attention.registry import get_cpu_backend_cls
from vllm_longspec.interpreter import interpreting
from vllm_longspec.options import options_of
from vllm_longspec.replacement import replace as _replace

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import SchedulerConfig, SpeculativeConfig, VllmConfig
    from vllm.v1.executor import Executor
    from vllm.v1.worker.gpu.states import RequestState
    from vllm.v1.worker.worker_base import WorkerBase

    from vllm_longspec.scheduling.step_times import StepTimes


def apply() -> None:
    """Applies the patches to a supported version of vLLM; idempotent."""
    import vllm.model_executor.model_loader.reload.inplace as inplace
    import vllm.v1.worker.gpu.spec_decode as spec_decode
    from vllm.config import SchedulerConfig, SpeculativeConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.sampling_params import SamplingParams
    from vllm.v1.executor import Executor
    from vllm.v1.spec_decode.metrics import SpecDecodingProm
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    from vllm_longspec.runner.graphs import init_verification_graphs
    from vllm_longspec.scheduling.metrics import init_prometheus_counters

    _replace(EngineArgs, "add_cli_args", cli.add_cli_args)
    _replace(EngineArgs, "from_cli_args", cli.from_cli_args)
    _replace(EngineArgs, "create_speculative_config", configure.create_speculative_config)
    # With adapters vLLM refuses batches that are too large for the whole tree in every request.
    _replace(EngineArgs, "create_load_config", configure.create_load_config)
    _replace(SpeculativeConfig, "compose_draft_hf_overrides", configure.compose_draft_hf_overrides)
    _replace(EngineArgs, "create_engine_config", configure.create_engine_config)
    # vLLM refuses min_p and logit_bias with any draft. Sampling every node of the tree makes both exact.
    _replace(SamplingParams, "_validate_spec_decode", _validate_spec_decode)
    # Method `draft_model` reserves rows, and slots for as many tokens as are drafted. Proposers need no rows, and say
    # themselves how many slots they write.
    _replace(SpeculativeConfig, "max_num_new_slots_for_drafting", _max_num_new_slots_for_drafting)
    _replace(VllmConfig, "num_lookahead_tokens", _num_lookahead_tokens)
    # And with any draft vLLM warns that its reservations may slow it down.
    _replace(VllmConfig, "_set_max_num_scheduled_tokens", _set_max_num_scheduled_tokens)
    _replace(SchedulerConfig, "get_scheduler_cls", _get_scheduler_cls)
    # Data-parallel ranks of a mixture of experts run in lockstep, and are refused. Those of dense targets are engines
    # of their own: each keeps its schedule.
    _replace(VllmConfig, "_maybe_disable_dynamic_sd_for_data_parallel", _maybe_disable_dynamic_sd_for_data_parallel)
    _replace(CudaGraphManager, "_init_candidates", init_verification_graphs)
    # The scheduler is built next. It is told how to decode, but not the executor that can ask the workers.
    _replace(Executor, "compile_or_warm_up_model", _compile_or_warm_up_model)
    _replace(SpecDecodingProm, "__init__", init_prometheus_counters)
    _replace(spec_decode, "init_speculator", _init_speculator)
    _replace(inplace, "reload_weights", _reload_weights)
    # The model runner imports these two by name, usually after plugins are loaded.
    if model_runner := sys.modules.get("vllm.v1.worker.gpu.model_runner"):
        _replace(model_runner, "init_speculator", _init_speculator)
        _replace(model_runner, "reload_weights", _reload_weights)
    if current_platform.is_cpu():
        from vllm.platforms.cpu import CpuPlatform

        _replace(CpuPlatform, "get_attn_backend_cls", get_cpu_backend_cls)
    if interpreting():
        from vllm.v1.worker.gpu.metrics import logits
        from vllm.v1.worker.gpu.sample import sampler
        from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

        from vllm_longspec.interpreter import sampling

        sampling.use_pytorch_top_k_top_p()
        _replace(sampler, "gumbel_sample", sampling.gumbel_sample)
        _replace(sampler, "get_num_nans", sampling.get_num_nans)
        _replace(logits, "get_num_nans", sampling.get_num_nans)
        _replace(StructuredOutputsWorker, "apply_grammar_bitmask", sampling.apply_grammar_bitmask)


def _validate_spec_decode(
    original: Callable[..., None], self: SamplingParams, speculative_config: SpeculativeConfig | None
) -> None:
    if options_of(speculative_config) is None:
        original(self, speculative_config)


def _max_num_new_slots_for_drafting(original: Callable[..., int], self: SpeculativeConfig) -> int:
    return original(self) if options_of(self) is None else 0


def _num_lookahead_tokens(original: Callable[..., int], self: VllmConfig) -> int:
    options = options_of(self.speculative_config)
    return original(self) if options is None else options.num_lookahead_tokens


def _set_max_num_scheduled_tokens(original: Callable[..., None], self: VllmConfig) -> None:
    scheduler_config = self.scheduler_config
    if options_of(self.speculative_config) is None:
        original(self)
    elif scheduler_config.max_num_scheduled_tokens is None:
        scheduler_config.max_num_scheduled_tokens = scheduler_config.max_num_batched_tokens


def _get_scheduler_cls(original: Callable[..., type], self: SchedulerConfig) -> type:
    # Imported here: not every process that loads the plugin needs the scheduler's modules.
    from vllm_longspec.scheduling.scheduler import get_scheduler_cls

    return get_scheduler_cls(original, self)


def _maybe_disable_dynamic_sd_for_data_parallel(original: Callable[..., None], self: VllmConfig) -> None:
    if options_of(self.speculative_config) is None:
        original(self)


def _compile_or_warm_up_model(original: Callable[..., None], self: Executor) -> None:
    original(self)
    config = self.vllm_config.speculative_config
    options = options_of(config)
    if config is not None and options is not None and options.measures_costs:
        from vllm_longspec.scheduling.step_times import attach_times

        times, *_ = self.collective_rpc(_time_steps)
        attach_times(config, times)


def _time_steps(worker: WorkerBase) -> StepTimes | None:
    # Imported in the workers only.
    from vllm_longspec.runner.timing import time_steps

    return time_steps(worker)


def _init_speculator(
    original: Callable[..., Any], vllm_config: VllmConfig, device: torch.device, req_states: RequestState
) -> Any:
    if options_of(vllm_config.speculative_config) is None:
        return original(vllm_config, device, req_states)
    from vllm_longspec.runner.speculator import TreeSpeculator

    return TreeSpeculator(vllm_config, device, req_states)


def _reload_weights(
    original: Callable[..., None], vllm_config: VllmConfig, model: Any, *args: Any, **kwargs: Any
) -> None:
    original(vllm_config, model, *args, **kwargs)
    if options_of(vllm_config.speculative_config) is not None:
        model.renew_proposer()
