# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU and is not a benchmark, in one command:

    python benchmarks/check_gpu.py [--skip-32b] [--out benchmarks/results/gpu_check.json]

1. every kernel, compiled, against its plain PyTorch oracle;
2. the shipped pair through `LLM.generate`, float32 and greedy: the tokens of plain decoding, and in bfloat16 with
   FlashAttention how many tokens a step;
3. the shipped pair through `vllm serve`, with and without `--speculative-model`;
4. QwQ-32B-Preview's shape with dummy weights at 16k tokens of context: runs with the default tree.

Each part runs in a process of its own. Writes what it saw, with the environment, and exits with 1 if anything failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAIR = ROOT / "benchmarks" / "pair"
DEFAULT_SHAPE = [4, 16, 16, 16, 16]
KERNEL_TESTS = (
    "prefix_attention",
    "shared_prefix",
    "hopper_prefix",
    "verify",
    "best_children",
    "order",
    "walk",
    "compact",
    "window_attention",
    "tree",
    "sample",
)

# https://huggingface.co/Qwen/QwQ-32B-Preview/blob/main/config.json
QWQ_32B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "max_position_embeddings": 32768,
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-32b", action="store_true", help="leave out part 4, which needs 80 GB of GPU memory")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_check.json")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        run_engine(json.loads(arguments.engine))
        return

    report: dict[str, Any] = {"environment": environment()}
    report["kernels"] = check_kernels()
    report["pair"] = check_pair()
    report["serve"] = check_serve()
    if not arguments.skip_32b:
        report["qwq_32b_shape"] = check_32b()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    failed = [name for name, part in report.items() if not part.get("passed", True)]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def environment() -> dict[str, str]:
    import torch
    import triton
    import vllm

    return {
        "device": torch.cuda.get_device_name(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm": vllm.__version__,
    }


def check_kernels() -> dict[str, Any]:
    tests = [str(ROOT / "tests" / "unit" / f"test_{name}.py") for name in KERNEL_TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(finished.stdout[-3000:] if finished.returncode else finished.stdout.splitlines()[-1])
    return {"passed": finished.returncode == 0, "summary": finished.stdout.splitlines()[-1]}


def check_pair() -> dict[str, Any]:
    draft = {"model": str(PAIR / "draft"), "tree_shape": DEFAULT_SHAPE}
    runs = {}
    for dtype in ("float32", "bfloat16"):
        common = {"model": str(PAIR / "target"), "dtype": dtype, "prompts": "pair", "max_tokens": 128}
        runs[dtype] = engine(**common), engine(**common, speculative_config=draft)
    plain, speculative = runs["float32"]
    same = sum(one == other for one, other in zip(plain["tokens"], speculative["tokens"], strict=True))
    report: dict[str, Any] = {"passed": same == len(plain["tokens"]), "identical": f"{same} of {len(plain['tokens'])}"}
    for dtype, (plain, speculative) in runs.items():
        report[dtype] = {
            "tokens_per_step": speculative["tokens_per_step"],
            "tokens_per_second": {"plain": plain["tokens_per_second"], "glide": speculative["tokens_per_second"]},
        }
    return report


def check_serve() -> dict[str, Any]:
    finished = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "demo.py")],
        cwd=ROOT,
        env={**os.environ, **EXACT_FLOAT32},
        capture_output=True,
        text=True,
        check=False,
    )
    print(finished.stdout[-2500:], finished.stderr[-1500:])
    return {"passed": finished.returncode == 0, "summary": finished.stdout.splitlines()[-9:]}


def check_32b() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        target, draft = Path(folder) / "target", Path(folder) / "draft"
        for path, architecture in ((target, "Qwen2ForCausalLM"), (draft, "Qwen2GlideDecoderLayer")):
            path.mkdir()
            (path / "config.json").write_text(json.dumps(QWQ_32B | {"architectures": [architecture]}))
        result = engine(
            model=str(target),
            dtype="bfloat16",
            load_format="dummy",
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
        "milliseconds_per_step": round(1000 * result["seconds"] / result["steps"], 1),
    }


# vLLM's Triton attention multiplies float32 matrices in TF32 unless Triton is told otherwise; exactness is about the
# method, not about that rounding.
EXACT_FLOAT32 = {"TRITON_F32_DEFAULT": "ieee"}


def engine(**settings: Any) -> dict[str, Any]:
    """Runs one engine in a process of its own, see `run_engine`."""
    with tempfile.NamedTemporaryFile() as output:
        settings["output"] = output.name
        command = [sys.executable, __file__, "--engine", json.dumps(settings)]
        finished = subprocess.run(
            command, env={**os.environ, **EXACT_FLOAT32}, capture_output=True, text=True, check=False
        )
        if finished.returncode != 0:
            sys.exit(f"{finished.stdout[-4000:]}\n{finished.stderr[-4000:]}\nan engine stopped: {settings}")
        return json.loads(Path(output.name).read_text())


def run_engine(settings: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    output, prompts, max_tokens = (settings.pop(name) for name in ("output", "prompts", "max_tokens"))
    llm = LLM(
        **settings,
        enforce_eager=True,
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
    llm.generate(requests, SamplingParams(temperature=0.0, max_tokens=8, detokenize=False), use_tqdm=False)
    before = counters(llm)
    # The time of the prompts, measured alone, is taken off: steps are what is compared.
    start = time.perf_counter()
    llm.generate(requests, SamplingParams(temperature=0.0, max_tokens=1, detokenize=False), use_tqdm=False)
    prompt_seconds = time.perf_counter() - start
    start = time.perf_counter()
    outputs = llm.generate(requests, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start - prompt_seconds
    after = counters(llm)
    drafts, accepted = (after[name] - before[name] for name in ("drafts", "accepted"))
    tokens = [list(each.outputs[0].token_ids) for each in outputs]
    result = {
        "tokens": tokens,
        "seconds": seconds,
        "steps": drafts,
        "tokens_per_step": round(1 + accepted / drafts, 2) if drafts else 1.0,
        "tokens_per_second": round(sum(map(len, tokens)) / seconds, 1),
    }
    Path(output).write_text(json.dumps(result))


def counters(llm: Any) -> dict[str, float]:
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return {
        "drafts": values.get("vllm:spec_decode_num_drafts", 0),
        "accepted": values.get("vllm:spec_decode_num_accepted_tokens", 0),
    }


if __name__ == "__main__":
    main()
