# SPDX-License-Identifier: Apache-2.0
"""Entry point of group `vllm.general_plugins`, which vLLM loads in every process."""

MODEL = "vllm_longspec.proposers.glide.model:GlideForCausalLM"


def register() -> None:
    """Registers the draft's architectures and applies the patches. vLLM may call it several times in a process.

    With an unsupported version of vLLM it warns, and a GLIDE draft is refused by name.
    """
    # Imported here, because vLLM imports this module in every process, with or without a draft.
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
