"""smooth-quant: ops that look as if a factor went through them, and do not, or not as it seems."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from tests.passes.models import Model
from tests.passes.test_smooth_quant import IMAGE, TOKENS, WIDTH, conv, layer, lin, norm, out, smooth


def halves() -> nn.Parameter:
    """Two gains in one parameter."""
    return nn.Parameter(torch.cat([norm().weight, norm().weight]).detach())


# What stands between the value that stands out and its reader.
LIMITS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "rounded quotient": lambda: (
        Model(lambda m, x: m.out(torch.div(m.norm(x), 0.1, rounding_mode="floor")), norm=norm(), out=out()),
        TOKENS,
    ),
    "pooled channels, no batch": lambda: (
        Model(lambda m, x: m.out(F.max_pool1d(m.norm(x), 3, 1, 1)), norm=norm(), out=out()),
        (16, WIDTH),
    ),
    "fewer channels, no batch": lambda: (
        Model(lambda m, x: m.out(F.avg_pool1d(m.norm(x), 2)), norm=norm(), out=lin(WIDTH // 2)),
        (16, WIDTH),
    ),
    "pooled channels of an image, no batch": lambda: (
        Model(
            lambda m, x: m.out(F.max_pool2d(m.norm(x.mT).mT, 3, 1, 1).mT),
            norm=norm(),
            out=out(),
        ),
        (4, WIDTH, 8),
    ),
    "weight of one output": lambda: (
        Model(lambda m, x: F.linear(m.norm(x), m.weight), norm=norm(), weight=nn.Parameter(torch.randn(WIDTH))),
        TOKENS,
    ),
    "both halves of one parameter": lambda: (
        Model(
            lambda m, x: (lambda a, b: m.out(torch.cat([x.tanh() * a, x.sigmoid() * b], -1)))(*m.gains.chunk(2)),
            gains=halves(),
            out=out(8, 2 * WIDTH),
        ),
        TOKENS,
    ),
}


@pytest.mark.parametrize("case", LIMITS)
def test_it_is_exact(case: str) -> None:
    torch.manual_seed(0)
    model, shape = LIMITS[case]()
    smooth(model.eval(), torch.randn(shape), options="{gain=0}")


def test_an_image_without_a_batch_is_pooled_in_its_last_axes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer(nn.Conv2d(WIDTH, WIDTH, 1)), nn.MaxPool2d(2), conv()).eval()
    names = smooth(model, torch.randn(IMAGE[1:])).program.constants
    assert [name for name in names if "smoothed" in name]
    assert not [name for name in names if "smoothing" in name]


def test_a_weight_of_one_output_stays_in_float() -> None:
    torch.manual_seed(0)
    model, shape = LIMITS["weight of one output"]()
    x = torch.randn(shape)
    compiled = fxopt.compile(
        model.eval(), example_inputs=x, passes="insert-fake-quant", calibration=[x], backend="onnx"
    )
    torch.testing.assert_close(compiled(x), model(x))
    assert "its weight is a vector" in str(compiled.report.quantization)
