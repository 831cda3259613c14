"""Dynamic sizes on TVM: slices of axes whose size is open, and sizes that are expressions of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxopt

pytest.importorskip("tvm")


class Slices(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x[:, :, 2:] * 2, x[1:], x[2:, 1:-1], x[:, -2:], x.roll(1, 0), x[3:][:, ::2] + 1, x[-4:]


@pytest.mark.slow
def test_slices_of_a_dynamic_axis() -> None:
    dim = torch.export.Dim("n", min=5, max=100)
    compiled = fxopt.compile(
        Slices(), example_inputs=(torch.randn(7, 4, 6),), backend="tvm", dynamic_shapes=({0: dim},)
    )
    for n in (7, 5, 12):
        x = torch.randn(n, 4, 6)
        torch.testing.assert_close(compiled(x), Slices()(x))


class ShiftedWindows(nn.Module):
    """The windows of Swin: padded, shifted, cut off again, and added to what came in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.pad(x, (0, 0, 0, 1, 0, 1)).roll((-2, -2), (1, 2))
        batch, height, width, channels = y.shape
        windows = y.view(batch, height // 4, 4, width // 4, 4, channels).transpose(2, 3).flatten(0, 2)
        back = windows.softmax(-1).view(batch, height // 4, width // 4, 4, 4, channels).transpose(2, 3)
        return x + back.reshape(batch, height, width, channels).roll((2, 2), (1, 2))[:, :7, :7]


def test_windows_of_a_dynamic_batch() -> None:
    x = torch.randn(2, 7, 7, 8)
    compiled = fxopt.compile(ShiftedWindows(), example_inputs=(x,), backend="tvm", dynamic_shapes=({0: "batch"},))
    for batch in (2, 1, 3):
        x = torch.randn(batch, 7, 7, 8)
        torch.testing.assert_close(compiled(x), ShiftedWindows()(x))


@pytest.mark.parametrize("size", [2, 3])
def test_sizes_that_are_multiples(size: int) -> None:
    """No input has the size of which its own is a multiple."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    dims = {2: size * torch.export.Dim("half", min=2, max=64), 3: torch.export.Dim("width", min=5, max=64)}
    inputs = torch.randn(1, 3, 4 * size, 9)
    compiled = fxopt.compile(model, example_inputs=(inputs,), backend="tvm", dynamic_shapes=(dims,))
    for height, width in ((4 * size, 9), (2 * size, 5), (7 * size, 16)):
        x = torch.randn(1, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
