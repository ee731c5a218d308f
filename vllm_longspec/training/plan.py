# SPDX-License-Identifier: Apache-2.0
"""What a run needs, before it starts: memory of a GPU, disk, and GPU hours. Formulas of shapes, and an assumed speed.

Nothing is started: of the target config.json and the embedding and head are read, and the data are checked and
tokenized, which the run needs anyway.
"""

import os
from typing import Any, NamedTuple

from vllm_longspec.targets.families import layer_sizes, layer_weights, num_experts, target_weights
from vllm_longspec.training.batches import Plan, without_short_stage
from vllm_longspec.training.config import TrainConfig
from vllm_longspec.training.forward import RECOMPUTE_ABOVE
from vllm_longspec.training.initialise import freeze_unused
from vllm_longspec.training.layer import SELF_ATTENTION_WINDOW, GlideLayer
from vllm_longspec.training.losses import CHUNK_BYTES
from vllm_longspec.training.optimizer import MUON, step_flops
from vllm_longspec.training.split import prepare_data
from vllm_longspec.training.target import check_served, load_shared

# Of a GPU with 990 TFLOP/s of bfloat16, such as an H100: shares that a prefill and the draft's training are taken to
# reach.
_PEAK = 990e12
_TEACHER_SHARE, _DRAFT_SHARE = 0.45, 0.3
_GIB = 2**30


class Stage(NamedTuple):
    """Sums over a stage."""

    tokens: int
    rows: int
    pairs: float  # (query, key) pairs of causal attention
    context: float  # keys that rows see


def plan(config: TrainConfig) -> str:
    """Text for people. Raises ValueError where the run would."""
    check_served(config.target, config.revision)
    shared = load_shared(config.target, config.revision)
    store, held_out = prepare_data(config, shared)
    whole, config = config, without_short_stage(config, store)
    target = shared.config
    lines = [
        f"target: {config.target}, {target.model_type}, {target.num_hidden_layers} layers, vocabulary of "
        f"{shared.vocab_size}",
        f"data: {store.counts}; {len(held_out)} samples held out",
    ]
    if config.stages != whole.stages:
        lines.append(f"the recipe's stage of {whole.stages[0].max_length} tokens is left out: almost no sample fits")
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    lines.append(
        f"a step: {num_ranks * config.accumulation} x {config.tokens_per_batch} tokens (tokens_per_batch), more where "
        "a sample is longer"
    )
    step_hours = num_ranks * _step_hours(config, target)
    hours, of_updates, longest = 0.0, 0.0, 0
    for number, stage in enumerate(config.stages):
        samples = Plan(
            store,
            stage,
            number,
            config.tokens_per_batch,
            config.accumulation,
            config.seed,
            target.max_position_embeddings,
            num_ranks=num_ranks,
        )
        lengths = [samples.lengths[index] for index in samples.usable.tolist()]
        longest = max(longest, *lengths)
        epoch = _epoch(store, samples, lengths)
        if stage.minutes is not None:
            of_stage, said = stage.minutes / 60 * num_ranks, f"{stage.minutes:g} minutes"
        else:
            per_epoch = samples.num_steps(1.0)
            if stage.tokens is not None:
                epochs = stage.tokens / epoch.tokens
            else:
                epochs = stage.epochs if stage.epochs is not None else (stage.steps or 0) / per_epoch
            updates = epochs * per_epoch * step_hours
            of_stage = epochs * _epoch_hours(config, target, shared.vocab_size, epoch) + updates
            of_updates += updates
            said = f"{epochs:.3g} epochs of {per_epoch} steps, {epochs * epoch.tokens:,.0f} tokens"
        hours += of_stage
        said += f", {len(samples.usable)} of {len(store)} samples"
        lines.append(f"stage {number + 1}: {said}, {of_stage:.2f} GPU hours")
    lines += [
        f"GPU hours: {hours:.2f} of a GPU with {_PEAK / 1e12:.0f} TFLOP/s of bfloat16, if the teacher reaches "
        f"{_TEACHER_SHARE:.0%} of them and the draft {_DRAFT_SHARE:.0%} (an estimate: a minute's run measures it)",
        *([f"of them {of_updates:.2f} for steps of {config.optimizer}, which each GPU computes"] if of_updates else []),
        *_memory(config, target, shared, max(longest, config.tokens_per_batch)),
        _disk(config, shared, store.counts.tokens, held_out),
    ]
    return "\n".join(lines)


def _epoch(store: Any, samples: Plan, lengths: list[int]) -> Stage:
    tokens = sum(lengths)
    share = store.counts.supervised / max(1, store.counts.tokens)
    return Stage(
        tokens,
        int(share * tokens),
        sum(length * length / 2 for length in lengths),
        sum(share * length * length / 2 for length in lengths),
    )


def _epoch_hours(config: TrainConfig, target: Any, vocab_size: int, epoch: Stage) -> float:
    _, _, heads, _, head_size = layer_sizes(target)
    # A multiplication and an addition for each weight of a token, and four of each for a pair and element of a head.
    active = target_weights(target, vocab_size, 1) - vocab_size * target.hidden_size
    if num_experts(target):
        active += (
            3
            * target.hidden_size
            * target.moe_intermediate_size
            * target.num_experts_per_tok
            * (target.num_hidden_layers)
        )
    teacher = 2 * active * epoch.tokens + 4 * target.num_hidden_layers * heads * head_size * epoch.pairs
    depths = config.depths_per_batch or config.levels
    head = vocab_size * target.hidden_size
    # Forward and backward of the layer at each depth; of the frozen head the backward pass is half of it.
    per_row = 6 * depths * layer_weights(target) + 4 * depths * head + 2 * head
    pairs = epoch.context + epoch.rows * SELF_ATTENTION_WINDOW
    draft = per_row * epoch.rows + 14 * heads * head_size * pairs
    return (teacher / _TEACHER_SHARE + draft / _DRAFT_SHARE) / _PEAK / 3600


def _step_hours(config: TrainConfig, target: Any) -> float:
    """Of the optimizer, on each GPU: with whole matrices every one computes all of them."""
    glide = _glide(target)
    freeze_unused(glide)
    flops = step_flops(config.optimizer, [each.shape for each in glide.parameters() if each.requires_grad])
    return flops / _DRAFT_SHARE / _PEAK / 3600


def _memory(config: TrainConfig, target: Any, shared: Any, tokens: int) -> list[str]:
    hidden, intermediate, heads, kv_heads, head_size = layer_sizes(target)
    draft = sum(parameter.numel() for parameter in _glide(target).parameters())
    depths = config.depths_per_batch or config.levels
    tied = 1 if shared.head is shared.embedding else 2
    # Weights, gradient and moments in float32.
    trained = (8 + _moment_bytes(config)) * draft
    shared_bytes = 2 * tied * shared.vocab_size * hidden
    lessons = 2 * tokens * (2 * kv_heads * head_size + hidden) * config.accumulation
    # What the backward pass needs of a row: the residual stream, attention and MLP of each depth, in bfloat16. Of many
    # rows the MLP is computed again.
    kept = min(tokens * depths, RECOMPUTE_ABOVE)
    activations = 2 * tokens * (4 * hidden + 3 * heads * head_size + depths * (2 * hidden + heads * head_size))
    activations += 2 * kept * (2 * hidden + 4 * intermediate)
    if depths > 1:
        # In float32: queries, and of each key that is added to the shared ones itself and its value less the mean.
        added = (config.levels - 1) * (heads + kv_heads)
        activations += 4 * tokens * (heads + added) * head_size
    logits = 4 * CHUNK_BYTES["cuda"]
    teacher = 2 * (target_weights(target, shared.vocab_size, 1)) if config.teacher == "hf" else 0
    prefill = 2 * tokens * (4 * hidden + 3 * intermediate) if config.teacher == "hf" else 0
    parts = {
        "draft with gradient and moments": trained,
        "embedding and head": shared_bytes,
        "lessons of a step": lessons,
        "activations, all tokens supervised": activations,
        "logits": logits,
        "target in Transformers": teacher,
        "its activations": prefill,
    }
    total = sum(parts.values())
    said = ", ".join(f"{what} {size / _GIB:.1f}" for what, size in parts.items() if size)
    lines = [f"memory of a GPU: about {total / _GIB:.0f} GiB for batches of {tokens} tokens ({said})"]
    if config.teacher == "vllm":
        lines.append("the engine of --teacher vllm takes its own memory, see gpu_memory_utilization")
    return lines


def _disk(config: TrainConfig, shared: Any, tokens: int, held_out: Any) -> str:
    draft = sum(parameter.numel() for parameter in _glide(shared.config).parameters())
    checkpoint = draft * (2 + 4 + 4 + _moment_bytes(config))
    kept = (config.checkpoints.keep + 1) * checkpoint
    return (
        f"disk in {config.out}: {5 * tokens / _GIB:.2f} GiB of tokens, {kept / _GIB:.1f} GiB of checkpoints "
        f"({config.checkpoints.keep} and one that is being written)"
    )


def _moment_bytes(config: TrainConfig) -> int:
    """Of a weight, nearly all of which are in matrices: Muon has one moment, AdamW two."""
    return 4 if config.optimizer == MUON else 8


def _glide(config: Any) -> GlideLayer:
    import torch

    with torch.device("meta"):
        return GlideLayer(config)
