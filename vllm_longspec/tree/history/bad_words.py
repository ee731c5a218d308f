# SPDX-License-Identifier: Apache-2.0
"""Bad words whose first tokens were emitted, are a node's ancestors, or are partly the one and partly the other."""

import torch
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext

from vllm_longspec.tree.history.paths import FollowsPaths, Paths, token_at


class PathBadWordsState(FollowsPaths, BadWordsState):
    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Sets the last tokens of bad words to -inf in `logits`, float32 [num_logits, vocab_size], in place."""
        max_num_bad_words = int(self.num_bad_words.np[ctx.idx_mapping_np].max())
        if max_num_bad_words > 0:
            apply_bad_words(
                logits,
                ctx.expanded_idx_mapping,
                self.paths(ctx),
                self.bad_word_token_ids.gpu,
                self.bad_word_offsets.gpu,
                self.num_bad_words.gpu,
                self.req_states.all_token_ids.gpu,
                self.req_states.prompt_len.gpu,
                self.req_states.total_len.gpu,
                max_num_bad_words,
            )
        return logits


def apply_bad_words(
    logits: torch.Tensor,  # float32 [num_logits, vocab_size], changed in place
    expanded_idx_mapping: torch.Tensor,  # [num_logits] req_state_idx
    paths: Paths,
    bad_word_token_ids: torch.Tensor,  # int32 [max_num_reqs, max_num_tokens] the words, one after the other
    bad_word_offsets: torch.Tensor,  # int32 [max_num_reqs, max_num_words + 1] where each begins, then their end
    num_bad_words: torch.Tensor,  # int32 [max_num_reqs]
    all_token_ids: torch.Tensor,  # int32 [max_num_reqs, max_model_len]
    prompt_len: torch.Tensor,  # int32 [max_num_reqs]
    total_len: torch.Tensor,  # int32 [max_num_reqs] tokens of the prompt and emitted ones
    max_num_bad_words: int,  # of any request
) -> None:
    """vLLM's function of this name, for rows that follow a path."""
    _path_bad_words_kernel[(logits.shape[0], max_num_bad_words)](
        logits,
        logits.stride(0),
        expanded_idx_mapping,
        paths.tokens,
        paths.tokens.stride(0),
        paths.depths,
        bad_word_token_ids,
        bad_word_token_ids.stride(0),
        bad_word_offsets,
        bad_word_offsets.stride(0),
        num_bad_words,
        all_token_ids,
        all_token_ids.stride(0),
        prompt_len,
        total_len,
    )


@triton.jit
def _path_bad_words_kernel(
    logits_ptr,
    logits_stride,
    expanded_idx_mapping_ptr,
    path_tokens_ptr,
    path_tokens_stride,
    path_depths_ptr,
    bad_word_token_ids_ptr,
    bad_word_token_ids_stride,
    bad_word_offsets_ptr,
    bad_word_offsets_stride,
    num_bad_words_ptr,
    all_token_ids_ptr,
    all_token_ids_stride,
    prompt_len_ptr,
    total_len_ptr,
):
    logits_row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1)
    req_state_idx = tl.load(expanded_idx_mapping_ptr + logits_row).to(tl.int64)
    if word >= tl.load(num_bad_words_ptr + req_state_idx):
        return

    total_len = tl.load(total_len_ptr + req_state_idx)
    history_len = total_len + tl.load(path_depths_ptr + logits_row)
    bad_word_offsets_ptr += req_state_idx * bad_word_offsets_stride + word
    start = tl.load(bad_word_offsets_ptr)
    prefix_len = tl.load(bad_word_offsets_ptr + 1) - start - 1
    # Tokens of the prompt do not count.
    if prefix_len > history_len - tl.load(prompt_len_ptr + req_state_idx):
        return

    bad_word_token_ids_ptr += req_state_idx * bad_word_token_ids_stride + start
    matches = True
    for i in range(prefix_len):
        token = token_at(
            all_token_ids_ptr + req_state_idx * all_token_ids_stride,
            path_tokens_ptr + logits_row * path_tokens_stride,
            total_len,
            history_len - prefix_len + i,
        )
        matches = matches & (token == tl.load(bad_word_token_ids_ptr + i))
    if matches:
        last_token = tl.load(bad_word_token_ids_ptr + prefix_len)
        tl.store(logits_ptr + logits_row * logits_stride + last_token, -float("inf"))
