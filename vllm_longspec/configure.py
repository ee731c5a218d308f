# SPDX-License-Identifier: Apache-2.0
"""Turns the user's speculative options into vLLM's and the plugin's; see docs/design.md#from-options-to-an-engine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic import ValidationError

from vllm_longspec import proposers
from vllm_longspec.attention.registry import choose_attention_backend
from vllm_longspec.frequent_tokens import num_frequent_tokens
from vllm_longspec.options import (
    AUTO,
    DEFAULT_LEVELS,
    OPTION_NAMES,
    LongSpecOptions,
    attach_options,
    count_verified_nodes,
    most_tokens,
    options_of,
    parse_copy_length,
    parse_cross_attention_budget,
    parse_partial_attention,
    parse_tree_shape,
    read_flag,
    times_steps,
)
from vllm_longspec.proposers.interface import SHARED_OPTIONS, DraftSetup
from vllm_longspec.scheduling.schedule import BATCH_ROWS, MOST_ROWS, default_schedule, numbers_of, plan_levels
from vllm_longspec.targets import support
from vllm_longspec.tree.synthetic_rates import rates_by_depth

if TYPE_CHECKING:
    import argparse

    from transformers import PretrainedConfig
    from vllm.config import LoadConfig, ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

# (flag, key of the speculative configuration, field of EngineArgs), in vLLM's order
_FLAGS = (
    ("--spec-method", "method", "spec_method"),
    ("--spec-model", "model", "spec_model"),
    ("--spec-tokens", "num_speculative_tokens", "spec_tokens"),
)
# Of vLLM's `sleep_preserve_parameter_names`, all that the draft does not share with the target.
_DRAFT_PARAMETERS = "draft.*"


@dataclass(frozen=True)
class Speculation:
    setup: DraftSetup
    options: LongSpecOptions
    # Arguments of vLLM's SpeculativeConfig.
    vllm_options: dict[str, Any]


def given_config(engine_args: "EngineArgs | argparse.Namespace") -> dict[str, Any]:
    """The user's speculative configuration, empty if there is none. Raises ValueError if it is not a JSON object."""
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
    """The speculative options from the configuration and from flags.

    Raises:
        ValueError: the configuration is not a JSON object, or an option is given twice.
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


def configure(
    engine_args: "EngineArgs", target: "ModelConfig", parallel_config: "ParallelConfig"
) -> Speculation | None:
    """Resolves the options of an engine with candidate trees; None for every other engine.

    Raises:
        ValueError: the draft, the target or an option is not supported, or an option of trees is given without a draft
            that drafts them.
    """
    given = read_options(engine_args)
    own = {name: given.pop(name) for name in OPTION_NAMES if name in given}
    method = given.get("method")
    name = method if isinstance(method, str) and method in proposers.names() else proposers.GLIDE
    known = proposers.setup_of(name).option_names
    setup = proposers.setup_of(name).find(given, {option: own[option] for option in own if option in known})
    if setup is None:
        _refuse_options_without_proposer(name, own, method)
        return None
    _check_option_names(name, own)

    from vllm.platforms import current_platform
    from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

    if method == name:
        # vLLM does not know the names of proposers.
        del given["method"]
    draft = draft_of(name)
    support.check_platform(draft)
    support.check_options(given, parallel_config, draft)
    support.check_arguments(engine_args, parallel_config, draft)
    support.check_target(target, draft)
    setup.check(target)
    draft_vocab_size = target.get_vocab_size()
    frequent_tokens = setup.frequent_tokens(own.get("frequent_tokens"), given, target, parallel_config)
    if frequent_tokens is not None:
        draft_vocab_size = num_frequent_tokens(frequent_tokens, draft_vocab_size)
    copy_length = parse_copy_length(own)
    needs_schedule = given.get("num_speculative_tokens_per_batch_size") is None
    measures = "step_costs" in known and times_steps(own)
    # `vllm_longspec/scheduling/cost.py` assumes weights of two bytes.
    knows_costs = measures or target.quantization is None
    adaptive_verification = _use_adaptive_verification(own, given, needs_schedule, target, knows_costs)
    is_given = own.get("tree_shape") is not None or own.get("gamma") is not None
    if set(setup.default_levels or ()) == {1} and not is_given:
        # What drafts a chain drafts as many tokens as vLLM's own options say.
        own["gamma"] = most_tokens(given)
    tree_shape = parse_tree_shape(own, draft_vocab_size, setup.default_levels or DEFAULT_LEVELS)
    num_nodes = count_verified_nodes(given.get("num_speculative_tokens"), tree_shape)
    options = dict(given)
    nodes_by_cost = False
    # In Triton's interpreter, which is for tests, all nodes are verified by default.
    if needs_schedule and (adaptive_verification or current_platform.is_cuda()):
        num_kv_heads = target.get_num_kv_heads(parallel_config)
        # A proposer with a schedule of its own keeps to it.
        schedule = setup.schedule(num_nodes, MOST_ROWS if adaptive_verification else None)
        if schedule is None:
            # One that has no costs has nothing to choose by.
            nodes_by_cost = "step_costs" in known and knows_costs and not adaptive_verification
            batch_rows = MOST_ROWS if adaptive_verification or nodes_by_cost else BATCH_ROWS
            queries_per_kv_head = target.get_num_attention_heads(parallel_config) // num_kv_heads
            schedule = default_schedule(num_nodes, queries_per_kv_head, batch_rows)
        options["num_speculative_tokens_per_batch_size"] = schedule
        num_nodes = schedule[0][2]
    if own.get("tree_shape") == AUTO:
        schedule = validate_and_normalize_dynamic_sd_schedule(options["num_speculative_tokens_per_batch_size"])
        tree_shape = tree_shape.with_plans(plan_levels(numbers_of(schedule, num_nodes), tree_shape))
        num_nodes = max((number for number, _ in tree_shape.plans), default=num_nodes)
    part = None
    if "budget" in setup.option_names:
        part = parse_partial_attention(own, target.max_model_len)
    elif "cross_attention_budget" in setup.option_names:
        part = parse_cross_attention_budget(own, target.max_model_len)
    options["num_speculative_tokens"] = num_nodes
    options.update(setup.vllm_options(engine_args, given, target, parallel_config))
    options.update(rates_by_depth(options, tree_shape))
    _, couple_noise = read_flag(own, "couple_noise")
    return Speculation(
        setup,
        LongSpecOptions(
            name,
            tree_shape,
            frequent_tokens,
            couple_noise=couple_noise is not False,
            adaptive_verification=adaptive_verification,
            copy_length=copy_length,
            num_lookahead_tokens=setup.num_lookahead_tokens(num_nodes),
            partial_attention=part,
            spool=own.get("spool"),
            nodes_by_cost=nodes_by_cost,
            measures_costs=measures and (adaptive_verification or nodes_by_cost),
        ),
        options,
    )


def draft_of(name: str) -> support.Draft:
    """How messages name the draft of a proposer."""
    setup = proposers.setup_of(name)
    return support.Draft(setup.noun or f"the method {name}", setup.without)


def _check_option_names(name: str, own: dict[str, Any]) -> None:
    """Refuses options that the proposer of this name lacks, and says who has them."""
    setup = proposers.setup_of(name)
    for option, value in own.items():
        # Null is the default, as of any option.
        if option in setup.option_names or value is None:
            continue
        way_out = setup.ways_out.get(option, "leave it out")
        if option not in SHARED_OPTIONS:
            others = ", ".join(draft_of(other).noun for other in proposers.others_with(option, name))
            way_out = f"it is an option of {others}; {way_out}"
        raise ValueError(f"{option} is not supported with {draft_of(name).noun}: {way_out}")


def _refuse_options_without_proposer(name: str, own: dict[str, Any], method: Any) -> None:
    """Refuses options where the proposer of this name, who lacks them, is not asked for either."""
    for option in own:
        others = proposers.others_with(option, name)
        add = f"add {proposers.ask_for(others)}" + (f" instead of {method!r}" if method is not None else "")
        raise ValueError(f"{option} is an option of the method {', '.join(others)}: {add}, or leave it out")


def _use_adaptive_verification(
    own: dict[str, Any], given: dict[str, Any], needs_schedule: bool, target: "ModelConfig", knows_costs: bool
) -> bool:
    from vllm.platforms import current_platform

    name, value = read_flag(own, "adaptive_verification", "adapt_nodes")
    # Synthetic acceptance does not depend on the number of nodes.
    is_synthetic = given.get("rejection_sample_method") == "synthetic"
    if own.get("tree_shape") == AUTO:
        for refused, reason in (
            (value is False, f"{name}=false"),
            (is_synthetic, "rejection_sample_method='synthetic', which sets what is accepted"),
            (not knows_costs, f"a target of quantization={target.quantization!r} whose steps are not timed"),
        ):
            if refused:
                raise ValueError(
                    f"tree_shape={AUTO!r} follows what is accepted and costs, and is not supported with {reason}: give "
                    "the nodes of each level"
                )
        return True
    if value is None:
        return current_platform.is_cuda() and needs_schedule and not is_synthetic and knows_costs
    if value and not knows_costs:
        raise ValueError(
            f"{name} is not supported with a target of quantization={target.quantization!r} whose steps are not timed: "
            "leave it out, or serve on a GPU without step_costs"
        )
    return value


# The setup of the draft whose SpeculativeConfig is being built, for `compose_draft_hf_overrides`.
_current: ContextVar[DraftSetup | None] = ContextVar("longspec_current_setup", default=None)
# Of the engine configuration that is being built with adapters: the number of tokens of its SpeculativeConfig. vLLM
# asks for room for this many in every request of the largest batch, because some runners give each of their logits an
# adapter. Here the schedule and the token budget bound the rows, and adapters of the head are refused. Default batches
# on any device would be too large for a tree.
_withheld: ContextVar[list[tuple["SpeculativeConfig", int]] | None] = ContextVar("longspec_withheld", default=None)


@contextmanager
def _building(speculation: Speculation, engine_args: "EngineArgs") -> Iterator[None]:
    """Puts vLLM's options into `engine_args` while vLLM builds the SpeculativeConfig, then restores the user's."""
    fields = ("speculative_config", *(field for _, _, field in _FLAGS))
    given = {field: getattr(engine_args, field) for field in fields}
    token = _current.set(speculation.setup)
    try:
        for field in fields:
            value = dict(speculation.vllm_options) if field == "speculative_config" else None
            setattr(engine_args, field, value)
        yield
    finally:
        _current.reset(token)
        for field, value in given.items():
            setattr(engine_args, field, value)


def create_speculative_config(
    original: "Callable[..., SpeculativeConfig | None]",
    self: "EngineArgs",
    target_model_config: "ModelConfig",
    target_parallel_config: "ParallelConfig",
) -> "SpeculativeConfig | None":
    speculation = configure(self, target_model_config, target_parallel_config)
    if speculation is None:
        try:
            config = original(self, target_model_config, target_parallel_config)
        except ValidationError as error:
            _name_all_methods(error)
        for name in proposers.names():
            proposers.setup_of(name).check_other(config)
        return config
    choose_attention_backend(self, target_model_config, draft_of(speculation.options.proposer).noun)
    with _building(speculation, self):
        config = original(self, target_model_config, target_parallel_config)
    assert config is not None
    support.check_method(config, target_model_config, draft_of(speculation.options.proposer))
    if config.draft_model_config is not None:
        # Candidates have the target's positions, so that what the draft's own config says must not limit the engine.
        config.draft_model_config.max_model_len = target_model_config.max_model_len
    attach_options(config, speculation.options)
    if self.enable_lora and (withheld := _withheld.get()) is not None:
        withheld.append((config, config.num_speculative_tokens))
        config.num_speculative_tokens = 0
    return config


def _name_all_methods(error: ValidationError) -> NoReturn:
    """Raises what vLLM says of a speculative configuration; of an unknown method it would list its own only."""
    for each in error.errors():
        if each["type"] == "literal_error" and each["loc"] == ("method",):
            own = " or ".join(sorted(proposers.names() - {proposers.GLIDE}))
            raise ValueError(
                f"there is no speculative method {each['input']!r}: give {own}, leave it out for a GLIDE draft, or "
                f"give one of vLLM's, {each['ctx']['expected']}"
            ) from None
    raise error


def create_load_config(original: "Callable[..., LoadConfig]", self: "EngineArgs") -> "LoadConfig":
    """Called after that comparison, and before anything else reads the number."""
    for config, num_speculative_tokens in _withheld.get() or ():
        config.num_speculative_tokens = num_speculative_tokens
    return original(self)


def compose_draft_hf_overrides(original: Callable[..., Any], *args: Any) -> "Callable[..., PretrainedConfig]":
    """The `hf_overrides` of the draft that is being built; must be picklable."""
    overrides, setup = original(*args), _current.get()
    # The first is those of the target. vLLM 0.33 has one more.
    return overrides if setup is None else setup.hf_overrides(overrides, args[0])


def _gives_capture_sizes(engine_args: "EngineArgs") -> bool:
    compilation = engine_args.compilation_config
    given = (
        engine_args.cudagraph_capture_sizes,
        engine_args.max_cudagraph_capture_size,
        compilation.cudagraph_capture_sizes,
        compilation.max_cudagraph_capture_size,
    )
    return any(value is not None for value in given)


def capture_largest_batch(vllm_config: "VllmConfig") -> None:
    """Adds `max_num_seqs` to the sizes of CUDA graphs, for the draft and for plain decoding with a row a request.

    vLLM's own sizes have it without speculation. With it they have the largest batches of the schedule's numbers, and
    a graph for more requests than `max_num_seqs` is not captured: of 3 requests at most, 3 would have none.
    """
    compilation = vllm_config.compilation_config
    sizes, most = compilation.cudagraph_capture_sizes, vllm_config.scheduler_config.max_num_seqs
    if sizes and most < max(sizes) and most not in sizes:
        compilation.cudagraph_capture_sizes = sorted([*sizes, most])


def create_engine_config(
    original: "Callable[..., VllmConfig]", self: "EngineArgs", *args: Any, **kwargs: Any
) -> "VllmConfig":
    given_backend = self.attention_backend
    gives_sizes = _gives_capture_sizes(self)
    token = _withheld.set([])
    try:
        vllm_config = original(self, *args, **kwargs)
    finally:
        _withheld.reset(token)
        # `create_speculative_config` chose a backend for this engine; `self` may be used again, with another draft.
        self.attention_backend = given_backend
    if (options := options_of(vllm_config.speculative_config)) is not None:
        if not gives_sizes:
            capture_largest_batch(vllm_config)
        support.check_engine(vllm_config, draft_of(options.proposer))
        proposers.setup_of(options.proposer).check_engine(vllm_config)
        preserved = vllm_config.model_config.sleep_preserve_parameter_names
        if vllm_config.model_config.enable_sleep_mode and _DRAFT_PARAMETERS not in preserved:
            # Waking up from level 2 is followed by a reload of the target's weights, not of the draft's.
            preserved.append(_DRAFT_PARAMETERS)
        from vllm_longspec.scheduling.scheduler import scheduler_name

        # The class depends on `async_scheduling`, which vLLM resolves in `original`.
        vllm_config.scheduler_config.scheduler_cls = scheduler_name(vllm_config.scheduler_config)
    return vllm_config
