"""Ops whose naive formulas lose precision, overflow or read what they should not: as in eager, whatever the inputs."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fxopt
from fxopt.errors import InputError, UnsupportedOp
from tests.backends.engine_models import ENGINES, Function

Compute = Callable[..., Any]

_POSITIVE = (1e-10, 1e-4, 0.3, 1.0, 5.0, 20.0, 88.0, 100.0, 1000.0, 1e20, inf)
_NEGATIVE = (-inf, -1e20, -1000.0, -100.0, -88.0, -20.0, -5.0, -1.0, -0.5, -1e-4, -1e-8, 0.0)
EXTREMES = torch.tensor([*_NEGATIVE, *_POSITIVE])
RTOL = {"onnx": 2e-6, "openvino": 2e-5}  # OpenVINO's exp and log are less exact by themselves
PAIRS = tuple(x.flatten() for x in torch.meshgrid(EXTREMES, EXTREMES, indexing="ij"))


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def compiled(function: Compute, *inputs: torch.Tensor, backend: str, **options: Any) -> fxopt.CompiledModel:
    return fxopt.compile(Function(function), example_inputs=inputs, backend=backend, **options)


def assert_same(actual: Any, expected: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


@ENGINES
@pytest.mark.parametrize("function", [torch.log1p, torch.expm1, torch.special.expm1, F.logsigmoid])
def test_the_last_bits_of_small_and_the_order_of_large_numbers(backend: str, function: Compute) -> None:
    assert_same(compiled(function, _normal(23), backend=backend)(EXTREMES), function(EXTREMES), RTOL[backend], 1e-37)


@ENGINES
@pytest.mark.parametrize("function", [F.softplus, lambda x: F.log_softmax(x.clamp(-1e30, 1e30), -1)])
def test_others_that_take_exponents_do_not_overflow(backend: str, function: Compute) -> None:
    assert_same(compiled(function, _normal(23), backend=backend)(EXTREMES), function(EXTREMES), 1e-5, 3e-6)


@pytest.mark.parametrize("function", [torch.log1p, torch.expm1, F.logsigmoid])
def test_float64_keeps_its_precision(function: Compute) -> None:
    x = EXTREMES.double()
    assert_same(compiled(function, x[5:17], backend="onnx")(x[5:17]), function(x[5:17]), rtol=2e-15, atol=1e-300)


@ENGINES
@pytest.mark.parametrize("function", [torch.logaddexp, torch.logaddexp2])
def test_sums_of_logarithms_neither_overflow_nor_vanish(backend: str, function: Compute) -> None:
    executable = compiled(function, _normal(len(PAIRS[0])), _normal(len(PAIRS[0])), backend=backend)
    assert_same(executable(*PAIRS), function(*PAIRS), RTOL[backend], 2e-6)


@ENGINES
@pytest.mark.parametrize("first", [-1000.0, 1000.0, -inf])
def test_logcumsumexp(backend: str, first: float) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.logcumsumexp(x, 1)

    x = torch.tensor([[first, -1001.0, 0.0, 100.0, 1000.0, 999.0, -inf], [first, -inf, -inf, 3.0, -2.0, inf, 5.0]])
    assert_same(compiled(function, _normal(2, 7), backend=backend)(x), function(x), rtol=1e-6)


@ENGINES
def test_logcumsumexp_over_a_dynamic_size_is_declined(backend: str) -> None:
    shapes = ({0: torch.export.Dim("n", min=2, max=64)},)
    with pytest.raises(UnsupportedOp, match=r"logcumsumexp.* at .*\.py"):
        compiled(lambda x: x.logcumsumexp(0), _normal(4), backend=backend, dynamic_shapes=(shapes,))


DIVISIONS: list[Compute] = [
    lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    lambda a, b: torch.div(a, b, rounding_mode="floor"),
    lambda a, b: a // b,
    lambda a, b: a % b,
    torch.fmod,
]


@ENGINES
@pytest.mark.parametrize("function", DIVISIONS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_integers_are_divided_as_integers(backend: str, function: Compute, dtype: torch.dtype) -> None:
    large = 2**24 - 1 if backend == "openvino" else (2**53 + 1 if dtype is torch.int64 else 2**30 + 3)
    a = torch.tensor([7, -7, 7, -7, 0, 5, -5, 6, large, -large, large, -large], dtype=dtype)
    b = torch.tensor([2, 2, -2, -2, 3, 5, 5, -3, 1, 1, -3, -3], dtype=dtype)
    ones = torch.arange(1, 13, dtype=dtype)
    assert_same(compiled(function, ones, ones, backend=backend)(a, b), function(a, b))
    for divisor in (3, -3):
        executable = compiled(lambda x, d=divisor: function(x, d), ones, backend=backend)
        assert_same(executable(a), function(a, divisor))


def test_openvino_declines_integers_that_it_would_divide_in_float() -> None:
    executable = compiled(DIVISIONS[0], torch.arange(1, 4), torch.arange(1, 4), backend="openvino")
    with pytest.raises(InputError, match="32 bits"):
        executable(torch.tensor([2**24 + 1, 1, 1]), torch.tensor([1, 1, 1]))


@pytest.mark.parametrize("function", DIVISIONS)
def test_floats_at_exact_multiples_and_infinities(function: Compute) -> None:
    a = torch.tensor([1.0, -1, 6, -6, 6, -6, 0.3, inf, -inf, inf, 1, -1, 5, 7, 0, nan, 1e10, -1e10, 0.9, -6, 6])
    b = torch.tensor([0.1, 0.1, 3, 3, -3, -3, 0.1, 1, 1, -2, inf, inf, -inf, 0, 0, 1, 3, 7, 0.3, 0.1, -0.1])
    assert_same(compiled(function, _normal(21), _normal(21), backend="onnx")(a, b), function(a, b))
    executable = compiled(lambda x: function(x, 0.1), _normal(21), backend="onnx")
    assert_same(executable(a), function(a, 0.1))


DIAGONALS: list[Compute] = [
    torch.diagonal,
    lambda x: torch.diagonal(x, -1),
    lambda x: torch.diag(x, 1),
    torch.linalg.diagonal,
    torch.trace,
    lambda x: torch.diagonal(x[None].expand(2, 3, 4), 1, 1, 0),
    lambda x: torch.diagonal(torch.stack([x, 2 * x]), 1, 2, 1),
]


@ENGINES
@pytest.mark.parametrize("function", DIAGONALS)
def test_what_is_off_the_diagonal_is_not_read(backend: str, function: Compute) -> None:
    x = torch.tensor([[1.0, inf, 2, nan], [-inf, 3, nan, 1], [inf, 5, 4, 3]])
    assert_same(compiled(function, _normal(3, 4), backend=backend)(x), function(x))


@ENGINES
def test_the_diagonal_of_a_dynamic_square(backend: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.diagonal(x[:, None] + torch.arange(x.shape[0]))

    shapes = (({0: torch.export.Dim("n", min=2, max=64)},),)
    executable = compiled(function, _normal(4), backend=backend, dynamic_shapes=shapes)
    for n in (2, 7):
        assert_same(executable(_normal(n)), function(_normal(n)))


@ENGINES
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("reduce", ["sum", "prod", "mean", "amax", "amin"])
def test_scatter_reduce(backend: str, reduce: str, include_self: bool) -> None:
    def function(x: torch.Tensor, index: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return x.scatter_reduce(0, index, source, reduce, include_self=include_self)

    executable = compiled(function, _normal(5), torch.tensor([0, 1, 2, 0]), _normal(4), backend=backend)
    for index, source in (([3, 3, 3, 0], [1.0, 2.0, 5.0, -inf]), ([1, 1, 4, 1], [-1.0, -2.0, inf, -0.5])):
        inputs = (_normal(5) * 100, torch.tensor(index), torch.tensor(source))
        assert_same(executable(*inputs), function(*inputs), rtol=1e-6)


def test_a_mean_of_integers_is_rounded_down() -> None:
    def function(x: torch.Tensor, index: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return x.scatter_reduce(0, index, source, "mean")

    inputs = (torch.arange(5) - 3, torch.tensor([3, 3, 3, 0]), torch.arange(4) - 9)
    assert_same(compiled(function, *inputs, backend="onnx")(*inputs), function(*inputs))


@ENGINES
def test_one_bound_of_a_clamp_leaves_infinities_on_the_other_side(backend: str) -> None:
    def function(x: torch.Tensor) -> Any:
        return x.clamp(max=1.0), x.clamp(min=-1), x.clamp_max(0), x.clamp_min(0.5)

    assert_same(compiled(function, _normal(23), backend=backend)(EXTREMES), function(EXTREMES))


POOLS: list[Compute] = [
    lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    lambda x: F.avg_pool2d(x, (3, 2), 2, 1, ceil_mode=True, divisor_override=5),
    lambda x: F.avg_pool2d(x, 2, 2, 1, ceil_mode=True),
    lambda x: F.avg_pool2d(x[0], 3, 2, 1, ceil_mode=True),
    lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
    lambda x: F.avg_pool1d(x[0], 3, 2, 1, ceil_mode=True),
    lambda x: F.avg_pool3d(x, 2, divisor_override=3),
    lambda x: F.max_pool2d(x, 2, 2, 1, ceil_mode=True),
    lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
]


@ENGINES
@pytest.mark.parametrize("function", POOLS)
@pytest.mark.parametrize("size", [6, 7])
def test_pooling_with_a_divisor_or_with_windows_beyond_the_input(backend: str, function: Compute, size: int) -> None:
    x = _normal(1, 2, size, size)
    assert_same(compiled(function, x, backend=backend)(-3 * x), function(-3 * x), rtol=1e-5, atol=1e-6)


KEEP_NAN: list[Compute] = [
    lambda x: (x.relu(), F.relu6(x), x.clamp(-1, 1), x.clamp(min=0), x.clamp(max=0), F.hardtanh(x), F.hardswish(x)),
    lambda x: (torch.maximum(x, x.flip(-1)), torch.minimum(x, x.flip(-1)), x + x.flip(-1), x.sum(-1), x.mean(-1)),
    lambda x: (F.elu(x), F.celu(x), F.selu(x), F.gelu(x), F.silu(x), F.softplus(x), F.leaky_relu(x), x.sigmoid()),
    lambda x: (x.softmax(-1), x.log_softmax(-1), x.logsumexp(-1), x.tanh(), x.exp(), x @ x, F.layer_norm(x, (4,))),
    lambda x: (F.conv2d(x[None, None], torch.ones(1, 1, 1, 1)).relu(), F.linear(x, torch.eye(4)).relu()),
]


@pytest.mark.parametrize("function", KEEP_NAN)
def test_what_onnxruntime_makes_nan_of_is_nan(function: Compute) -> None:
    """What the page of the backend says of NaN; it names the operators that drop it."""
    x = torch.tensor([[nan, 1, -2, 0.5], [3, nan, 0.2, -1], [-0.5, -3, nan, 0.7], [0.1, 2, -1, nan]])
    assert_same(compiled(function, _normal(4, 4), backend="onnx")(x), function(x), 2e-6, 1e-6)
