# SPDX-License-Identifier: Apache-2.0
"""Entry point of group `vllm.general_plugins`, which vLLM loads in every process."""

MODEL = "vllm_longspec.proposers.glide.model:GlideForCausalLM"


def register() -> None:
    """Registers the draft's architectures and applies the patches. vLLM may call it several times in a process.

    With an unsupported version of vLLM it warns, and GLIDE drafts and the methods of proposers are refused by name.
    """
    # Imported here, because vLLM imports this module in every process, with or without a draft; and the version first,
    # because the other modules need parts of vLLM that an unsupported version may not have.
    from vllm_longspec.compat.versions import is_supported

    if not is_supported():
        from vllm_longspec import refusal

        refusal.apply()
        return

    from vllm import ModelRegistry

    from vllm_longspec import patches
    from vllm_longspec.targets.families import FAMILIES

    for architecture in FAMILIES.values():
        ModelRegistry.register_model(architecture, MODEL)
    patches.apply()
