# SPDX-License-Identifier: Apache-2.0
"""Registers the tree attention backends with vLLM, in engines with trees only, and chooses among them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

# The names for `--attention-backend`, and the classes.
FLASH_BACKEND, TRITON_BACKEND, CPU_BACKEND = "LONGSPEC_FLASH", "LONGSPEC_TRITON", "LONGSPEC_CPU"
ATTENTION_BACKENDS = {
    FLASH_BACKEND: "vllm_longspec.attention.flash.TreeFlashAttentionBackend",
    TRITON_BACKEND: "vllm_longspec.attention.triton.TreeTritonAttentionBackend",
    CPU_BACKEND: "vllm_longspec.attention.cpu.TreeCpuAttentionBackend",
}


def attention_backend(name: str) -> "AttentionBackendEnum":
    """The member of vLLM's enum for one of ATTENTION_BACKENDS, registered if it is not there yet."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if name not in AttentionBackendEnum.__members__:
        member = AttentionBackendEnum.register(name, ATTENTION_BACKENDS[name])
        # A spawned process unpickles vLLM's configuration before it loads plugins, when the enum lacks this member.
        member.__reduce_ex__ = lambda protocol: (attention_backend, (name,))  # type: ignore[assignment]
    return AttentionBackendEnum[name]


def choose_attention_backend(engine_args: "EngineArgs", target: "ModelConfig", noun: str = "a GLIDE draft") -> None:
    """Selects the tree attention backend for the target in `engine_args`.

    Raises:
        ValueError: the user asks for a backend that cannot verify a tree; the message calls the draft `noun`.
    """
    from vllm.platforms import current_platform

    supported = (CPU_BACKEND,) if current_platform.is_cpu() else (FLASH_BACKEND, TRITON_BACKEND)
    config = engine_args.attention_config
    given = engine_args.attention_backend or config.backend or "auto"
    name = (given if isinstance(given, str) else given.name).upper()
    if name not in ("AUTO", *supported):
        raise ValueError(f"attention backend {name} cannot verify the tree of {noun}: leave --attention-backend out")
    for kind, backend in config.backend_per_kind.items():
        if backend.name not in supported:
            raise ValueError(
                f"attention backend {backend.name} for {kind} cannot verify the tree of {noun}: leave "
                "backend_per_kind out of --attention-config"
            )
    if config.backend is not None:
        return
    if name == "AUTO" and len(supported) == 1:
        name = supported[0]
    elif name == "AUTO":
        name = FLASH_BACKEND if _flash_attention_serves(engine_args, target) else TRITON_BACKEND
    engine_args.attention_backend = attention_backend(name)


def _flash_attention_serves(engine_args: "EngineArgs", target: "ModelConfig") -> bool:
    from vllm.utils.torch_utils import resolve_kv_cache_dtype_string
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.v1.kv_cache_interface import is_quantized_kv_cache

    if target.dtype not in (torch.float16, torch.bfloat16):
        return False
    version: int | None = engine_args.attention_config.flash_attn_version
    version = version or get_flash_attn_version(head_size=target.get_head_size())
    # The checkpoint may ask for a quantised cache too; for compressed-tensors vLLM resolves that later, in the worker.
    cache_dtype = resolve_kv_cache_dtype_string(engine_args.kv_cache_dtype, target)
    scheme = (getattr(target.hf_config, "quantization_config", None) or {}).get("kv_cache_scheme")
    is_quantised = is_quantized_kv_cache(cache_dtype) or (cache_dtype == "auto" and scheme is not None)
    return version in ((3,) if is_quantised else (2, 3))


def get_cpu_backend_cls(
    original: "Callable[..., str]",
    cls: "type[CpuPlatform]",
    selected_backend: "AttentionBackendEnum | None",
    attn_selector_config: "AttentionSelectorConfig",
    num_heads: int | None = None,
) -> str:
    """The path of the backend on a CPU."""
    if selected_backend is not None and selected_backend.name == CPU_BACKEND:
        return selected_backend.get_path()
    return original(cls, selected_backend, attn_selector_config, num_heads)
