# SPDX-License-Identifier: Apache-2.0
"""Training of a draft on samples of 32k and 128k tokens, on one GPU: whether it fits, tokens a second and peak memory.

    python -m benchmarks.training.long_samples --shape llama-3.2-1b --out FILE [--teachers hf vllm]

The target has random weights, since what they are changes neither cost; so do the samples, of which the last tokens are
supervised, as an answer is. Each run is `vllm-longspec train` in a process of its own. The first half of its steps,
where kernels are compiled, is not counted. The engine of --teachers vllm is on the same GPU, with memory of its own.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.reporting import environment, markdown
from benchmarks.shapes import SHAPES, write_target

# https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json
LLAMA_3_2_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "head_dim": 64,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
# https://huggingface.co/Qwen/Qwen3-8B/blob/main/config.json, with positions for 128k
QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "head_dim": 128,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "vocab_size": 151936,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
TARGETS = {"llama-3.2-1b": LLAMA_3_2_1B, "qwen3-8b": QWEN3_8B, "toy": SHAPES["toy"]}


def write_random_target(folder: Path, config: dict[str, Any], device: str) -> None:
    """With weights, which the trainer reads."""
    from transformers import AutoConfig, AutoModelForCausalLM

    write_target(folder, config)
    torch.manual_seed(0)
    chosen = AutoConfig.from_pretrained(folder)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(chosen, dtype=chosen.dtype)
    model.save_pretrained(folder, max_shard_size="100GB")


def write_samples(path: Path, length: int, supervised: int, count: int, vocab_size: int) -> None:
    generator = random.Random(length)
    mask = [0] * (length - supervised) + [1] * supervised
    with path.open("w") as file:
        for _ in range(count):
            ids = generator.choices(range(vocab_size), k=length)
            file.write(json.dumps({"input_ids": ids, "loss_mask": mask}) + "\n")


def train(target: Path, data: Path, folder: Path, length: int, steps: int, teacher: str, settings: list[str]) -> Path:
    """Returns the run's metrics."""
    stage = {"steps": steps, "max_length": length, "learning_rate": 1e-4}
    command = [sys.executable, "-m", "vllm_longspec", "train", "--target", str(target), "--data", str(data)]
    command += ["--out", str(folder), "--teacher", teacher, "--set", f"stages={json.dumps([stage])}"]
    command += ["held_out.samples=0", "report.steps=1", "compared_samples=0", *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(" / ".join((done.stderr or done.stdout).strip().splitlines()[-4:]))
    return folder / "metrics.jsonl"


def figures(metrics: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    counted = lines[len(lines) // 2 :]
    # Each line is one step of the same number of tokens.
    seconds_per_token = sum(1 / line["tokens_per_second"] for line in counted) / len(counted)
    return {
        "steps": len(lines),
        "tokens_per_second": round(1 / seconds_per_token, 1),
        "peak_memory_gib": max(line.get("peak_memory_gib", 0.0) for line in lines),
        "last_loss": round(lines[-1]["loss"], 4),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=sorted(TARGETS), default="llama-3.2-1b")
    add("--samples", nargs="+", default=["32768:512", "32768:8192", "131072:512"], metavar="LENGTH:SUPERVISED")
    add("--teachers", nargs="+", choices=("hf", "vllm"), default=["hf"])
    add("--steps", type=int, default=12)
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of `vllm-longspec train`")
    add("--engine", default='{"gpu_memory_utilization": 0.4}', help="of --teachers vllm, JSON")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--commit", help="of the plugin, where there is no git to ask")
    add("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    config = TARGETS[args.shape]
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_target(folder / "target", config, args.device)
        for teacher in args.teachers:
            for sample in args.samples:
                length, supervised = map(int, sample.split(":"))
                data = folder / f"{length}-{supervised}.jsonl"
                if not data.exists():
                    write_samples(data, length, supervised, 4, config["vocab_size"])
                settings = [*args.set, *([f"engine={args.engine}"] if teacher == "vllm" else [])]
                record = {"teacher": teacher, "length": length, "supervised": supervised}
                started = time.perf_counter()
                run = folder / f"{teacher}-{length}-{supervised}"
                try:
                    record |= figures(train(folder / "target", data, run, length, args.steps, teacher, settings))
                except RuntimeError as error:
                    record["error"] = str(error)
                record["wall_seconds"] = round(time.perf_counter() - started, 1)
                records.append(record)
                print(json.dumps(record), flush=True)
                result = {"environment": environment(args.commit), "target": args.shape, "records": records}
                args.out.write_text(json.dumps(result, indent=2) + "\n")
    rows = [["teacher", "tokens of a sample", "supervised", "tokens/s", "peak memory, GiB"]]
    rows += [
        [each["teacher"], str(each["length"]), str(each["supervised"])]
        + ([f"{each['tokens_per_second']:.0f}", f"{each['peak_memory_gib']}"] if "error" not in each else ["-", "-"])
        for each in records
    ]
    print(markdown(rows))


if __name__ == "__main__":
    main()
