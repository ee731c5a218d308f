# SPDX-License-Identifier: Apache-2.0
"""Which tokens are to be expected because others like them have come up (docs/design.md#a-head-that-learns).

Tokens are alike that share features: the script of their letters, and three characters in a row. Of each feature the
share is known of tokens that have been seen lately, and a token is as likely as its features' mean share. So a text in
another script brings all tokens of the script, and one in another language those that look like it, before they have
come up.

All is done in integers, without atomics: with tensor parallelism every rank expects the same.
"""

import unicodedata
from collections.abc import Sequence

import torch
from torch import nn

NGRAM = 3
# Of tokens that are equally likely to be in use, the one of rank n among N is expected N / (n * SCALE) times: Zipf's
# law, with about the harmonic number of a vocabulary, so that all tokens together are expected once each.
SCALE = 16


def features_of(text: str) -> set[str]:
    """A token's runs of three characters, or its whole text if it is shorter, and the script of its first letter."""
    ngrams = {text[start : start + NGRAM] for start in range(max(1, len(text) - NGRAM + 1))}
    # A script is the first word of its characters' names. Signs of Indic scripts are marks, not letters.
    letters = (character for character in text if unicodedata.category(character)[0] in "LM")
    names = (unicodedata.name(letter, "").split(" ")[0] for letter in letters)
    return ngrams | {f"script {next(names, 'of none')}"}


class Resemblance(nn.Module):
    """How often tokens are to be expected, by what those that share features with them were counted."""

    # A module with buffers, as vLLM keeps buffers when weights are discarded (sleep level 2).
    tokens: torch.Tensor  # int64 [num_pairs] of pairs of token and feature, in the order of features
    feature_ends: torch.Tensor  # int64 [num_features] where each one's pairs end in `tokens`
    features: torch.Tensor  # int64 [num_pairs] of the same pairs, in the order of tokens
    token_ends: torch.Tensor  # int64 [vocab_size] where each one's pairs end in `features`
    num_tokens: torch.Tensor  # int64 [num_features]
    divisors: torch.Tensor  # int64 [vocab_size] what a token's sum of shares is divided by

    def __init__(
        self,
        texts: Sequence[str],  # of each token, in the order of ids: from frequent to rare
        device: torch.device,
    ):
        super().__init__()
        ids: dict[str, int] = {}
        by_token = [[ids.setdefault(feature, len(ids)) for feature in sorted(features_of(text))] for text in texts]
        sizes = torch.tensor([len(features) for features in by_token])
        features = torch.tensor([feature for features in by_token for feature in features])
        ranks = torch.arange(1, len(texts) + 1)
        num_tokens = torch.bincount(features, minlength=len(ids))
        order = features.argsort(stable=True)
        for name, value in (
            ("tokens", ranks.repeat_interleave(sizes)[order] - 1),
            ("feature_ends", num_tokens.cumsum(0)),
            ("features", features),
            ("token_ends", sizes.cumsum(0)),
            ("num_tokens", num_tokens),
            ("divisors", SCALE * sizes * ranks),
        ):
            self.register_buffer(name, value.to(device), persistent=False)

    def expected(
        self,
        counts: torch.Tensor,  # int64 [vocab_size]
        unit: int,  # what a token was counted that has been seen; of more, no more matters
    ) -> torch.Tensor:  # int64 [vocab_size]
        """How often each token is to be expected, in the unit of `counts`."""
        seen = counts.clamp(max=unit)
        # From 0 to `unit`.
        shares = _sums(seen[self.tokens], self.feature_ends) // self.num_tokens
        return _sums(shares[self.features], self.token_ends) * counts.shape[0] // self.divisors


def _sums(
    values: torch.Tensor,  # int64 [num_pairs]
    ends: torch.Tensor,  # int64 [num_segments], ascending
) -> torch.Tensor:  # int64 [num_segments]
    """Sums of consecutive segments, none of them empty."""
    return values.cumsum(0)[ends - 1].diff(prepend=ends.new_zeros(1))
