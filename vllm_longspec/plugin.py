# SPDX-License-Identifier: Apache-2.0
"""Entry point of group `vllm.general_plugins`: makes GLIDE drafts known to vLLM, in every process."""

MODEL = "vllm_longspec.proposers.glide.model:GlideForCausalLM"


def register() -> None:
    """Registers the draft's architectures and applies the patches. vLLM may call it any number of times in a process.

    With a version of vLLM that is not supported it says so and only makes sure that a GLIDE draft is refused by name.
    """
    # Everything is imported in here: importing this module must cost nothing.
    from vllm_longspec import patches
    from vllm_longspec.compat.versions import is_supported, warn_unsupported
    from vllm_longspec.targets.families import FAMILIES

    if not is_supported():
        warn_unsupported()
        patches.apply_refusal()
        return

    from vllm import ModelRegistry

    for architecture in FAMILIES.values():
        ModelRegistry.register_model(architecture, MODEL)
    patches.apply()
