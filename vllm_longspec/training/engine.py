# SPDX-License-Identifier: Apache-2.0
"""The same prompts in a real engine, in a process of its own: how many nodes each of its steps accepts.

The process gets a job on its standard input and writes what it found to a file, both JSON. It ends before or after the
target of the walk is on the same GPU.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

# Without a GPU vLLM's kernels run in Triton's interpreter.
_CPU_ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OPENBLAS_NUM_THREADS": "1",
}
_CPU_SETTINGS = {"block_size": 32, "enforce_eager": True, "distributed_executor_backend": "uni"}
_LINES_SHOWN = 12


def run_engine(settings: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """Starts an engine and makes all runs with it, one after the other.

    Args:
        settings: of vLLM's `LLM`
        runs: each with `prompts`, lists of token ids; `max_tokens`, one for each prompt; `sampling`, a dict

    Returns:
        Of every run and prompt: `accepted`, nodes of each step, and `token_ids`. Of a run also vLLM's own counters,
        which must say the same.

    Raises:
        ValueError: the engine failed. What it printed goes to standard error.
    """
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        settings = _CPU_SETTINGS | dict(settings)
        environment = _CPU_ENVIRONMENT | environment
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        job = {"settings": dict(settings), "runs": list(runs), "out": str(found)}
        done = subprocess.run(
            [sys.executable, "-m", __name__], input=json.dumps(job), text=True, env=environment, capture_output=True
        )
        if done.returncode != 0 or not found.exists():
            print("\n".join(done.stderr.splitlines()[-_LINES_SHOWN:]), file=sys.stderr)
            raise ValueError(
                f"the engine of --engine stopped with {done.returncode}, its last lines are above: give --engine-args "
                "what vllm serve needs for this target"
            )
        return json.loads(found.read_text())


def _main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    job = json.load(sys.stdin)
    llm = LLM(**job["settings"])
    found = []
    for run in job["runs"]:
        before = _counters(llm)
        parameters = [
            SamplingParams(**{"seed": seed, **run["sampling"]}, max_tokens=number, detokenize=False)
            for seed, number in enumerate(run["max_tokens"])
        ]
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in run["prompts"]]
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        completions = [output.outputs[0] for output in outputs]
        metrics: list[Any] = [each.spec_decode_metrics for each in completions]
        accepted = [list(each.per_step_accepted) for each in metrics]
        drafts, nodes = (after - old for after, old in zip(_counters(llm), before, strict=True))
        if (drafts, nodes) != (sum(map(len, accepted)), sum(map(sum, accepted))):
            raise RuntimeError(f"vLLM counts {drafts} drafts and {nodes} accepted nodes, its requests other numbers")
        found.append(
            [
                {"accepted": steps, "token_ids": list(each.token_ids)}
                for steps, each in zip(accepted, completions, strict=True)
            ]
        )
    Path(job["out"]).write_text(json.dumps(found))
    llm.llm_engine.engine_core.shutdown()


def _counters(llm: Any) -> tuple[int, int]:
    """Drafts and accepted nodes so far, as vLLM's metrics have them."""
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    drafts, accepted = (int(values.get(f"vllm:spec_decode_num_{name}", 0)) for name in ("drafts", "accepted_tokens"))
    return drafts, accepted


if __name__ == "__main__":
    _main()
