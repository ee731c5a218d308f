# SPDX-License-Identifier: Apache-2.0
"""KV connectors that work with trees; docs/design.md#kv-connectors says what one must do, and why.

A connector that is not listed may save layer by layer in the forward pass, before accepted rows are compacted, or take
drafted tokens for computed ones.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig

_LMCACHE = ("LMCacheConnectorV1",)
# Loads wait for what the GPU was given before, or run beside it.
_LOADS_IN_ORDER = ("OffloadingConnector",)
_LOADS_BESIDE = ("SimpleCPUOffloadConnector", *_LMCACHE)
_NIXL = ("NixlConnector", "NixlPullConnector", "NixlPushConnector")
# With one of them LMCache takes another way through its code, some of it in the forward pass.
_LMCACHE_MODES = ("use_layerwise", "enable_blending", "enable_async_loading", "enable_pd", "enable_p2p")


def connector_refusal(vllm_config: "VllmConfig") -> tuple[str, str] | None:
    """What is refused of a KV connector, and the way out; None if all of it is supported.

    Args:
        vllm_config: the engine's, after vLLM has added what `--kv-offloading-size` asks for.
    """
    config = vllm_config.kv_transfer_config
    if config is None or config.kv_connector is None:
        return None
    name = f"the KV connector {config.kv_connector}"
    others = "serve without --kv-transfer-config and --kv-offloading-size, or with"
    # A draft that writes after its root does so while vLLM already gives the blocks of a request that has ended to
    # another one, which nothing must be loaded into before. And the receiver of NIXL's pairs the last blocks of both
    # sides, where the sender's last ones would be its draft's.
    supported = _LOADS_IN_ORDER + (() if vllm_config.num_lookahead_tokens > 0 else _LOADS_BESIDE + _NIXL)
    if config.kv_connector_module_path:
        return (
            f"{name} of the module {config.kv_connector_module_path}",
            f"{others} one of vLLM's own: {', '.join(supported)}",
        )
    if config.kv_connector not in supported:
        return name, f"{others} one of {', '.join(supported)}"
    if config.kv_connector in _NIXL and config.get_from_extra_config("bidirectional_kv_xfer", False):
        # The same, of blocks for nodes of the side that decodes.
        return f"{name} with bidirectional_kv_xfer", "leave bidirectional_kv_xfer out of kv_connector_extra_config"
    if config.kv_connector in _LMCACHE:
        return _lmcache_refusal(name, config, vllm_config)
    return None


def _lmcache_refusal(name: str, config: "KVTransferConfig", vllm_config: "VllmConfig") -> tuple[str, str] | None:
    from vllm.platforms import current_platform

    if config.get_from_extra_config("use_native", False):
        return f"{name} with use_native", "leave use_native out of kv_connector_extra_config"
    if config.kv_role != "kv_both":
        return f"{name} with kv_role={config.kv_role}", "serve with kv_role kv_both"
    mode = vllm_config.compilation_config.cudagraph_mode
    if mode is not None and mode.has_full_cudagraphs():
        # vLLM calls it outside of a forward context then, and it loads nothing of what was found.
        way_out = """serve with --compilation-config '{"cudagraph_mode": "PIECEWISE"}'"""
        return f"{name} with full CUDA graphs", way_out
    settings = _lmcache_settings(config)
    for setting in _LMCACHE_MODES:
        if str(settings.get(setting)).strip().lower() in ("true", "1"):
            return f"{name} with {setting}", f"leave {setting} out of LMCache's settings"
    if current_platform.is_cuda() and not has_lmcache_kernels():
        # What it does in their place takes K and V of a token for those of two others.
        return f"{name} without its compiled extension", "install an lmcache that was built for this version of torch"
    return None


def _lmcache_settings(config: "KVTransferConfig") -> dict[str, Any]:
    """Of the modes, from this connector's configuration or LMCache's file or environment; empty without LMCache."""
    try:
        from lmcache.integration.vllm.utils import lmcache_get_or_create_config
    except ImportError:
        # vLLM says so when it makes the connector.
        return {}
    loaded = lmcache_get_or_create_config()
    return {
        name: config.get_from_extra_config(f"lmcache.{name}", getattr(loaded, name, None)) for name in _LMCACHE_MODES
    }


def has_lmcache_kernels() -> bool:
    try:
        importlib.import_module("lmcache.cuda_ops")
    except ImportError:
        return False
    return True
