# SPDX-License-Identifier: Apache-2.0
"""The samples of a run, out of its data: those to train with, and held-out ones to measure by."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from vllm_longspec.training.batches import generator_of
from vllm_longspec.training.config import TrainConfig
from vllm_longspec.training.data import TokenStore, files_of, prepare
from vllm_longspec.training.target import SharedTarget, load_tokenizer

# In the place of a number of a stage, for what is drawn of held-out samples.
_HELD_OUT = -1


def prepare_data(config: TrainConfig, shared: SharedTarget) -> tuple[TokenStore, TokenStore]:
    """Samples to train with, and held-out ones. Their tokens are written to the run's folder, if they are not there.

    Raises:
        ValueError: a file or a line of the data is wrong, or too few samples would be left to train with.
    """
    longest = min(max(stage.max_length for stage in config.stages), shared.config.max_position_embeddings)
    cache = Path(config.out) / "data"

    def stored(paths: Sequence[str]) -> TokenStore:
        num_bytes = sum(file.stat().st_size for file in files_of(paths))
        # Not shown where the tokens are there already.
        with tqdm(total=num_bytes, desc="reading data", unit="B", unit_scale=True, delay=1.0, leave=False) as bar:
            return prepare(paths, cache, lambda: load_tokenizer(shared), shared.vocab_size, longest, bar.update)

    if config.held_out.data:
        return stored(config.data), stored(config.held_out.data)
    whole = stored(config.data)
    count = config.held_out.samples
    if 0 < len(whole) <= count:
        raise ValueError(
            f"the data have {len(whole)} samples, and {count} are held out: give more, or fewer as held_out.samples"
        )
    is_held_out = held_out_by_prompt(whole.prompts, count, config.seed)
    return whole.part(~is_held_out), whole.part(is_held_out)


def held_out_by_prompt(prompts: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Which samples are held out: about `count`, all answers to a prompt or none, drawn by the seed.

    Args:
        prompts: int64 [num_samples], hashes

    Returns:
        bool [num_samples]
    """
    different, number_of, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    chosen = np.zeros(len(different), dtype=np.bool_)
    if count:
        if len(different) == 1:
            raise ValueError("all samples have the same prompt, so none is held out: give held_out.data, or samples 0")
        left = count
        order = torch.randperm(len(different), generator=generator_of(seed, _HELD_OUT)).tolist()
        for group in order:
            if sizes[group] <= left:
                chosen[group] = True
                left -= sizes[group]
        if not chosen.any():
            # Each prompt has more answers than that.
            chosen[sizes.argmin()] = True
    return chosen[number_of]
