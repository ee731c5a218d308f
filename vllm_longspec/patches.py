# SPDX-License-Identifier: Apache-2.0
"""Every function of vLLM that this plugin replaces, and which seam is missing. Nothing else touches vLLM's own code.

Each replacement gets the original and calls it for everything that is not about a GLIDE draft.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_longspec.attention.registry import CPU_BACKEND, choose_attention_backend
from vllm_longspec.compat.versions import unsupported_version
from vllm_longspec.configure import building, configure, draft_hf_overrides, given_config
from vllm_longspec.interpreter import interpreting
from vllm_longspec.options import DEFAULT_LEVELS, attach_options, options_of
from vllm_longspec.proposers.glide.checkpoint import inspect_draft
from vllm_longspec.proposers.glide.setup import check_other_draft
from vllm_longspec.scheduling.schedule import numbers_of_nodes
from vllm_longspec.targets import support
from vllm_longspec.tree.chain import warn_of_chains

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import ModelConfig, ParallelConfig, SchedulerConfig, SpeculativeConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig
    from vllm.v1.spec_decode.metrics import SpecDecodingProm, SpecDecodingStats
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
    from vllm.v1.worker.gpu.states import RequestState

# Where vLLM's own counters keep those that only trees have.
_KIND_COUNTERS = "longspec_kind_counters"
_HELP_GROUP = "LongSpec"
_HELP_SUMMARY = (
    "Speculative decoding with a LongSpec GLIDE draft: --speculative-model MODEL "
    "[--speculative-tree-shape N [N ...]] [--speculative-frequent-tokens FILE]. See --help=LongSpec."
)


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

    _replace(EngineArgs, "add_cli_args", _add_cli_args)
    _replace(EngineArgs, "from_cli_args", _from_cli_args)
    _replace(EngineArgs, "create_speculative_config", _create_speculative_config)
    _replace(EngineArgs, "create_engine_config", _create_engine_config)
    _replace(SpeculativeConfig, "compose_draft_hf_overrides", _compose_draft_hf_overrides)
    _replace(SamplingParams, "_validate_spec_decode", _validate_spec_decode)
    _replace(SpeculativeConfig, "max_num_new_slots_for_drafting", _max_num_new_slots_for_drafting)
    _replace(VllmConfig, "num_lookahead_tokens", _num_lookahead_tokens)
    _replace(SchedulerConfig, "get_scheduler_cls", _get_scheduler_cls)
    _replace(CudaGraphManager, "_init_candidates", _init_candidates)
    _replace(VllmConfig, "_maybe_disable_dynamic_sd_for_data_parallel", _maybe_disable_dynamic_sd_for_data_parallel)
    _replace(SpecDecodingProm, "__init__", _init_prometheus_counters)
    _replace(SpecDecodingProm, "observe", _observe_prometheus_counters)
    _replace(spec_decode, "init_speculator", _init_speculator)
    _replace(inplace, "reload_weights", _reload_weights)
    if current_platform.is_cpu():
        from vllm.platforms.cpu import CpuPlatform

        _replace(CpuPlatform, "get_attn_backend_cls", _get_attn_backend_cls)
    # The model runner imports these two by name, usually later than this.
    if model_runner := sys.modules.get("vllm.v1.worker.gpu.model_runner"):
        _replace(model_runner, "init_speculator", _init_speculator)
        _replace(model_runner, "reload_weights", _reload_weights)
    if interpreting():
        from vllm.v1.worker.gpu.metrics import logits
        from vllm.v1.worker.gpu.sample import sampler
        from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

        from vllm_longspec.interpreter.sampling import apply_grammar_bitmask, get_num_nans, gumbel_sample

        _use_pytorch_top_k_top_p()
        # The sampler calls these functions by name; nothing asks it for others.
        _replace(sampler, "gumbel_sample", gumbel_sample)
        _replace(sampler, "get_num_nans", get_num_nans)
        _replace(logits, "get_num_nans", get_num_nans)
        # The runner makes this worker itself, with its kernel.
        _replace(StructuredOutputsWorker, "apply_grammar_bitmask", apply_grammar_bitmask)


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


# The command line has no seam for options of a plugin.


def _add_cli_args(
    original: Callable[..., argparse.ArgumentParser], parser: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    parser = original(parser)
    group = parser.add_argument_group(title=_HELP_GROUP, description=_HELP_SUMMARY)
    group.add_argument(
        "--speculative-model",
        dest="spec_model",
        metavar="MODEL",
        help="The draft to speculate with, as --spec-model. A LongSpec GLIDE draft is recognised from its checkpoint "
        "and needs no other option; a draft of another kind is handled by vLLM.",
    )
    group.add_argument(
        "--speculative-tree-shape",
        type=int,
        nargs="+",
        metavar="N",
        help="Nodes at each level of the tree that a GLIDE draft grows, as "
        "--speculative-config '{\"tree_shape\": [...]}'. Without it the shape is "
        f"{' '.join(map(str, DEFAULT_LEVELS))}; 1 1 1 1 drafts 4 tokens in sequence.",
    )
    group.add_argument(
        "--speculative-frequent-tokens",
        metavar="FILE",
        help="The tokens that a GLIDE draft may draw, as --speculative-config '{\"frequent_tokens\": FILE}'; see "
        "python -m vllm_longspec.frequent_tokens --help. A smaller head drafts faster; the output does not change.",
    )
    return parser


def _from_cli_args(original: Callable[..., EngineArgs], cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
    # It copies the fields of EngineArgs and nothing else. The speculative configuration is one of them, so the options
    # move there, in the parsed arguments themselves: further API servers get those, and read them before they load us.
    for name in ("tree_shape", "frequent_tokens"):
        value = getattr(args, f"speculative_{name}", None)
        if value is None:
            continue
        given = given_config(args)
        flag = f"--speculative-{name.replace('_', '-')}"
        if name in given or name.replace("_", "-") in given:
            raise ValueError(f"{flag} and --speculative-config['{name}'] are mutually exclusive")
        args.speculative_config = {**given, name: value}
        setattr(args, f"speculative_{name}", None)
    return original(cls, args)


# SpeculativeConfig refuses options it does not know, and knows the kinds of draft it has.


def _create_speculative_config(
    original: Callable[..., SpeculativeConfig | None],
    self: EngineArgs,
    target_model_config: ModelConfig,
    target_parallel_config: ParallelConfig,
) -> SpeculativeConfig | None:
    speculation = configure(self, target_model_config, target_parallel_config)
    if speculation is None:
        config = original(self, target_model_config, target_parallel_config)
        check_other_draft(config)
        return config
    choose_attention_backend(self, target_model_config)
    with building(speculation, self):
        config = original(self, target_model_config, target_parallel_config)
    assert config is not None
    attach_options(config, speculation.options)
    return config


def _compose_draft_hf_overrides(original: Callable[..., Any], target_hf_overrides: Any) -> Any:
    # The draft's ModelConfig takes no other change to its Hugging Face config, such as another architecture.
    return draft_hf_overrides(original(target_hf_overrides))


def _create_engine_config(
    original: Callable[..., VllmConfig], self: EngineArgs, *args: Any, **kwargs: Any
) -> VllmConfig:
    # A complete configuration is shown to platforms only; checked here, an error is the user's own process's.
    given_backend = self.attention_backend
    try:
        vllm_config = original(self, *args, **kwargs)
    finally:
        # The draft's choice is this engine's own; the arguments may be used again, with another draft or none.
        self.attention_backend = given_backend
    if options_of(vllm_config.speculative_config) is not None:
        support.check_engine(vllm_config)
        warn_of_chains(vllm_config.model_config)
        from vllm_longspec.scheduling.scheduler import scheduler_name

        # Only now is it known whether scheduling is asynchronous.
        vllm_config.scheduler_config.scheduler_cls = scheduler_name(vllm_config.scheduler_config)
    return vllm_config


# A CPU has one attention backend for everything but MLA, whichever is selected; other platforms take any that is
# registered.


def _get_attn_backend_cls(
    original: Callable[..., str],
    cls: type[CpuPlatform],
    selected_backend: AttentionBackendEnum | None,
    attn_selector_config: AttentionSelectorConfig,
    num_heads: int | None = None,
) -> str:
    if selected_backend is not None and selected_backend.name == CPU_BACKEND:
        return selected_backend.get_path()
    return original(cls, selected_backend, attn_selector_config, num_heads)


def _validate_spec_decode(
    original: Callable[..., None], self: SamplingParams, speculative_config: SpeculativeConfig | None
) -> None:
    # vLLM refuses min_p and logit_bias with any draft. Sampling every node of the tree makes both exact.
    if options_of(speculative_config) is None:
        original(self, speculative_config)


def _init_speculator(
    original: Callable[..., Any], vllm_config: VllmConfig, device: torch.device, req_states: RequestState
) -> Any:
    # Speculators are listed in this function; a model class cannot bring its own.
    if options_of(vllm_config.speculative_config) is None:
        return original(vllm_config, device, req_states)
    from vllm_longspec.runner.speculator import TreeSpeculator

    return TreeSpeculator(vllm_config, device, req_states)


# Nobody but the model itself is told that its weights are others, and that is before all of them are in their places.


def _reload_weights(
    original: Callable[..., None], vllm_config: VllmConfig, model: Any, *args: Any, **kwargs: Any
) -> None:
    original(vllm_config, model, *args, **kwargs)
    if options_of(vllm_config.speculative_config) is not None:
        model.renew_proposer()


# vLLM reserves cache slots and rows for a draft that writes to the cache, as all but GLIDE's of this method do.


def _num_lookahead_tokens(original: Callable[..., int], self: VllmConfig) -> int:
    return 0 if options_of(self.speculative_config) is not None else original(self)


def _max_num_new_slots_for_drafting(original: Callable[..., int], self: SpeculativeConfig) -> int:
    return 0 if options_of(self) is not None else original(self)


# The scheduler's class is an option, but vLLM warns that one from outside will be slow.


def _get_scheduler_cls(original: Callable[..., type], self: SchedulerConfig) -> type:
    from vllm_longspec.scheduling import scheduler

    if self.scheduler_cls == scheduler.scheduler_name(self):
        return scheduler.AsyncTreeScheduler if self.async_scheduling else scheduler.TreeScheduler
    return original(self)


# The graphs of verification cover the numbers in the scheduler's table and no others. And where there are several, for
# a batch between two captured sizes vLLM looks at the graphs of the next size alone, which may be of other numbers.


def _init_candidates(original: Callable[..., None], self: CudaGraphManager) -> None:
    config = self.vllm_config.speculative_config
    options = options_of(config)
    if config is None or options is None or not config.uses_dynamic_speculative_decoding():
        original(self)
        return
    from vllm.v1.worker.gpu import cudagraph_utils

    build_lookup = cudagraph_utils.build_dynamic_sd_schedule_lookup
    if options.adaptive_verification:
        numbers = numbers_of_nodes(config)
        # All that is read of the table is which numbers it has, behind entry 0.
        cudagraph_utils.build_dynamic_sd_schedule_lookup = lambda *_, **__: [0, *numbers]
    try:
        original(self)
    finally:
        cudagraph_utils.build_dynamic_sd_schedule_lookup = build_lookup

    uniform = [desc for descs in self._capture_descs.values() for desc in descs if desc.uniform_token_count is not None]
    uniform.sort(key=lambda desc: desc.num_tokens)
    for (num_tokens, num_active_loras), candidates in self._candidates.items():
        smallest: dict[int | None, BatchExecutionDescriptor] = {}
        for desc in uniform:
            if desc.num_tokens >= num_tokens and desc.num_active_loras == num_active_loras:
                smallest.setdefault(desc.uniform_token_count, desc)
        # The first that fits a batch is taken, and those of any number of tokens come last.
        candidates[:0] = [desc for desc in smallest.values() if desc not in candidates]


# Numbers by batch size are dropped with data parallelism, since the ranks of a mixture of experts run in step. The
# targets of a GLIDE draft are dense, and each of their ranks is an engine of its own.


def _maybe_disable_dynamic_sd_for_data_parallel(original: Callable[..., None], self: VllmConfig) -> None:
    if options_of(self.speculative_config) is None:
        original(self)


# The counters have a token's place in the list for a label, and none for what only trees have.


def _init_prometheus_counters(
    original: Callable[..., None],
    self: SpecDecodingProm,
    speculative_config: SpeculativeConfig | None,
    *args: Any,
    **kwargs: Any,
) -> None:
    from vllm_longspec.scheduling.metrics import KindCounters, by_depth

    original(self, by_depth(speculative_config), *args, **kwargs)
    if options_of(speculative_config) is not None:
        setattr(self, _KIND_COUNTERS, KindCounters(self._counter_cls, *args, **kwargs))


def _observe_prometheus_counters(
    original: Callable[..., None], self: SpecDecodingProm, spec_decoding_stats: SpecDecodingStats, engine_idx: int = 0
) -> None:
    original(self, spec_decoding_stats, engine_idx)
    if (counters := getattr(self, _KIND_COUNTERS, None)) is not None:
        counters.observe(spec_decoding_stats, engine_idx)


def _use_pytorch_top_k_top_p() -> None:
    # vLLM's Triton kernel for top-k and top-p does not run in Triton's interpreter (a scalar argument has no `.to`).
    # The module has the same function in PyTorch, for machines without Triton.
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False
