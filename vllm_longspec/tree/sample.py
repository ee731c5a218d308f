# SPDX-License-Identifier: Apache-2.0
"""Stage "sample": draws the target's own next token at every row, then walks.

Every emitted token is the target's own sample, for every sampling setting, and every row is sampled at its true
position. vLLM's Gumbel noise is keyed by (seed, position, token id), so plain decoding with the same seed emits the
same tokens.
"""

import torch
from torch import nn
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.triton_utils import tl, triton
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics import logits as logits_metrics
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import _iter_request_chunks, get_max_chunk_logits

from vllm_longspec.interpreter import interpreting
from vllm_longspec.tree.batch import TreeBatch
from vllm_longspec.tree.draw import draw_at_temperature, draws_at_temperature
from vllm_longspec.tree.state import NO_TOKEN, TreeState
from vllm_longspec.tree.synthetic import walk_synthetically
from vllm_longspec.tree.walk import walk_tree


class TreeSampler:
    """Takes the place of vLLM's rejection sampler."""

    # Read by vLLM's kernel warm-up.
    enable_adaptive_verification = False

    def __init__(
        self,
        sampler: Sampler,
        state: TreeState,
        batch: TreeBatch,
        max_depth: int,
        synthetic_conditional_rates: torch.Tensor | None = None,  # float32 [max_depth], None: the target decides
    ):
        self.sampler = sampler
        self.state = state
        self.batch = batch
        self.max_depth = max_depth
        self.synthetic_conditional_rates = synthetic_conditional_rates
        # In the interpreter there is nothing to compile.
        self.is_warm = interpreting()

    def __call__(
        self,
        logits: torch.Tensor,  # [num_logits, vocab_size], a row for every root and node
        input_batch: InputBatch,
        draft_logits: torch.Tensor | None = None,
        invalid_drafts: torch.Tensor | None = None,
    ) -> SamplerOutput:
        # As in vLLM: before penalties and temperature are applied.
        num_nans = self._count_nans(logits, input_batch) if self.sampler.compute_nans else None
        num_reqs = input_batch.num_reqs
        # The walk must not accept draft tokens that vLLM's scheduler did not check against the request's grammar.
        draft_tokens = input_batch.input_ids[input_batch.logits_indices]
        if invalid_drafts is not None:
            draft_tokens = draft_tokens.masked_fill(invalid_drafts, NO_TOKEN)
        emitted = torch.empty(num_reqs, self.max_depth + 1, dtype=torch.int64, device=logits.device)
        num_emitted = torch.empty(num_reqs, dtype=torch.int32, device=logits.device)
        # The most log-probabilities and the most `logprob_token_ids` of any request.
        logprobs_dims = self.sampler.get_logprobs_dims(input_batch.idx_mapping_np)
        logprobs: list[LogprobsTensors] = []
        # In chunks, as in vLLM, because processed logits are a float32 copy.
        max_logits = get_max_chunk_logits(logits.shape[1])
        for start, end in _iter_request_chunks(input_batch.cu_num_logits_np, max_logits):
            chunk_logprobs = self._sample_requests(
                logits, input_batch, start, end, draft_tokens, emitted, num_emitted, logprobs_dims
            )
            if chunk_logprobs is not None:
                logprobs.append(chunk_logprobs)

        num_sampled, num_rejected = get_num_sampled_and_rejected(
            num_emitted,
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.sampler.req_states.prefill_len.gpu,
        )
        logprobs_tensors = None
        if logprobs:
            logprobs_tensors = LogprobsTensors.cat(
                logprobs, cu_num_generated_tokens=input_batch.cu_num_logits_np.tolist()
            )
        return SamplerOutput(
            sampled_token_ids=emitted,
            logprobs_tensors=logprobs_tensors,
            num_nans=num_nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _count_nans(self, logits: torch.Tensor, input_batch: InputBatch) -> torch.Tensor:
        """NaNs in `logits` [num_logits, vocab_size] by request, int32 [num_reqs], without rows that hold no node."""
        row = input_batch.expanded_local_pos
        holds_node = self.state.parent_rows[input_batch.expanded_idx_mapping, row] >= 0
        row_nans = logits_metrics.get_num_nans(logits).masked_fill(~holds_node & (row > 0), 0)
        # vLLM expects a count for each request.
        nans_before = nn.functional.pad(row_nans.cumsum(0), (1, 0))
        return nans_before[input_batch.cu_num_logits].diff().to(torch.int32)

    def _sample_requests(
        self,
        logits: torch.Tensor,
        input_batch: InputBatch,
        start: int,
        end: int,
        draft_tokens: torch.Tensor,  # [num_logits]
        emitted: torch.Tensor,  # [num_reqs, max_depth + 1], written for requests [start, end)
        num_emitted: torch.Tensor,  # [num_reqs], likewise
        logprobs_dims: tuple[int, int] | None,
    ) -> LogprobsTensors | None:
        first = int(input_batch.cu_num_logits_np[start])
        rows = slice(first, int(input_batch.cu_num_logits_np[end]))
        logits = logits[rows]
        idx_mapping_np = input_batch.idx_mapping_np[start:end]
        logits_indices = input_batch.logits_indices[rows]
        positions = input_batch.positions[logits_indices]
        expanded_idx_mapping = input_batch.expanded_idx_mapping[rows]
        return_processed = logprobs_dims is not None and self.sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES
        if not self.is_warm:
            # The first requests are those of vLLM's warm-up, which have every sampling parameter. This compiles the
            # draw that they would not compile.
            self.is_warm = True
            draw_at_temperature(self.sampler, logits, expanded_idx_mapping, positions)
        processed_logits = logits
        if draws_at_temperature(self.sampler, idx_mapping_np, return_processed):
            sampled = draw_at_temperature(self.sampler, logits, expanded_idx_mapping, positions)
        else:
            sampled, processed_logits = self.sampler.sample(
                logits,
                expanded_idx_mapping,
                input_batch.idx_mapping[start:end],
                idx_mapping_np,
                positions,
                input_batch.input_ids[logits_indices],
                input_batch.expanded_local_pos[rows],
                input_batch.seq_lens_cpu_upper_bound.numpy()[start:end],
                return_logprobs=logprobs_dims is not None,
            )
        cu_num_logits = input_batch.cu_num_logits[start : end + 1] - first
        path_rows = self.batch.path_rows[start:end]
        walked = (
            sampled,
            draft_tokens[rows],
            cu_num_logits,
            input_batch.idx_mapping[start:end],
            self.state.parent_rows,
            emitted[start:end],
            num_emitted[start:end],
            path_rows,
        )
        if self.synthetic_conditional_rates is None:
            walk_tree(*walked, self.max_depth)
        else:
            seeds = self.sampler.sampling_states.seeds.gpu
            walk_synthetically(self.synthetic_conditional_rates, seeds, positions, self.state.depths, *walked)
        if logprobs_dims is None:
            return None
        num_logprobs, num_named_tokens = logprobs_dims
        scored = processed_logits if return_processed else logits
        emitted_rows, emitted_tokens = _rows_of_emitted(
            logits.shape[0], cu_num_logits, path_rows, emitted[start:end], num_emitted[start:end]
        )
        return compute_topk_scores(
            scored[emitted_rows],
            num_logprobs,
            emitted_tokens,
            (input_batch.cu_num_logits_np[start : end + 1] - first).tolist(),
            logprob_token_ids_state=self.sampler.logprob_token_ids_state,
            expanded_idx_mapping=input_batch.expanded_idx_mapping[rows],
            max_per_req_token_ids=num_named_tokens,
            logits_mode=self.sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )


@triton.jit
def _rows_of_emitted_kernel(
    rows_ptr,  # [num_logits]
    tokens_ptr,  # [num_logits]
    cu_num_logits_ptr,  # [num_reqs + 1]
    path_rows_ptr,  # [num_reqs, num_rows]
    path_rows_stride,
    emitted_ptr,  # [num_reqs, max_depth + 1]
    emitted_stride,
    num_emitted_ptr,  # [num_reqs]
    BLOCK_SIZE: tl.constexpr,
):
    batch_idx = tl.program_id(0)
    first = tl.load(cu_num_logits_ptr + batch_idx)
    i = tl.arange(0, BLOCK_SIZE)
    mask = i < tl.load(num_emitted_ptr + batch_idx)
    row = tl.load(path_rows_ptr + batch_idx * path_rows_stride + i, mask=mask)
    token = tl.load(emitted_ptr + batch_idx * emitted_stride + i, mask=mask)
    tl.store(rows_ptr + first + i, (first + row).to(tl.int64), mask=mask)
    tl.store(tokens_ptr + first + i, token, mask=mask)


def _rows_of_emitted(
    num_logits: int,
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    path_rows: torch.Tensor,  # [num_reqs, num_rows]
    emitted: torch.Tensor,  # [num_reqs, max_depth + 1]
    num_emitted: torch.Tensor,  # [num_reqs]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits row and token of every emitted token, packed at the front of each request's rows.

    vLLM reads a request's log-probabilities from its first `num_emitted` rows, which in a tree are not the rows of the
    emitted tokens. The remaining entries point at row 0 and are never read. Returns two int64 tensors [num_logits].
    """
    rows = torch.zeros(num_logits, dtype=torch.int64, device=emitted.device)
    tokens = torch.zeros(num_logits, dtype=torch.int64, device=emitted.device)
    _rows_of_emitted_kernel[(emitted.shape[0],)](
        rows,
        tokens,
        cu_num_logits,
        path_rows,
        path_rows.stride(0),
        emitted,
        emitted.stride(0),
        num_emitted,
        BLOCK_SIZE=triton.next_power_of_2(emitted.shape[1]),
    )
    return rows, tokens
