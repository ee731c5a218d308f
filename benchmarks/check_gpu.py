# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU and is not a benchmark, in one command:

    python -m benchmarks.check_gpu [--skip-32b] [--only engines,serve] [--commit COMMIT] \
        [--out benchmarks/results/gpu_check.json]

1. every kernel, compiled, against its plain PyTorch oracle, and small engines of all kinds, token for token, against
   plain decoding (`tests/`): losslessness, every CUDA-graph mode, fp8 caches and quantised targets;
2. the shipped pair through `LLM.generate`, greedy: in float32 the tokens of plain decoding, eagerly and with
   torch.compile, CUDA graphs and async scheduling, and in bfloat16 with FlashAttention how many tokens a step;
3. the shipped pair through `vllm serve`, with and without `--speculative-model`;
4. QwQ-32B-Preview's shape with dummy weights at 16k tokens of context: runs with the default tree.

Nothing is timed, so everything runs at once; tests use all GPUs of CUDA_VISIBLE_DEVICES. Writes what it saw, with the
environment, and exits with 1 if anything failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks import PAIR, RESULTS, ROOT
from benchmarks.reporting import environment
from benchmarks.server import ENVIRONMENT, SMALL_CACHE
from benchmarks.shapes import QWQ_32B, write_glide_draft, write_target
from benchmarks.speed.engine import counters

DEFAULT_SHAPE = [4, 16, 16, 16, 16]
KERNEL_TESTS = [
    "prefix_attention",
    "flash_attention",
    "verify",
    "best_children",
    "coupling",
    "copying",
    "merge",
    "history",
    "order",
    "walk",
    "compact",
    "window_attention",
    "growing_trees",
    "tree",
    "sample",
    "draft_inputs",
    "block_scores",
    "partial_tables",
    "window",
    "quantised_rows",
    "learned_head",
    "narrow_levels",
    "synthetic",
    "draw",
    "properties",
]
# The last one where there are two GPUs; elsewhere it skips itself.
ENGINE_TESTS = ["cuda_graphs", "kv_connectors", "lora", "lossless", "magicdec", "quantised", "sleep_mode"]
ENGINE_TESTS += ["tensor_parallel"]
PARTS = ["kernels", "engines", "pair", "serve", "qwq_32b_shape"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda names: names.split(","), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--skip-32b", action="store_true", help="leave out part 4, which needs 100 GB of GPU memory")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_check.json")
    parser.add_argument("--commit", help="the plugin's commit, where there is no git repository")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        run_engine(json.loads(arguments.engine))
        return

    chosen = arguments.only or [name for name in PARTS if not (arguments.skip_32b and name == "qwq_32b_shape")]
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    report: dict[str, Any] = {"environment": environment(arguments.commit)}
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        "kernels": lambda: run_tests(4, *(f"tests/unit/test_{name}.py" for name in KERNEL_TESTS)),
        "engines": lambda: run_tests(8 * num_gpus(), *(f"tests/integration/test_{name}.py" for name in ENGINE_TESTS)),
        "pair": check_pair,
        "serve": check_serve,
        "qwq_32b_shape": check_32b,
    }
    with ThreadPoolExecutor() as pool:
        names = {pool.submit(checks[name]): name for name in chosen}
        for part in as_completed(names):
            record(report, names[part], part.result(), arguments.out)
    failed = [name for name, part in report.items() if not part.get("passed", True)]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def num_gpus() -> int:
    """How many GPUs `tests/conftest.py` deals round."""
    return len(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(","))


def record(report: dict[str, Any], name: str, part: dict[str, Any], out: Path) -> None:
    """Writes every part when it is known: the next one may take minutes."""
    report[name] = part
    print(name, json.dumps(part, indent=2), flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")


def run_tests(workers: int, *tests: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-n", str(workers), "--dist", "loadgroup"]
    finished = subprocess.run(
        [*command, "--durations", "12", "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    print(finished.stdout[-20000 if finished.returncode else -2000 :], flush=True)
    failed = [line for line in finished.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {
        "passed": finished.returncode == 0,
        "files": [Path(test).name for test in tests],
        "summary": finished.stdout.splitlines()[-1].strip("= "),
        "failed": [line[:200] for line in failed],
    }


def check_pair() -> dict[str, Any]:
    # All nodes of the tree, whatever the size of the batch.
    draft = {
        "model": str(PAIR / "draft"),
        "tree_shape": DEFAULT_SHAPE,
        "num_speculative_tokens_per_batch_size": [[1, 8, sum(DEFAULT_SHAPE)]],
    }
    kinds = {
        f"{dtype}, {'eager' if eager else 'graphs'}": {"dtype": dtype, "enforce_eager": eager}
        for dtype, eager in (("float32", True), ("float32", False), ("bfloat16", False))
    }

    def run(kind: str, speculative_config: dict[str, Any] | None) -> dict[str, Any]:
        return engine(
            model=str(PAIR / "target"),
            prompts="pair",
            max_tokens=128,
            speculative_config=speculative_config,
            kv_cache_memory_bytes=SMALL_CACHE,
            gpu_memory_utilization=0.05,
            **kinds[kind],
        )

    with ThreadPoolExecutor() as pool:
        plain = {kind: pool.submit(run, kind, None) for kind in kinds}
        speculative = {kind: pool.submit(run, kind, draft) for kind in kinds}
    report: dict[str, Any] = {"passed": True}
    for kind in kinds:
        expected, result = plain[kind].result(), speculative[kind].result()
        same = sum(one == other for one, other in zip(expected["tokens"], result["tokens"], strict=True))
        report[kind] = {
            "identical": f"{same} of {len(expected['tokens'])}",
            "tokens_per_step": result["tokens_per_step"],
        }
        # In half precision near-ties fall either way.
        report["passed"] &= same == len(expected["tokens"]) or kinds[kind]["dtype"] != "float32"
    return report


def check_serve() -> dict[str, Any]:
    finished = subprocess.run(
        [sys.executable, "-m", "examples.demo"],
        cwd=ROOT,
        env=ENVIRONMENT | os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    print(finished.stdout[-2500:], finished.stderr[-1500:])
    # Without the speeds, as other engines run beside it.
    summary = [line for line in finished.stdout.splitlines()[-9:] if "per second" not in line]
    return {"passed": finished.returncode == 0, "summary": summary}


def check_32b() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        target = write_target(Path(folder) / "target", QWQ_32B)
        draft = write_glide_draft(Path(folder) / "draft", QWQ_32B)
        result = engine(
            model=str(target),
            dtype="bfloat16",
            load_format="dummy",
            # The others' engines are on this GPU too.
            gpu_memory_utilization=0.6,
            kv_cache_memory_bytes=8 << 30,
            max_model_len=17 * 1024,
            prompts=16 * 1024,
            max_tokens=64,
            speculative_config={"model": str(draft), "tree_shape": DEFAULT_SHAPE},
        )
    return {
        "passed": len(result["tokens"][0]) == 64,
        "context": 16 * 1024,
        "generated_tokens": len(result["tokens"][0]),
        "steps": result["steps"],
    }


def engine(**settings: Any) -> dict[str, Any]:
    """Runs one engine in a process of its own, see `run_engine`."""
    with tempfile.NamedTemporaryFile() as output:
        settings["output"] = output.name
        finished = subprocess.run(
            [sys.executable, "-m", "benchmarks.check_gpu", "--engine", json.dumps(settings)],
            cwd=ROOT,
            env=ENVIRONMENT | os.environ,
            capture_output=True,
            text=True,
            check=False,
        )
        if finished.returncode != 0:
            sys.exit(f"{finished.stdout[-4000:]}\n{finished.stderr[-4000:]}\nan engine stopped: {settings}")
        return json.loads(Path(output.name).read_text())


def run_engine(settings: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    output, prompts, max_tokens = (settings.pop(name) for name in ("output", "prompts", "max_tokens"))
    llm = LLM(
        **settings,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        enable_prefix_caching=False,
        max_num_seqs=8,
    )
    if prompts == "pair":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
        lines = (PAIR / "prompts.jsonl").read_text().splitlines()
        prompts = [tokenizer.encode(json.loads(line)["text"]) for line in lines[::8]]
    else:
        prompts = [[(7919 * i) % 150000 for i in range(prompts)]]
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    requests: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(requests, sampling, use_tqdm=False)
    drafts, _, accepted, _ = counters(llm)
    result = {
        "tokens": [list(each.outputs[0].token_ids) for each in outputs],
        "steps": drafts,
        "tokens_per_step": round(1 + accepted / drafts, 2) if drafts else 1.0,
    }
    Path(output).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
