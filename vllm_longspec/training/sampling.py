# SPDX-License-Identifier: Apache-2.0
"""How a target draws its tokens, and the noise that it must have drawn a known token with.

At temperature T > 0 vLLM draws argmax(logits / T + g) with Gumbel noise g, and the plugin's drafts are ranked with the
same noise (`vllm_longspec/tree/coupling.py`). Of a stored answer the tokens are known and the noise is not. But given a
token and the target's logits the noise has a known distribution, from which `noise_given` draws exactly: the maximum
does not depend on which token has it and is a Gumbel variable at log-sum-exp of the logits; every other token's noised
logit is a Gumbel variable that is cut off at that maximum (Maddison et al., arXiv:1411.0030). Noise of different
positions is independent, also given the whole text. Acceptance of a coupled draft on a stored text is then distributed
as in the engine that wrote it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Logit of a token that cannot be drawn. Finite: some of what is computed with it is multiplied by zero.
FORBIDDEN = -1e9


class Sampling(NamedTuple):
    """Parameters of vLLM's SamplingParams, with its names."""

    temperature: float
    top_k: int = 0  # 0 for none
    top_p: float = 1.0
    min_p: float = 0.0


def truncate(scaled: Tensor, sampling: Sampling) -> Tensor:
    """Takes improbable tokens out of logits / T, [..., vocabulary], in vLLM's order."""
    if sampling.min_p:
        cutoff = scaled.amax(-1, keepdim=True) + math.log(sampling.min_p)
        scaled = scaled.masked_fill(scaled < cutoff, FORBIDDEN)
    if sampling.top_k:
        top_k = min(sampling.top_k, scaled.shape[-1])
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k, -1).values[..., -1:], FORBIDDEN)
    if sampling.top_p < 1.0:
        probabilities, tokens = scaled.softmax(-1).sort(-1, descending=True)
        is_kept = probabilities.cumsum(-1) - probabilities < sampling.top_p
        is_kept = torch.zeros_like(is_kept).scatter(-1, tokens, is_kept)
        scaled = scaled.masked_fill(~is_kept, FORBIDDEN)
    return scaled


def lower(scaled: Tensor, sampling: Sampling) -> Tensor:
    """What the plugin adds noise to instead of the draft's logits / T, [..., vocabulary]."""
    from vllm import SamplingParams

    from vllm_longspec.tree.coupling import CUTOFF_WIDTH, log_cutoff

    cutoff = log_cutoff(SamplingParams(**sampling._asdict()))
    above = scaled - scaled.amax(-1, keepdim=True) - cutoff
    return scaled + nn.functional.logsigmoid(above / CUTOFF_WIDTH)


def noise_given(scaled: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Gumbel noise g, distributed as when argmax(scaled + g) turned out to be these tokens.

    Args:
        scaled: [rows, vocabulary] the target's logits / T after `truncate`; `FORBIDDEN` ones had any noise
        tokens: int64 [rows], not forbidden
        generator: on the device of `scaled`

    Returns:
        float64 [rows, vocabulary]
    """
    scaled = scaled.double()
    exponential = torch.empty_like(scaled).exponential_(generator=generator)
    noise = -exponential.log()
    # Of the rows' highest noised logits.
    highest = torch.empty_like(scaled[:, :1]).exponential_(generator=generator)
    highest = scaled.logsumexp(-1, keepdim=True) - highest.log()
    cut_off = -torch.logaddexp(-highest, -(scaled + noise)) - scaled
    noise = torch.where(scaled > FORBIDDEN, cut_off, noise)
    return noise.scatter(-1, tokens[:, None], highest - scaled.gather(-1, tokens[:, None]))
