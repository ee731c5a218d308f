# SPDX-License-Identifier: Apache-2.0
"""KV connectors that work with trees; docs/design.md#kv-connectors says what one must do, and why.

A connector that is not listed may save layer by layer in the forward pass, before accepted rows are compacted, or take
drafted tokens for computed ones.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig

_OFFLOADING = ("OffloadingConnector", "SimpleCPUOffloadConnector")
_NIXL = ("NixlConnector", "NixlPullConnector", "NixlPushConnector")


def connector_refusal(config: "KVTransferConfig | None", num_lookahead_tokens: int) -> tuple[str, str] | None:
    """What is refused of a KV connector, and the way out; None if all of it is supported.

    Args:
        config: the engine's, after vLLM has added what `--kv-offloading-size` asks for.
        num_lookahead_tokens: cache slots that drafts may write.
    """
    if config is None or config.kv_connector is None:
        return None
    name = f"the KV connector {config.kv_connector}"
    others = "serve without --kv-transfer-config and --kv-offloading-size, or with"
    # The receiver of NIXL's pairs the last blocks of both sides, and the sender's last ones would be its draft's.
    supported = _OFFLOADING if num_lookahead_tokens > 0 else _OFFLOADING + _NIXL
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
    return None
