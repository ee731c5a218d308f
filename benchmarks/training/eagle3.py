# SPDX-License-Identifier: Apache-2.0
"""An EAGLE-3 head for the target of a pair, trained by the `speculators` package for a given time on one GPU.

    pip install speculators
    python -m benchmarks.training.eagle3 --pair FOLDER --data FOLDER --seconds 120 [--set full_attention_indices='[0]']

Draft, losses, optimiser, schedule and training loop are the package's own, with its own defaults, as its `train`
command puts them together. Only where the data come from is ours: the windows that `benchmarks.training.recipes` draws,
with the target's hidden states computed as they are needed. The head is written to FOLDER/eagle3, which
`vllm serve --speculative-config '{"model": "FOLDER/eagle3", "method": "eagle3"}'` takes.
"""

import argparse
import json
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from speculators.model import SpeculatorModel
from speculators.models.eagle3.data import shift_batch
from speculators.train.cli import build_draft_model, set_seed
from speculators.train.config import TrainConfig
from speculators.train.data import CollateFn
from speculators.train.trainer import Trainer, TrainerConfig
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModel

from benchmarks.training.draft import RandomWindows
from benchmarks.training.realsize import FULL, SMOKE, name_of
from benchmarks.training.text import Windows, load_ids
from vllm_longspec.training.batches import Cursor

# Steps before the clock: kernels are compiled, then a step is timed.
_WARM_UP, _TIMED = 8, 12
# Of a toy on a CPU, where nothing is compiled and a step takes seconds.
_SMOKE_WARM_UP, _SMOKE_TIMED = 1, 1
# Of the target; with fewer the package has no choice of layers that differ.
_FEWEST_LAYERS = 7


class HiddenStates:
    """A target in Transformers, and what EAGLE-3 reads of it.

    Args:
        layers: of which the inputs are read; one more than the last is what the final norm reads
    """

    def __init__(self, target: Path, layers: list[int], device: str, dtype: torch.dtype) -> None:
        self.decoder = AutoModel.from_pretrained(target, dtype=dtype).to(device).eval()
        self.found: dict[int, Tensor] = {}
        places = [*self.decoder.layers, self.decoder.norm]
        self.read = [*layers, len(places) - 1]
        for number in self.read:
            places[number].register_forward_pre_hook(self._keep(number), with_kwargs=True)

    def _keep(self, number: int) -> Any:
        def keep(_module: Any, arguments: tuple, named: dict[str, Any]) -> None:
            self.found[number] = arguments[0] if arguments else named["hidden_states"]

        return keep

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of int64 [count, length]: [count, length, layers * hidden_size], and [count, length, hidden_size]."""
        self.decoder(input_ids=ids, use_cache=False)
        *layers, last = (self.found[number] for number in self.read)
        return torch.cat(layers, dim=-1), last


class Batches(IterableDataset):
    """Endless batches as the package's own data set and collation make them."""

    def __init__(self, source: RandomWindows, states: HiddenStates, collate: CollateFn, num_steps: int) -> None:
        self.source, self.states, self.collate, self.num_steps = source, states, collate, num_steps

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        device = self.states.decoder.device
        for step in self.source.steps(Cursor()):
            (batch,) = step.batches
            ids = torch.stack([sample.input_ids for sample in batch]).to(device)
            hidden, last = self.states(ids)
            length = ids.shape[1]
            samples = [
                {
                    "hidden_states": hidden[row],
                    "input_ids": ids[row],
                    "verifier_last_hidden_states": last[row],
                    "loss_mask": torch.ones(length, dtype=torch.bool, device=device),
                    "lengths": torch.tensor([length]),
                    "position_ids": torch.arange(length, device=device),
                }
                for row in range(len(ids))
            ]
            yield self.collate(samples)


class CpuTrainer(Trainer):
    """The package trains on accelerators only; this is for trying the script."""

    def setup_trainer(self) -> None:
        super().setup_trainer()
        self.local_rank, self.device_type = torch.device("cpu"), "cpu"
        # Its timer of the first step waits for an accelerator.
        torch.accelerator.synchronize = lambda *_: None


def settings(args: argparse.Namespace, batch_tokens: int, num_layers: int) -> Namespace:
    """The package's own, as its command line resolves them.

    Args:
        num_layers: of the target
    """
    given: dict[str, Any] = {
        "verifier_name_or_path": str(args.pair / "target"),
        "save_path": str(args.pair / "eagle3-run"),
        "total_seq_len": batch_tokens,
        "epochs": 1,
        "seed": args.seed,
        # Values of a step are read from the device when it is logged.
        "log_freq": 1 << 30,
    }
    if args.device == "cpu":
        # FlexAttention has no backward pass there, and the fused losses are kernels of Triton's.
        given |= {"draft_attn_impl": "eager", "loss_implementation": "eager"}
    if args.layers:
        given["target_layer_ids"] = args.layers
    elif num_layers < _FEWEST_LAYERS:
        given["target_layer_ids"] = [0, num_layers // 2, num_layers]
    for setting in args.set:
        name, _, value = setting.partition("=")
        given[name] = yaml.safe_load(value)
    config = TrainConfig.from_sources(cli=given, argv=[])
    return Namespace(**config.flatten())


def trainer_config(chosen: Namespace, train_call_kwargs: dict[str, Any], max_steps: int) -> TrainerConfig:
    # Settings that the command line and the trainer share have the same names.
    shared = {name: getattr(chosen, name) for name in TrainerConfig._fields if hasattr(chosen, name)}
    return TrainerConfig(
        **shared
        | {
            "num_epochs": chosen.epochs,
            "resume_from_checkpoint": False,
            "train_call_kwargs": outside_graphs(train_call_kwargs),
            "hidden_states_dtype": getattr(torch, chosen.hidden_states_dtype),
            "max_steps": max_steps,
        }
    )


def outside_graphs(call_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the model's forward pass, with losses that are called between compiled graphs.

    Dynamo of torch 2.11 cannot trace the package's fused losses, whose two Triton kernels share one list of tiles
    ("ListVariable is already tracked for mutation"). The losses stay the same.
    """
    losses = call_kwargs["loss_config"].items()
    return call_kwargs | {
        "loss_config": {name: (torch.compiler.disable(loss), weight) for name, (loss, weight) in losses}
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, required=True, help="folder with target/, of benchmarks.training.realsize")
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare_data.py wrote")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=float, help=f"of training (default {FULL.draft_seconds:.0f})")
    budget.add_argument("--steps", type=int, help="instead of a time")
    parser.add_argument("--name", default="eagle3", help="of the folder that the head is written to")
    parser.add_argument("--layers", type=int, nargs="+", help="of the target that are read (the package's choice)")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the package, as YAML")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="for a target of realsize --smoke")
    args = parser.parse_args()
    plan = SMOKE if args.smoke else FULL
    on_cpu = args.device == "cpu"

    target_config = json.loads((args.pair / "target" / "config.json").read_text())
    chosen = settings(args, plan.batch_tokens, target_config["num_hidden_layers"])
    set_seed(chosen.seed)
    model_class = SpeculatorModel.registry[chosen.speculator_type]
    model = build_draft_model(chosen, model_class, None, None, target_config["vocab_size"])
    train_call_kwargs, _ = model_class.get_trainer_kwargs(**vars(chosen))
    dtype = getattr(torch, chosen.hidden_states_dtype)
    states = HiddenStates(args.pair / "target", model.target_layer_ids, args.device, dtype)
    collate = CollateFn(
        plan.batch_tokens, target_config["hidden_size"], len(model.target_layer_ids), dtype, shift_batch
    )
    ids = load_ids(args.data / "train.npy.xz", "cpu")
    run = Path(chosen.save_path)
    shutil.rmtree(run, ignore_errors=True)

    def trained(num_steps: int, seed: int) -> Trainer:
        windows = Windows(ids, torch.Generator().manual_seed(seed))
        source = RandomWindows(windows, plan.draft_windows, plan.batch_tokens, target_config["max_position_embeddings"])
        loader = DataLoader(Batches(source, states, collate, num_steps), batch_size=None)
        config = trainer_config(chosen, train_call_kwargs, num_steps)
        return (CpuTrainer if on_cpu else Trainer)(model, config, loader)

    num_steps = args.steps
    if num_steps is None:
        first = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
        warm_up, timed = (_SMOKE_WARM_UP, _SMOKE_TIMED) if args.smoke else (_WARM_UP, _TIMED)
        trained(warm_up, args.seed + 1).train_epoch(0)
        _wait(args.device)
        started = time.perf_counter()
        trained(timed, args.seed + 2).train_epoch(0)
        _wait(args.device)
        seconds_per_step = (time.perf_counter() - started) / timed
        num_steps = max(1, round((args.seconds or plan.draft_seconds) / seconds_per_step))
        print(f"{seconds_per_step:.3f} s a step, so {num_steps} steps", flush=True)
        model.load_state_dict(first)
    trainer = trained(num_steps, args.seed)
    started = time.perf_counter()
    trainer.train_epoch(0)
    _wait(args.device)
    seconds = time.perf_counter() - started
    trainer.maybe_save_checkpoint(0)
    folder = args.pair / args.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.move(run / "0" / file, folder / file)
    shutil.rmtree(run)
    record = {
        "draft": args.name,
        "recipe": f"speculators {_version()}",
        "settings": args.set,
        "parameters": sum(each.numel() for each in model.parameters() if each.requires_grad),
        "steps": trainer.global_step,
        "tokens": trainer.global_step * plan.batch_tokens,
        "seconds": round(seconds, 1),
        "device": name_of(args.device),
    }
    with (args.pair / "recipes.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _version() -> str:
    from importlib.metadata import version

    return version("speculators")


if __name__ == "__main__":
    main()
