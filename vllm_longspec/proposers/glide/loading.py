# SPDX-License-Identifier: Apache-2.0
"""The `draft_load_config` of a draft.

By default vLLM loads a draft in the target's `load_format`. But a target may have been exported to a format such as
`sharded_state` or `tensorizer`, while GLIDE drafts are published as safetensors or .bin files.
"""

import os
from dataclasses import fields
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from vllm_longspec.proposers.glide.checkpoint import DraftCheckpoint, weight_files

if TYPE_CHECKING:
    from vllm.config import LoadConfig
    from vllm.engine.arg_utils import EngineArgs

# load_format -> files that vLLM's loader reads, for the formats that can be checked
_FILES = {
    **dict.fromkeys(("auto", "hf"), ("*.safetensors", "*.bin", "*.pt")),
    **dict.fromkeys(("safetensors", "fastsafetensors", "instanttensor", "runai_streamer"), ("*.safetensors",)),
    "mistral": ("consolidated*.safetensors",),
    "npcache": ("*.bin", "*.pt"),
    "pt": ("*.pt",),
}
_WITHOUT_WEIGHTS = 'download or export it again, or give draft_load_config {"load_format": "dummy"} to do without'


def draft_load_config(engine_args: "EngineArgs", given: Any, checkpoint: DraftCheckpoint) -> "LoadConfig | None":
    """The draft's LoadConfig: the user's `given`, or one for the draft's own files; None for dummy weights.

    Raises:
        ValueError: `given` is not a LoadConfig, or the draft has no files of its format.
    """
    from vllm.config import LoadConfig

    if given is None:
        if engine_args.load_format.lower() == "dummy":
            return None
        # Where and how files are read is taken from the target, but not their format.
        strategy = engine_args.safetensors_load_strategy
        return LoadConfig(
            load_format=_format_of_files(checkpoint),
            download_dir=engine_args.download_dir,
            safetensors_load_strategy=None if strategy == "torchao" else strategy,
            safetensors_prefetch_num_threads=engine_args.safetensors_prefetch_num_threads,
            safetensors_prefetch_block_size=engine_args.safetensors_prefetch_block_size,
            use_tqdm_on_load=engine_args.use_tqdm_on_load,
            pt_load_map_location=engine_args.pt_load_map_location,
        )
    if not isinstance(given, LoadConfig):
        given = _read(given)
    _check_files(given, checkpoint)
    return given


def _read(given: Any) -> "LoadConfig":
    from pydantic import ValidationError
    from vllm.config import LoadConfig

    example = 'give an object such as {"load_format": "safetensors"}'
    if not isinstance(given, dict):
        raise ValueError(f"draft_load_config must be vLLM's LoadConfig, got {given!r}: {example}")
    options = {str(key).replace("-", "_"): value for key, value in given.items()}
    names = [field.name for field in fields(LoadConfig)]
    for name in options:
        if name not in names:
            raise ValueError(f"draft_load_config has no option {name!r}, its options are {', '.join(names)}")
    try:
        return LoadConfig(**options)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ValueError(f"draft_load_config has a {name} that is none ({first['msg']}): {example}") from None


def _format_of_files(checkpoint: DraftCheckpoint) -> str:
    if os.path.isdir(checkpoint.model):
        files = weight_files(checkpoint.model)
        if not files:
            raise ValueError(f"draft {checkpoint.model} has no file of weights: {_WITHOUT_WEIGHTS}")
        if files[0].suffix == ".pt":
            # With "hf" vLLM would read a trainer's own .bin files instead.
            return "pt"
    return "hf"


def _check_files(load_config: "LoadConfig", checkpoint: DraftCheckpoint) -> None:
    """Refuses a local draft without a file that its loader reads; vLLM checks repositories."""
    patterns = _FILES.get(load_config.load_format)
    if patterns is None or not os.path.isdir(checkpoint.model):
        return
    if any(fnmatch(name, pattern) for name in os.listdir(checkpoint.model) for pattern in patterns):
        return
    files = weight_files(checkpoint.model)
    way_out = f"its weights are in {files[0].name}, leave draft_load_config out" if files else _WITHOUT_WEIGHTS
    raise ValueError(
        f"draft {checkpoint.model} has no file of weights of load_format {load_config.load_format!r}, which "
        f"draft_load_config asks for: {way_out}"
    )
