# SPDX-License-Identifier: Apache-2.0
"""One engine in a process of its own: decodes batches of prompts and appends what it measured to a file of records.

`runs.py` starts this module with a job as JSON on standard input. What is timed is decoding alone: the prompts are in
the prefix cache, and the clock starts when every request of a batch has its first tokens and stops before any ends.
"""

import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.repetition import loop_start
from benchmarks.speed.records import Record, append

# Compiles what is compiled when it is first used.
WARM_UP_TOKENS = 12
# Before the clock starts, so that the step with the prompts is over.
LEAD_IN_TOKENS = 2
# The last block of a cached prompt is computed again, with EAGLE-3 the one before it too.
MAX_BLOCKS_NOT_CACHED = 3


def main() -> None:
    job = json.load(sys.stdin)
    started = time.monotonic()
    engine = Engine(job["llm"], job["tokens"])
    try:
        measure_cells(engine, job, round(time.monotonic() - started, 1))
    finally:
        engine.close()


def measure_cells(engine: "Engine", job: dict[str, Any], start_seconds: float) -> None:
    speculative_config = engine.vllm_config.speculative_config
    record: Record = job["record"] | {
        "max_model_len": engine.vllm_config.model_config.max_model_len,
        "max_num_seqs": engine.vllm_config.scheduler_config.max_num_seqs,
        "kv_cache_tokens": engine.num_blocks * engine.block_size,
        "draft_quantization": speculative_config and speculative_config.quantization,
        "start_seconds": start_seconds,
        "draft_memory": engine.llm.collective_rpc(draft_memory)[0],
    }
    prompts = TrainedPrompts(Path(job["trained"])) if job["trained"] else RandomPrompts(job["vocab_size"])
    for number, cell in itertools.product(range(job["passes"]), job["cells"]):
        if time.time() >= job["deadline"]:
            break
        measured = record | cell | {"pass": 1 + number}
        if cell["acceptance"] is not None:
            engine.llm.collective_rpc(set_acceptance, args=(cell["acceptance"],))
        batches = list(prompts.batches(cell["context"], cell["batch"], job["repeats"]))
        if not batches:
            measured["skipped"] = f"there are fewer than {cell['batch']} prompts of {cell['context']} tokens"
        elif lacking := engine.lacking_blocks(cell["context"], cell["batch"]):
            measured["skipped"] = f"the KV cache lacks {lacking * engine.block_size} tokens"
        else:
            rounds, outputs = engine.measure(batches, cell["temperature"])
            measured |= summary(rounds, cell["batch"], job["tokens"], same_work=not job["trained"])
            measured |= {"peak_memory_bytes": engine.llm.collective_rpc(peak_memory)[0], "rounds": rounds}
            if job["trained"]:
                measured["looping"] = share_of_loops(outputs)
        append(Path(job["out"]), measured)


class RandomPrompts:
    """Random token ids. A shorter prompt is the beginning of a longer one, which saves computing it again."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.prompts: dict[int, list[int]] = {}

    def batches(self, context: int, batch: int, repeats: int) -> Iterator[list[list[int]]]:
        yield from [[self._prompt(number, context) for number in range(batch)]] * repeats

    def _prompt(self, number: int, length: int) -> list[int]:
        if len(self.prompts.get(number, ())) < length:
            self.prompts[number] = random.Random(number).choices(range(self.vocab_size), k=length)
        return self.prompts[number][:length]


class TrainedPrompts:
    """The last tokens before the same places of the same texts, so that contexts differ in nothing but their length."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "target" / "tokenizer.json"))
        lines = (folder / "prompts.jsonl").read_text().splitlines()
        self.prompts = [tokenizer.encode(json.loads(line)["text"]).ids for line in lines]

    def batches(self, context: int, batch: int, repeats: int) -> Iterator[list[list[int]]]:
        """Every prompt once, however many repeats are asked for."""
        prompts = [prompt[-context:] for prompt in self.prompts if len(prompt) >= context]
        for start in range(0, len(prompts) - batch + 1, batch):
            yield prompts[start : start + batch]


class Engine:
    def __init__(self, settings: dict[str, Any], tokens: int):
        from vllm import LLM

        self.llm = LLM(**settings)
        self.tokens = tokens
        self.most_tokens = most_tokens(tokens)
        self.vllm_config = self.llm.llm_engine.vllm_config
        cache = self.vllm_config.cache_config
        assert cache.num_gpu_blocks is not None
        self.num_blocks, self.block_size = cache.num_gpu_blocks, cache.block_size

    def close(self) -> None:
        """Ends the engine's processes.

        vLLM does so when the interpreter ends, but `multiprocessing` may wait for them before that: which of the two
        comes first depends on what was imported first.
        """
        self.llm.llm_engine.engine_core.shutdown()

    def lacking_blocks(self, context: int, batch: int) -> int:
        """How many blocks the KV cache would need in addition, 0 if it is large enough."""
        speculative = self.vllm_config.speculative_config
        ahead = speculative.num_speculative_tokens + 1 if speculative else 1
        per_request = -(-(context + self.most_tokens + ahead) // self.block_size)
        # One block is vLLM's own.
        return max(0, batch * per_request + 1 - self.num_blocks)

    def measure(
        self, batches: list[list[list[int]]], temperature: float
    ) -> tuple[list[dict[str, Any]], list[list[int]]]:
        """Every batch's seconds and counts, and all outputs."""
        rounds, warm, outputs = [], None, []
        self.llm.collective_rpc(peak_memory)
        for number, prompts in enumerate(batches):
            if prompts is not warm:
                self._generate(prompts, temperature, number, WARM_UP_TOKENS)
                warm = prompts
            prompt_seconds, first = self._generate(prompts, temperature, number, 1)
            for output in first:
                if len(output.prompt_token_ids) - output.num_cached_tokens > MAX_BLOCKS_NOT_CACHED * self.block_size:
                    raise RuntimeError(f"only {output.num_cached_tokens} tokens of a prompt are in the prefix cache")
            decoded, tokens = self._decode(prompts, temperature, number)
            rounds.append({"prompt_seconds": prompt_seconds} | decoded)
            outputs += tokens
        return rounds, outputs

    def _decode(
        self, prompts: list[list[int]], temperature: float, number: int
    ) -> tuple[dict[str, Any], list[list[int]]]:
        """Times steps of a full batch, until its requests have `tokens` more on average.

        No request ends before that: one that is lucky with its drafts would leave the others in a smaller batch.
        """
        engine: Any = self.llm.llm_engine
        requests = {f"{number}-{request}": prompt for request, prompt in enumerate(prompts)}
        sampling = self._sampling(len(prompts), temperature, number, self.most_tokens)
        for (request, prompt), each in zip(requests.items(), sampling, strict=True):
            engine.add_request(request, {"prompt_token_ids": prompt}, each)
        outputs: dict[str, list[int]] = {request: [] for request in requests}

        def step() -> int:
            for output in engine.step():
                outputs[output.request_id] = list(output.outputs[0].token_ids)
                if output.finished:
                    raise RuntimeError(
                        f"a request ended at {len(outputs[output.request_id])} tokens, before the others"
                    )
            return sum(map(len, outputs.values()))

        first = step()
        while min(map(len, outputs.values())) < LEAD_IN_TOKENS:
            first = step()
        before, start = counters(self.llm), time.perf_counter()
        while (last := step()) < first + len(prompts) * self.tokens:
            pass
        seconds = time.perf_counter() - start
        drafts, drafted, accepted, preempted = (
            now - then for now, then in zip(counters(self.llm), before, strict=True)
        )
        if preempted:
            raise RuntimeError(f"{preempted} requests were preempted")
        engine.abort_request(list(requests))
        while engine.has_unfinished_requests():
            engine.step()
        counts = {
            "seconds": seconds,
            "emitted": last - first,
            "drafts": drafts,
            "drafted": drafted,
            "accepted": accepted,
        }
        return counts, list(outputs.values())

    def _generate(
        self, prompts: list[list[int]], temperature: float, number: int, max_tokens: int
    ) -> tuple[float, list[Any]]:
        requests: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        sampling = self._sampling(len(prompts), temperature, number, max_tokens)
        start = time.perf_counter()
        outputs = self.llm.generate(requests, sampling, use_tqdm=False)
        return time.perf_counter() - start, outputs

    def _sampling(self, batch: int, temperature: float, number: int, max_tokens: int) -> list[Any]:
        from vllm import SamplingParams

        return [
            SamplingParams(
                temperature=temperature,
                # Synthetic acceptance draws by it, at any temperature.
                seed=number * batch + request,
                max_tokens=max_tokens,
                ignore_eos=True,
                detokenize=False,
            )
            for request in range(batch)
        ]


def counters(llm: Any) -> tuple[int, int, int, int]:
    """Drafts, their tokens, accepted tokens, preemptions since vLLM's `LLM` started."""
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    names = ("drafts", "draft_tokens", "accepted_tokens")
    drafts, drafted, accepted = (int(values.get(f"vllm:spec_decode_num_{name}", 0)) for name in names)
    return drafts, drafted, accepted, int(values.get("vllm:num_preemptions", 0))


def most_tokens(tokens: int) -> int:
    """How many tokens the luckiest request of a batch may get while the average one gets so many."""
    return 2 * tokens + 64


def summary(rounds: list[dict[str, Any]], batch: int, tokens: int, same_work: bool) -> Record:
    """Milliseconds a token of a request and milliseconds a step, and tokens and drafted ones a step over all rounds.

    With a draft, vLLM counts a draft for every request and step. A step without any, as where speculation does not pay,
    emits one token.

    Args:
        same_work: the rounds decode the same batch, so the median of them is typical; otherwise their mean is.
    """
    typical = statistics.median if same_work else statistics.fmean
    # Of every request on its own.
    steps = [each["drafts"] + max(0, each["emitted"] - each["drafts"] - each["accepted"]) for each in rounds]
    for each, each_steps in zip(rounds, steps, strict=True):
        each["ms_per_token"] = 1000 * each["seconds"] * batch / each["emitted"]
        each["ms_per_step"] = 1000 * each["seconds"] * batch / each_steps
    drafted, accepted = (sum(each[name] for each in rounds) for name in ("drafted", "accepted"))
    return {
        "tokens": tokens,
        "ms_per_token": round(typical([each["ms_per_token"] for each in rounds]), 4),
        "ms_per_step": round(typical([each["ms_per_step"] for each in rounds]), 4),
        "tokens_per_step": round(1 + accepted / sum(steps), 3),
        # Verified: of a tree its nodes.
        "drafted_per_step": round(drafted / sum(steps), 1),
    }


def share_of_loops(outputs: list[list[int]]) -> float:
    """How much of the outputs repeats itself: a loop is easy to draft."""
    return round(1 - sum(map(loop_start, outputs)) / sum(map(len, outputs)), 3)


# What follows runs in the engine's worker.


def peak_memory(worker: Any) -> int:
    """Most bytes of GPU memory in use since this was last asked."""
    import torch

    if not torch.cuda.is_available():
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def set_acceptance(worker: Any, length: float) -> None:
    """Synthetic acceptance of `length` tokens a step from now on; what the scheduler chose by it does not follow."""
    import torch
    from vllm.config import SpeculativeConfig
    from vllm.v1.spec_decode.utils import unconditional_to_conditional_rates

    runner = worker.model_runner
    # On the device. Of this plugin for every depth of a tree, of vLLM for every draft token.
    rates = runner.rejection_sampler.synthetic_conditional_rates
    depth = min(len(rates), runner.num_speculative_steps)
    conditional = unconditional_to_conditional_rates(
        SpeculativeConfig._resolve_synthetic_acceptance_rates(depth, None, length)
    )
    rates[:depth].copy_(torch.tensor(conditional))


def draft_memory(worker: Any) -> dict[str, int]:
    """What a draft keeps: bytes for a request, whatever its context, and for every token of it."""
    speculator = worker.model_runner.speculator
    window = getattr(getattr(speculator, "proposer", None), "window", None)
    context = worker.vllm_config.compilation_config.static_forward_context
    caches = [context[name].kv_cache for name in getattr(speculator, "draft_attn_layer_names", ())]
    tokens = worker.vllm_config.cache_config.num_gpu_blocks * worker.vllm_config.cache_config.block_size
    return {
        "bytes_per_request": window.bytes_per_request if window else 0,
        "bytes_per_token": sum(cache.numel() * cache.element_size() for cache in caches) // tokens,
    }


if __name__ == "__main__":
    main()
