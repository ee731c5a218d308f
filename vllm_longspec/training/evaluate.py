# SPDX-License-Identifier: Apache-2.0
"""`vllm-longspec evaluate`: what a draft's steps accept, predicted from stored answers and checked in a real engine.

    vllm-longspec evaluate --target T --draft draft/ [--data data/] --contexts 2k,8k,32k,128k [--engine]

Without --data the answers are those that the run of the draft has held out.

The walk grows the plugin's tree at a root of a stored answer, follows the answer down the tree, and goes on from where
it leaves it, as serving does (`vllm_longspec/training/walk.py`). So the figures are tokens a step of the engine, for
the tree, the number of verified nodes and the copies that are asked for; --engine lets one serve the same prompts.
"""

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from vllm_longspec.frequent_tokens import FILE_NAME, read_frequent_tokens
from vllm_longspec.options import (
    DEFAULT_COPY_LENGTH,
    DEFAULT_CROSS_ATTENTION_BUDGET,
    DEFAULT_LEVELS,
    parse_copy_length,
    parse_cross_attention_budget,
    parse_tree_shape,
)
from vllm_longspec.proposers.glide.checkpoint import DraftCheckpoint, find_file
from vllm_longspec.scheduling.schedule import default_schedule
from vllm_longspec.targets.families import layer_sizes, size_of
from vllm_longspec.training import checkpoints
from vllm_longspec.training.acceptance import Sum, compare, describe, number, plot, summary
from vllm_longspec.training.config import RUN_FILE, load
from vllm_longspec.training.continuations import Bucket, Part, choose, parse_contexts, parts_of
from vllm_longspec.training.data import TokenStore
from vllm_longspec.training.data import prepare as store_texts
from vllm_longspec.training.draft import TargetVocabulary, check_draft, load_draft
from vllm_longspec.training.engine import run_engine
from vllm_longspec.training.generate import MANIFEST, check_engine_arguments, json_object
from vllm_longspec.training.layer import rope_type_of
from vllm_longspec.training.predict import Drafting, Likelihood, Predictor, Steps
from vllm_longspec.training.sampling import Sampling
from vllm_longspec.training.split import prepare_data
from vllm_longspec.training.target import SharedTarget, load_shared, load_tokenizer
from vllm_longspec.training.teachers import Sample
from vllm_longspec.training.teachers.hf import HfTeacher

DEFAULT_CONTEXTS = "2k,8k,32k,128k"
# Of the stored tokens, the least share of the target's most probable ones with which an answer passes for greedy:
# batches and kernels differ in the last bits.
_GREEDY_SHARE = 0.95
# Standard deviations, and nats a token, beyond which an answer does not pass for a draw of this sampling.
_SURPRISE_DEVIATIONS, _SURPRISE = 4.0, 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--target", required=True, help="the target that the draft is for: folder or name")
    add("--revision", help="branch, tag or commit of the target's repository")
    add("--draft", required=True, help="the draft: folder or name")
    add(
        "--data",
        type=Path,
        help="JSONL with input_ids and loss_mask, or a folder of it: the answers (those that the draft's run held out)",
    )
    add(
        "--contexts",
        metavar="N,N",
        help=f"contexts, each from half of it on (those of {DEFAULT_CONTEXTS} with answers)",
    )
    add("--temperatures", type=_temperatures, metavar="T,T", help="with which the answers were drawn (the manifest's)")
    add("--top-k", type=int, metavar="K", help="of the answers' sampling (the manifest's, or none)")
    add("--top-p", type=float, metavar="P", help="likewise")
    add("--min-p", type=float, metavar="P", help="likewise")
    add("--parts", type=int, default=32, metavar="N", help="parts of answers at each context (32)")
    add("--tokens", type=int, default=256, metavar="N", help="of each part (256)")
    add("--seed", type=int, default=0, help="of the choice of parts and of the noise (0)")
    add("--tree-shape", type=int, nargs="+", metavar="N", help="nodes at each level, as --speculative-tree-shape")
    add("--nodes", type=int, metavar="N", help="verified nodes (what a GPU verifies of a single request at most)")
    add(
        "--copy-length", type=int, metavar="N", help=f"as --speculative-copy-length ({DEFAULT_COPY_LENGTH}); 0 for none"
    )
    add("--frequent-tokens", type=Path, metavar="FILE", help="as --speculative-frequent-tokens")
    add(
        "--cross-attention-budget",
        type=_budget,
        metavar="N",
        help=f"as cross_attention_budget ({DEFAULT_CROSS_ATTENTION_BUDGET}); false for all",
    )
    add("--no-couple-noise", action="store_true", help="drafts that do not know the target's noise")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the target (its own; float32 on a CPU)")
    add("--engine", action="store_true", help="serve the same prompts, and fail if an engine accepts otherwise")
    add("--engine-args", type=json_object, default={}, metavar="JSON", help="further arguments of vLLM's LLM")
    add("--tolerance", type=float, default=0.03, metavar="X", help="what walk and engine may differ by (0.03)")
    add("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    add("--plot", type=Path, metavar="FILE", help="draw them, as .svg or .png")


@dataclass
class Evaluation:
    """What is measured, all of it checked before a weight is loaded."""

    arguments: argparse.Namespace
    shared: SharedTarget
    checkpoint: DraftCheckpoint
    manifest: dict[str, Any]
    samplings: list[Sampling]
    drafting: Drafting
    frequent_tokens: str | None
    buckets: list[Bucket]
    texts: TokenStore
    parts: list[Part]
    folder: TemporaryDirectory  # of the texts, for as long as this object is there

    @property
    def config(self) -> Any:
        return self.shared.config


def run(arguments: argparse.Namespace) -> None:
    evaluation = prepare(arguments)
    drafting = evaluation.drafting
    print(
        f"Target {arguments.target}, draft {arguments.draft}: tree {list(drafting.shape.levels)}, {drafting.num_nodes} "
        f"nodes verified, up to {drafting.copy_length} tokens copied, drafts {'' if drafting.couple_noise else 'not '}"
        "coupled",
        flush=True,
    )
    walked, likelihoods = predict(evaluation)
    results = []
    for sampling, steps, likelihood in zip(evaluation.samplings, walked, likelihoods, strict=True):
        contexts = [
            summary([each for each in steps if each.part.bucket == index], bucket, drafting.reach)
            for index, bucket in enumerate(evaluation.buckets)
        ]
        result = {**sampling._asdict(), "contexts": contexts, "greedy_share": likelihood.greedy / likelihood.num_tokens}
        notes = [_contradiction(sampling, evaluation.manifest), mismatch(sampling, likelihood)]
        result["notes"] = [note for note in notes if note is not None]
        results.append(result)
    served = serve(evaluation) if arguments.engine else [None] * len(results)
    disagreeing = []
    for result, steps, engine in zip(results, walked, served, strict=True):
        if engine is not None:
            disagreeing += _compare(evaluation, result, steps, engine)
        print(f"\n{describe(result)}")
        for note in result["notes"]:
            print(f"\nNote: {note}.")
    if arguments.out:
        written = {
            "target": arguments.target,
            "draft": arguments.draft,
            "tree_shape": list(drafting.shape.levels),
            "nodes": drafting.num_nodes,
            "copy_length": drafting.copy_length,
            "couple_noise": drafting.couple_noise,
            "cross_attention_budget": drafting.cross_attention_budget,
            "tolerance": arguments.tolerance,
            "results": results,
        }
        arguments.out.write_text(json.dumps(written, indent=2) + "\n")
    if arguments.plot:
        try:
            plot(results, arguments.plot)
        except ImportError:
            print("--plot needs matplotlib: pip install 'vllm-longspec[report]'", file=sys.stderr)
    if disagreeing:
        raise ValueError(f"walk and engine differ by more than {arguments.tolerance:.1%}: {'; '.join(disagreeing)}")


def prepare(arguments: argparse.Namespace) -> Evaluation:
    """Reads the configurations and all of the data.

    Raises:
        ValueError: an argument, the draft or the data cannot be used.
    """
    for name in ("parts", "tokens"):
        if getattr(arguments, name) < (2 if name == "tokens" else 1):
            raise ValueError(f"--{name} is {getattr(arguments, name)}: give more")
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {arguments.device} cannot be used ({reason}): give cuda or cpu") from None
    if not 0 < arguments.tolerance < 1:
        raise ValueError(f"--tolerance must be between 0 and 1, such as 0.03, got {arguments.tolerance}")
    if arguments.plot and arguments.plot.suffix not in (".svg", ".png"):
        raise ValueError(f"--plot {arguments.plot} must end with .svg or .png")
    for name in ("out", "plot"):
        # They are written when everything has been measured.
        path = getattr(arguments, name)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"--{name} {path} cannot be a file: give one in a folder that exists")
    check_engine_arguments("--engine-args", arguments.engine_args, {"model": "--target", "revision": "--revision"})
    if not isinstance(arguments.engine_args.get("speculative_config", {}), dict):
        raise ValueError("--engine-args has a speculative_config that is no JSON object: leave it out")
    shared = load_shared(arguments.target, arguments.revision)
    config = shared.config
    checkpoint = check_draft(arguments.draft, arguments.target, config)
    drafting, frequent_tokens = _drafting(arguments, config)
    # A whole tree has places in the cache after the last root.
    longest = config.max_position_embeddings - drafting.num_nodes - 1
    buckets = parse_contexts(arguments.contexts or DEFAULT_CONTEXTS)
    if arguments.contexts and buckets[-1].limit > config.max_position_embeddings:
        raise ValueError(
            f"--contexts {buckets[-1].name} is longer than the {config.max_position_embeddings} positions of "
            f"{arguments.target}: leave it out"
        )
    folder = TemporaryDirectory()
    if arguments.data is None:
        texts, data = _held_out(arguments.draft, shared)
    else:
        data = arguments.data
        texts = store_texts(
            [str(data)],
            Path(folder.name),
            lambda: load_tokenizer(shared),
            shared.vocab_size,
            config.max_position_embeddings,
        )
    manifest = _read_manifest(data)
    parts = (
        part
        for number in range(len(texts))
        for part in parts_of(number, texts[number][1], buckets, arguments.tokens, drafting.reach)
        if part.end <= longest
    )
    chosen = choose(parts, len(buckets), arguments.parts, arguments.seed)
    used = {part.bucket for part in chosen}
    empty = [bucket.name for index, bucket in enumerate(buckets) if index not in used]
    reason = (
        f"no answers of {drafting.reach + 2} tokens or more with such contexts in {data}, whose "
        f"longest text has {max(texts.lengths)} tokens"
    )
    if empty and (arguments.contexts or not used):
        raise ValueError(f"--contexts {','.join(empty)}: {reason}; leave them out or add data")
    if empty:
        print(f"Left out, {reason}: {', '.join(empty)}")
        places = {index: place for place, index in enumerate(sorted(used))}
        chosen = [part._replace(bucket=places[part.bucket]) for part in chosen]
        buckets = [bucket for index, bucket in enumerate(buckets) if index in used]
    samplings = _samplings(arguments, manifest)
    return Evaluation(
        arguments, shared, checkpoint, manifest, samplings, drafting, frequent_tokens, buckets, texts, chosen, folder
    )


def _held_out(draft: str, shared: SharedTarget) -> tuple[TokenStore, Path]:
    """The samples that the run of a draft has held out, and the file or folder that they come from."""
    run = checkpoints.run_of(Path(draft))
    if not (run / RUN_FILE).is_file():
        raise ValueError(
            f"--draft {draft} has no {RUN_FILE} of a run of vllm-longspec train, whose held-out samples would be "
            "evaluated: give answers as --data"
        )
    config = load(run / RUN_FILE, {"out": str(run)}, [])
    _, held_out = prepare_data(config, shared)
    if not len(held_out):
        raise ValueError(f"the run of {run} has held out no samples: give answers as --data")
    return held_out, Path((config.held_out.data or config.data)[0])


def _drafting(arguments: argparse.Namespace, config: Any) -> tuple[Drafting, str | None]:
    """As the plugin's options are read, and the file of frequent tokens, if any."""
    path = arguments.frequent_tokens or find_file(arguments.draft, FILE_NAME)
    token_ids = None
    if path is not None:
        token_ids = torch.tensor(read_frequent_tokens(path, config.vocab_size), device=arguments.device)
    vocab_size = config.vocab_size if token_ids is None else len(token_ids)
    shape = parse_tree_shape({"tree_shape": arguments.tree_shape or list(DEFAULT_LEVELS)}, vocab_size)
    group = config.num_attention_heads // size_of(config, "num_key_value_heads")
    num_nodes = default_schedule(shape.num_nodes, group)[0][2] if arguments.nodes is None else arguments.nodes
    if not 1 <= num_nodes <= shape.num_nodes:
        raise ValueError(f"--nodes must be from 1 to {shape.num_nodes}, the nodes of the tree, got {num_nodes}")
    copy_length = parse_copy_length({"copy_length": arguments.copy_length})
    part = parse_cross_attention_budget(
        {"cross_attention_budget": arguments.cross_attention_budget}, config.max_position_embeddings
    )
    drafting = Drafting(
        shape,
        num_nodes,
        copy_length,
        not arguments.no_couple_noise,
        token_ids,
        part,
        arguments.engine_args.get("block_size", Drafting.block_size),
    )
    return drafting, None if path is None else str(Path(path).absolute())


def _samplings(arguments: argparse.Namespace, manifest: dict[str, Any]) -> list[Sampling]:
    from vllm import SamplingParams

    stored = manifest.get("sampling", {})
    temperatures = arguments.temperatures
    if temperatures is None:
        temperatures = [stored.get("temperature", 0.0)]
    chosen = {
        name: getattr(arguments, name) if getattr(arguments, name) is not None else stored.get(name, default)
        for name, default in Sampling._field_defaults.items()
    }
    for temperature in temperatures:
        try:
            SamplingParams(temperature=temperature, **chosen)
        except Exception as error:
            # vLLM's own errors of validation are no ValueErrors; they name the parameter.
            raise ValueError(str(error)) from None
    # vLLM's -1 is none as well.
    chosen["top_k"] = max(0, chosen["top_k"])
    return [
        Sampling(temperature, **chosen) if temperature > 0 else Sampling(temperature) for temperature in temperatures
    ]


def predict(evaluation: Evaluation) -> tuple[list[list[Steps]], list[Likelihood]]:
    """Of each sampling, the steps of all parts and the likelihood of their tokens."""
    arguments = evaluation.arguments
    shared = evaluation.shared
    stored = torch.float32 if arguments.device == "cpu" else shared.embedding.dtype
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else stored
    target = HfTeacher(shared, arguments.device, dtype, way_out="mend its files, or give a target that it loads")
    vocabulary = TargetVocabulary.of(shared, arguments.device, dtype)
    glide = load_draft(evaluation.checkpoint, evaluation.config, arguments.device)
    predictors = [
        Predictor(vocabulary, glide, evaluation.drafting, sampling, arguments.seed) for sampling in evaluation.samplings
    ]
    steps: list[list[Steps]] = [[] for _ in predictors]
    likelihoods: list[list[Likelihood]] = [[] for _ in predictors]
    by_text = _by_text(evaluation.parts)
    samples = (_sample(evaluation.texts[number][0], parts) for number, parts in by_text.items())
    for parts, lesson in zip(by_text.values(), target.teach(samples), strict=True):
        for index, predictor in enumerate(predictors):
            for part in parts:
                steps[index].append(predictor.steps(lesson, part))
                likelihoods[index].append(predictor.likelihood(lesson, part))
        if sys.stderr.isatty():
            print(f"\r{len(steps[0])} of {len(evaluation.parts)} parts", end="", file=sys.stderr, flush=True)
    target.close()
    del target, vocabulary, glide, predictors
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return steps, [Likelihood(*map(sum, zip(*each, strict=True))) for each in likelihoods]


def serve(evaluation: Evaluation) -> list[list[dict[str, Any]]]:
    """Of each sampling, what an engine did with each part."""
    prompts = [evaluation.texts[part.text][0][: part.start].tolist() for part in evaluation.parts]
    max_tokens = [part.end - part.start - evaluation.drafting.reach for part in evaluation.parts]
    ends = evaluation.config.eos_token_id
    stops = {"stop_token_ids": ends if isinstance(ends, list) else [ends]} if ends is not None else {}
    runs = [
        {"prompts": prompts, "max_tokens": max_tokens, "sampling": {**sampling._asdict(), **stops}}
        for sampling in evaluation.samplings
    ]
    print(f"Serving {len(prompts)} prompts in an engine, {len(runs)} times", flush=True)
    longest = max(len(prompt) + tokens for prompt, tokens in zip(prompts, max_tokens, strict=True))
    return run_engine(engine_settings(evaluation, longest), runs)


def engine_settings(evaluation: Evaluation, longest: int) -> dict[str, Any]:
    """Of vLLM's `LLM`, for requests of up to `longest` tokens."""
    arguments, drafting = evaluation.arguments, evaluation.drafting
    settings = {
        "model": arguments.target,
        "revision": arguments.revision,
        "dtype": arguments.dtype or ("float32" if arguments.device == "cpu" else "auto"),
        "max_model_len": longest + drafting.num_nodes + 2,
        # One request at a time, as the walk: what is learned of copies then is learned in the same order.
        "max_num_seqs": 1,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "per_request_spec_decode_metrics": "detailed",
    }
    if rope_type_of(evaluation.config) == "longrope":
        # vLLM takes the table for short contexts where they are limited to such.
        settings["max_model_len"] = evaluation.config.max_position_embeddings
    if arguments.device == "cpu":
        # vLLM would take a share of the memory, which Triton's interpreter copies.
        *_, kv_heads, head_size = layer_sizes(evaluation.config)
        token_bytes = 2 * evaluation.config.num_hidden_layers * kv_heads * head_size * 4
        settings["kv_cache_memory_bytes"] = max(32 << 20, 2 * settings["max_model_len"] * token_bytes)
    settings |= arguments.engine_args
    settings["speculative_config"] = {
        "model": arguments.draft,
        "tree_shape": list(drafting.shape.levels),
        "num_speculative_tokens_per_batch_size": [[1, settings["max_num_seqs"], drafting.num_nodes]],
        "copy_length": drafting.copy_length,
        "couple_noise": drafting.couple_noise,
        "cross_attention_budget": drafting.cross_attention_budget,
        "frequent_tokens": evaluation.frequent_tokens or False,
        **arguments.engine_args.get("speculative_config", {}),
    }
    return settings


def _compare(
    evaluation: Evaluation, result: dict[str, Any], steps: Sequence[Steps], served: Sequence[dict[str, Any]]
) -> list[str]:
    """Puts the comparison of each context, and of all together, into a result, and returns those that disagree."""
    # A request whose first token ends it takes no step.
    pairs = [
        (mine.part.bucket, Sum.of(mine.accepted), Sum.of(other["accepted"]))
        for mine, other in zip(steps, served, strict=True)
        if other["accepted"]
    ]
    found = []
    places: list[tuple[str, dict[str, Any], list]] = [
        (f"context {context['context']}", context, [pair for pair in pairs if pair[0] == index])
        for index, context in enumerate(result["contexts"])
    ]
    for name, place, own in (*places, ("all contexts", result, pairs)):
        if not own:
            raise ValueError(f"the engine took no step, {name}: give more --tokens")
        _, walked, engine = zip(*own, strict=True)
        compared = compare(walked, engine, evaluation.arguments.tolerance)
        place["engine"] = compared._asdict()
        if compared.verdict == "differ":
            values = f"{number(compared.walk)} and {number(compared.engine)} tokens a step"
            found.append(f"{name}, temperature {result['temperature']:g}: {values}")
    return found


def _contradiction(sampling: Sampling, manifest: dict[str, Any]) -> str | None:
    """What the manifest says otherwise; None if nothing."""
    stored = manifest.get("sampling", {})
    none = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    wanted = sampling._asdict() | none
    if stored.get("top_k") == -1:
        stored = stored | {"top_k": 0}
    others = [f"{name} {stored[name]}" for name, value in wanted.items() if stored.get(name, value) != value]
    return f"by their manifest the answers were drawn with {', '.join(others)}" if others else None


def mismatch(sampling: Sampling, likelihood: Likelihood) -> str | None:
    """Why the answers do not look as if they had been drawn so; None if they do."""
    if sampling.temperature == 0:
        share = likelihood.greedy / likelihood.num_tokens
        if share < _GREEDY_SHARE:
            return (
                f"{share:.1%} of the stored tokens are the target's most probable ones, so the answers were not drawn "
                "at temperature 0, and these figures are not those of serving at it"
            )
        return None
    per_token = likelihood.surprise / likelihood.num_tokens
    deviations = abs(likelihood.surprise) / max(likelihood.variance, 1e-12) ** 0.5
    if deviations > _SURPRISE_DEVIATIONS and abs(per_token) > _SURPRISE:
        return (
            f"the stored tokens are {abs(per_token):.2f} nats {'less' if per_token > 0 else 'more'} probable than "
            f"draws at temperature {sampling.temperature:g} are, {deviations:.0f} standard deviations, so the answers "
            "were not drawn like this, and these figures are not those of serving like this"
        )
    return None


def _read_manifest(data: Path) -> dict[str, Any]:
    """What `vllm-longspec generate` wrote beside its data; nothing if there is none."""
    path = (data if data.is_dir() else data.parent) / MANIFEST
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path} is not JSON: move it away, and give --temperatures") from None
    return content if isinstance(content, dict) else {}


def _by_text(parts: Sequence[Part]) -> dict[int, list[Part]]:
    found: dict[int, list[Part]] = {}
    for part in parts:
        found.setdefault(part.text, []).append(part)
    return found


def _sample(ids: Tensor, parts: Sequence[Part]) -> Sample:
    """A text up to its last part; of the answers only the parts are supervised."""
    length = max(part.end for part in parts)
    mask = torch.zeros(length, dtype=torch.bool)
    for part in parts:
        mask[part.start : part.end] = True
    return Sample(ids[:length], mask, torch.arange(length))


def _budget(value: str) -> str | bool:
    return False if value == "false" else value


def _temperatures(value: str) -> list[float]:
    try:
        return [float(each) for each in value.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no list of numbers such as 0,0.6,1") from None
