# SPDX-License-Identifier: Apache-2.0
"""The choice of a level's nodes as its definition says: all pairs of parent and token, sorted."""

import math

import torch


def token_log_probs(
    logits: torch.Tensor,  # [vocab_size]
) -> list[float]:
    """In float64. A row that is not sound says nothing: minus infinity for every token."""
    values = logits.double()
    if not (values.max() < math.inf) or values.isnan().any() or values.max() == -math.inf:
        return [-math.inf] * len(values)
    return values.log_softmax(dim=0).tolist()


def best_children(
    logits: torch.Tensor,  # [num_reqs * width, vocab_size]
    parent_log_probs: torch.Tensor,  # [num_reqs, width]
    num_children: int,
) -> list[list[tuple[int, int, float]]]:
    """Parent, token and cumulative log-probability of each request's best pairs.

    Equals are sorted by parent, then by logit, highest first and NaN as minus infinity, then by token.
    """
    num_reqs, width = parent_log_probs.shape
    result = []
    for request in range(num_reqs):
        pairs = []
        for parent in range(width):
            row = logits[request * width + parent]
            before = float(parent_log_probs[request, parent])
            for token, log_prob in enumerate(token_log_probs(row)):
                logit = float(row[token])
                pairs.append((-(before + log_prob), parent, math.inf if math.isnan(logit) else -logit, token))
        result.append([(parent, token, -cost) for cost, parent, _, token in sorted(pairs)[:num_children]])
    return result
