# SPDX-License-Identifier: Apache-2.0
"""vLLM's schedulers for requests with trees: lists of nodes are cut to what fits the step's token budget and KV cache.

Uncut, the trees of the first requests would take budget and blocks from all others; see docs/design.md#how-many-nodes.
Any prefix of a list is a tree (`vllm_longspec/tree/order.py`), and the empty one is plain decoding.
"""

from collections.abc import Callable, Iterable
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request, RequestStatus
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_longspec import proposers
from vllm_longspec.compat.differences import grammar_mask_stride
from vllm_longspec.options import options_of
from vllm_longspec.scheduling.adaptive import AdaptiveVerification, NodesByCost
from vllm_longspec.scheduling.cost import cost_of_steps
from vllm_longspec.scheduling.grammar import FillBudget, TreeGrammars
from vllm_longspec.scheduling.metrics import TreeDecodingStats
from vllm_longspec.scheduling.schedule import BATCH_ROWS, nodes_by_batch_size, within_rows
from vllm_longspec.scheduling.step_times import describe_numbers, describe_times, times_of
from vllm_longspec.tree.state import NO_TOKEN
from vllm_longspec.tree.synthetic_rates import accepted_by_nodes

if TYPE_CHECKING:
    from vllm.config import SchedulerConfig

    _Base = Scheduler
else:
    _Base = object

# A child of vLLM's logger, so that vLLM's logging configuration applies.
logger = init_logger(f"vllm.{__name__}")

# Tokens of context of each request for which start-up says how many nodes are verified.
LOGGED_CONTEXT = 4096
# Part of the rows beside the running requests' own that nodes get at least while prompts want them too.
MIN_NODE_SHARE = 0.25


def most_nodes(max_nodes: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 0 to `max_nodes` that fits; `fits` must be monotonic, and 0 always fits."""
    if fits(max_nodes):
        return max_nodes
    low, high = 0, max_nodes
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class TreeSchedulerMixin(_Base):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        speculative_config = self.vllm_config.speculative_config
        options = options_of(speculative_config)
        assert options is not None and speculative_config is not None
        self.max_depth = options.max_depth
        # With a scheduler for each rank they must all decide the same, whatever their clocks say.
        has_clock = self.parallel_config.distributed_executor_backend != "external_launcher"
        self.grammars = TreeGrammars(
            self.structured_output_manager,
            FillBudget() if has_clock else None,
            grammar_mask_stride(self.vllm_config),
        )
        # Requests of the latest step with masks some of whose nodes were not checked against their grammar.
        self.unchecked: set[str] = set()
        self.chosen: NodesByCost | None = None
        max_batch_size = self.scheduler_config.max_num_seqs
        cost = cost_of_steps(self.vllm_config) if options.chooses_nodes else None
        if cost is not None:
            choices = nodes_by_batch_size(speculative_config, max_batch_size, choose=True)
            # Longer lists would always be cut, to lengths that have no graphs and of which nothing is counted.
            most_rows = self._token_budget()
            known = set().union(*choices)
            if (times := times_of(speculative_config)) is not None:
                # What was timed are CUDA graphs; more rows than the largest has would take longer than that.
                most_rows = min(most_rows, self.vllm_config.compilation_config.max_cudagraph_capture_size or 0)
                if self.vllm_config.model_config.quantization is not None:
                    # The constants, which tell the costs of all others, know weights of two bytes only.
                    known &= {0, *times.numbers()}
            choices = [
                [number for number in numbers if number == 0 or (number in known and size * (1 + number) <= most_rows)]
                for size, numbers in enumerate(choices)
            ]
            self.chosen = (
                AdaptiveVerification(choices, cost, self._num_cached_tokens, options.tree_shape)
                if options.adaptive_verification
                else NodesByCost(
                    choices,
                    cost,
                    self._num_cached_tokens,
                    options.tree_shape,
                    accepted_by_nodes(speculative_config, options.tree_shape, set().union(*choices[1:])),
                )
            )
            # vLLM only ever reads entry `batch_size`.
            table: Any = self.chosen
            self.dynamic_sd_lookup = table
            self._log_choice(self.chosen)
        elif options.chooses_nodes:
            if proposers.setup_of(options.proposer).schedule(self.num_spec_tokens, None) is None:
                self.dynamic_sd_lookup = within_rows(self.num_spec_tokens, BATCH_ROWS, max_batch_size)
            else:
                # Whose batches draft as much as pays, which nothing says.
                self.dynamic_sd_lookup = [0] * (max_batch_size + 1)
            logger.info_once(
                "Steps were not timed, and what a quantised target's cost is not known without: nodes by batch size %s",
                describe_numbers(self.dynamic_sd_lookup),
            )
        elif self.dynamic_sd_lookup is None:
            # Without a table vLLM pads a new decoding request to a whole list of draft tokens, or delays it until they
            # fit. With one it schedules the root alone.
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (max_batch_size + 1)

    def _log_choice(self, chosen: NodesByCost) -> None:
        """Says once what steps cost and how many nodes follow from that."""
        config = self.vllm_config.speculative_config
        options, times = options_of(config), times_of(config)
        assert options is not None and config is not None
        # With adaptive verification a typical one is begun with, whatever is set.
        is_set = config.rejection_sample_method == "synthetic" and not options.adaptive_verification
        context = min(LOGGED_CONTEXT, self.max_model_len // 2)
        numbers = [chosen.best(size, size * context) for size in range(1, len(chosen.choices))]
        logger.info_once(
            "%s. Nodes by batch size at %s acceptance and %d tokens of context: %s",
            "Costs of steps are those of an H200"
            if times is None
            else f"Steps on {times.device}: {describe_times(times, options.tree_shape.num_levels)}",
            "the set" if is_set else "a typical",
            context,
            describe_numbers([0, *numbers]),
        )

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._cut_lists()
        return super().schedule(*args, **kwargs)

    def _cut_lists(self) -> None:
        """Cuts the running requests' lists of nodes to one length at which their rows fit this step."""
        lengths = [len(request.spec_token_ids) for request in self.running if request.spec_token_ids]
        if not lengths:
            return
        chunk = self._chunks()
        max_rows = self._max_node_rows(chunk)
        in_cache = self._fits_in_cache(chunk)
        num_nodes = most_nodes(
            max(lengths), lambda nodes: sum(min(length, nodes) for length in lengths) <= max_rows and in_cache(nodes)
        )
        for request in self.running:
            if len(request.spec_token_ids) > num_nodes:
                # Not in place: requests may share a list of placeholders.
                request.spec_token_ids = request.spec_token_ids[:num_nodes]

    def _max_node_rows(self, chunk: Callable[[Request], int]) -> int:
        """Rows of this step's token budget that nodes may take."""
        budget = self._token_budget()
        # vLLM schedules in this order: what stands before a request with nodes gets all that it asks for.
        last = max(index for index, request in enumerate(self.running) if request.spec_token_ids)
        before, after = self.running[: last + 1], self.running[last + 1 :]
        rest = budget - sum(map(chunk, before)) - len(after)
        wanted = sum(chunk(request) - 1 for request in after) + self._num_waiting_tokens(chunk, rest)
        return max(0, rest - wanted, int(rest * MIN_NODE_SHARE))

    def _num_waiting_tokens(self, chunk: Callable[[Request], int], limit: int) -> int:
        """Tokens that waiting requests can use in this step, at least `limit` if there are so many.

        What is cached, and whether the cache has room for a request, is only known once vLLM schedules it.
        """
        num_running = len(self.running) + self.num_waiting_for_streaming_input
        queues: list[Iterable[Request]] = []
        if self.pause_state != PauseState.PAUSED_ALL:
            queues.append(self.kv_holding_waiting)
        if self.pause_state == PauseState.UNPAUSED:
            queues.append(self.waiting)
        ready = (
            request
            for request in chain.from_iterable(queues)
            if request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        )
        num_tokens = 0
        for request in islice(ready, max(0, self.max_num_active_reqs - num_running)):
            num_tokens += chunk(request)
            if num_tokens >= limit:
                break
        return num_tokens

    def _token_budget(self) -> int:
        return min(self.max_num_scheduled_tokens, self.scheduler_config.max_num_batched_tokens)

    def _chunks(self) -> Callable[[Request], int]:
        """Tokens of a request in this step, without its nodes: 1 if it decodes, or a chunk of its prompt."""
        budget = self._token_budget()
        most = min(self._long_prefill_threshold() or budget, budget)

        def chunk(request: Request) -> int:
            left = request.num_tokens + request.num_output_placeholders - request.num_computed_tokens
            return max(1, min(left, most))

        return chunk

    def _long_prefill_threshold(self) -> int:
        """The most tokens of a prompt in a step, 0 for no limit, as in vLLM's `schedule`."""
        num_requests = sum(self.get_request_counts())
        threshold = self.scheduler_config.long_prefill_token_threshold if num_requests > 1 else 0
        if threshold > 0 and self.adaptive_long_prefill_threshold:
            threshold = max(threshold, self.scheduler_config.max_num_batched_tokens // num_requests)
        return threshold

    def _fits_in_cache(self, chunk: Callable[[Request], int]) -> Callable[[int], bool]:
        """Whether a number of nodes per request has slots without a preemption."""
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        num_rows = self._token_budget() + len(self.running) * (self.block_size + self.num_lookahead_tokens)
        if free * self.block_size >= num_rows:
            return lambda nodes: True
        # (tokens after this step without nodes, nodes, allocated blocks)
        requests = [
            (
                request.num_computed_tokens + chunk(request),
                len(request.spec_token_ids),
                len(self.kv_cache_manager.get_blocks(request.request_id).blocks[0]),
            )
            for request in self.running
        ]

        # Slots that the next draft writes.
        lookahead = self.num_lookahead_tokens

        def fits(nodes: int) -> bool:
            needed = (
                cdiv(min(tokens + min(length, nodes) + lookahead, self.max_model_len), self.block_size) - held
                for tokens, length, held in requests
            )
            return sum(max(0, num_blocks) for num_blocks in needed) <= free

        return fits

    def _num_cached_tokens(self) -> int:
        """Of all decoding requests; a request in its prompt has no draft yet."""
        return sum(
            request.num_computed_tokens
            for request in self.running
            if request.num_computed_tokens >= request.num_prompt_tokens
        )

    # vLLM checks draft tokens against grammars when it gets them, each after the one before it. Here they stay packed
    # with their parents (`vllm_longspec/tree/packing.py`), for the grammar masks of the step that verifies them; vLLM
    # reads no more of them than how many there are.

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Sets the requests' lists of nodes for the next step."""
        for request_id, nodes in zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True):
            request = self.requests.get(request_id)
            if request is not None and not request.is_finished():
                request.spec_token_ids = [] if request.is_prefill_chunk else nodes

    def update_draft_token_ids_in_output(
        self, draft_token_ids: DraftTokenIds, scheduler_output: SchedulerOutput
    ) -> None:
        """Replaces the placeholders of a step that is being executed by the lists of nodes."""
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        for request_id, nodes in zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True):
            if (num_nodes := len(scheduled.get(request_id, ()))) > 0:
                scheduled[request_id] = (nodes + [NO_TOKEN] * num_nodes)[:num_nodes]

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """The masks of all rows of the requests with structured output that decode in this step."""
        if not scheduler_output.has_structured_output_requests:
            return None
        request_ids = [
            request_id
            for request_id in scheduler_output.num_scheduled_tokens
            if (request := self.requests.get(request_id)) is not None
            and request.use_structured_output
            and not request.is_prefill_chunk
        ]
        if not request_ids:
            return None
        masks = self.grammars.masks(self.requests, request_ids, scheduler_output.scheduled_spec_decode_tokens)
        scheduler_output.num_invalid_spec_tokens = masks.num_invalid
        self.unchecked = masks.unchecked
        return GrammarOutput(request_ids, masks.bitmask, masks.num_checked)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        # Nodes that were not checked against a grammar could not be accepted.
        if self.chosen is not None and request_id not in self.unchecked:
            self.chosen.observe(num_draft_tokens, num_accepted_tokens)
        if not self.log_stats:
            return None
        if spec_decoding_stats is None:
            spec_decoding_stats = TreeDecodingStats.new(self.max_depth)
        return super().make_spec_decoding_stats(
            spec_decoding_stats, num_draft_tokens, num_accepted_tokens, num_invalid_spec_tokens, request_id
        )

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        if request.spec_decode_metrics is not None:
            # The histogram ends at the deepest node's depth, the most that a step accepts.
            request.spec_decode_metrics = RequestSpecDecodeMetrics.new(self.max_depth)


class TreeScheduler(TreeSchedulerMixin, Scheduler):
    pass


class AsyncTreeScheduler(TreeSchedulerMixin, AsyncScheduler):
    pass


def scheduler_name(config: "SchedulerConfig") -> str:
    """Qualified name of the scheduler, for `scheduler_cls`."""
    cls: type = AsyncTreeScheduler if config.async_scheduling else TreeScheduler
    return f"{cls.__module__}.{cls.__qualname__}"


def get_scheduler_cls(original: Callable[..., type], self: "SchedulerConfig") -> type:
    """The scheduler's class, without vLLM's warning that custom schedulers are slow."""
    if self.scheduler_cls == scheduler_name(self):
        return AsyncTreeScheduler if self.async_scheduling else TreeScheduler
    return original(self)
