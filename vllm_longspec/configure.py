# SPDX-License-Identifier: Apache-2.0
"""Prepares vLLM's engine arguments for a GLIDE draft, or leaves them alone when the draft is of another kind."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

from vllm_longspec.attention.registry import CPU_BACKEND, FLASH_BACKEND, TRITON_BACKEND, attention_backend
from vllm_longspec.frequent_tokens import FILE_NAME, read_frequent_tokens
from vllm_longspec.targets import support
from vllm_longspec.proposers.glide.checkpoint import (
    FAMILIES,
    DraftCheckpoint,
    NoGlideDraftError,
    UnseenDraftError,
    find_file,
    read_draft,
)
from vllm_longspec.proposers.glide.fit import check_fit
from vllm_longspec.proposers.glide.loading import draft_load_config
from vllm_longspec.options import (
    ADAPT_NODES_ATTRIBUTE,
    FREQUENT_TOKENS_ATTRIBUTE,
    OPTION_NAMES,
    SHAPE_ATTRIBUTE,
    TreeShape,
    count_verified_nodes,
    parse_tree_shape,
)
from vllm_longspec.proposers.glide.quantization import default_quantization
from vllm_longspec.scheduling.schedule import default_schedule
from vllm_longspec.targets import support
from vllm_longspec.tree.synthetic_rates import rates_by_depth

if TYPE_CHECKING:
    import argparse

    from transformers import PretrainedConfig
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
    from vllm.engine.arg_utils import EngineArgs

# vLLM shows what loggers below its own say.
logger = init_logger(f"vllm.{__name__}")

# The same order as vLLM's: flag, key of the speculative configuration, field of EngineArgs.
_FLAGS = (
    ("--spec-method", "method", "spec_method"),
    ("--spec-model", "model", "spec_model"),
    ("--spec-tokens", "num_speculative_tokens", "spec_tokens"),
)

# vLLM decides what kind of draft it has by these words in its path, before it looks at anything else.
_WORDS_OF_OTHER_METHODS = ("eagle-", "eagle3", "dflash", "dspark")


@dataclass(frozen=True)
class GlideDraft:
    """A GLIDE draft with everything that vLLM needs to be told about it."""

    checkpoint: DraftCheckpoint
    tree_shape: TreeShape
    # None: all tokens are drafted
    frequent_tokens: str | None
    adapt_nodes: bool
    # of vLLM's SpeculativeConfig
    options: dict[str, Any]


# The draft whose speculative configuration is being built.
_current: ContextVar[GlideDraft | None] = ContextVar("longspec_current_draft", default=None)


def given_config(engine_args: "EngineArgs | argparse.Namespace") -> dict[str, Any]:
    """The speculative configuration as the user wrote it; empty when there is none.

    Raises:
        ValueError: it is not an object with names.
    """
    given = engine_args.speculative_config
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise ValueError(
            f"--speculative-config must be a JSON object, got {given!r}: for example "
            '\'{"model": "DRAFT", "tree_shape": [4, 16, 16]}\''
        )
    return given


def read_options(engine_args: "EngineArgs") -> dict[str, Any]:
    """The speculative options from all the places where a user can put them.

    Raises:
        ValueError: when one of them is given in two places, the way vLLM says it, or they are none.
    """
    options: dict[str, Any] = {}
    for key, value in given_config(engine_args).items():
        name = key.replace("-", "_")
        if name in options:
            raise ValueError(f"{name} is given twice in --speculative-config: leave one of the two out")
        options[name] = value
    for flag, key, field in _FLAGS:
        value = getattr(engine_args, field)
        if value is None:
            continue
        if key in options:
            raise ValueError(f"{flag} and --speculative-config['{key}'] are mutually exclusive")
        options[key] = value
    return options


def find_glide_draft(
    engine_args: "EngineArgs", target: "ModelConfig", parallel_config: "ParallelConfig"
) -> GlideDraft | None:
    """The GLIDE draft that the user asks for; None when there is no draft or one of another kind.

    Raises:
        ValueError: in one line, for a draft, a target or an option that does not work, and for a tree without a
            GLIDE draft.
    """
    options = read_options(engine_args)
    tree_options = {name: options.pop(name) for name in OPTION_NAMES if name in options}
    model = options.get("model")
    try:
        if not isinstance(model, str):
            given = "no draft was given" if model is None else f"the model must be a string, got {model!r}"
            raise NoGlideDraftError(f"{given}, add --speculative-model DRAFT")
        checkpoint = read_draft(model, options.get("revision"), expected=bool(tree_options))
    except NoGlideDraftError as error:
        for name in tree_options:
            raise ValueError(f"{name} needs a GLIDE draft: {error}") from None
        # Of a draft of another kind vLLM needs to know more, and will say so.
        if isinstance(error, UnseenDraftError) and not options.keys() & {"method", "num_speculative_tokens"}:
            logger.warning("Draft %s. If it is a GLIDE draft, it is not recognised.", error)
        return None

    from vllm.platforms import current_platform

    support.check_platform()
    support.check_options(options, parallel_config)
    support.check_arguments(engine_args, parallel_config)
    support.check_target(target)
    check_fit(checkpoint, target)
    for word in _WORDS_OF_OTHER_METHODS:
        if word in checkpoint.model.lower():
            raise ValueError(
                f"draft {checkpoint.model} is a GLIDE draft, but vLLM takes any path with {word!r} in it for another "
                "kind: move it or link to it under another name"
            )
    draft_vocab_size = target.get_vocab_size()
    frequent_tokens = _find_frequent_tokens(tree_options.get("frequent_tokens"), checkpoint, options.get("revision"))
    if frequent_tokens is not None:
        draft_vocab_size = len(read_frequent_tokens(frequent_tokens, draft_vocab_size))
    tree_shape = parse_tree_shape(tree_options, draft_vocab_size)
    num_nodes = count_verified_nodes(options.get("num_speculative_tokens"), tree_shape)
    needs_schedule = options.get("num_speculative_tokens_per_batch_size") is None
    adapt_nodes = tree_options.get("adapt_nodes")
    if adapt_nodes is None:
        # Synthetic acceptance is the same of few nodes as of many, so there is nothing to adapt to.
        is_synthetic = options.get("rejection_sample_method") == "synthetic"
        adapt_nodes = current_platform.is_cuda() and needs_schedule and not is_synthetic and target.quantization is None
    if not isinstance(adapt_nodes, bool):
        raise ValueError(f"adapt_nodes must be true or false, got {adapt_nodes!r}")
    if adapt_nodes and target.quantization is not None:
        # `vllm_longspec/scheduling/cost.py` knows weights of two bytes.
        raise ValueError(
            f"adapt_nodes is not supported with a target of quantization={target.quantization!r}: leave it out, or "
            "serve a target that is not quantised"
        )
    # Triton's interpreter is for trying and testing; there the number of nodes has no load to follow.
    if needs_schedule and (adapt_nodes or current_platform.is_cuda()):
        queries_per_kv_head = target.get_num_attention_heads(parallel_config) // target.get_num_kv_heads(
            parallel_config
        )
        schedule = default_schedule(num_nodes, queries_per_kv_head)
        options["num_speculative_tokens_per_batch_size"] = schedule
        num_nodes = schedule[0][2]
    options["num_speculative_tokens"] = num_nodes
    if "quantization" not in options:
        options["quantization"] = default_quantization(engine_args, target, parallel_config, draft_vocab_size)
    options["draft_load_config"] = draft_load_config(engine_args, options.get("draft_load_config"), checkpoint)
    options.update(rates_by_depth(options, tree_shape))
    options["method"] = "draft_model"
    return GlideDraft(checkpoint, tree_shape, frequent_tokens, adapt_nodes, options)


def check_other_draft(config: "SpeculativeConfig | None") -> None:
    """Refuses a GLIDE draft that vLLM has found where `find_glide_draft` sees none, such as in object storage.

    vLLM knows its architecture, and would build it and drive it as an ordinary model.

    Raises:
        ValueError: in one line, with the way out.
    """
    if config is None or config.draft_model_config is None:
        return
    if not set(config.draft_model_config.architectures) & set(FAMILIES.values()):
        return
    assert config.model is not None
    try:
        read_draft(config.model, config.revision, expected=True)
    except NoGlideDraftError as error:
        raise ValueError(f"a GLIDE draft cannot be served from where it is: {error}") from None
    raise ValueError(f"draft {config.model} is a GLIDE draft, but was not to be seen at first: start vLLM again")


def _find_frequent_tokens(option: Any, checkpoint: DraftCheckpoint, revision: str | None) -> str | None:
    """The file that the user gives, or else the one that comes with the draft, unless the option is false."""
    if option is False:
        return None
    if option is None:
        shipped = find_file(checkpoint.model, FILE_NAME, revision)
        return None if shipped is None else str(shipped)
    if not isinstance(option, str):
        raise ValueError(
            f"frequent_tokens must be a file, or false, got {option!r}: make one with "
            "python -m vllm_longspec.frequent_tokens"
        )
    return os.path.abspath(option)


@contextmanager
def building(draft: GlideDraft, engine_args: "EngineArgs") -> Iterator[None]:
    """Shows vLLM the options as it knows them while it builds the draft's SpeculativeConfig, then the user's again."""
    fields = ("speculative_config", *(field for _, _, field in _FLAGS))
    given = {field: getattr(engine_args, field) for field in fields}
    token = _current.set(draft)
    try:
        for field in fields:
            setattr(engine_args, field, dict(draft.options) if field == "speculative_config" else None)
        yield
    finally:
        _current.reset(token)
        for field, value in given.items():
            setattr(engine_args, field, value)


def glide_hf_overrides(
    overrides: "Callable[[PretrainedConfig], PretrainedConfig]",
) -> "Callable[[PretrainedConfig], PretrainedConfig]":
    """The `hf_overrides` of the draft that is being built: vLLM's own, and what is written on a GLIDE draft's config.

    Part of vLLM's configuration, so it must be picklable.
    """
    draft = _current.get()
    if draft is None:
        return overrides
    return functools.partial(
        _describe,
        draft.checkpoint.architecture,
        draft.tree_shape.levels,
        draft.frequent_tokens,
        draft.adapt_nodes,
        overrides,
    )


def _describe(
    architecture: str,
    levels: tuple[int, ...],
    frequent_tokens: str | None,
    adapt_nodes: bool,
    overrides: "Callable[[PretrainedConfig], PretrainedConfig]",
    hf_config: "PretrainedConfig",
) -> "PretrainedConfig":
    hf_config.architectures = [architecture]
    setattr(hf_config, SHAPE_ATTRIBUTE, list(levels))
    setattr(hf_config, FREQUENT_TOKENS_ATTRIBUTE, frequent_tokens)
    setattr(hf_config, ADAPT_NODES_ATTRIBUTE, adapt_nodes)
    # A draft's config.json may be a quantised target's; its weights never are.
    vars(hf_config).pop("quantization_config", None)
    return overrides(hf_config)


def choose_attention_backend(engine_args: "EngineArgs", target: "ModelConfig") -> None:
    """Selects the tree attention backend for the target: it is what `attention_backend` says from then on.

    Raises:
        ValueError: when the user asks for a backend that cannot verify a tree.
    """
    from vllm.platforms import current_platform

    supported = (CPU_BACKEND,) if current_platform.is_cpu() else (FLASH_BACKEND, TRITON_BACKEND)
    config = engine_args.attention_config
    given = engine_args.attention_backend or config.backend or "auto"
    name = (given if isinstance(given, str) else given.name).upper()
    if name not in ("AUTO", *supported):
        raise ValueError(
            f"attention backend {name} cannot verify the tree of a GLIDE draft: leave --attention-backend out"
        )
    for kind, backend in config.backend_per_kind.items():
        if backend.name not in supported:
            raise ValueError(
                f"attention backend {backend.name} for {kind} cannot verify the tree of a GLIDE draft: leave "
                "backend_per_kind out of --attention-config"
            )
    if config.backend is not None:
        return
    if name == "AUTO" and len(supported) == 1:
        name = supported[0]
    elif name == "AUTO":
        name = FLASH_BACKEND if _flash_attention_serves(engine_args, target) else TRITON_BACKEND
    engine_args.attention_backend = attention_backend(name)


def _flash_attention_serves(engine_args: "EngineArgs", target: "ModelConfig") -> bool:
    from vllm.utils.torch_utils import is_quantized_kv_cache, resolve_kv_cache_dtype_string
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    if target.dtype not in (torch.float16, torch.bfloat16):
        return False
    version: int | None = engine_args.attention_config.flash_attn_version
    version = version or get_flash_attn_version(head_size=target.get_head_size())
    # The checkpoint may ask for a quantised cache too; of compressed-tensors vLLM finds that out later, in the worker.
    cache_dtype = resolve_kv_cache_dtype_string(engine_args.kv_cache_dtype, target)
    scheme = (getattr(target.hf_config, "quantization_config", None) or {}).get("kv_cache_scheme")
    is_quantised = is_quantized_kv_cache(cache_dtype) or (cache_dtype == "auto" and scheme is not None)
    return version in ((3,) if is_quantised else (2, 3))
