# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.kernels` calls the kernels as they are; times are a GPU's business, and FlashAttention's part too."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from benchmarks import kernels
from tests.unit.test_sample import without_a_gpu  # noqa: F401

SMALL = kernels.QWQ_32B | {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 50}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(calls: Sequence[Callable[[], Any]]) -> float:
        for call in calls:
            call()
        return 2.0

    def prefix_attention(batch: kernels.Batch, **_: Any) -> Callable[[], torch.Tensor]:
        return lambda: torch.zeros(batch.query.shape[1], batch.query.shape[0], device=batch.query.device)

    monkeypatch.setattr(kernels, "DEVICE", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    monkeypatch.setattr(kernels, "QWQ_32B", SMALL)
    monkeypatch.setattr(kernels, "MODELS", {"small": SMALL})
    monkeypatch.setattr(kernels, "CACHE_BYTES", 1 << 22)
    monkeypatch.setattr(kernels, "COLD_BYTES", 1)
    monkeypatch.setattr(kernels, "CONTEXTS", (64, 1 << 20))
    monkeypatch.setattr(kernels, "BATCHES", (1, 2))
    monkeypatch.setattr(kernels, "COPIES", ((64, 1), (100, 2)))
    monkeypatch.setattr(kernels, "LLAMA_3_8B_262K", SMALL | {"num_hidden_layers": 9})
    monkeypatch.setattr(kernels, "SELECTIONS", ((1500, 1), (64, 2)))
    monkeypatch.setattr(kernels, "DEFAULT_ROWS", 12)
    monkeypatch.setattr(kernels, "PART", 64)
    monkeypatch.setattr(kernels, "PART_BATCHES", (1, 3))
    monkeypatch.setattr(kernels, "WINDOW_HEADS", ((1, 2), (2, 1)))
    monkeypatch.setattr(kernels, "WINDOW_BATCHES", (1, 2))
    monkeypatch.setattr(kernels, "WINDOW_WIDTHS", (1, 3))
    monkeypatch.setattr(kernels, "SAMPLED", ((1, 5), (2, 3)))
    monkeypatch.setattr(kernels, "LEVELS", ((1, 3), (2, 4)))
    monkeypatch.setattr(kernels, "GEMM_ROWS", (1, 3))
    monkeypatch.setattr(kernels, "NORM_SIZES", (64, 96))
    monkeypatch.setattr(kernels, "NORM_ROWS", (1, 3))
    monkeypatch.setattr(kernels, "measure", measure)
    monkeypatch.setattr(kernels, "measure_without_graph", lambda call: measure([call]))
    monkeypatch.setattr(kernels.Batch, "prefix_attention", prefix_attention)


def test_attention() -> None:
    """Contexts that do not fit the cache are left out."""
    rows = list(kernels.attention())
    assert [(row["context"], row["batch"], row["rows"]) for row in rows] == [
        (64, batch, rows) for batch in (1, 2) for rows in (8, 64, 12)
    ]
    assert {row["times one query"] for row in rows} == {1.0}
    assert kernels.table(rows).splitlines()[0].startswith("| model | context | batch | rows | FA3, one query |")


def test_splits() -> None:
    rows = list(kernels.splits())
    assert rows == [{"batch": batch, "up to 32 splits": 2.0, "one split": 2.0} for batch in (1, 3)]


def test_window(monkeypatch: pytest.MonkeyPatch) -> None:
    quantised = []

    def scaled_fp8_quant(rows: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        quantised.append(rows.shape)
        return rows.to(torch.float8_e4m3fn), torch.ones(len(rows), 1)

    monkeypatch.setattr("vllm._custom_ops.scaled_fp8_quant", scaled_fp8_quant)
    rows = list(kernels.window())
    assert [tuple(row.values())[:4] for row in rows[::2]] == [
        (*heads, batch, width) for heads in ((1, 2), (2, 1)) for batch in (1, 2) for width in (1, 3)
    ]
    assert [row["o_proj"] for row in rows[:2]] == ["fp8", "bf16"]
    assert list(rows[0])[5:] == ["whole", "2 splits", "4 splits", "8 splits", "default"]
    # Of a window that is split the merge does it. Two calls have other requests if each has one.
    assert quantised == 2 * [(1, 256), (1, 256), (3, 256), (3, 256), (2, 256), (6, 256)]


def test_children() -> None:
    rows = list(kernels.children())
    assert [(row["batch"], row["width"]) for row in rows] == [(1, 3), (2, 4)]
    assert list(rows[0]) == ["batch", "width", "no noise", "greedy", "temperature", "temperature and top-p"]


def test_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []

    def cutlass_scaled_mm(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, dtype: Any):
        """What vLLM's asserts."""
        assert b.stride() == (1, b.shape[0]) and a.shape[1] == b.shape[0]
        assert scale_a.shape == (a.shape[0], 1) and scale_b.shape == (1, b.shape[1])
        products.append((*a.shape, b.shape[1]))

    monkeypatch.setattr("vllm._custom_ops.cutlass_scaled_mm", cutlass_scaled_mm)
    rows = list(kernels.gemms())
    assert [(row["model"], row["rows"]) for row in rows] == [("small", 1), ("small", 3)]
    hidden, inner, queries = SMALL["hidden_size"], SMALL["intermediate_size"], 4 * 128
    layer = [(hidden, 2 * queries), (queries, hidden), (hidden, queries), (queries, hidden)]
    layer += [(hidden, 2 * inner), (inner, hidden)]
    assert products == [(num_rows, *sizes) for num_rows in (1, 3) for sizes in (*layer, (hidden, 50))]


def test_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    added = []

    def vllm_norm(
        rows: torch.Tensor,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        epsilon: float,
        bound: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> None:
        assert rows.shape == hidden.shape and weight.shape == hidden.shape[1:] and scales.shape == (len(hidden), 1)
        added.append(residual is not None)

    monkeypatch.setattr(torch.ops._C, "rms_norm_dynamic_per_token_quant", vllm_norm, raising=False)
    rows = list(kernels.norms())
    assert [(row["size"], row["rows"]) for row in rows] == [(64, 1), (64, 3), (96, 1), (96, 3)]
    assert list(rows[0])[2:] == ["vLLM's kernel", "as it is", "vLLM's kernel, residual", "as it is, residual"]
    assert added == [False, True] * 4


def test_sample() -> None:
    rows = list(kernels.sample())
    assert [(row["batch"], row["rows"]) for row in rows[::3]] == [(1, 5), (2, 3)]
    assert all(row["same tokens"] for row in rows)


def test_compact() -> None:
    assert [(row["batch"], row["emitted tokens"]) for row in kernels.compact()] == [
        (batch, emitted) for batch in (1, 2) for emitted in (1, 4, 6)
    ]


def test_copy() -> None:
    assert [tuple(row.values()) for row in kernels.copy()] == [(64, 1, 2.0, 2.0), (100, 2, 2.0, 2.0)]


def test_scores() -> None:
    rows = list(kernels.scores())
    assert [(row["context"], row["batch"]) for row in rows] == [(1500, 1), (64, 2)]
    assert kernels.table(rows).splitlines()[0] == (
        "| context | batch | FA3 | scores, all | choice, all | scores, in turn | choice, in turn | scores, none | "
        "choice, none | tables, all layers |"
    )


def test_learn() -> None:
    rows = list(kernels.learn())
    assert [(row["batch"], row["rows"]) for row in rows] == [(1, 25), (2, 25)]
    assert rows[0]["a step, fp8"] > rows[0]["count emitted"] == 2.0
