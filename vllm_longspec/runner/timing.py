# SPDX-License-Identifier: Apache-2.0
"""Times the CUDA graphs of an engine right after they were captured, for `vllm_longspec/scheduling/step_times.py`.

Every rank replays the same graphs in the same order, since they contain collectives; the clock of the first decides.
As in vLLM's own dummy runs, no request is in the batch: slots of the cache are padding, to which nothing is written,
and block tables name blocks that are only read.
"""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.worker.gpu.input_batch import InputBatch, set_dummy_context

from vllm_longspec.options import options_of
from vllm_longspec.runner.graphs import has_graphs, run_in_larger_graphs
from vllm_longspec.runner.speculator import TreeSpeculator
from vllm_longspec.runner.times_file import TimesFile, what_times_depend_on
from vllm_longspec.scheduling.schedule import nodes_by_batch_size
from vllm_longspec.scheduling.step_times import Curve, StepTimes

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.worker_base import WorkerBase

# A child of vLLM's logger, so that vLLM's logging configuration applies.
logger = init_logger(f"vllm.{__name__}")

_T = TypeVar("_T")

# Replays of each graph, of which the median counts, and before them.
REPLAYS, WARM_UP = 5, 1
# The longest context with which graphs are timed, in tokens of a request, and the largest batch.
CONTEXT, CONTEXT_BATCH = 16384, 4
# Batch sizes are powers of two, one between two of them, and as many more as are off the line by more than this share
# of the time. GEMMs may take longer with few rows of a tile than with all of them: a step of Llama-3-8B with weights
# of fp8 takes 3.4 ms with 16 rows on an H200, 4.3 with 20 and 3.6 with 64.
OFF_LINE = 0.03
# Share of a graph's time by which a larger one has to be faster to run its batches, more than noise.
GAIN = 0.05


@torch.inference_mode()
def time_steps(worker: "WorkerBase") -> StepTimes | None:
    """The times of the first rank, from its cache or measured now; None without full CUDA graphs.

    Called on every rank, after vLLM has captured the graphs.
    """
    assert worker.model_runner is not None
    runner: GPUModelRunner = worker.model_runner
    group = get_tp_group()
    first = group.is_first_rank
    file = TimesFile(what_times_depend_on(runner.vllm_config)) if first else None
    times = group.broadcast_object(_of_an_earlier_start(runner, file) if file is not None else None, src=0)
    if times is None:
        times = _measure(runner, file)
    elif file is not None:
        logger.info("The times of steps are those of an earlier start (%s).", file.path)
    if times is not None and runner.cudagraph_manager is not None:
        run_in_larger_graphs(runner.cudagraph_manager, times.larger)
    return times


def _of_an_earlier_start(runner: "GPUModelRunner", file: TimesFile) -> StepTimes | None:
    """The times in the file; None if there are none, or if they are of other graphs, which is warned of."""
    times = file.read()
    # An edited file, or one that another commit of this version wrote.
    if times is not None and not has_graphs(runner.cudagraph_manager, times.larger):
        file.warn("they are of other CUDA graphs")
        return None
    return times


def _measure(runner: "GPUModelRunner", file: TimesFile | None) -> StepTimes | None:
    """As `time_steps`, measured now and written to the file, which only the first rank has."""
    start = time.perf_counter()
    times = get_tp_group().broadcast_object(StepTimer(runner).times(), src=0)
    if file is not None and times is None:
        logger.info(
            "Steps are not timed, since neither target nor draft run in full CUDA graphs: their costs are those of an "
            "H200."
        )
    elif file is not None and times is not None:
        logger.info("Timing the steps took %.1f s; the times are kept in %s.", time.perf_counter() - start, file.path)
        logger.debug("Times of steps: %s", times.to_json())
        file.write(times)
    return times


class StepTimer:
    def __init__(self, runner: "GPUModelRunner"):
        config = runner.vllm_config.speculative_config
        options = options_of(config)
        assert config is not None and options is not None and isinstance(runner.speculator, TreeSpeculator)
        self.runner = runner
        self.speculator = runner.speculator
        # vLLM has already seeded the device's own.
        self.generator = torch.Generator(runner.device)
        self.choices = nodes_by_batch_size(config, runner.max_num_reqs, options.chooses_nodes)
        self.graph_times: dict[BatchExecutionDescriptor, float] = {}

    def times(self) -> StepTimes | None:
        """None if plain decoding or every number of nodes lacks graphs."""
        verify: dict[int, list[tuple[int, float]]] = {}
        draft: dict[int, list[tuple[int, float]]] = {}
        read: dict[int, list[tuple[int, float]]] = {}
        larger: dict[int, list[tuple[int, int]]] = {}
        for number in sorted(set().union(*self.choices[1:])):
            sizes = [size for size in self._sizes(number) if self._has_graphs(size, number)]
            if not sizes:
                if number == 0:
                    return None
                continue
            points = self._verification_times(number, sizes)
            of_graph = {self._num_reqs(size, number): time for size, time in points}
            faster = self._faster_graphs(number, points, of_graph)
            if faster:
                larger[number] = list(faster.items())
            taken = {num_reqs: faster.get(num_reqs, num_reqs) for num_reqs in of_graph}
            verify[number] = [(size, of_graph[taken[self._num_reqs(size, number)]]) for size, _ in points]
            if number > 0:
                draft[number] = [(size, self._time_draft(size, number)) for size in sizes]
            without = dict(points)
            read[number] = [
                (size, self._time_token(size, number, without[size])) for size in sizes if size in (1, CONTEXT_BATCH)
            ] or [(sizes[0], self._time_token(sizes[0], number, without[sizes[0]]))]
        # What padding leaves behind in the tables is zero.
        self.runner.block_tables.get_dummy_block_tables(self.runner.max_num_reqs)
        return StepTimes(current_platform.get_device_name(), verify, draft, read, larger) if draft else None

    def _sizes(self, number: int) -> list[int]:
        """Batch sizes for which a number of nodes is timed: powers of two, and the largest that may have it."""
        largest = max(size for size, numbers in enumerate(self.choices) if size > 0 and number in numbers)
        return sorted({*(1 << power for power in range(largest.bit_length())), largest})

    def _verification_times(self, number: int, sizes: list[int]) -> list[tuple[int, float]]:
        """Of these batch sizes and of those in between that `_time_between` adds, each in the smallest graph."""
        coarse = [(size, self._time_graph(size, number)) for size in sizes]
        points = coarse[:1]
        for smaller, larger in pairwise(coarse):
            points += [*self._time_between(number, smaller, larger), larger]
        return points

    def _time_between(
        self, number: int, smaller: tuple[int, float], larger: tuple[int, float]
    ) -> list[tuple[int, float]]:
        """Times of verification for batch sizes between two: the middle, and more where it is off the line."""
        (low, low_time), (high, high_time) = smaller, larger
        size = (low + high) // 2
        if size == low:
            return []
        middle = size, self._time_graph(size, number)
        line = low_time + (high_time - low_time) * (size - low) / (high - low)
        if abs(middle[1] - line) <= OFF_LINE * line:
            return [middle]
        return [*self._time_between(number, smaller, middle), middle, *self._time_between(number, middle, larger)]

    def _time_graph(self, batch_size: int, number: int) -> float:
        """Milliseconds of verification in the smallest graph that has room for the batch, which is timed once."""
        graph = self._graph(batch_size, number)
        if graph not in self.graph_times:
            # What is timed next depends on it, so all ranks have to have the same.
            self.graph_times[graph] = self._agreed(self._time_verification(batch_size, number))
        return self.graph_times[graph]

    def _faster_graphs(
        self, number: int, points: list[tuple[int, float]], of_graph: dict[int, float]
    ) -> dict[int, int]:
        """Requests of a graph -> of a larger one that runs its batches in less time, without and with a context.

        Args:
            points: times by batch size.
            of_graph: the same by the requests of the graph, ascending.
        """
        if self.runner.vllm_config.parallel_config.data_parallel_size > 1:
            # Engines that run in step have to choose the same, whatever their clocks say.
            return {}
        if self._graph(1, number).uniform_token_count is None:
            # Batches of any query lengths share these.
            return {}
        expected = Curve(points, rises=False)
        faster: dict[int, int] = {}
        for size in sorted({self._num_reqs(size, number) for size in range(1, points[-1][0] + 1)}):
            others = {other: time for other, time in of_graph.items() if other >= size}
            least = min(others.values())
            if least > (1 - GAIN) * expected(size):
                continue
            # With as little padding as takes no longer.
            other = next(other for other, time in others.items() if time <= (1 + OFF_LINE) * least)
            if other == size:
                # It ran a smaller batch, so it takes less than what is expected of a batch of its size.
                continue
            context = self._context(size, number)
            own, padded = (self._agreed(self._time_verification(size, number, context, of)) for of in (size, other))
            if padded < own:
                faster[size] = other
        return faster

    def _num_reqs(self, batch_size: int, number: int) -> int:
        num_reqs = self._graph(batch_size, number).num_reqs
        assert num_reqs is not None
        return num_reqs

    @staticmethod
    def _agreed(times: _T) -> _T:
        """Those of the first rank."""
        return get_tp_group().broadcast_object(times, src=0)

    def _graph(self, batch_size: int, number: int) -> "BatchExecutionDescriptor":
        manager = self.runner.cudagraph_manager
        assert manager is not None
        return manager.dispatch(
            batch_size, batch_size * (1 + number), uniform_token_count=1 + number, num_active_loras=0
        )

    def _has_graphs(self, batch_size: int, number: int) -> bool:
        if self.runner.cudagraph_manager is None:
            return False
        graph = self._graph(batch_size, number)
        # Graphs of any number of tokens have no trees.
        has_graph = graph.cg_mode == CUDAGraphMode.FULL and (number == 0 or graph.uniform_token_count == 1 + number)
        return has_graph and (number == 0 or self.speculator.graphs.find(batch_size, number) is not None)

    def _time_verification(self, batch_size: int, number: int, context: int = 0, graph_of: int | None = None) -> float:
        """Milliseconds of the target's forward pass, head and greedy sampling.

        Args:
            context: cached tokens of each request.
            graph_of: the batch size whose graph runs it; by default its own.
        """
        runner, graph = self.runner, self._graph(graph_of or batch_size, number)
        manager = runner.cudagraph_manager
        assert manager is not None and graph.num_reqs is not None
        # The steps of vLLM's dummy runs, which cannot be asked for a number of rows a request.
        batch = InputBatch.make_dummy(graph.num_reqs, graph.num_tokens, runner.input_buffers, is_padding=False)
        # Different tokens, so that a mixture of experts reads as many as with texts; the same on every rank.
        batch.input_ids.random_(0, runner.vocab_size, generator=self.generator.manual_seed(0))
        block_tables, slot_mappings = runner.prepare_dummy_attn(batch)
        if context:
            set_dummy_context(
                batch,
                runner.block_tables,
                context,
                runner.kv_cache_config.num_blocks,
                runner.max_model_len,
                input_block_tables=block_tables,
            )
            # The others are padding.
            batch.seq_lens[batch_size:] -= context
        runner.model_state.prepare_attn(
            batch,
            graph.cg_mode,
            block_tables,
            slot_mappings,
            runner.attn_groups,
            runner.kv_cache_config,
            for_capture=True,
        )
        # An observer has nobody to look at. What it takes, now and then, is in the proposer's model of the cost.
        self.speculator.tree_batch.idx_mapping.fill_(-1)
        num_rows = batch_size * (1 + number)

        def replay() -> None:
            hidden_states = manager.run_fullgraph(graph)
            if isinstance(hidden_states, tuple):
                hidden_states = hidden_states[0]
            assert isinstance(hidden_states, torch.Tensor)
            logits = runner.model.compute_logits(hidden_states[:num_rows])
            # What sampling does at least with every row. With tensor parallelism not every rank may have the logits.
            if logits is not None:
                logits.float().argmax(dim=-1)

        return time_of(replay)

    def _time_token(self, batch_size: int, number: int, without: float) -> float:
        """Milliseconds that a cached token adds; `without` is the time of the same graph without a context."""
        context = self._context(batch_size, number)
        if context <= 0:
            return 0.0
        time = self._time_verification(batch_size, number, context)
        return max(0.0, time - without) / (batch_size * context)

    def _context(self, batch_size: int, number: int) -> int:
        """The most cached tokens of each request that are timed, 0 if the cache has room for none."""
        cache = self.runner.kv_cache_config.num_blocks * self.runner.block_tables.block_sizes[0]
        return max(0, min(CONTEXT, self.runner.max_model_len - (1 + number), cache // batch_size))

    def _time_draft(self, batch_size: int, number: int) -> float:
        """Milliseconds of a draft of padding requests, for which nothing is written, as when it was captured."""
        graph = self.speculator.graphs.find(batch_size, number)
        assert graph is not None
        self.speculator.idx_mapping.fill_(-1)
        return time_of(lambda: self.speculator.graphs.run_fullgraph(graph))


def time_of(run: Callable[[], object]) -> float:
    """Median milliseconds of `run` on the GPU, one after the other without a wait in between."""
    for _ in range(WARM_UP):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    events[-1].synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in pairwise(events))
