"""Resized images where TVM's own importer is wrong: rounded sizes, antialiasing, sizes of other tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt

pytest.importorskip("tvm")


class Resized(nn.Module):
    """Images, resized in several ways at once."""

    def __init__(self, *ways: dict[str, Any]) -> None:
        super().__init__()
        self.ways = ways

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [F.interpolate(x, **way) for way in self.ways]


class Like(nn.Module):
    """Images in the size of others."""

    def __init__(self, **way: Any) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, size=y.shape[2:], **self.way) + y


def check(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> fxopt.CompiledModel:
    compiled = fxopt.compile(model.eval(), example_inputs=inputs, backend="tvm", **options)
    torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    return compiled


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_scales_that_are_no_whole_numbers(mode: str) -> None:
    torch.manual_seed(0)
    scales: list[Any] = [1.7, 0.6, (1.5, 2.0), (3.3, 0.37)]
    check(Resized(*[{"scale_factor": scale, "mode": mode} for scale in scales]), torch.randn(2, 3, 7, 8))


def test_the_nearest_element_is_that_of_torch_where_it_is_close() -> None:
    ways = [{"scale_factor": scale} for scale in (1.7, 1.1, 0.1)]
    check(Resized(*ways), torch.arange(3000.0).reshape(1, 1, 1000, 3).repeat(1, 1, 1, 5))


def test_corners_that_are_aligned_and_sizes_of_one() -> None:
    corners = {"mode": "bilinear", "align_corners": True}
    check(
        Resized({"scale_factor": 1.7, **corners}, {"size": (1, 1), **corners}, {"size": (1, 1), "mode": "bicubic"}),
        torch.randn(1, 3, 7, 8),
    )


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_antialiasing(mode: str) -> None:
    torch.manual_seed(0)
    sizes = [(3, 5), (14, 3), (1, 1), (20, 31)]
    check(Resized(*[{"size": size, "mode": mode, "antialias": True} for size in sizes]), torch.randn(1, 3, 7, 8))


def test_a_scale_with_antialiasing_or_along_one_axis() -> None:
    torch.manual_seed(0)
    scales: list[Any] = [0.4, 1.7, (0.4, 2.0)]
    ways = [{"scale_factor": scale, "mode": "bicubic", "antialias": True} for scale in scales]
    check(Resized(*ways), torch.randn(1, 3, 7, 8))
    check(Resized({"scale_factor": 1.7, "mode": "linear"}, {"size": 9, "mode": "linear"}), torch.randn(1, 3, 7))


def test_volumes_and_half_precision() -> None:
    torch.manual_seed(0)
    check(Resized({"scale_factor": 1.7, "mode": "trilinear"}, {"scale_factor": 1.7}), torch.randn(1, 2, 4, 3, 5))
    model, x = Resized({"scale_factor": 1.7, "mode": "bilinear"}), torch.randn(1, 3, 7, 8).half()
    compiled = fxopt.compile(model.eval(), example_inputs=(x,), backend="tvm")
    torch.testing.assert_close(compiled(x), model(x), rtol=2e-3, atol=2e-3)


def test_a_dynamic_batch() -> None:
    smooth = {"size": (3, 5), "mode": "bilinear", "antialias": True}
    model = Resized({"scale_factor": 1.7, "mode": "bilinear"}, {"size": (11, 5)}, smooth)
    compiled = check(model, torch.randn(2, 3, 7, 8), dynamic_shapes=({0: "batch"},))
    x = torch.randn(5, 3, 7, 8)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_sizes_of_another_tensor_that_are_open(mode: str) -> None:
    torch.manual_seed(0)
    model, shapes = Like(mode=mode), ({2: "h", 3: "w"}, {2: "high", 3: "wide"})
    compiled = check(model, torch.randn(1, 3, 7, 8), torch.randn(1, 3, 14, 17), dynamic_shapes=shapes)
    inputs = torch.randn(1, 3, 5, 12), torch.randn(1, 3, 11, 9)
    torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def test_what_is_declined_says_why() -> None:
    way: dict[str, Any] = {"scale_factor": 1.7, "mode": "bilinear"}
    x = torch.randn(1, 3, 7, 8)
    with pytest.raises(
        fxopt.UnsupportedOp, match=r"upsample_bilinear2d.*test_tvm_resize.py:\d+ .*needs sizes that are"
    ):
        check(Resized(way), x, dynamic_shapes=({2: "h", 3: "w"},))
    corners = {"size": (3, 5), "mode": "bilinear", "antialias": True, "align_corners": True}
    with pytest.raises(fxopt.UnsupportedOp, match=r"bilinear2d_aa.*test_tvm_resize.py:\d+ .*between aligned corners"):
        check(Resized(corners), x)
    with pytest.raises(fxopt.UnsupportedOp, match=r"test_tvm_resize.py:\d+ .*between elements of uint8"):
        check(Resized(way), (x * 10).to(torch.uint8))
