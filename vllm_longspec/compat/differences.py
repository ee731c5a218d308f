# SPDX-License-Identifier: Apache-2.0
"""What differs between the supported versions of vLLM: functions with one meaning, implemented for each.

Every branch asks `IS_0_32` and nothing else, so that tests/seams.py can tell which of the two is alive.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_longspec.compat.versions import IS_0_32

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker


def grammar_mask_stride(vllm_config: "VllmConfig") -> int | None:
    """Rows of the grammar bitmask that each request has; None for as many as it has logits."""
    return None if IS_0_32 else 1 + vllm_config.num_speculative_tokens


def masked_ends_of_reasoning(manager: "StructuredOutputManager", request: "Request") -> Sequence[int]:
    """Tokens that must not be sampled while a request reasons.

    They would end its reasoning and be the first that its grammar reads, which the grammar forbids. vLLM 0.32 lets them
    be sampled and ends the request there. The grammar must be at its beginning.
    """
    return () if IS_0_32 else manager._masked_reasoning_ends(request)  # type: ignore[attr-defined]


def grammar_mapping(
    worker: "StructuredOutputsWorker", input_batch: "InputBatch", grammar_req_ids: list[str]
) -> list[int]:
    """Of every row of the grammar bitmask: place of the request in the batch * worker.mask_stride + row of its logits.

    Rows may be beyond the logits of their request.
    """
    if IS_0_32:
        from vllm.v1.worker.gpu.structured_outputs import _build_grammar_mapping

        return _build_grammar_mapping(
            input_batch.req_ids,
            grammar_req_ids,
            input_batch.cu_num_logits_np,
            input_batch.num_draft_tokens_per_req,
            worker.num_bonus_tokens,
            worker.mask_stride,
        )
    else:
        places = {request_id: place for place, request_id in enumerate(input_batch.req_ids)}
        stride = worker.mask_stride
        return [places[request_id] * stride + row for request_id in grammar_req_ids for row in range(stride)]
