# SPDX-License-Identifier: Apache-2.0
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.platforms
import vllm.triton_utils
from transformers import MistralConfig, Phi3Config, Qwen3Config
from vllm.config import CUDAGraphMode, KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from vllm_longspec.attention.cpu import TreeCpuAttentionImpl
from vllm_longspec.targets import connectors, support


def refused(error):
    message = str(error.value)
    assert "\n" not in message
    return message


WRAPPER: dict[str, Any] = {"is_multimodal_model": True, "architectures": ["Mistral3ForConditionalGeneration"]}


def target(**settings):
    """What is read of vLLM's ModelConfig, of a target that is served."""
    text_config = SimpleNamespace(**{"model_type": "llama", **settings.pop("hf_text_config", {})})
    served = {
        "model": "TARGET",
        "model_impl": "auto",
        "architectures": ["LlamaForCausalLM"],
        "using_transformers_backend": lambda: False,
        "hf_text_config": text_config,
        "runner_type": "generate",
        "is_multimodal_model": False,
        "multimodal_config": SimpleNamespace(language_model_only=False),
        "is_encoder_decoder": False,
        "is_diffusion": False,
        "use_mla": False,
        "is_hybrid": False,
        "is_attention_free": False,
        "uses_alibi": False,
        "uses_mrope": False,
        "enable_prompt_embeds": False,
        "logits_processors": None,
        "return_sampling_mask": False,
        "enable_sleep_mode": False,
        "sleep_mode_backend": "cumem",
        "get_head_size": lambda: 128,
        "get_sliding_window": lambda: None,
    }
    assert settings.keys() <= served.keys()
    return SimpleNamespace(**{**served, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"hf_text_config": {"model_type": "qwen2"}},
        {"model_impl": "vllm"},
        {**WRAPPER, "multimodal_config": SimpleNamespace(language_model_only=True)},
        # a window that no layer has, and layers that have none (any more)
        {"get_sliding_window": lambda: 64, "hf_text_config": {"layer_types": ["full_attention"]}},
        {"hf_text_config": {"layer_types": ["sliding_attention"]}},
        {"enable_sleep_mode": True},
        # which nobody uses
        {"sleep_mode_backend": "theirs"},
        {"hf_text_config": {"model_type": "granite"}},
        {"hf_text_config": {"model_type": "granite", "layer_types": ["full_attention"], "attention_sinks": False}},
    ],
)
def test_supported_target(settings):
    support.check_target(target(**settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"runner_type": "pooling"}, "a pooling target"),
        ({"is_multimodal_model": True}, "a multimodal target"),
        (
            # One whose other parts are left out, but not known to be a text model then.
            {"is_multimodal_model": True, "multimodal_config": SimpleNamespace(language_model_only=True)},
            "a multimodal target",
        ),
        (WRAPPER, "draft: serve without --speculative-model, or with --language-model-only"),
        ({"is_encoder_decoder": True}, "an encoder-decoder target"),
        ({"is_diffusion": True}, "a diffusion target"),
        ({"use_mla": True}, "MLA"),
        ({"is_hybrid": True}, "a hybrid target"),
        ({"is_attention_free": True}, "an attention-free target"),
        ({"get_sliding_window": lambda: 4096}, "a sliding window of 4096"),
        (
            {
                "get_sliding_window": lambda: 64,
                "hf_text_config": {"layer_types": ["full_attention", "sliding_attention"]},
            },
            "a sliding window of 64",
        ),
        ({"hf_text_config": {"dual_chunk_attention_config": {}}}, "dual chunk attention"),
        ({"uses_alibi": True}, "ALiBi"),
        ({"uses_mrope": True}, "multi-dimensional RoPE"),
        ({"hf_text_config": {"attention_chunk_size": 8192}}, "chunked attention"),
        ({"hf_text_config": {"attn_logit_softcapping": 50.0}}, "a soft cap of attention logits"),
        ({"hf_text_config": {"model_type": "gpt_oss"}}, "attention sinks"),
        ({"hf_text_config": {"attention_sinks": True}}, "attention sinks"),
        ({"hf_text_config": {"add_swa_attention_sink_bias": True}}, "attention sinks"),
        ({"hf_text_config": {"model_type": "granite", "layer_types": ["full_attention"]}}, "attention sinks"),
        ({"hf_text_config": {"num_kv_shared_layers": 10}}, "layers share their KV cache"),
        ({"model_impl": "transformers"}, "model_impl='transformers'"),
        ({"model_impl": "terratorch"}, "model_impl='terratorch'"),
        # what vLLM does with an architecture that it does not know
        (
            {"using_transformers_backend": lambda: True, "architectures": ["TheirsForCausalLM"]},
            "the architecture TheirsForCausalLM, which vLLM does not know and runs with the Transformers backend",
        ),
        ({"get_head_size": lambda: 16}, "head size 16"),
        ({"get_head_size": lambda: 512}, "head size 512"),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
        ({"logits_processors": ["package:Processor"]}, "a custom logits processor"),
        ({"return_sampling_mask": True}, "a sampling mask"),
        ({"enable_sleep_mode": True, "sleep_mode_backend": "theirs"}, "sleep_mode_backend='theirs'"),
    ],
)
def test_unsupported_target_is_refused_by_name(settings, said):
    with pytest.raises(ValueError, match=r"\(target TARGET\) is not supported with a GLIDE draft: .*serve") as error:
        support.check_target(target(**settings))
    assert said in refused(error)


def test_only_glide_drafts_need_a_family():
    unknown: Any = target(hf_text_config={"model_type": "olmo2"})
    support.check_target(unknown)
    with pytest.raises(ValueError, match=r"a target of the olmo2 family \(target TARGET\) is not .*llama") as error:
        support.check_family(unknown)
    refused(error)


@pytest.mark.parametrize("setting", [{"layer_rope_theta": [10000, 0]}, {"no_rope_layers": [1, 1, 0]}])
def test_layers_without_rotary_embedding_are_refused_with_a_glide_draft(setting):
    nope: Any = target(hf_text_config={"model_type": "granite", **setting})
    with pytest.raises(
        ValueError, match=r"\(NoPE\) \(target TARGET\) is not supported with a GLIDE draft: serve"
    ) as error:
        support.check_family(nope)
    refused(error)
    for layers in ([10000, 500], None):
        support.check_family(target(hf_text_config={"model_type": "granite", "layer_rope_theta": layers}))


@pytest.mark.parametrize(
    ("config", "window"),
    [
        # What transformers assumes where config.json says nothing, as Mistral-7B-v0.1's does say.
        (MistralConfig(), 4096),
        (MistralConfig(sliding_window=None), None),
        (Qwen3Config(), None),
        (Qwen3Config(use_sliding_window=True, max_window_layers=2), 4096),
        (Phi3Config(sliding_window=262144), 262144),
    ],
)
def test_a_window_of_the_config_is_refused(config, window):
    served: Any = target(hf_text_config=vars(config) | {"model_type": config.model_type})
    served.get_sliding_window = lambda: config.sliding_window
    if window is None:
        support.check_target(served)
        return
    with pytest.raises(ValueError, match=f"a sliding window of {window} .*with --disable-sliding-window") as error:
        support.check_target(served)
    refused(error)


def test_a_refusal_names_the_draft_at_hand():
    draft = support.Draft("the method magicdec", "serve without --speculative-config")
    with pytest.raises(ValueError) as error:
        support.check_target(target(uses_alibi=True), draft)
    assert refused(error) == (
        "a target with ALiBi (target TARGET) is not supported with the method magicdec: "
        "serve without --speculative-config"
    )
    with pytest.raises(ValueError, match="is not supported with the method magicdec"):
        support.check_engine(engine(use_v2_model_runner=False), draft)
    with pytest.raises(ValueError, match="is not supported with the method magicdec"):
        support.check_arguments(*arguments(use_ubatching=True), draft=draft)
    with pytest.raises(ValueError, match="is not supported with the method magicdec"):
        support.check_options({"parallel_drafting": True}, PARALLEL, draft)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alibi_slopes": [1.0, 0.5]}, "ALiBi"),
        ({"sliding_window": 64}, "a sliding window"),
        ({"logits_soft_cap": 50.0}, "a soft cap of attention logits"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "KV sharing between layers"),
        ({"sinks": torch.zeros(2)}, "attention sinks"),
        ({"chunk_lookback": 1}, "chunked attention"),
        ({"attn_type": "encoder_only"}, "attention of type encoder_only"),
    ],
)
def test_what_only_layers_show_is_refused_when_they_are_built(settings, said):
    """A target may attend in a way that its configuration does not tell under any name that is known."""
    TreeCpuAttentionImpl(2, 32, 0.1, 1, logits_soft_cap=None, sliding_window=None)
    with pytest.raises(ValueError, match=f"a target that has {said} is not supported with trees: serve ") as error:
        TreeCpuAttentionImpl(2, 32, 0.1, 1, **settings)
    refused(error)


def arguments(**settings: Any) -> tuple[Any, Any]:
    """What is read of vLLM's EngineArgs and ParallelConfig, of an engine that is served."""
    engine_args = {
        "scheduler_cls": None,
        "watermark_config": None,
        "weight_transfer_config": None,
    }
    parallel = {
        "pipeline_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "use_ubatching": False,
        "enable_batch_sharded_sampling": False,
    }
    for part in (engine_args, parallel):
        part.update({name: settings.pop(name) for name in part.keys() & settings.keys()})
    assert not settings
    return SimpleNamespace(**engine_args), SimpleNamespace(**parallel)


def test_supported_arguments():
    support.check_arguments(*arguments())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size=2"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size=2"),
        ({"use_ubatching": True}, "dual batch overlap"),
        ({"enable_batch_sharded_sampling": True}, "batch-sharded sampling"),
        ({"scheduler_cls": "mine.Scheduler"}, "scheduler_cls='mine.Scheduler'"),
        ({"watermark_config": {}}, "watermarking"),
        ({"weight_transfer_config": object()}, "weight transfer from a trainer"),
    ],
)
def test_unsupported_argument_is_refused_by_name(settings, said):
    with pytest.raises(ValueError, match="is not supported with a GLIDE draft: ") as error:
        support.check_arguments(*arguments(**settings))
    assert said in refused(error)


def test_installed_logits_processors_are_refused_by_name(monkeypatch):
    installed = {"vllm.logits_processors": [SimpleNamespace(name="theirs")]}
    monkeypatch.setattr(support, "entry_points", lambda group: installed[group])
    with pytest.raises(ValueError, match="the installed logits processor theirs is not supported") as error:
        support.check_arguments(*arguments())
    refused(error)


def engine(**settings):
    """What is read of vLLM's VllmConfig, of an engine that is served."""
    served = {
        "use_v2_model_runner": True,
        "kv_transfer_config": None,
        "num_lookahead_tokens": 0,
    }
    model = {"dtype": torch.bfloat16, "is_moe": False, "enable_sleep_mode": False}
    parallel = {"data_parallel_size": 1, "enable_eplb": False}
    cache = {"cache_dtype": "auto", "kv_sharing_fast_prefill": False, "kv_cache_dtype_skip_layers": []}
    structured_outputs = {"backend": "auto"}
    compilation = {"cudagraph_mode": CUDAGraphMode.PIECEWISE}
    for part in (served, model, parallel, cache, structured_outputs, compilation):
        part.update({name: settings.pop(name) for name in part.keys() & settings.keys()})
    assert not settings
    return SimpleNamespace(
        **served,
        model_config=SimpleNamespace(**model),
        parallel_config=SimpleNamespace(**parallel),
        cache_config=SimpleNamespace(**cache),
        structured_outputs_config=SimpleNamespace(**structured_outputs),
        compilation_config=SimpleNamespace(**compilation),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"data_parallel_size": 2},
        {"is_moe": True},
        *({"cache_dtype": name} for name in ("bfloat16", "fp8", "fp8_e4m3")),
        *({"backend": name} for name in ("xgrammar", "guidance", "outlines")),
    ],
)
def test_supported_engine(settings):
    support.check_engine(engine(**settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_v2_model_runner": False}, "VLLM_USE_V2_MODEL_RUNNER"),
        ({"cache_dtype": "fp8_e5m2"}, "a KV cache of fp8_e5m2 with a model of bfloat16"),
        ({"cache_dtype": "fp8_per_token_head"}, "a KV cache of fp8_per_token_head with a model of bfloat16"),
        ({"kv_cache_dtype_skip_layers": ["0"]}, "quantised in some layers only"),
        ({"cache_dtype": "float16"}, "a KV cache of float16 with a model of bfloat16"),
        ({"kv_sharing_fast_prefill": True}, "KV sharing"),
        ({"is_moe": True, "data_parallel_size": 2}, "data_parallel_size=2 with a mixture of experts"),
        ({"is_moe": True, "enable_eplb": True}, "expert parallel load balancing"),
        ({"backend": "lm-format-enforcer"}, "the structured output backend lm-format-enforcer"),
    ],
)
def test_unsupported_engine_is_refused_by_name(settings, said):
    with pytest.raises(ValueError, match="is not supported with a GLIDE draft: ") as error:
        support.check_engine(engine(**settings))
    assert said in refused(error)


def connector(name, module_path=None, **extra_config):
    return KVTransferConfig(
        kv_connector=name,
        kv_role="kv_both",
        kv_connector_module_path=module_path,
        kv_connector_extra_config=extra_config,
    )


@pytest.mark.parametrize("name", ["OffloadingConnector", "SimpleCPUOffloadConnector"])
def test_connectors_that_save_whole_blocks_are_supported(name):
    support.check_engine(engine(kv_transfer_config=connector(name)))
    support.check_engine(engine(kv_transfer_config=connector("OffloadingConnector"), num_lookahead_tokens=4))


@pytest.mark.parametrize("name", ["SimpleCPUOffloadConnector", "LMCacheConnectorV1"])
def test_nothing_is_loaded_beside_a_draft_that_writes_to_the_cache(monkeypatch, name):
    lmcache(monkeypatch)
    support.check_engine(engine(kv_transfer_config=connector(name)))
    with pytest.raises(ValueError, match=f"the KV connector {name} is not .*with one of OffloadingConnector$") as error:
        support.check_engine(engine(kv_transfer_config=connector(name), num_lookahead_tokens=4))
    refused(error)


def test_sleep_mode_needs_the_cache_for_itself():
    support.check_engine(engine(enable_sleep_mode=True))
    transfer = connector("OffloadingConnector")
    with pytest.raises(ValueError, match="sleep mode with a KV connector is not supported") as error:
        support.check_engine(engine(enable_sleep_mode=True, kv_transfer_config=transfer))
    refused(error)


def test_a_transfer_without_a_connector_is_none():
    support.check_engine(engine(kv_transfer_config=KVTransferConfig()))


@pytest.mark.parametrize("name", ["NixlConnector", "NixlPullConnector", "NixlPushConnector"])
def test_blocks_are_sent_unless_drafts_have_some_of_their_own(name):
    support.check_engine(engine(kv_transfer_config=connector(name)))
    with pytest.raises(ValueError, match=f"the KV connector {name} is not .*with one of OffloadingConnector$") as error:
        support.check_engine(engine(kv_transfer_config=connector(name), num_lookahead_tokens=4))
    assert "Nixl" not in refused(error).split(":", 1)[1]
    with pytest.raises(ValueError, match=f"{name} with bidirectional_kv_xfer is not supported .*: leave ") as error:
        support.check_engine(engine(kv_transfer_config=connector(name, bidirectional_kv_xfer=True)))
    refused(error)


def lmcache(monkeypatch, **settings):
    """A package of this name in whose environment these settings are."""
    utils: Any = ModuleType("lmcache.integration.vllm.utils")
    utils.lmcache_get_or_create_config = lambda: SimpleNamespace(**settings)
    for name in ("lmcache", "lmcache.integration", "lmcache.integration.vllm"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    monkeypatch.setattr(connectors, "has_lmcache_kernels", lambda: True)


def test_lmcache_is_supported(monkeypatch):
    for settings in ({}, {"use_layerwise": False, "save_decode_cache": True, "enable_p2p": None}):
        lmcache(monkeypatch, **settings)
        transfer = connector("LMCacheConnectorV1", **{"lmcache.use_layerwise": "False"})
        support.check_engine(engine(kv_transfer_config=transfer))
    # vLLM says what is missing.
    monkeypatch.setitem(sys.modules, "lmcache", None)
    support.check_engine(engine(kv_transfer_config=connector("LMCacheConnectorV1")))


@pytest.mark.parametrize(
    "setting", ["use_layerwise", "enable_blending", "enable_async_loading", "enable_pd", "enable_p2p"]
)
def test_other_ways_through_lmcache_are_refused(monkeypatch, setting):
    said = f"the KV connector LMCacheConnectorV1 with {setting} is not supported with a GLIDE draft: leave {setting} "
    lmcache(monkeypatch)
    for value in (True, "True", "1"):
        with pytest.raises(ValueError, match=said) as error:
            transfer = connector("LMCacheConnectorV1", **{f"lmcache.{setting}": value})
            support.check_engine(engine(kv_transfer_config=transfer))
        refused(error)
    lmcache(monkeypatch, **{setting: True})
    with pytest.raises(ValueError, match=said):
        support.check_engine(engine(kv_transfer_config=connector("LMCacheConnectorV1")))


def test_where_lmcache_restores_nothing_or_something_else_it_is_refused(monkeypatch):
    lmcache(monkeypatch)
    transfer = connector("LMCacheConnectorV1")
    for mode in (CUDAGraphMode.FULL, CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.FULL_AND_PIECEWISE):
        with pytest.raises(ValueError, match=r"with full CUDA graphs is not supported .*: serve with .*PIECEWISE"):
            support.check_engine(engine(kv_transfer_config=transfer, cudagraph_mode=mode))
    with pytest.raises(ValueError, match="with use_native is not supported"):
        support.check_engine(engine(kv_transfer_config=connector("LMCacheConnectorV1", use_native=True)))
    for role in ("kv_producer", "kv_consumer"):
        one_way = KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role=role)
        with pytest.raises(ValueError, match=f"with kv_role={role} is not supported"):
            support.check_engine(engine(kv_transfer_config=one_way))
    monkeypatch.setattr(vllm.platforms.current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr(connectors, "has_lmcache_kernels", lambda: False)
    with pytest.raises(ValueError, match=r"without its compiled extension is not supported .*: install an lmcache"):
        support.check_engine(engine(kv_transfer_config=transfer))
    monkeypatch.setattr(connectors, "has_lmcache_kernels", lambda: True)
    support.check_engine(engine(kv_transfer_config=transfer))


def test_other_connectors_are_refused_by_name():
    """All that vLLM has, so that a new one is looked into before it is supported."""
    supported = {"OffloadingConnector", "SimpleCPUOffloadConnector", "LMCacheConnectorV1"}
    supported |= {"NixlConnector", "NixlPullConnector", "NixlPushConnector"}
    registered = set(KVConnectorFactory._registry)
    assert supported < registered
    for name in sorted({*registered, "TheirConnector"} - supported):
        with pytest.raises(ValueError, match=f"the KV connector {name} is not supported with a GLIDE draft") as error:
            support.check_engine(engine(kv_transfer_config=connector(name)))
        assert all(each in refused(error) for each in supported)
        # Nothing is offered that would be refused as well.
        with pytest.raises(ValueError) as error:
            support.check_engine(engine(kv_transfer_config=connector(name), num_lookahead_tokens=4))
        assert "OffloadingConnector" in refused(error) and "Nixl" not in refused(error)
    # A module's class may have the name of one of vLLM's.
    for num_lookahead_tokens in (0, 4):
        transfer = connector("OffloadingConnector", "theirs")
        with pytest.raises(ValueError, match="OffloadingConnector of the module theirs is not supported") as error:
            support.check_engine(engine(kv_transfer_config=transfer, num_lookahead_tokens=num_lookahead_tokens))
        assert ("Nixl" in refused(error)) == (num_lookahead_tokens == 0)


PARALLEL: Any = SimpleNamespace(tensor_parallel_size=2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model": "DRAFT", "revision": "main", "code_revision": "main", "num_speculative_tokens": 5},
        {"method": None},
        {"method": "draft_model"},
        {"draft_tensor_parallel_size": 2},
        {"enforce_eager": True},
        {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.5},
        {"num_speculative_tokens_per_batch_size": [(1, 4, 8), [5, 8, 0]]},
        # what vLLM assumes when nothing is said
        {"rejection_sample_method": "standard", "draft_sample_method": "greedy", "parallel_drafting": False},
        {"suffix_decoding_max_tree_depth": 24, "max_model_len": None},
        # not an option at all: vLLM says so
        {"no_such_option": 1},
    ],
)
def test_supported_options(options):
    support.check_options(options, PARALLEL)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "eagle"}, "speculative method 'eagle'"),
        ({"method": "ngram"}, "speculative method 'ngram'"),
        ({"draft_tensor_parallel_size": 1}, "draft_tensor_parallel_size=1 with a target of tensor_parallel_size=2"),
        ({"rejection_sample_method": "block"}, "rejection_sample_method='block'"),
        ({"draft_sample_method": "probabilistic"}, "draft_sample_method='probabilistic'"),
        ({"parallel_drafting": True}, "parallel_drafting=True"),
        ({"quantization": "fp8"}, "quantization='fp8'"),
        ({"quantization": "fp8_per_channel"}, "on a CPU"),
        ({"attention_backend": "FLASH_ATTN"}, "attention_backend='FLASH_ATTN'"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8'"),
        ({"use_heterogeneous_vocab": True}, "use_heterogeneous_vocab=True"),
        ({"max_model_len": 512}, "max_model_len=512"),
        ({"prompt_lookup_max": 3}, "prompt_lookup_max=3"),
    ],
)
def test_unsupported_option_is_refused_by_name(options, said):
    with pytest.raises(ValueError, match="is not supported with a GLIDE draft: leave ") as error:
        support.check_options(options, PARALLEL)
    assert said in refused(error)


@pytest.mark.parametrize(
    "schedule",
    [
        *([], "1:8", [(1, 4)], [(2, 4, 8)], [(1, 4, -1)], [(1, 4, 8), (3, 6, 4)]),
        *([(1, 4, "many")], [(1, None, 8)], [(1, float("inf"), 8)], [(1, [4], 8)]),
    ],
)
def test_wrong_schedule_is_refused_before_the_engine_starts(schedule):
    with pytest.raises(ValueError, match=r"num_speculative_tokens_per_batch_size=.* cannot be used \(.*\): ") as error:
        support.check_options({"num_speculative_tokens_per_batch_size": schedule}, PARALLEL)
    assert "\n" not in str(error.value)


class Platform:
    def __init__(self, name):
        self.device_name = name

    def is_cpu(self):
        return self.device_name == "cpu"

    def is_cuda(self):
        return self.device_name == "cuda"


WITHOUT_TRITON = {"is_installed": False, "has_triton": False}
BOTH = "longspec,longspec_interpreter"


@pytest.mark.parametrize(
    ("platform", "settings", "said"),
    [
        ("cpu", {"TRITON_INTERPRET": "1"}, None),
        ("cpu", {"TRITON_INTERPRET": "1", "VLLM_PLUGINS": BOTH}, None),
        ("cuda", {}, None),
        # On a GPU nobody needs the interpreter.
        ("cuda", {"VLLM_PLUGINS": "longspec"}, None),
        ("cpu", WITHOUT_TRITON, "install triton and set TRITON_INTERPRET=1"),
        ("cpu", {}, "its interpreter: set TRITON_INTERPRET=1"),
        ("cpu", {"TRITON_INTERPRET": "0", "has_triton": False}, "its interpreter: set TRITON_INTERPRET=1"),
        ("cpu", {"TRITON_INTERPRET": "1", **WITHOUT_TRITON}, "install triton (pip install triton)"),
        (
            "cpu",
            {"TRITON_INTERPRET": "1", "has_triton": False, "VLLM_PLUGINS": "longspec"},
            f"VLLM_PLUGINS='longspec' leaves the plugin longspec_interpreter out: set VLLM_PLUGINS={BOTH}",
        ),
        (
            # vLLM takes the space for part of the name.
            "cpu",
            {"TRITON_INTERPRET": "1", "has_triton": False, "VLLM_PLUGINS": "longspec, longspec_interpreter,theirs"},
            f"leaves the plugin longspec_interpreter out: set VLLM_PLUGINS={BOTH},theirs",
        ),
        (
            "cpu",
            {"TRITON_INTERPRET": "1", "has_triton": False, "VLLM_TARGET_DEVICE": "cpu"},
            "VLLM_TARGET_DEVICE=cpu keeps it from asking plugins for a platform, unset it",
        ),
        (
            "cpu",
            {"TRITON_INTERPRET": "1", "has_triton": False},
            "its plugin longspec_interpreter was not loaded in time",
        ),
        ("cuda", WITHOUT_TRITON, "install triton (pip install triton)"),
        ("cuda", {"has_triton": False}, "install triton again"),
        ("rocm", {}, "not on rocm"),
        ("xpu", {}, "not on xpu"),
    ],
)
def test_platform(monkeypatch, platform, settings, said):
    environment = {"is_installed": True, "has_triton": True, **settings}
    is_installed, has_triton = environment.pop("is_installed"), environment.pop("has_triton")
    monkeypatch.setattr(vllm.platforms, "_current_platform", Platform(platform))
    monkeypatch.setattr(vllm.triton_utils, "HAS_TRITON", has_triton)
    monkeypatch.setattr(support, "find_spec", lambda name: name if is_installed else None)
    for name in ("TRITON_INTERPRET", "VLLM_PLUGINS", "VLLM_TARGET_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if said is None:
        support.check_platform()
        return
    with pytest.raises(ValueError) as error:
        support.check_platform()
    assert said in refused(error)
