# SPDX-License-Identifier: Apache-2.0
"""What LMCache needs to be tested in a process, on a CPU too.

LMCache copies between vLLM's cache and its own memory on accelerators only; elsewhere it saves nothing. Here blocks are
copied by torch, as soon as LMCache asks for it. What is saved when, and under which keys, is LMCache's.
"""

from typing import Any

import torch
from lmcache.integration.vllm.utils import ENGINE_NAME
from lmcache.v1 import gpu_connector
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.metadata import LMCacheMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector import LMCacheConnectorV1


class HostConnector(GPUConnectorInterface):
    """Copies whole blocks, so that it need not know how an attention backend lays out tokens and heads in one."""

    def __init__(self, metadata: LMCacheMetadata):
        self.num_layers, kinds, self.chunk_size, heads, size = metadata.kv_shape
        assert kinds == 2
        self.width = heads * size

    def get_shape(self, num_tokens: int) -> torch.Size:
        return torch.Size([2, self.num_layers, num_tokens, self.width])

    def from_gpu(self, memory_obj: MemoryObj, start: int, end: int, **kwargs: Any) -> None:
        for layer, cache in enumerate(kwargs["kvcaches"]):
            block = cache[self._block(start, end, **kwargs)]
            memory_obj.tensor[:, layer] = block.reshape(2, end - start, self.width)

    def to_gpu(self, memory_obj: MemoryObj, start: int, end: int, **kwargs: Any) -> None:
        # Other requests may share blocks that vLLM has.
        assert start >= kwargs.get("vllm_cached_tokens", 0)
        for layer, cache in enumerate(kwargs["kvcaches"]):
            block = cache[self._block(start, end, **kwargs)]
            block.copy_(memory_obj.tensor[:, layer].reshape(block.shape))

    def batched_from_gpu(self, memory_objs: Any, starts: list[int], ends: list[int], **kwargs: Any) -> None:
        for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
            self.from_gpu(memory_obj, start, end, **kwargs)

    def batched_to_gpu(self, memory_objs: Any = None, starts: Any = None, ends: Any = None, **kwargs: Any) -> None:
        for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
            self.to_gpu(memory_obj, start, end, **kwargs)

    def _block(self, start: int, end: int, *, slot_mapping: torch.Tensor, kvcaches: Any, **_: Any) -> int:
        """The block of the cache that these tokens fill."""
        assert len(kvcaches) == self.num_layers
        block, first = divmod(int(slot_mapping[start]), self.chunk_size)
        assert first == 0 and end - start == self.chunk_size
        return block


def install() -> None:
    """For this process, before an engine is made."""
    if not torch.cuda.is_available():
        gpu_connector.CreateGPUConnector = lambda config, metadata, engine, **hints: HostConnector(metadata)
    # vLLM's class does not pass on that the engine ends, and a thread of LMCache's would keep the process.
    LMCacheConnectorV1.shutdown = lambda self: LMCacheEngineBuilder.destroy(ENGINE_NAME)  # type: ignore[method-assign]
