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

from vllm_longspec.attention.registry import CPU_BACKEND
from vllm_longspec.compatibility import unsupported_version
from vllm_longspec.config import support
from vllm_longspec.config.checkpoint import inspect_draft
from vllm_longspec.config.cost import StepCost
from vllm_longspec.config.draft import (
    building,
    choose_attention_backend,
    find_glide_draft,
    given_config,
    glide_hf_overrides,
)
from vllm_longspec.config.options import (
    DEFAULT_LEVELS,
    adapts_nodes,
    is_glide,
    speculates_with_glide,
    tree_shape_of,
)
from vllm_longspec.config.sampling import needs_chain, warn_of_chains
from vllm_longspec.config.schedule import nodes_by_batch_size, numbers_of_nodes
from vllm_longspec.interpreter import interpreting
from vllm_longspec.node_budget import NodeBudget

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request
    from vllm.v1.spec_decode.metrics import SpecDecodingProm, SpecDecodingStats
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
    from vllm.v1.worker.gpu.states import RequestState

_HELP_GROUP = "LongSpec"
_HELP_SUMMARY = (
    "Speculative decoding with a LongSpec GLIDE draft: --speculative-model MODEL "
    "[--speculative-tree-shape N [N ...]] [--speculative-frequent-tokens FILE]. See --help=LongSpec."
)


def apply() -> None:
    """Replaces what has to be replaced in a supported version of vLLM; calling it again changes nothing."""
    import vllm.model_executor.model_loader.reload.inplace as inplace
    import vllm.v1.worker.gpu.spec_decode as spec_decode
    from vllm.config import SpeculativeConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.spec_decode.metrics import SpecDecodingProm
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    _replace(EngineArgs, "add_cli_args", _add_cli_args)
    _replace(EngineArgs, "from_cli_args", _from_cli_args)
    _replace(EngineArgs, "create_speculative_config", _create_speculative_config)
    _replace(EngineArgs, "create_engine_config", _create_engine_config)
    _replace(SpeculativeConfig, "compose_draft_hf_overrides", _compose_draft_hf_overrides)
    _replace(SamplingParams, "_validate_spec_decode", _validate_spec_decode)
    _replace(Scheduler, "__init__", _init_scheduler)
    _replace(Scheduler, "make_spec_decoding_stats", _make_spec_decoding_stats)
    _replace(Scheduler, "add_request", _add_request)
    _replace(CudaGraphManager, "_init_candidates", _init_candidates)
    _replace(VllmConfig, "_maybe_disable_dynamic_sd_for_data_parallel", _maybe_disable_dynamic_sd_for_data_parallel)
    _replace(SpecDecodingProm, "__init__", _init_prometheus_counters)
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

        from vllm_longspec.interpreted_sampling import apply_grammar_bitmask, get_num_nans, gumbel_sample

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
    descriptor = type(found) if isinstance(found, staticmethod | classmethod) else None
    original = found.__func__ if descriptor else found
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
    draft = find_glide_draft(self, target_model_config, target_parallel_config)
    if draft is None:
        return original(self, target_model_config, target_parallel_config)
    choose_attention_backend(self, target_model_config)
    with building(draft, self):
        return original(self, target_model_config, target_parallel_config)


def _compose_draft_hf_overrides(original: Callable[..., Any], target_hf_overrides: Any) -> Any:
    # The draft's ModelConfig takes no other change to its Hugging Face config, such as another architecture.
    return glide_hf_overrides(original(target_hf_overrides))


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
    if is_glide(vllm_config):
        support.check_engine(vllm_config)
        warn_of_chains(vllm_config.model_config)
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
    if not speculates_with_glide(speculative_config):
        original(self, speculative_config)


def _init_speculator(
    original: Callable[..., Any], vllm_config: VllmConfig, device: torch.device, req_states: RequestState
) -> Any:
    # Speculators are listed in this function; a model class cannot bring its own.
    if not is_glide(vllm_config):
        return original(vllm_config, device, req_states)
    from vllm_longspec.speculator import GlideSpeculator

    return GlideSpeculator(vllm_config, device, req_states)


# Nobody but the model itself is told that its weights are others, and that is before all of them are in their places.


def _reload_weights(
    original: Callable[..., None], vllm_config: VllmConfig, model: Any, *args: Any, **kwargs: Any
) -> None:
    original(vllm_config, model, *args, **kwargs)
    if is_glide(vllm_config):
        model.renew_draft_head()


# The scheduler looks the number of draft tokens up by the batch's size and asks nobody.


def _init_scheduler(original: Callable[..., None], self: Scheduler, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    if adapts_nodes(self.vllm_config):
        assert self.dynamic_sd_lookup is not None and self.vllm_config.speculative_config is not None
        max_batch_size = len(self.dynamic_sd_lookup) - 1
        choices = nodes_by_batch_size(self.vllm_config.speculative_config, max_batch_size, adapt=True)

        def num_cached_tokens() -> int:
            return sum(
                request.num_computed_tokens
                for request in self.running
                # A prompt that is not over has no draft yet.
                if request.num_computed_tokens >= request.num_prompt_tokens
            )

        budget: Any = NodeBudget(choices, StepCost.of(self.vllm_config), num_cached_tokens)
        # It is read by the batch's size and nothing else.
        self.dynamic_sd_lookup = budget


# The graphs of verification cover the numbers in the scheduler's table and no others. And where there are several, for
# a batch between two captured sizes vLLM looks at the graphs of the next size alone, which may be of other numbers.


def _init_candidates(original: Callable[..., None], self: CudaGraphManager) -> None:
    config = self.vllm_config.speculative_config
    if config is None or not config.uses_dynamic_speculative_decoding() or not is_glide(self.vllm_config):
        original(self)
        return
    from vllm.v1.worker.gpu import cudagraph_utils

    build_lookup = cudagraph_utils.build_dynamic_sd_schedule_lookup
    if adapts_nodes(self.vllm_config):
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
    if not is_glide(self):
        original(self)


# Metrics count a draft's tokens by their place in the list, and take its length for the most that a step accepts.


def _make_spec_decoding_stats(
    original: Callable[..., SpecDecodingStats | None],
    self: Scheduler,
    spec_decoding_stats: SpecDecodingStats | None,
    num_draft_tokens: int,
    num_accepted_tokens: int,
    num_invalid_spec_tokens: dict[str, int] | None,
    request_id: str,
) -> SpecDecodingStats | None:
    if (shape := tree_shape_of(self.vllm_config)) is not None:
        from vllm_longspec.metrics import TreeDecodingStats

        request = self.requests[request_id]
        # What a grammar has cut from a list says nothing about lists of that length.
        if isinstance(self.dynamic_sd_lookup, NodeBudget) and not request.use_structured_output:
            self.dynamic_sd_lookup.observe(num_draft_tokens, num_accepted_tokens)
        spec_decoding_stats = spec_decoding_stats or TreeDecodingStats.of(shape)
        params = request.sampling_params
        if params is not None and needs_chain(params):
            # vLLM takes the invalid ones off.
            num_invalid = (num_invalid_spec_tokens or {}).get(request_id, 0)
            num_draft_tokens = min(num_draft_tokens, shape.max_depth + num_invalid)
    return original(
        self, spec_decoding_stats, num_draft_tokens, num_accepted_tokens, num_invalid_spec_tokens, request_id
    )


def _add_request(original: Callable[..., None], self: Scheduler, request: Request) -> None:
    original(self, request)
    if request.spec_decode_metrics is not None and (shape := tree_shape_of(self.vllm_config)) is not None:
        from vllm_longspec.metrics import request_metrics

        request.spec_decode_metrics = request_metrics(shape, request.sampling_params)


def _init_prometheus_counters(
    original: Callable[..., None],
    self: SpecDecodingProm,
    speculative_config: SpeculativeConfig | None,
    *args: Any,
    **kwargs: Any,
) -> None:
    from vllm_longspec.metrics import by_depth

    original(self, by_depth(speculative_config), *args, **kwargs)


def _use_pytorch_top_k_top_p() -> None:
    # vLLM's Triton kernel for top-k and top-p does not run in Triton's interpreter (a scalar argument has no `.to`).
    # The module has the same function in PyTorch, for machines without Triton.
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False
