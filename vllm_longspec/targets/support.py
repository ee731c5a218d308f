# SPDX-License-Identifier: Apache-2.0
"""Refuses what trees or their drafts do not work with: by name and with the way out, as early as it can be known.

Options, arguments and target are checked before vLLM builds its SpeculativeConfig, `check_engine` sees the complete
configuration. Every check raises ValueError, in one line.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_longspec.targets.connectors import connector_refusal
from vllm_longspec.targets.families import FAMILIES, WRAPPERS

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

# Head sizes that the attention kernels are tested for.
MIN_HEAD_SIZE, MAX_HEAD_SIZE = 32, 256

# Options of vLLM's SpeculativeConfig that apply to trees.
_OPTIONS = frozenset(
    {"model", "method", "num_speculative_tokens", "revision", "code_revision", "draft_load_config", "enforce_eager"}
    | {"draft_tensor_parallel_size", "num_speculative_tokens_per_batch_size"}
    | {"rejection_sample_method", "synthetic_acceptance_length", "synthetic_acceptance_rates", "quantization"}
)
# `model_type` of targets with a learned sink in each attention head, and settings that give other targets some.
_ATTENTION_SINKS = ("gpt_oss",)
_SINK_SETTINGS = ("attention_sinks", "add_full_attention_sink_bias", "add_swa_attention_sink_bias")
# vLLM's methods that quantise while loading.
_DRAFT_QUANTIZATIONS = ("fp8_per_tensor", "fp8_per_channel")


class Draft(NamedTuple):
    """The draft in messages, and how to serve without it."""

    noun: str = "a GLIDE draft"
    without: str = "serve without --speculative-model"


GLIDE_DRAFT = Draft()

# (whether it applies, what is refused, the way out)
_Refusal = tuple[bool, str, str]


def _refuse(draft: Draft, *refusals: _Refusal) -> None:
    for applies, what, way_out in refusals:
        if applies:
            raise ValueError(f"{what} is not supported with {draft.noun}: {way_out}")


def check_options(options: Mapping[str, Any], parallel_config: "ParallelConfig", draft: Draft = GLIDE_DRAFT) -> None:
    """Refuses options of the speculative configuration, by ValueError."""
    from vllm.config import SpeculativeConfig
    from vllm.platforms import current_platform
    from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

    # vLLM raises it too, but in the engine's process.
    if (schedule := options.get("num_speculative_tokens_per_batch_size")) is not None:
        try:
            validate_and_normalize_dynamic_sd_schedule(schedule)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"num_speculative_tokens_per_batch_size={schedule!r} cannot be used ({error}): give ranges of batch "
                "sizes with their number of nodes, such as [[1, 4, 68], [5, 256, 0]]"
            ) from None
    method = options.get("method")
    draft_size, target_size = options.get("draft_tensor_parallel_size"), parallel_config.tensor_parallel_size
    rejection_sample_method = options.get("rejection_sample_method")
    quantization = options.get("quantization")
    quantized = f"quantization={quantization!r} in the speculative configuration"
    leave_out = "leave it out"
    _refuse(
        draft,
        (
            quantization not in (None, *_DRAFT_QUANTIZATIONS),
            quantized,
            f"leave it out, or give {' or '.join(_DRAFT_QUANTIZATIONS)}",
        ),
        (quantization is not None and current_platform.is_cpu(), f"{quantized} on a CPU", leave_out),
        (method not in (None, "draft_model"), f"speculative method {method!r}", "leave the method out"),
        (
            draft_size not in (None, target_size),
            f"draft_tensor_parallel_size={draft_size} with a target of tensor_parallel_size={target_size}",
            leave_out,
        ),
        (
            # Trees are walked, never rejection-sampled; "synthetic" is another walk.
            rejection_sample_method not in (None, "standard", "synthetic"),
            f"rejection_sample_method={rejection_sample_method!r} in the speculative configuration",
            leave_out,
        ),
    )
    for field in fields(SpeculativeConfig):
        value = options.get(field.name)
        if field.name in _OPTIONS or value is None or value == _default(field):
            continue
        _refuse(draft, (True, f"{field.name}={value!r} in the speculative configuration", leave_out))


def _default(field: Any) -> Any:
    # vLLM's fields are plain defaults or pydantic's Field(default=...).
    return getattr(field.default, "default", field.default) if field.default is not MISSING else None


def check_arguments(engine_args: "EngineArgs", parallel_config: "ParallelConfig", draft: Draft = GLIDE_DRAFT) -> None:
    """Refuses features of the engine that an argument asks for, by ValueError."""
    logits_processors = entry_points(group="vllm.logits_processors")
    pipeline = parallel_config.pipeline_parallel_size
    prefill_context = parallel_config.prefill_context_parallel_size
    decode_context = parallel_config.decode_context_parallel_size
    scheduler_cls = engine_args.scheduler_cls
    instead = "use --tensor-parallel-size instead"
    _refuse(
        draft,
        (pipeline > 1, f"pipeline_parallel_size={pipeline}", instead),
        (prefill_context > 1, f"prefill_context_parallel_size={prefill_context}", instead),
        (
            decode_context > 1,
            f"decode_context_parallel_size={decode_context}",
            "serve without --decode-context-parallel-size",
        ),
        (parallel_config.use_ubatching, "dual batch overlap", "serve without --enable-dbo"),
        # `TreeScheduler` takes its place.
        (scheduler_cls is not None, f"scheduler_cls={scheduler_cls!r}", "serve without --scheduler-cls"),
        (
            # Each rank would walk only its own requests, but must compact the cache of all.
            bool(parallel_config.enable_batch_sharded_sampling),
            "batch-sharded sampling",
            "serve without --enable-batch-sharded-sampling",
        ),
        (engine_args.watermark_config is not None, "watermarking", "serve without --watermark-config"),
        (
            # It can load weights of a draft too, but does not know which modules the draft shares.
            engine_args.weight_transfer_config is not None,
            "weight transfer from a trainer",
            "serve without --weight-transfer-config, and let `reload_weights` read a checkpoint",
        ),
        (
            # They run for every request, and may read its history, which differs by node.
            bool(logits_processors),
            f"the installed logits processor {', '.join(plugin.name for plugin in logits_processors)}",
            f"uninstall it or {draft.without}",
        ),
    )


def _is_known(target: "ModelConfig") -> bool:
    """Whether vLLM lists an architecture of the target, be it with the Transformers backend."""
    from vllm.model_executor.models import ModelRegistry

    return bool(set(target.architectures) & set(ModelRegistry.get_supported_archs()))


def check_target(target: "ModelConfig", draft: Draft = GLIDE_DRAFT) -> None:
    """Refuses targets whose trees cannot be verified, by ValueError.

    What only the attention layers show is refused when they are built (`vllm_longspec/attention/backend.py`).
    """
    config = target.hf_text_config
    head_size = target.get_head_size()
    # Without `layer_types` vLLM gives every layer the window.
    sliding_window = target.get_sliding_window()
    layer_types = getattr(config, "layer_types", None) or ("sliding_attention",)
    without = draft.without
    is_wrapper = bool(set(target.architectures) & set(WRAPPERS))
    multimodal = target.multimodal_config
    is_text_only = is_wrapper and multimodal is not None and multimodal.language_model_only
    refusals: tuple[_Refusal, ...] = (
        (target.runner_type != "generate", f"a {target.runner_type} target", without),
        (
            target.is_multimodal_model and not is_text_only,
            "a multimodal target",
            f"{without}, or with --language-model-only" if is_wrapper else without,
        ),
        (target.is_encoder_decoder, "an encoder-decoder target", without),
        (target.is_diffusion, "a diffusion target", without),
        (target.use_mla, "a target with multi-head latent attention (MLA)", without),
        (target.is_hybrid, "a hybrid target", without),
        (target.is_attention_free, "an attention-free target", without),
        (
            sliding_window is not None and "sliding_attention" in layer_types,
            f"a target with a sliding window of {sliding_window}",
            f"{without}, or with --disable-sliding-window",
        ),
        (getattr(config, "attention_chunk_size", None) is not None, "a target with chunked attention", without),
        (
            getattr(config, "attn_logit_softcapping", None) is not None,
            "a target with a soft cap of attention logits",
            without,
        ),
        (_has_attention_sinks(config), "a target with attention sinks", without),
        (bool(getattr(config, "num_kv_shared_layers", None)), "a target whose layers share their KV cache", without),
        (getattr(config, "dual_chunk_attention_config", None) is not None, "dual chunk attention", without),
        (target.uses_alibi, "a target with ALiBi", without),
        (target.uses_mrope, "a target with multi-dimensional RoPE", without),
        (
            target.model_impl not in ("auto", "vllm"),
            f"model_impl={target.model_impl!r}",
            "serve with --model-impl auto or vllm: trees are tested with vLLM's own implementations",
        ),
        (
            target.using_transformers_backend() and not _is_known(target),
            f"the architecture {', '.join(target.architectures)}, which vLLM does not know and runs with the "
            "Transformers backend",
            without,
        ),
        (
            not MIN_HEAD_SIZE <= head_size <= MAX_HEAD_SIZE,
            f"head size {head_size}",
            f"{MIN_HEAD_SIZE} to {MAX_HEAD_SIZE} are; {without}",
        ),
        (target.enable_prompt_embeds, "prompt embeddings", "serve without --enable-prompt-embeds"),
        (bool(target.logits_processors), "a custom logits processor", "serve without --logits-processors"),
        (target.return_sampling_mask, "a sampling mask", "serve without --return-sampling-mask"),
        (
            # They keep other memory than vLLM's own.
            target.enable_sleep_mode and target.sleep_mode_backend != "cumem",
            f"sleep_mode_backend={target.sleep_mode_backend!r}",
            "serve with --sleep-mode-backend cumem",
        ),
    )
    _refuse(draft, *((applies, f"{what} (target {target.model})", way_out) for applies, what, way_out in refusals))


def _has_attention_sinks(config: Any) -> bool:
    if config.model_type in _ATTENTION_SINKS or any(getattr(config, name, None) for name in _SINK_SETTINGS):
        return True
    # vLLM takes a Granite with `layer_types` for one with sinks, unless its config denies it.
    is_granite = config.model_type in ("granite", "granitemoe", "granitemoeshared")
    return (
        is_granite
        and getattr(config, "layer_types", None) is not None
        and getattr(config, "attention_sinks", None) is None
    )


def check_family(target: "ModelConfig", draft: Draft = GLIDE_DRAFT) -> None:
    """Refuses targets of families that have no GLIDE drafts, by ValueError."""
    config = target.hf_text_config
    model_type = config.model_type
    # Settings of each layer where 0 stands for none: RoPE's base, and whether it is applied.
    rotations = (getattr(config, name, None) or () for name in ("layer_rope_theta", "no_rope_layers"))
    _refuse(
        draft,
        (
            model_type not in FAMILIES,
            f"a target of the {model_type} family (target {target.model})",
            f"the families supported are {', '.join(FAMILIES)}; {draft.without}",
        ),
        (
            # The draft's queries are rotated as those of the target's last layer.
            any(not rotation for layers in rotations for rotation in layers),
            f"a target with layers without rotary embedding (NoPE) (target {target.model})",
            draft.without,
        ),
    )


def check_method(config: "SpeculativeConfig", target: "ModelConfig", draft: Draft = GLIDE_DRAFT) -> None:
    """Refuses targets whose configuration, read as a draft's, vLLM turns into a method of its own, by ValueError."""
    _refuse(
        draft,
        (
            config.method != "draft_model",
            f"a target that vLLM itself drafts for by the method {config.method!r} (target {target.model})",
            draft.without,
        ),
    )


def check_platform(draft: Draft = GLIDE_DRAFT) -> None:
    """Refuses platforms without a Triton that works, by ValueError."""
    from vllm import envs
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    from vllm_longspec.interpreter import INTERPRETER_PLUGIN, interpreting, left_out

    noun = draft.noun[0].upper() + draft.noun[1:]
    if not (current_platform.is_cuda() or current_platform.is_cpu()):
        raise ValueError(
            f"{noun} runs on NVIDIA GPUs and on CPUs, not on {current_platform.device_name}: {draft.without}"
        )
    is_installed = find_spec("triton") is not None
    if current_platform.is_cpu() and not interpreting():
        install = "" if is_installed else "install triton and "
        raise ValueError(
            f"{noun} needs Triton, on a CPU its interpreter: {install}set TRITON_INTERPRET=1 before vLLM starts"
        )
    if HAS_TRITON:
        return
    if not is_installed:
        reason = "install triton (pip install triton)"
    elif current_platform.is_cpu():
        # On a CPU vLLM disables Triton unless the platform plugin is loaded first.
        reason = left_out(INTERPRETER_PLUGIN) or (
            "VLLM_TARGET_DEVICE=cpu keeps it from asking plugins for a platform, unset it"
            if envs.VLLM_TARGET_DEVICE == "cpu"
            else f"its plugin {INTERPRETER_PLUGIN} was not loaded in time, install vllm-longspec with pip and set "
            "TRITON_INTERPRET=1 before vLLM is imported"
        )
    else:
        reason = "install triton again (pip install --force-reinstall triton), or see in vLLM's log why it is off"
    raise ValueError(f"{noun} needs Triton and vLLM found none that works: {reason}")


def check_engine(vllm_config: "VllmConfig", draft: Draft = GLIDE_DRAFT) -> None:
    """Refuses what only the complete configuration shows, by ValueError."""
    cache = vllm_config.cache_config
    parallel, is_moe = vllm_config.parallel_config, vllm_config.model_config.is_moe
    model_dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    cache_dtypes = ("auto", model_dtype, "fp8", "fp8_e4m3")
    connector = connector_refusal(vllm_config)
    _refuse(
        draft,
        (
            not vllm_config.use_v2_model_runner,
            "vLLM's model runner V1",
            "set VLLM_USE_V2_MODEL_RUNNER=1 or leave it unset",
        ),
        (connector is not None, *(connector or ("", ""))),
        (
            # It holds on to the memory of the cache.
            vllm_config.kv_transfer_config is not None and vllm_config.model_config.enable_sleep_mode,
            "sleep mode with a KV connector",
            "serve without --enable-sleep-mode, or without --kv-transfer-config and --kv-offloading-size",
        ),
        (
            cache.cache_dtype not in cache_dtypes,
            f"a KV cache of {cache.cache_dtype} with a model of {model_dtype}",
            "serve with --kv-cache-dtype auto or fp8",
        ),
        (
            # One kernel compacts all layers, so they must have one dtype.
            bool(cache.kv_cache_dtype_skip_layers),
            "a KV cache that is quantised in some layers only",
            "serve without --kv-cache-dtype-skip-layers",
        ),
        (
            # It supports no speculation, and would fail every request that uses it.
            vllm_config.structured_outputs_config.backend == "lm-format-enforcer",
            "the structured output backend lm-format-enforcer",
            "serve with --structured-outputs-config.backend auto, xgrammar, guidance or outlines",
        ),
        (cache.kv_sharing_fast_prefill, "fast prefill by KV sharing", "serve without --kv-sharing-fast-prefill"),
        (
            # Its ranks run in lockstep, but each chooses its own number of nodes.
            is_moe and parallel.data_parallel_size > 1,
            f"data_parallel_size={parallel.data_parallel_size} with a mixture of experts",
            "serve with --tensor-parallel-size, or start an engine for each part of the requests",
        ),
        (is_moe and parallel.enable_eplb, "expert parallel load balancing", "serve without --enable-eplb"),
    )
