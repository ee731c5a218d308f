# SPDX-License-Identifier: Apache-2.0
"""The memory pools of vLLM's sleep mode on a CPU: sleeping overwrites what a GPU's memory would lose.

Which pool a tensor is allocated in, which pools are kept at which level, and what is copied besides is for vLLM's own
worker and backend to say. Only its allocator is another one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# 0.7 in every floating-point type, and out of the range of every index. Not NaN, which survives a weight of zero:
# vLLM's kernels read more of a block than they attend.
LOST = 0x3F


class _Recorder(TorchDispatchMode):
    """Hands on the storages that operators allocate."""

    def __init__(self, storages: dict[int, torch.UntypedStorage]):
        super().__init__()
        self.storages = storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage.nbytes() > 0 and storage.data_ptr() not in given:
                self.storages[storage.data_ptr()] = storage
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu"]


class Pools:
    """Takes the place of vLLM's CuMemAllocator. Storages are held, so that no address is used twice."""

    def __init__(self) -> None:
        self.storages: dict[str, dict[int, torch.UntypedStorage]] = {}
        self.asleep: dict[str, dict[int, torch.UntypedStorage]] = {}
        self.tags: list[str] = []

    @contextmanager
    def use_memory_pool(self, tag: str) -> Iterator[None]:
        self.tags.append(tag)
        found: dict[int, torch.UntypedStorage] = {}
        with _Recorder(found):
            yield
        self.tags.pop()
        inner = {address for other in self.storages.values() for address in other}
        mine = {address: storage for address, storage in found.items() if address not in inner}
        self.storages.setdefault(tag, {}).update(mine)

    def sleep(self, offload_tags: Sequence[str]) -> None:
        for tag, storages in self.storages.items():
            kept = {address: storage.clone() for address, storage in storages.items()} if tag in offload_tags else {}
            self.asleep[tag] = kept
            for storage in storages.values():
                torch.empty(0, dtype=torch.uint8).set_(storage).fill_(LOST)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        for tag in list(self.asleep):
            if tags is None or tag in tags:
                for address, kept in self.asleep.pop(tag).items():
                    self.storages[tag][address].copy_(kept)


def _save_sleep_parameters(self: Any, model: torch.nn.Module) -> None:
    """vLLM's own leaves parameters out that are on a CPU."""
    patterns = self.model_config.sleep_preserve_parameter_names
    self._sleep_saved_parameters = {
        name: parameter.detach().clone()
        for name, parameter in self._get_sleep_parameters(model).items()
        if any(fnmatch(name, pattern) for pattern in patterns)
    }


def simulate_sleep_mode() -> Pools:
    """Gives this process's CPU workers sleep mode; call it before the engine is made."""
    import vllm.device_allocator as device_allocator
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    pools: Any = Pools()
    device_allocator.get_mem_allocator_instance = lambda: pools
    current_platform.is_sleep_mode_available = lambda: True  # type: ignore[method-assign]
    CPUWorker.sleep = Worker.sleep  # type: ignore[method-assign]
    CPUWorker.wake_up = Worker.wake_up  # type: ignore[method-assign]
    CPUWorker._maybe_get_memory_pool_context = (  # type: ignore[method-assign]
        lambda self, tag: pools.use_memory_pool(tag)
    )
    CPUWorker._save_sleep_parameters = _save_sleep_parameters  # type: ignore[method-assign]
    torch.accelerator.synchronize = lambda *args: None
    torch.accelerator.get_memory_info = lambda *args: (0, 0)

    def keep_weights(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    # vLLM's kernels for CPUs have copies of weights in memory of their own.
    utils.dispatch_cpu_unquantized_gemm = keep_weights
    return pools
