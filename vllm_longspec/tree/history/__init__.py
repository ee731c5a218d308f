# SPDX-License-Identifier: Apache-2.0
"""Sampling that reads the tokens before: the history of a node is the prefix, the root and the node's ancestors.

vLLM's kernels take row i of a request to follow its rows 1 to i - 1, and find them at fixed places before row i. The
rows of a path are anywhere before its last one, so no argument makes those kernels follow it. The states of this
package inherit all of their bookkeeping, which is of tokens that were emitted, and replace `apply`.
"""

from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_longspec.tree.history.bad_words import PathBadWordsState
from vllm_longspec.tree.history.penalties import PathPenaltiesState
from vllm_longspec.tree.history.thinking_budget import PathThinkingBudgetState
from vllm_longspec.tree.state import TreeState


def read_history_along_paths(sampler: Sampler, tree_state: TreeState, max_depth: int) -> None:
    """Lets penalties, bad words and thinking budgets of `sampler` read the path of every row.

    Requests with one row, the last token of their prompt or of a step without drafts, are sampled as before.

    Args:
        max_depth: depth of the deepest node of any tree.
    """
    sampler.penalties_state = PathPenaltiesState(sampler.penalties_state, tree_state, max_depth)
    sampler.thinking_budget_state = PathThinkingBudgetState(sampler.thinking_budget_state, tree_state, max_depth)
    processors: list[LogitsProcessor] = []
    for processor in sampler.logits_processors:
        if isinstance(processor, PenaltiesState):
            processors.append(sampler.penalties_state)
        elif isinstance(processor, BadWordsState):
            processors.append(PathBadWordsState(processor, tree_state, max_depth))
        else:
            processors.append(processor)
    sampler.logits_processors = processors
