# SPDX-License-Identifier: Apache-2.0
"""Runs real vLLM engines for the tests, one process each: they get requests and give back tokens."""

import functools
import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from tests.process import run_alone


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    # Keyword arguments of vLLM's SamplingParams, as sorted pairs so that a request can be hashed.
    sampling: tuple[tuple[str, Any], ...] = ()


def request(prompt: Sequence[int], **sampling: Any) -> Request:
    return Request(tuple(prompt), tuple(sorted(sampling.items())))


@dataclass
class Result:
    # For every batch, for every request (for every output of it, if it asks for n of them): token ids, what ended it.
    tokens: list[list[list[int]]]
    finish_reasons: list[list[str]]
    # For every batch and request that asked for them: per token {token id: log-probability}.
    logprobs: list[list[list[dict[str, float]] | None]]
    # For every batch and request that asked for them: per prompt token but the first the same.
    prompt_logprobs: list[list[list[dict[str, float]] | None]]
    # For every batch, for every request: tokens a verified step, None without such a step or if not asked for with
    # `per_request_spec_decode_metrics`.
    acceptance_lengths: list[list[float | None]]
    # Accepted nodes at depth 1, 2, ..; empty without a draft.
    accepted_by_depth: list[float] = field(default_factory=list)
    # vLLM's own counters at the end.
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def num_drafts(self) -> float:
        return self.metrics["vllm:spec_decode_num_drafts"]

    @property
    def num_draft_tokens(self) -> float:
        return self.metrics["vllm:spec_decode_num_draft_tokens"]

    @property
    def num_accepted_tokens(self) -> float:
        return self.metrics["vllm:spec_decode_num_accepted_tokens"]

    @property
    def acceptance_length(self) -> float:
        return 1 + self.num_accepted_tokens / self.num_drafts


SETTINGS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 8,
    "disable_log_stats": False,
    "enable_prefix_caching": True,
    # A small cache: several tests may share a GPU, and Triton's interpreter copies what a kernel is given.
    "kv_cache_memory_bytes": 32 << 20,
    "gpu_memory_utilization": 0.1,
}
ACCEPTED_BY_DEPTH = "vllm:spec_decode_num_accepted_tokens_per_pos"
CPU_SETTINGS: dict[str, Any] = {"distributed_executor_backend": "uni"}


@functools.cache
def _generate(specification: str) -> Result:
    environment = {}
    if torch.cuda.is_available() and json.loads(specification)["settings"].get("tensor_parallel_size", 1) > 1:
        # CUDA does not outlive a fork, and vLLM does not notice that this process has asked for it.
        environment["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    result, _ = run_alone(_run_engine, specification, environment=environment)
    return Result(**result)


def generate(model: Path, batches: Sequence[Sequence[Request] | Path], **settings: Any) -> Result:
    """Generates every batch with one engine; the same call is answered from memory.

    Where a model stands in the place of a batch, the engine goes on with that model's weights.
    """
    specification = {
        "settings": {"model": str(model), **settings},
        "batches": [str(batch) if isinstance(batch, Path) else [asdict(each) for each in batch] for batch in batches],
    }
    return _generate(json.dumps(specification, sort_keys=True))


def _run_engine(specification_json: str) -> dict[str, Any]:
    """Returns what `Result` has."""
    specification = json.loads(specification_json)
    with running(specification["settings"]) as llm:
        return _generate_batches(llm, specification["batches"])


def run_batches(settings: dict[str, Any], batches: Sequence[Sequence[Request]]) -> dict[str, Any]:
    """The same in this process, which should be one of its own (tests/process.py)."""
    return _run_engine(
        json.dumps({"settings": settings, "batches": [[asdict(each) for each in one] for one in batches]})
    )


def _generate_batches(llm: Any, batches: list[Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    columns: dict[str, list] = {
        field.name: [] for field in fields(Result) if field.name not in ("metrics", "accepted_by_depth")
    }
    for batch in batches:
        if isinstance(batch, str):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": batch})
            # What is cached was computed with the weights before.
            assert llm.reset_prefix_cache()
            continue
        outputs = llm.generate(
            [{"prompt_token_ids": each["prompt"]} for each in batch],
            [SamplingParams(**sampling_of(each["sampling"])) for each in batch],
            use_tqdm=False,
        )
        completions = [completion for output in outputs for completion in output.outputs]
        columns["tokens"].append([list(completion.token_ids) for completion in completions])
        columns["finish_reasons"].append([completion.finish_reason for completion in completions])
        columns["logprobs"].append([_logprobs(completion.logprobs) for completion in completions])
        # The first token of a prompt has none.
        columns["prompt_logprobs"].append(
            [_logprobs(output.prompt_logprobs and output.prompt_logprobs[1:]) for output in outputs]
        )
        columns["acceptance_lengths"].append([_acceptance_length(completion) for completion in completions])
    found = llm.get_metrics()
    metrics = {metric.name: metric.value for metric in found if hasattr(metric, "value")}
    (by_depth,) = [metric.values for metric in found if metric.name == ACCEPTED_BY_DEPTH] or [[]]
    return {**columns, "metrics": metrics, "accepted_by_depth": list(by_depth)}


@contextmanager
def running(settings: dict[str, Any]) -> Iterator[Any]:
    """vLLM's LLM with these settings on top of those of all tests, for as long as the context lasts."""
    from vllm import LLM

    if "async_scheduling" in settings:
        # vLLM's CPU platform turns it off whatever the user says, and spawns ranks instead of forking them.
        importlib.import_module("benchmarks.cpu_async")
    defaults = SETTINGS if torch.cuda.is_available() else SETTINGS | CPU_SETTINGS
    llm = LLM(**(defaults | settings))
    try:
        yield llm
    finally:
        # A process that only ends terminates the ranks wherever they are: one of them in the middle of a draft leaves
        # the other's GPU waiting for it for ever.
        llm.llm_engine.engine_core.shutdown()


def sampling_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    from vllm.sampling_params import StructuredOutputsParams

    sampling = {"detokenize": False, **dict(pairs)}
    if "logit_bias" in sampling:
        # JSON has no integer keys.
        sampling["logit_bias"] = {int(token): bias for token, bias in sampling["logit_bias"].items()}
    if "structured_outputs" in sampling:
        sampling["structured_outputs"] = StructuredOutputsParams(**sampling["structured_outputs"])
    return sampling


def _logprobs(positions: Any) -> list[dict[str, float]] | None:
    if positions is None:
        return None
    return [{str(token): value.logprob for token, value in position.items()} for position in positions]


def _acceptance_length(completion: Any) -> float | None:
    metrics = completion.spec_decode_metrics
    if metrics is None or sum(metrics.histogram) == 0:
        return None
    return 1 + sum(length * count for length, count in enumerate(metrics.histogram)) / sum(metrics.histogram)
