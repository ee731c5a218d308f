# SPDX-License-Identifier: Apache-2.0
"""The file in vLLM's cache folder that keeps the times of an engine's steps for its next start.

An engine has a file for all that its times depend on. Like vLLM's other caches it may be removed at any time, and is
measured again if it cannot be read.
"""

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm import envs
from vllm.config.utils import hash_factors
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.version import __version__ as VLLM_VERSION

from vllm_longspec.options import options_of
from vllm_longspec.scheduling.schedule import nodes_by_batch_size
from vllm_longspec.scheduling.step_times import StepTimes
from vllm_longspec.targets.families import layer_sizes
from vllm_longspec.version import __version__

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# A child of vLLM's logger, so that vLLM's logging configuration applies.
logger = init_logger(f"vllm.{__name__}")

# Of the file and of how steps are timed.
FORMAT = 3


def what_times_depend_on(vllm_config: "VllmConfig") -> dict[str, Any]:
    """JSON of this engine's device, shapes and settings."""
    config, model = vllm_config.speculative_config, vllm_config.model_config
    options = options_of(config)
    assert config is not None and options is not None
    target, parallel, compilation = model.hf_text_config, vllm_config.parallel_config, vllm_config.compilation_config
    return {
        "format": FORMAT,
        "versions": [__version__, VLLM_VERSION, torch.__version__],
        "device": current_platform.get_device_name(),
        "ranks": [
            parallel.tensor_parallel_size,
            parallel.data_parallel_size,
            parallel.enable_expert_parallel,
            parallel.disable_custom_all_reduce,
        ],
        "kernels": vllm_config.kernel_config.compute_hash(),
        # Variables choose kernels too, such as VLLM_USE_DEEP_GEMM and VLLM_BATCH_INVARIANT.
        "environment": hash_factors(envs.compile_factors()),
        "target": {
            "architectures": model.architectures,
            "sizes": [*layer_sizes(target), target.num_hidden_layers, model.get_vocab_size()],
            "experts": [
                getattr(target, name, None) for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
            ],
            "dtype": str(model.dtype),
            # A method has several schemes, such as 4 and 8 bits of compressed-tensors.
            "quantization": [
                model.quantization,
                str(model.model_arch_config.quantization_config),
                str(model.quantization_config),
            ],
            "lora": vllm_config.lora_config and vllm_config.lora_config.compute_hash(),
            "attention": vllm_config.attention_config.compute_hash(),
            "cache": [vllm_config.cache_config.cache_dtype, vllm_config.cache_config.block_size],
            "max_model_len": model.max_model_len,
        },
        "draft": {
            "proposer": options.proposer,
            "levels": options.tree_shape.levels,
            "plans": options.tree_shape.plans,
            "frequent_tokens": options.frequent_tokens,
            "copy_length": options.copy_length,
            "noise": [options.couple_noise, model.use_fp64_gumbel],
            "rejection_sample_method": config.rejection_sample_method,
            "part": str(options.partial_attention),
            "quantization": config.quantization,
            "enforce_eager": config.enforce_eager,
        },
        "graphs": {
            "mode": str(compilation.cudagraph_mode),
            "compiled": [str(compilation.mode), compilation.custom_ops, compilation.pass_config.compute_hash()],
            "sizes": compilation.cudagraph_capture_sizes,
            "nodes": nodes_by_batch_size(config, vllm_config.scheduler_config.max_num_seqs, options.chooses_nodes)[1:],
        },
    }


class TimesFile:
    def __init__(self, key: dict[str, Any]):
        # As it is read back: JSON has no tuples.
        self.key = json.loads(json.dumps(key))
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = Path(envs.VLLM_CACHE_ROOT) / "longspec" / f"step_times_{digest}.json"

    def read(self) -> StepTimes | None:
        """The times, or None if there are none for this key. Warns of a file that cannot be read."""
        try:
            found = json.loads(self.path.read_text())
            if found["key"] != self.key:
                raise ValueError("it is for another engine")
            return StepTimes.from_json(json.dumps(found["times"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.warn(error)
            return None

    def warn(self, reason: object) -> None:
        """Says that the times are not used, and why."""
        logger.warning("The times of steps in %s cannot be used (%s): steps are timed anew.", self.path, reason)

    def write(self, times: StepTimes) -> None:
        """Replaces the file at once. Warns if that is not possible: the next start measures again."""
        text = json.dumps({"key": self.key, "times": json.loads(times.to_json())}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem)
            try:
                with os.fdopen(descriptor, "w") as file:
                    file.write(text)
                os.replace(name, self.path)
            except OSError:
                with suppress(OSError):
                    os.unlink(name)
                raise
        except OSError as error:
            logger.warning("The times of steps cannot be written to %s: %s", self.path, error)
