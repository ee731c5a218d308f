# SPDX-License-Identifier: Apache-2.0
"""Every function of vLLM that this plugin replaces, with the seam that is missing there.

Each replacement gets the original and calls it for everything that is not about trees. Everything else is subclassed or
registered; `attention/registry.py` adds members to vLLM's enum of attention backends, and `proposers/glide/` sets
attributes of layers that are the draft's own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_longspec import cli, configure
from vllm_longspec.attention.registry import get_cpu_backend_cls
from vllm_longspec.compat.versions import unsupported_version
from vllm_longspec.interpreter import interpreting
from vllm_longspec.options import options_of
from vllm_longspec.proposers.glide.checkpoint import inspect_draft

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import SchedulerConfig, SpeculativeConfig, VllmConfig
    from vllm.v1.worker.gpu.states import RequestState


def apply() -> None:
    """Replaces what has to be replaced in a supported version of vLLM; calling it again changes nothing."""
    import vllm.model_executor.model_loader.reload.inplace as inplace
    import vllm.v1.worker.gpu.spec_decode as spec_decode
    from vllm.config import SchedulerConfig, SpeculativeConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.sampling_params import SamplingParams
    from vllm.v1.spec_decode.metrics import SpecDecodingProm
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    from vllm_longspec.runner.graphs import init_verification_graphs
    from vllm_longspec.scheduling.metrics import init_prometheus_counters, observe_prometheus_counters

    # The command line has no seam for options of a plugin.
    _replace(EngineArgs, "add_cli_args", cli.add_cli_args)
    _replace(EngineArgs, "from_cli_args", cli.from_cli_args)
    # SpeculativeConfig refuses options and kinds of draft that it does not know, and a draft's config takes no other
    # change, such as another architecture. A complete configuration is shown to platforms only.
    _replace(EngineArgs, "create_speculative_config", configure.create_speculative_config)
    _replace(SpeculativeConfig, "compose_draft_hf_overrides", configure.compose_draft_hf_overrides)
    _replace(EngineArgs, "create_engine_config", configure.create_engine_config)
    # vLLM refuses min_p and logit_bias with any draft. Sampling every node of the tree makes both exact.
    _replace(SamplingParams, "_validate_spec_decode", _validate_spec_decode)
    # Slots and rows are reserved for a draft with a cache, as all others of this method have.
    _replace(SpeculativeConfig, "max_num_new_slots_for_drafting", _max_num_new_slots_for_drafting)
    _replace(VllmConfig, "num_lookahead_tokens", _num_lookahead_tokens)
    # The scheduler's class is an option, but vLLM warns that one from outside will be slow.
    _replace(SchedulerConfig, "get_scheduler_cls", _get_scheduler_cls)
    # Numbers by batch size are dropped with data parallelism, since the ranks of a mixture of experts run in step. The
    # targets of a GLIDE draft are dense, and each of their ranks is an engine of its own.
    _replace(VllmConfig, "_maybe_disable_dynamic_sd_for_data_parallel", _maybe_disable_dynamic_sd_for_data_parallel)
    # The graphs of verification cover the numbers in the scheduler's table and no others. And where there are several,
    # for a batch between two captured sizes vLLM looks at those of the next size alone, which may be of other numbers.
    _replace(CudaGraphManager, "_init_candidates", init_verification_graphs)
    # The counters have a token's place in the list for a label, and none for what only trees have.
    _replace(SpecDecodingProm, "__init__", init_prometheus_counters)
    _replace(SpecDecodingProm, "observe", observe_prometheus_counters)
    # Speculators are listed in this function; a model class cannot bring its own.
    _replace(spec_decode, "init_speculator", _init_speculator)
    # Nobody but the model itself is told that its weights are others, before all of them are in their places.
    _replace(inplace, "reload_weights", _reload_weights)
    # The model runner imports these two by name, usually later than this.
    if model_runner := sys.modules.get("vllm.v1.worker.gpu.model_runner"):
        _replace(model_runner, "init_speculator", _init_speculator)
        _replace(model_runner, "reload_weights", _reload_weights)
    if current_platform.is_cpu():
        from vllm.platforms.cpu import CpuPlatform

        # A CPU has one attention backend for everything but MLA, whichever is selected.
        _replace(CpuPlatform, "get_attn_backend_cls", get_cpu_backend_cls)
    if interpreting():
        from vllm.v1.worker.gpu.metrics import logits
        from vllm.v1.worker.gpu.sample import sampler
        from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

        from vllm_longspec.interpreter import sampling

        sampling.use_pytorch_top_k_top_p()
        # The sampler calls these functions by name; nothing asks it for others.
        _replace(sampler, "gumbel_sample", sampling.gumbel_sample)
        _replace(sampler, "get_num_nans", sampling.get_num_nans)
        _replace(logits, "get_num_nans", sampling.get_num_nans)
        # The runner makes this worker itself, with its kernel.
        _replace(StructuredOutputsWorker, "apply_grammar_bitmask", sampling.apply_grammar_bitmask)


def apply_refusal() -> None:
    """All that is done to an unsupported version of vLLM: a GLIDE draft is refused by name, if the place is there."""
    try:
        from vllm.engine.arg_utils import EngineArgs

        _replace(EngineArgs, "create_speculative_config", _refuse_glide_draft)
    except (ImportError, KeyError):
        pass


def _replace(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Puts `replacement`, called with the original as its first argument, in the place of `owner.name`."""
    found = vars(owner)[name]
    descriptor = type(found) if isinstance(found, staticmethod | classmethod | property) else None
    original: Any = found.fget if isinstance(found, property) else found.__func__ if descriptor else found
    if hasattr(original, "longspec_original"):
        return

    # Keeps the qualified name too: vLLM's configuration pickles functions by it.
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    wrapper.longspec_original = original  # type: ignore[attr-defined]
    setattr(owner, name, descriptor(wrapper) if descriptor else wrapper)


def _refuse_glide_draft(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    options = getattr(self, "speculative_config", None)
    options = options if isinstance(options, dict) else {}
    model = options.get("model") or getattr(self, "spec_model", None)
    if isinstance(model, str) and inspect_draft(model, options.get("revision")) is not None:
        raise ValueError(f"draft {model} is a GLIDE draft. {unsupported_version()}")
    return original(self, *args, **kwargs)


def _validate_spec_decode(
    original: Callable[..., None], self: SamplingParams, speculative_config: SpeculativeConfig | None
) -> None:
    if options_of(speculative_config) is None:
        original(self, speculative_config)


def _max_num_new_slots_for_drafting(original: Callable[..., int], self: SpeculativeConfig) -> int:
    return original(self) if options_of(self) is None else 0


def _num_lookahead_tokens(original: Callable[..., int], self: VllmConfig) -> int:
    return original(self) if options_of(self.speculative_config) is None else 0


def _get_scheduler_cls(original: Callable[..., type], self: SchedulerConfig) -> type:
    # The scheduler's module is a worker's or a server's, of which this process need not be one.
    from vllm_longspec.scheduling.scheduler import get_scheduler_cls

    return get_scheduler_cls(original, self)


def _maybe_disable_dynamic_sd_for_data_parallel(original: Callable[..., None], self: VllmConfig) -> None:
    if options_of(self.speculative_config) is None:
        original(self)


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
