# SPDX-License-Identifier: Apache-2.0
"""Makes the tree attention backends known to vLLM, when a target with a GLIDE draft first needs one.

No engine without a GLIDE draft ever sees them.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

# The name of each in `--attention-backend` and its class.
FLASH_BACKEND, TRITON_BACKEND, CPU_BACKEND = "LONGSPEC_FLASH", "LONGSPEC_TRITON", "LONGSPEC_CPU"
ATTENTION_BACKENDS = {
    FLASH_BACKEND: "vllm_longspec.attention.flash.TreeFlashAttentionBackend",
    TRITON_BACKEND: "vllm_longspec.attention.triton.TreeTritonAttentionBackend",
    CPU_BACKEND: "vllm_longspec.attention.cpu.TreeCpuAttentionBackend",
}


def attention_backend(name: str) -> "AttentionBackendEnum":
    """The member of vLLM's enum for one of ATTENTION_BACKENDS."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if name not in AttentionBackendEnum.__members__:
        member = AttentionBackendEnum.register(name, ATTENTION_BACKENDS[name])
        # A spawned process unpickles vLLM's configuration before it loads plugins, when its enum has no such member.
        member.__reduce_ex__ = lambda protocol: (attention_backend, (name,))  # type: ignore[assignment]
    return AttentionBackendEnum[name]
