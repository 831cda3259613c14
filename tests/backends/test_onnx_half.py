"""Reductions of float16 on the onnx backend: values and dtypes of eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fxopt
from tests.backends.engine_models import Function

pytest.importorskip("onnxscript")

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(),
    "sum of a dim": lambda x: x.sum(1, keepdim=True),
    "sum in float32": lambda x: x.sum(1, dtype=torch.float32),
    "prod": lambda x: x.prod(1),
    "prod of all": lambda x: x.prod(),
    "amax": lambda x: x.amax((0, 1)),
    "amin": lambda x: x.amin(-1),
    "cumsum": lambda x: x.cumsum(0),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_of_half_precision_keep_their_dtype(name: str) -> None:
    x = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)).half() + 0.5
    model = Function(REDUCTIONS[name]).eval()
    result, expected = fxopt.compile(model, example_inputs=(x,), backend="onnx")(x), model(x)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=2e-3, atol=1e-3)
