# SPDX-License-Identifier: Apache-2.0
"""The noise with which the target will draw, for drafts that are ranked with it (docs/design.md#coupled-drafts).

At temperature T > 0 vLLM draws argmax(logits / T + g), where the Gumbel noise g is a function of the request's seed,
the position of the row and the token. All three are known while a tree is drafted, and g is the same for all nodes at
one depth. A draft that ranks tokens by its own logits / T + g therefore ranks first what the target will draw if it
agrees with the draft, instead of what is most probable before anything is drawn. This is Gumbel coupling (Daliri et
al., arXiv:2408.07978) carried over to trees. It is exact because the target samples every node itself: a draft only
proposes, and may know anything. (Rejection sampling, which accepts with probability p / q, needs independent draws.)

Top-k, top-p and min-p take improbable tokens out of the target's draw, however high their noise. Which ones depends on
the target's probabilities. The draft's differ, so it does not leave such tokens out but lowers their rank: by
log(sigmoid(x / CUTOFF_WIDTH)) for a token that is exp(x) times as probable as the one at the cutoff.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.gumbel import gumbel_noised_argmax

if TYPE_CHECKING:
    from vllm import SamplingParams

CUTOFF_WIDTH = 0.3
# As kernels read it.
_WIDTH = tl.constexpr(CUTOFF_WIDTH)


def log_cutoff(params: "SamplingParams") -> float:
    """Natural logarithm of the cutoff, relative to the most probable token; minus infinity if nothing is taken out.

    Fitted to the acceptance of the shipped pair (docs/performance.md#coupled-drafts).
    """
    cutoff = max((1.0 - params.top_p) ** 2, params.min_p)
    if params.top_k > 0:
        cutoff = max(cutoff, params.top_k**-2)
    return math.log(cutoff) if cutoff > 0.0 else -math.inf


class TargetNoise(NamedTuple):
    """What the target's draws depend on beside its logits, by req_state_idx."""

    temperature: torch.Tensor  # float32 [max_num_reqs]; no noise at 0
    seeds: torch.Tensor  # int64 [max_num_reqs]
    log_cutoffs: torch.Tensor  # float32 [max_num_reqs] of `log_cutoff`
    use_fp64: bool  # vLLM's `use_fp64_gumbel`


class LevelNoise(NamedTuple):
    """The noise of one level of the trees, or of the roots."""

    noise: TargetNoise
    idx_mapping: torch.Tensor  # int64 [num_reqs] req_state_idx; -1 for padding, which has no noise
    root_positions: torch.Tensor  # int64 [num_reqs]
    depth: int  # of the nodes whose children are ranked; 0 for the roots

    def of_requests(self, start: int, end: int) -> "LevelNoise":
        return self._replace(idx_mapping=self.idx_mapping[start:end], root_positions=self.root_positions[start:end])


@triton.jit
def level_noise(
    tokens,  # [n] token ids of the target
    request,
    depth,
    temperature_ptr,  # float32 [max_num_reqs]
    seeds_ptr,  # int64 [max_num_reqs]
    log_cutoffs_ptr,  # float32 [max_num_reqs]
    idx_mapping_ptr,  # int64 [num_reqs]
    root_positions_ptr,  # int64 [num_reqs]
    USE_FP64: tl.constexpr,
):
    """What `add_noise` adds at all nodes of a request at one depth.

    Returns noise, float32 [n], the inverse of the temperature, and the cutoff. At temperature 0 and for padding the
    inverse is 0 and means none.
    """
    req_state_idx = tl.load(idx_mapping_ptr + request)
    is_request = req_state_idx >= 0
    temperature = tl.load(temperature_ptr + req_state_idx, mask=is_request, other=0.0)
    log_cutoff = tl.load(log_cutoffs_ptr + req_state_idx, mask=is_request, other=float("-inf"))
    noise = tl.zeros([tokens.shape[0]], tl.float32)
    inverse = 0.0
    if temperature != 0.0:
        seed = tl.load(seeds_ptr + req_state_idx, mask=is_request, other=0)
        # vLLM's noise belongs to the row at which is sampled, which is the parent's.
        position = tl.load(root_positions_ptr + request) + depth
        noise = _noise(tokens, seed, position, USE_FP64)
        inverse = 1.0 / temperature
    return noise, inverse, log_cutoff


@triton.jit
def add_noise(
    logits,  # float32 [n]
    mask,  # [n]; -inf is returned elsewhere
    noise,  # float32 [n], and what `level_noise` returns with it
    inverse,
    log_cutoff,
    logit_max_ptr,  # float32 [num_maxima], of which the greatest is the row's highest logit; not read without a cutoff
    num_maxima,
    MAXIMA_BLOCK: tl.constexpr,
):
    """logits / T + g, float32 [n], lower past the cutoff; without noise, the logits themselves."""
    if inverse != 0.0:
        scaled = logits * inverse
        noised = scaled + noise
        if log_cutoff > float("-inf"):
            index = tl.arange(0, MAXIMA_BLOCK)
            logit_max = tl.load(logit_max_ptr + index, mask=index < num_maxima, other=float("-inf"))
            above = (scaled - tl.max(logit_max, axis=0) * inverse - log_cutoff) / _WIDTH
            # The logarithm of the sigmoid, finite for any finite logit.
            noised += tl.minimum(above, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(above)))
        logits = tl.where(mask, noised, float("-inf"))
    return logits


@triton.jit
def _noise(
    tokens,  # [n]
    seed,  # int64, or [n]
    position,  # int64, or [n]
    USE_FP64: tl.constexpr,
):
    """vLLM's Gumbel noise, float32 [n], by vLLM's own function: the maximum of one noised zero is the noise."""
    zeros = tl.zeros([1, tokens.shape[0]], tl.float32)
    noise, _ = gumbel_noised_argmax(zeros, tokens[None, :], zeros == 0.0, seed, position, 1.0, False, USE_FP64)
    return noise.to(tl.float32)


@triton.jit
def has_cutoff(request, temperature_ptr, log_cutoffs_ptr, idx_mapping_ptr):
    """Whether `add_noise` reads `logit_max_ptr` for the request."""
    req_state_idx = tl.load(idx_mapping_ptr + request)
    is_request = req_state_idx >= 0
    temperature = tl.load(temperature_ptr + req_state_idx, mask=is_request, other=0.0)
    log_cutoff = tl.load(log_cutoffs_ptr + req_state_idx, mask=is_request, other=float("-inf"))
    return (temperature != 0.0) & (log_cutoff > float("-inf"))


def noised_logits(
    logits: torch.Tensor,  # [num_reqs * width, vocab_size]
    level: LevelNoise,
    token_ids: torch.Tensor | None,  # int64 [vocab_size] the target's id of each token; None for the same
) -> torch.Tensor:  # float32 [num_reqs * width, vocab_size]
    """As `add_noise` for every row. For the interpreter: one program for all requests, and it waits for the device."""
    num_reqs, vocab_size = level.idx_mapping.shape[0], logits.shape[1]
    temperature = level.noise.temperature[level.idx_mapping].masked_fill(level.idx_mapping < 0, 0.0)
    drawn = temperature.nonzero()[:, 0]
    if len(drawn) == 0:
        return logits.float()
    noised = logits.to(torch.float32, copy=True).view(num_reqs, -1, vocab_size)
    tokens = torch.arange(vocab_size, device=logits.device) if token_ids is None else token_ids
    seeds = level.noise.seeds[level.idx_mapping[drawn]].repeat_interleave(vocab_size)
    positions = (level.root_positions[drawn] + level.depth).repeat_interleave(vocab_size)
    noise = torch.empty(len(drawn), 1, vocab_size, device=logits.device)
    _noise_kernel[(1,)](
        noise,
        tokens.repeat(len(drawn)),
        seeds,
        positions,
        noise.numel(),
        USE_FP64=level.noise.use_fp64,
        BLOCK=triton.next_power_of_2(noise.numel()),
    )
    drawn_logits = noised[drawn] / temperature[drawn, None, None]
    above = drawn_logits - drawn_logits.amax(dim=-1, keepdim=True)
    above -= level.noise.log_cutoffs[level.idx_mapping[drawn]][:, None, None]
    noised[drawn] = drawn_logits + noise + nn.functional.logsigmoid(above / CUTOFF_WIDTH)
    return noised.flatten(0, 1)


@triton.jit
def _noise_kernel(
    noise_ptr,  # float32 [n]
    tokens_ptr,  # int64 [n]
    seeds_ptr,  # int64 [n]
    positions_ptr,  # int64 [n]
    num_elements,
    USE_FP64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.arange(0, BLOCK)
    mask = index < num_elements
    token = tl.load(tokens_ptr + index, mask=mask, other=0)
    seed = tl.load(seeds_ptr + index, mask=mask, other=0)
    position = tl.load(positions_ptr + index, mask=mask, other=0)
    tl.store(noise_ptr + index, _noise(token, seed, position, USE_FP64), mask=mask)
