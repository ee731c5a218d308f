# SPDX-License-Identifier: Apache-2.0
"""How fast an engine teaches, beside the same engine's plain prefill:

    python -m benchmarks.training.teacher --shape llama-3-8b-262k --contexts 4096 65536 --out FILE
    python -m benchmarks.training.teacher --target FOLDER --engine '{"tensor_parallel_size": 2}'

Random tokens of each length go through an engine that captures K, V and the hidden states of the supervised rows, with
all that follows until lessons are there (`vllm_longspec/training/teachers/vllm.py`), and through one with the same
options that computes prompts only. A shape stands for a target with random weights. Each engine has a process of its
own, and computes one batch of each length before it is timed.
"""

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.reporting import environment, markdown
from benchmarks.shapes import SHAPES, write_target
from vllm_longspec.training.teachers import Sample
from vllm_longspec.training.teachers.vllm import VllmTeacher


def samples_of(num_tokens: int, count: int, vocab_size: int, num_supervised: int) -> Iterator[Sample]:
    """The last tokens are supervised, as an answer is."""
    generator = random.Random(num_tokens)
    mask = torch.zeros(num_tokens, dtype=torch.bool)
    mask[-num_supervised:] = True
    for _ in range(count):
        yield Sample(torch.tensor(generator.choices(range(vocab_size), k=num_tokens)), mask, torch.arange(num_tokens))


def captured_seconds(target: str, batches: Sequence[list[Sample]], options: dict[str, Any]) -> list[float]:
    """Seconds of each batch, from its samples to its last lesson."""
    longest = max(len(sample.input_ids) for batch in batches for sample in batch)
    teacher = VllmTeacher(target, longest, **options)
    try:
        return [_seconds(lambda batch=batch: sum(1 for _ in teacher.teach(batch))) for batch in batches]
    finally:
        teacher.close()


def plain_seconds(target: str, batches: Sequence[list[list[int]]], options: dict[str, Any]) -> list[float]:
    """Seconds of each batch of prompts, in an engine without a draft."""
    # Spawned, so that an engine finds nothing that another one has left in this process.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(prefill, target, batches, options).result()


def prefill(target: str, batches: Sequence[list[list[int]]], options: dict[str, Any]) -> list[float]:
    """The same in this process."""
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.usage.usage_lib import UsageContext

    from vllm_longspec.training.teachers.engine import engine_arguments

    longest = max(len(prompt) for batch in batches for prompt in batch)
    settings = {"target": target, "revision": None, "max_length": longest, "engine": options, "spool": "none"}
    arguments = {**engine_arguments(settings), "speculative_config": None}
    engine = LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)
    params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)

    def compute(batch: list[list[int]]) -> None:
        for index, prompt in enumerate(batch):
            (rendered,) = engine.renderer.render_cmpl([{"prompt_token_ids": prompt}])
            engine.add_request(str(index), rendered, params)
        while engine.has_unfinished_requests():
            engine.step()

    try:
        return [_seconds(lambda batch=batch: compute(batch)) for batch in batches]
    finally:
        engine.engine_core.shutdown()


def _seconds(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(arguments: argparse.Namespace, target: str, vocab_size: int) -> list[dict[str, Any]]:
    """A record for each length."""
    batches: list[list[Sample]] = []
    for num_tokens in arguments.contexts:
        count = max(1, arguments.tokens // num_tokens)
        num_supervised = min(arguments.supervised, num_tokens - 1)
        # A batch to warm up with, then the one that counts.
        batches += [list(samples_of(num_tokens, size, vocab_size, num_supervised)) for size in (min(count, 2), count)]
    options = dict(arguments.engine)
    captured = captured_seconds(target, batches, options)[1::2]
    prompts = [[sample.input_ids.tolist() for sample in batch] for batch in batches]
    plain = plain_seconds(target, prompts, options)[1::2]
    records = []
    for batch, with_capture, without in zip(batches[1::2], captured, plain, strict=True):
        num_tokens = sum(len(sample.input_ids) for sample in batch)
        records.append(
            {
                "context": len(batch[0].input_ids),
                "samples": len(batch),
                "supervised": len(batch[0].rows),
                "captured_tokens_per_second": num_tokens / with_capture,
                "plain_tokens_per_second": num_tokens / without,
                "share": without / with_capture,
            }
        )
    return records


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    targets = parser.add_mutually_exclusive_group(required=True)
    targets.add_argument("--shape", choices=sorted(SHAPES))
    targets.add_argument("--target", help="a folder with weights")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 65536])
    parser.add_argument("--tokens", type=int, default=1 << 20, help="of all samples of a length, about")
    parser.add_argument("--supervised", type=int, default=1024, help="tokens of a sample, at its end")
    parser.add_argument("--engine", type=json.loads, default={}, help="engine arguments of vLLM, as JSON")
    parser.add_argument("--commit", help="of the plugin, where there is no git to ask")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with tempfile.TemporaryDirectory() as folder:
        target, config = arguments.target, {}
        if arguments.shape is not None:
            shape = SHAPES[arguments.shape]
            window = max(shape["max_position_embeddings"], *arguments.contexts)
            target = str(write_target(Path(folder) / "target", {**shape, "max_position_embeddings": window}))
            arguments.engine = {"load_format": "dummy", **arguments.engine}
        config = json.loads((Path(target) / "config.json").read_text())
        records = measure(arguments, target, config["vocab_size"])
    rows = [["context", "samples", "captured, tokens/s", "plain, tokens/s", "share"]]
    rows += [
        [
            str(record["context"]),
            str(record["samples"]),
            f"{record['captured_tokens_per_second']:.0f}",
            f"{record['plain_tokens_per_second']:.0f}",
            f"{record['share']:.0%}",
        ]
        for record in records
    ]
    print(markdown(rows))
    if arguments.out is not None:
        result = {
            "environment": environment(arguments.commit),
            "target": arguments.shape or arguments.target,
            "engine": arguments.engine,
            "records": records,
        }
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
