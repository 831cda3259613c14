"""Models that the exporter has no direct translation for: made of what has one, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt.errors import UnsupportedOp
from tests.backends.engine_models import ENGINES, Function

Compute = Callable[..., Any]
ROWS = (({0: torch.export.Dim("n", min=2, max=64)},),)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_like_eager(model: nn.Module, x: torch.Tensor, *others: torch.Tensor, backend: str, **options: Any) -> None:
    compiled = fxopt.compile(model.eval(), example_inputs=(x,), backend=backend, **options)
    for other in (x, *others):
        torch.testing.assert_close(compiled(other), model(other), rtol=1e-5, atol=1e-5)


MODULES: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.RMSNorm(4), (3, 4)),
    (lambda: nn.RNN(4, 5, nonlinearity="relu", batch_first=True), (2, 3, 4)),
    (lambda: nn.RNN(4, 5, num_layers=2, bidirectional=True), (2, 3, 4)),
    (lambda: nn.LSTMCell(4, 5), (2, 4)),
    (lambda: nn.GRUCell(4, 5), (2, 4)),
    (lambda: nn.RNNCell(4, 5), (2, 4)),
    (lambda: nn.Conv3d(2, 3, 2, bias=False), (1, 2, 4, 4, 4)),
    (lambda: nn.Sequential(nn.Conv3d(2, 3, 2, bias=False), nn.ReLU()), (1, 2, 4, 4, 4)),
]


@ENGINES
@pytest.mark.parametrize(("make", "shape"), MODULES)
def test_modules_are_made_of_what_has_a_translation(
    backend: str, make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    assert_like_eager(make(), torch.randn(shape), torch.randn(shape) * 3, backend=backend)


FUNCTIONS: list[tuple[Compute, tuple[int, ...]]] = [
    (lambda x: F.rms_norm(x, (4,)), (3, 4)),
    (lambda x: F.interpolate(x, scale_factor=2, mode="linear"), (1, 2, 5)),
    (lambda x: F.interpolate(x, size=7, mode="linear", align_corners=True), (1, 2, 5)),
    (lambda x: F.cosine_similarity(x, x.flip(1)), (3, 4)),
    (lambda x: F.cosine_similarity(x, 0 * x), (3, 4)),
    (lambda x: x.chunk(4, 1), (2, 6)),
    (lambda x: x.chunk(5, 1)[-1], (2, 7)),
    (lambda x: x.chunk(3, -1), (2, 6)),
    (lambda x: x.tensor_split(4, 1), (2, 6)),
]


@ENGINES
@pytest.mark.parametrize(("function", "shape"), FUNCTIONS)
def test_functions_are_made_of_what_has_a_translation(backend: str, function: Compute, shape: tuple[int, ...]) -> None:
    assert_like_eager(Function(function), torch.randn(shape), torch.randn(shape) * 3, backend=backend)


def _overwritten(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    y[:, :1] = 1
    y[:, 1:] = x[:, 1:]
    return y


@ENGINES
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum() / x.numel(),
        lambda x: x * x[:, :2].numel(),
        _overwritten,
        lambda x: torch.empty_like(x).copy_(x * 4) + 1,
        lambda x: torch.empty(x.shape[0], 2).fill_(3) + x.sum(),
        lambda x: x.new_empty(x.shape[0]).fill_(2.0) * x[:, 0],
        lambda x: torch.arange(9).clamp(max=x.shape[0] - 1),
        lambda x: torch.arange(2 * x.shape[0]) % x.shape[0],
        lambda x: torch.arange(2 * x.shape[0]) // x.shape[0],
        lambda x: torch.div(torch.arange(2 * x.shape[0]), x.shape[0], rounding_mode="trunc"),
        lambda x: torch.fmod(torch.arange(2 * x.shape[0]), x.shape[0]),
        lambda x: (x.shape[0] - x, x.shape[0] - 1 - torch.arange(x.shape[0])),
        lambda x: x.chunk(2, 1),
        lambda x: F.rms_norm(x, (3,)),
        lambda x: x * torch.arange(x.shape[0] - 1, -1, -1)[:, None],
        lambda x: x[torch.arange(x.shape[0] - 1, -1, -1)],
        lambda x: torch.arange(x.shape[0], -x.shape[0], -1.0, dtype=torch.int64),
    ],
)
def test_dynamic_sizes(backend: str, function: Compute) -> None:
    assert_like_eager(
        Function(function),
        torch.randn(4, 3),
        torch.randn(7, 3),
        torch.randn(2, 3),
        backend=backend,
        dynamic_shapes=ROWS,
    )


@ENGINES
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clamp(0, 0.5),
        lambda x: x.clamp_max(1.5),
        lambda x: x.clamp(min=-0.5),
        lambda x: x - 0.5,
        lambda x: 0.5 - x,
        lambda x: 1 - x,
        lambda x: torch.rsub(x, 0.5, alpha=2),
        lambda x: torch.where(x > 1, x, 0.5),
        lambda x: torch.sub(x, x.float(), alpha=2),
    ],
)
def test_integers_meet_floats_in_the_dtype_of_the_result(backend: str, function: Compute) -> None:
    assert_like_eager(Function(function), torch.arange(4), torch.arange(4) - 2, backend=backend)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.fft.rfft(x).abs(),
        lambda x: torch.fft.fft2(x).real,
        lambda x: torch.fft.fft(torch.fft.fft(x, dim=0)).real,
    ],
)
def test_openvino_declines_fourier_transforms_with_the_source_line(function: Compute) -> None:
    with pytest.raises(UnsupportedOp, match=r"aten\.fft_.* at .*\.py:\d+"):
        fxopt.compile(Function(function), example_inputs=(torch.randn(4, 8),), backend="openvino")


@ENGINES
def test_an_op_without_any_translation_is_named_with_its_source_line(backend: str) -> None:
    with pytest.raises(UnsupportedOp, match=r"aten\.erfinv.* at .*\.py:\d+"):
        fxopt.compile(Function(torch.erfinv), example_inputs=(torch.rand(4),), backend=backend)


@ENGINES
def test_random_numbers_are_declined_still(backend: str) -> None:
    with pytest.raises(UnsupportedOp, match="draws random numbers"):
        fxopt.compile(Function(lambda x: x + torch.rand_like(x)), example_inputs=(torch.rand(4),), backend=backend)


@ENGINES
@pytest.mark.parametrize(
    "pool", [nn.AdaptiveAvgPool2d((1, 2)), nn.AdaptiveMaxPool2d(2), nn.AdaptiveAvgPool2d((None, 3))]
)
def test_windows_of_open_size_are_refused(pool: nn.Module, backend: str) -> None:
    x, columns = torch.randn(2, 3, 8, 8), ({3: "columns"},)
    with pytest.raises(UnsupportedOp, match=r"adaptive_.*_pool2d.* pools a dimension of open size into several parts"):
        fxopt.compile(pool, example_inputs=(x,), backend=backend, dynamic_shapes=columns)
    compiled = fxopt.compile(pool, example_inputs=(x,), dynamic_shapes=columns)  # another engine takes it
    other = torch.randn(2, 3, 8, 11)
    torch.testing.assert_close(compiled(other), pool(other))


@ENGINES
def test_one_window_of_open_size(backend: str) -> None:
    x, other, shapes = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 11), ({3: "columns"},)
    for pool in (nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)):
        assert_like_eager(pool, x, other, backend=backend, dynamic_shapes=shapes)
