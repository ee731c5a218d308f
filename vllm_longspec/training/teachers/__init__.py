# SPDX-License-Identifier: Apache-2.0
"""What a draft is trained with: the frozen target's last K and V, and its hidden states at supervised rows."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Sample(NamedTuple):
    """One text, as the target reads it."""

    input_ids: Tensor  # int64 [num_tokens]
    loss_mask: Tensor  # bool [num_tokens], true where a token is predicted from the one before; false at 0
    positions: Tensor  # int64 [num_tokens], increasing; those of anchor-offset training leave some out

    @property
    def rows(self) -> Tensor:
        """int64 [num_rows], the indices from which supervised tokens are predicted."""
        return self.loss_mask.nonzero()[:, 0] - 1


class Lesson(NamedTuple):
    """What the target computed for a sample."""

    sample: Sample
    keys: Tensor  # [num_tokens, num_kv_heads, head_size] of the last layer, rotated
    values: Tensor  # [num_tokens, num_kv_heads, head_size]
    # [num_rows, hidden_size] what the head multiplies at `sample.rows`: after the final norm
    hidden: Tensor


class TeacherError(ValueError):
    """What runs in the background has failed; in one line, with the way out."""


class Teacher(Protocol):
    """A frozen target. Lessons come in the order of the samples; it may work ahead, in bounded memory."""

    def teach(self, samples: Iterable[Sample]) -> Iterator[Lesson]: ...

    def teach_batches(self, batches: Iterable[Sequence[Sample]]) -> Iterator[Lesson]:
        """As `teach`, but what is computed together is of one batch where rounding depends on it: a run that is
        resumed begins with a batch."""
        ...

    def close(self) -> None:
        """Ends what the teacher runs in the background."""
