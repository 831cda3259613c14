"""OpenVINO computes integers in 32 bits: what does not fit is refused, positions and masks are taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fxopt
from fxopt.backends._openvino_integers import integer_bounds
from fxopt.capture import capture
from fxopt.errors import InputError, UnsupportedOp
from tests.backends.engine_models import Function
from tools import models

pytest.importorskip("openvino")
SMALL = torch.tensor([3, 4])


def compiled_for(function: Callable[..., Any], x: torch.Tensor = SMALL) -> fxopt.CompiledModel:
    return fxopt.compile(Function(function), example_inputs=(x,), backend="openvino")


@pytest.mark.parametrize(
    ("function", "most"),
    [
        (lambda i: i.view(1, 2), 2**31 - 1),
        (lambda i: i < 12, 2**24 - 1),
        (lambda i: i + i, 2**30 - 1),
        (lambda i: torch.sub(7, i, alpha=3), 2**29 - 1),
        (lambda i: i.sum(), 2**23 - 1),
        (lambda i: i.amax(0), 2**24 - 1),
        (lambda i: i.cumsum(0), 2**30 - 1),
        (lambda i: torch.cat([i.view(1, 2), -i.view(1, 2)]).sum((0, 1)), 2**22 - 1),
        (lambda i: i * i, 2**15 - 1),
        (lambda i: (i & 2**20) * 1000, 2**20 - 1),
        (lambda i: i % 7 + torch.div(i, 7, rounding_mode="floor"), 2**24 - 1),
    ],
)
def test_inputs_are_limited_to_what_nothing_overflows_for(function: Callable[..., Any], most: int) -> None:
    compiled = compiled_for(function)
    for value in (most, -most):
        inputs = torch.tensor([value, value])
        torch.testing.assert_close(compiled(inputs), function(inputs))
    with pytest.raises(InputError, match=f"holds {most + 1}, but OpenVINO computes integers in 32 bits.*{most}"):
        compiled(torch.tensor([1, most + 1]))


@pytest.mark.parametrize(
    ("function", "x", "op"),
    [
        (lambda i: i * 1000003, SMALL, "mul"),
        (lambda i: i**3, SMALL, "pow"),
        (lambda i: i.prod(), SMALL, "prod"),
        (lambda i: i + 2**40, SMALL, "add"),
        (lambda i: i < 2**40, SMALL, "lt"),
        (lambda i: i + torch.tensor(2**40), SMALL, "2199|constant|tensor"),
        (lambda x: x.long(), torch.randn(3), "to"),
        (lambda i: i + i, SMALL.to(torch.uint8), "add"),
        (lambda i: i * 2, SMALL.to(torch.int8), "mul"),
    ],
)
def test_what_may_overflow_for_any_input_is_declined(function: Callable[..., Any], x: torch.Tensor, op: str) -> None:
    with pytest.raises(UnsupportedOp, match=f"32 bits.*({op})"):
        compiled_for(function, x)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_narrow_integers_that_fit_are_taken(dtype: torch.dtype) -> None:
    def function(i: torch.Tensor) -> Any:
        return i.float() / 2, i.long() * 1000, i & 5, i.clamp(1, 3), torch.where(i > 3, i, 0)

    compiled = compiled_for(function, SMALL.to(dtype))
    most = min(torch.iinfo(dtype).max, 2**16)
    inputs = torch.tensor([most, 0], dtype=dtype)
    torch.testing.assert_close(compiled(inputs), function(inputs))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5-encoder"])
def test_transformers_are_taken(name: str) -> None:
    model, (ids,) = models.load(name)
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", max=512)}
    kwargs = {"attention_mask": torch.ones_like(ids)}
    fixed = capture(model, (ids,), kwargs)
    dynamic = capture(model, (ids,), kwargs, {leaf.name: sizes for leaf in fixed.program.signature.inputs})
    for captured in (fixed, dynamic):
        bounds = integer_bounds(captured.program)
        assert min(bound.high for bound in bounds.values()) >= 2**24 - 1


def test_positions_from_a_mask_of_any_length() -> None:
    model = Function(lambda mask: (mask.cumsum(-1) - 1).clamp(min=0))
    shapes = ({0: "batch", 1: "tokens"},)
    example = torch.ones(2, 5, dtype=torch.int64)
    captured = capture(model.eval(), (example,), None, {"inputs": shapes})
    [bound] = integer_bounds(captured.program).values()
    assert bound.high >= 2**12 - 1


def test_arithmetic_in_a_branch_is_declined() -> None:
    model = Function(lambda i: torch.cond(i.sum() > 9, lambda i: i * 3, lambda i: i - 1, (i,)))
    with pytest.raises(UnsupportedOp, match=r"32 bits.* in a branch"):
        fxopt.compile(model, example_inputs=(SMALL,), backend="openvino")


def test_auto_takes_an_engine_that_has_64_bits() -> None:
    compiled = fxopt.compile(Function(lambda i: i * 1000003), example_inputs=(SMALL,))
    assert compiled.backend != "openvino"
    assert compiled(torch.tensor([2**40, 3])).tolist() == [2**40 * 1000003, 3000009]
