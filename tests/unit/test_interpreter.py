# SPDX-License-Identifier: Apache-2.0
"""What is left out of Triton's interpreter is left out, and changes nothing."""

from typing import Any

import pytest
import torch
from vllm.triton_utils import tl, triton

from vllm_longspec.interpreter import booleans, interpreting, overhead

pytestmark = pytest.mark.skipif(not interpreting(), reason="Triton compiles on this machine")


@triton.jit
def _double(x):
    return x + x


@triton.jit
def _doubles_kernel(out_ptr, TIMES: tl.constexpr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    values = tl.load(out_ptr + offsets)
    for _ in range(TIMES):
        values = _double(values)
    tl.store(out_ptr + offsets, values)
    # A device function of Triton's own, which knows the language by another name.
    tl.store(out_ptr + SIZE, tl.sum(values, axis=0))


def launch(values: list[int], times: int) -> list[int]:
    out = torch.tensor([*values, 0], dtype=torch.int32)
    _doubles_kernel[(1,)](out, TIMES=times, SIZE=len(values))
    return out.tolist()


def test_a_launch_replaces_the_language_once(monkeypatch):
    from triton.runtime import interpreter

    replaced: list[Any] = []
    original = interpreter._patch_builtin

    def replace(owner: Any, *args: Any) -> None:
        replaced.append(owner)
        original(owner, *args)

    monkeypatch.setattr(interpreter, "_patch_builtin", replace)
    assert launch([1, 2, 3, 4], times=1) == [2, 4, 6, 8, 20]
    once, replaced[:] = replaced[:], []
    assert launch([1, 2, 3, 4], times=6) == [64, 128, 192, 256, 640]
    assert tl in once and replaced.count(tl) == 1 and len(replaced) <= len(once)


def test_a_launch_restores_the_language():
    launch([1, 2], times=2)
    for function in (tl.load, tl.math.exp, tl.tensor.__add__):
        assert tl.core.is_builtin(function)
    with pytest.raises(ValueError, match="_semantic"):
        tl.arange(0, 4)


def test_integers_wrap_around():
    """As on a GPU. Nothing is computed again to find out."""
    from triton.runtime import interpreter

    assert not interpreter.interpreter_builder.options.sanitize_overflow
    assert launch([2**30, -(2**31)], times=1) == [-(2**31), 0, -(2**31)]


def test_types_are_looked_up_once():
    from triton.runtime import interpreter

    for dtype in (tl.int1, tl.bfloat16, tl.float8e4nv, tl.pointer_type(tl.float32), tl.block_type(tl.int64, [2, 4])):
        found = interpreter._get_np_dtype(dtype)
        assert found == interpreter._get_np_dtype.longspec_original(dtype)
        assert found is interpreter._get_np_dtype(dtype)


def triton_makes(cls: Any, *args: Any) -> Any:
    made = object.__new__(cls)
    cls.__init__.longspec_original(made, *args)
    return made


def attributes(made: Any) -> dict[str, str]:
    return {name: repr(value) for name, value in vars(made).items()}


@pytest.mark.parametrize(
    "dtype", [tl.int1, tl.float32, tl.pointer_type(tl.int64), tl.pointer_type(tl.int64, const=True)]
)
@pytest.mark.parametrize("shape", [[4], [2, 8], [tl.constexpr(2), tl.constexpr(8)], None])
def test_types_and_tensors_have_all_attributes(dtype, shape):
    for _ in range(2):
        type_ = dtype if shape is None else tl.block_type(dtype, shape)
        if shape is not None:
            assert type_.element_ty is dtype
            assert attributes(type_) == attributes(triton_makes(tl.block_type, dtype, shape))
        handle = object()
        tensor = tl.tensor(handle, type_)
        assert tensor.handle is handle and tensor.type is type_ and tensor.dtype is dtype
        assert attributes(tensor) == attributes(triton_makes(tl.tensor, handle, type_))


def test_a_shape_that_is_none_is_refused():
    for shape in ([3], [4, 6]):
        for _ in range(2):
            with pytest.raises(ValueError, match="power of 2"):
                tl.block_type(tl.int32, shape)


def test_nothing_is_left_out_twice():
    from triton.runtime import interpreter

    before = interpreter._patch_lang, interpreter._get_np_dtype
    overhead.leave_out()
    assert before == (interpreter._patch_lang, interpreter._get_np_dtype)


@triton.jit
def _first_if_positive_kernel(values_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    first = tl.load(values_ptr)
    tl.store(out_ptr + offsets, tl.load(values_ptr + offsets, mask=(offsets < 2) & (first > 0), other=7))


@pytest.mark.parametrize(("first", "expected"), [(1, [1, 5, 7, 7]), (-1, [7, 7, 7, 7])])
def test_a_scalar_comparison_is_a_mask(first, expected):
    """As in vLLM's n-gram speculator."""
    values, out = torch.tensor([first, 5, 5, 5]), torch.zeros(4, dtype=torch.int64)
    _first_if_positive_kernel[(1,)](values, out, SIZE=4)
    assert out.tolist() == expected


def test_booleans_are_kept_once():
    from triton.runtime import interpreter

    kept = interpreter.InterpreterBuilder.create_splat
    booleans.keep()
    assert interpreter.InterpreterBuilder.create_splat is kept
