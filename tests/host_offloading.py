# SPDX-License-Identifier: Apache-2.0
"""A medium for vLLM's OffloadingConnector that works on a CPU: blocks are copied to other tensors of the host.

vLLM's own media need a GPU. The scheduler's side, which decides what is saved when, is vLLM's. The copies are made as
soon as they are asked for, so that nothing that is written later can repair a block that was saved too early.
"""

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class HostWorker(OffloadingWorker):
    def __init__(self, kv_caches: CanonicalKVCaches, num_blocks: int):
        self.caches = [cache.tensor for cache in kv_caches.tensors]
        self.saved = [torch.zeros(num_blocks, cache.shape[1], dtype=cache.dtype) for cache in self.caches]
        self.finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        return self._copy(job_id, src_spec, self.caches, dst_spec, self.saved)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        return self._copy(job_id, src_spec, self.saved, dst_spec, self.caches)

    def _copy(
        self,
        job_id: int,
        source: LoadStoreSpec,
        source_tensors: list[torch.Tensor],
        target: LoadStoreSpec,
        target_tensors: list[torch.Tensor],
    ) -> bool:
        assert isinstance(source, CPULoadStoreSpec | GPULoadStoreSpec)
        assert isinstance(target, CPULoadStoreSpec | GPULoadStoreSpec)
        from_blocks, to_blocks = torch.tensor(source.block_ids), torch.tensor(target.block_ids)
        assert len(from_blocks) == len(to_blocks)
        for from_tensor, to_tensor in zip(source_tensors, target_tensors, strict=True):
            to_tensor[to_blocks] = from_tensor[from_blocks]
        self.finished.append(TransferResult(job_id, success=True))
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self.finished = self.finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        return None


class HostOffloadingSpec(CPUOffloadingSpec):
    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        assert self.blocks_per_chunk == 1
        return HostWorker(kv_caches, self.num_chunks)
