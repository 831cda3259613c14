"""NaN and infinity on the tvm backend go where they go in eager, also when no example input holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from tests.backends.engine_models import Function

pytest.importorskip("tvm")

INF, NAN = float("inf"), float("nan")
X = torch.tensor(
    [
        [1.0, -2, NAN, 3, 0, 5, -INF, INF, 2],
        [4, NAN, -1, NAN, 2, INF, 1, 0, -3],
        [-INF] * 9,
        [1, 2, 3, 4, 5, 6, 7, 8, 9],
    ]
)
FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp from below": lambda x: x.clamp(min=0.5),
    "clamp of float64": lambda x: x.double().clamp(-1, 1),
    "elu": F.elu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "leaky relu": F.leaky_relu,
    "round": lambda x: torch.round(F.silu(x * 2)),
    "maximum": lambda x: torch.maximum(x, x.flip(0)),
    "minimum": lambda x: torch.minimum(x, x.flip(0)),
    "amax": lambda x: x.amax(-1),
    "amin": lambda x: x.amin(-1),
    "amax of columns": lambda x: x.amax(0),
    "amax of a stack": lambda x: torch.stack([x, x.flip(0)]).amax(0),
    "argmax": lambda x: x.argmax(-1),
    "argmin of columns": lambda x: x.argmin(0, keepdim=True),
    "argmax of all": lambda x: x.argmax(),
    "max pool": lambda x: F.max_pool1d(x[None], 3),
    "max pool, padded": lambda x: F.max_pool2d(x[None, None], 2, padding=1),
    "softmax": lambda x: x.softmax(-1),
    "equal to itself": lambda x: (x == x, x != x, x >= x, torch.where(x == x, x, 0.0)),
    "not less": lambda x: (~(x < x.flip(1)), torch.where(~(x > 1), x, 1.0), torch.logical_not(x >= 0)),
    "not both": lambda x: ~((x < x.flip(1)) & (x > 0)),
    "difference": lambda x: (x - x, x / x, torch.nan_to_num(x, 0.5, 1.0, -1.0)),
    "logsumexp": lambda x: x.logsumexp(-1),
    "logsumexp of columns": lambda x: x.logsumexp(0, keepdim=True),
    "logsumexp of all": lambda x: x.logsumexp((0, 1)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_and_infinity(name: str) -> None:
    function = FUNCTIONS[name]
    example = torch.randn(X.shape, generator=torch.Generator().manual_seed(0))
    compiled = fxopt.compile(Function(function).eval(), example_inputs=(example,), backend="tvm", verify=False)
    for x in (X, example):
        torch.testing.assert_close(compiled(x), function(x), rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("activation", [nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU])
def test_integers_after_any_activation(activation: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), activation(), nn.Conv2d(16, 16, 3, groups=16), activation(), nn.Conv2d(16, 8, 1)
    ).eval()
    data = [(torch.randn(4, 8, 9, 9),) for _ in range(4)]
    compiled = fxopt.compile(model, example_inputs=data[0], backend="tvm", passes="insert-fake-quant", calibration=data)
    expected = model(data[0][0])
    error = (compiled(*data[0]) - expected).abs().max() / (expected.max() - expected.min())
    assert error < 0.02  # a few steps of 1/255
