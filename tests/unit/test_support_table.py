# SPDX-License-Identifier: Apache-2.0
"""docs/support.md: every feature that users turn on has a row under what becomes of it, and every row a test."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "docs" / "support.md"
# The page has a section for each.
STATES = ("works with trees", "refused")

# What users of vLLM turn on, and a word that is in the file of the test that shows it.
REQUIRED = {
    "temperature": "temperature",
    "top-k": "top_k",
    "top-p": "top_p",
    "min-p": "min_p",
    "seed": "seed",
    "`n` > 1": '"n": 3',
    "presence, frequency and repetition penalties": "frequency_penalty",
    "logit bias": "logit_bias",
    "allowed tokens": "allowed_token_ids",
    "bad words": "bad_words",
    "`min_tokens`": "min_tokens",
    "stop strings": '"stop"',
    "stop token ids": "stop_token_ids",
    "`ignore_eos`": "ignore_eos",
    "logprobs, 0 and 5": "logprobs=5",
    "logprobs in every mode, raw and processed": "processed_logits",
    "prompt logprobs": "prompt_logprobs",
    "structured output: JSON schema": '"json"',
    "structured output: regex": '"regex"',
    "structured output: choice": '"choice"',
    "structured output: grammar": '"grammar"',
    "structured output with xgrammar": "xgrammar",
    "structured output with guidance": "guidance",
    "structured output with outlines": "outlines",
    "structured output with LM Format Enforcer": "lm-format-enforcer",
    "tool calling": "tool_choice",
    "reasoning parsers": "--reasoning-parser",
    "thinking budgets": "thinking_token_budget",
    "custom logits processors": "logits_processors",
    "streaming": "DELTA",
    "abort in mid-stream": "abort_after",
    "beam search": "beam_width",
    "any token budget, long-prefill threshold and schedule of nodes": "long_prefill_token_threshold",
    "a token budget shared evenly among requests": "max_num_batched_tokens",
    "trees that preempt no request": "num_gpu_blocks_override",
    "KV cache of plain decoding and the rows in flight": "num_lookahead_tokens",
    "priority scheduling": "priority",
    "prefix caching": "prefix_cache_hits",
    "chunked prefill": "LENGTHS",
    "preemption and resumption": "num_preemptions",
    "`max_model_len` edges": "max_model_len",
    "continuous batching with mixed prompts": "arriving",
    "async scheduling off": "async_scheduling=False",
    "async scheduling on": '"async_scheduling": True',
    "enforce-eager": "generate(",
    "CUDA graphs: PIECEWISE": '"PIECEWISE"',
    "CUDA graphs: FULL": '"FULL"',
    "CUDA graphs: FULL_DECODE_ONLY": '"FULL_DECODE_ONLY"',
    "CUDA graphs: FULL_AND_PIECEWISE": '"FULL_AND_PIECEWISE"',
    "bf16 KV cache": "kv_cache_dtype",
    "fp8 KV cache": "write_cache_scales",
    "fp8 targets": '"fp8"',
    "fp8 drafts": 'quantization="fp8_per_channel"',
    "AWQ targets": "write_awq",
    "GPTQ targets, quantised heads": "write_gptq",
    "compressed-tensors targets": "write_int8",
    "tensor parallelism": "tensor_parallel_size",
    "data parallelism": "--data-parallel-size",
    "sleep mode, levels 1 and 2": "enable_sleep_mode",
    "weight reload": "reload_weights",
    "several engines in one process": '"side by side"',
    "load formats of the target": '"sharded_state"',
    "`draft_load_config`": "draft_load_config",
    "dummy weights": '"dummy"',
    "NaN counts (`VLLM_COMPUTE_NANS_IN_LOGITS`)": "VLLM_COMPUTE_NANS_IN_LOGITS",
    "trace replay (`trace_decode_token_ids`)": "trace_decode_token_ids",
    "architectures that vLLM does not list": "using_transformers_backend",
    "other model implementations by `--model-impl`": "model_impl",
    "drafts in object storage": "s3://",
    "drafts on ModelScope": "VLLM_USE_MODELSCOPE",
    "drafts that do not fit their target": "does not fit",
    "drafts with pickled code": "pickle",
    "a scheduler class of the user's": "scheduler_cls",
    "attention backends other than the plugin's": "cannot verify the tree",
    "LoRA adapters of the target, with a GLIDE draft": "enable_lora",
    "LoRA with MagicDec": "enable_lora",
    "requests with different adapters, or none, in a batch": "lora_request",
    "LoRA adapters of the target's head": "lora-target-modules",
    "pipeline parallelism": "pipeline_parallel_size",
    "KV offloading (`--kv-offloading-size`, `OffloadingConnector`)": "kv_transfer_config",
    "LMCache in the engine's process (`LMCacheConnectorV1`) with a GLIDE draft": '"LMCacheConnectorV1"',
    "sleep mode with a KV connector": "kv_transfer_config",
    "multimodal targets": "is_multimodal_model",
    "sliding-window targets": "get_sliding_window",
    "windows that are a config's default, such as Mistral-7B-v0.1's": "MistralConfig()",
    "Llama 3.1 to 3.3": "LLAMA3_ROPE",
    "Qwen3": '"qwen3"',
    "Qwen3-MoE": '"qwen3_moe"',
    "Mistral": '"mistral"',
    "Ministral 3, text": '"ministral3"',
    "Phi-3 and Phi-4": '"phi3"',
    "GLM-4": '"glm4"',
    "Granite 3": '"granite"',
    "MLA": "use_mla",
    "hybrid models": "is_hybrid",
    "embeddings and pooling": "runner_type",
    "prompt embeddings": "enable_prompt_embeds",
    "watermarking": "watermark_config",
}


def read_table(text: str) -> list[list[str]]:
    """Feature, state and test of each feature in the tables of the page.

    The state is the heading of the section. A row holds one feature or several, divided by semicolons, then for some
    tables a remark, and its test.
    """
    rows = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        state = section.splitlines()[0].strip().lower()
        for table in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
            # The first two are the head and its rule.
            head, _, *lines = ([cell.strip() for cell in line.strip("| \n").split("|")] for line in table.splitlines())
            assert head[0] == "feature" and head[-1] == "test"
            for cells in lines:
                if len(cells) != len(head) or not all(cells):
                    rows.append(cells)
                    continue
                rows += [[feature.strip(), state, cells[-1]] for feature in cells[0].split(";")]
    assert rows
    return rows


def wrong_rows(rows: list[list[str]]) -> list[str]:
    """What is wrong with a table, a line for each thing."""
    wrong = []
    for row in rows:
        if len(row) != 3 or not all(row):
            wrong.append(f"{row}: a cell is missing or empty")
            continue
        feature, state, test = row
        if state not in STATES:
            wrong.append(f"{feature}: {state!r} is none of {', '.join(STATES)}")
        named = re.fullmatch(r"`(tests/\S+\.py)::(test_\w+)`", test)
        if named is None:
            wrong.append(f"{feature}: {test!r} names no test")
            continue
        path = ROOT / named[1]
        if not path.is_file() or named[2] not in (tests := functions_of(path.read_text())):
            wrong.append(f"{feature}: there is no {test}")
        elif tests[named[2]]:
            wrong.append(f"{feature}: {test} is not run")
        elif (word := REQUIRED.get(feature)) and word not in path.read_text():
            wrong.append(f"{feature}: {test} says nothing of {word}")
    features = [row[0] for row in rows]
    wrong += [f"{feature}: has no row" for feature in REQUIRED if feature not in features]
    wrong += [
        f"{feature}: has {features.count(feature)} rows" for feature in set(features) if features.count(feature) > 1
    ]
    return wrong


def functions_of(source: str) -> dict[str, bool]:
    """The test functions of a file, and whether a mark keeps them from being run."""
    return {
        node.name: any(re.search(r"mark\.(skip|xfail)\b", ast.unparse(each)) for each in node.decorator_list)
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
    }


def test_every_feature_has_a_row_and_every_row_a_test():
    assert wrong_rows(read_table(SUPPORT.read_text())) == []


ROW = ["min-p", "works with trees", "`tests/integration/test_lossless.py::test_trained_draft`"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (ROW[:2], "a cell is missing or empty"),
        ([*ROW[:2], ""], "a cell is missing or empty"),
        ([ROW[0], "works", ROW[2]], "'works' is none of"),
        ([*ROW[:2], "by hand"], "'by hand' names no test"),
        ([*ROW[:2], "`tests/integration/test_lossless.py::test_nothing`"], "there is no"),
        ([*ROW[:2], "`tests/unit/test_nothing.py::test_nothing`"], "there is no"),
        (
            ["watermarking", "refused", "`tests/unit/test_options.py::test_gamma_is_a_chain`"],
            "says nothing of watermark",
        ),
    ],
)
def test_a_wrong_row_is_named(row, said):
    assert any(said in line for line in wrong_rows([row]) if row[0] in line)


def test_a_missing_row_is_named():
    rows = read_table(SUPPORT.read_text())
    assert wrong_rows([row for row in rows if row[0] != "seed"]) == ["seed: has no row"]
    assert wrong_rows([*rows, rows[0]]) == [f"{rows[0][0]}: has 2 rows"]


PAGE = """# Features

No table.

## Refused

| feature | the way out | test |
| --- | --- | --- |
| LoRA; MLA | none | `one` |
| watermarking | | `one` |

## Works with trees

### Sampling

| feature | test |
| --- | --- |
| seed | `two` |
"""


def test_the_state_of_a_feature_is_its_section():
    assert read_table(PAGE) == [
        ["LoRA", "refused", "`one`"],
        ["MLA", "refused", "`one`"],
        ["watermarking", "", "`one`"],
        ["seed", "works with trees", "`two`"],
    ]
    assert "['watermarking', '', '`one`']: a cell is missing or empty" in wrong_rows(read_table(PAGE))
