"""Grids: a range and zero fit into the integers, halves round alike in every engine, the scale is hardly larger."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt import quantized
from fxopt.passes.insert_fake_quant.grid import Grid

U8 = Grid(torch.uint8, symmetric=False, qmin=0, qmax=255)
S8 = Grid(torch.int8, symmetric=False, qmin=-128, qmax=127)
S8_EVEN = Grid(torch.int8, symmetric=False, qmin=-127, qmax=127)
SYMMETRIC = [Grid(torch.uint8, symmetric=True, qmin=0, qmax=255), Grid(torch.int8, symmetric=True, qmin=-127, qmax=127)]
GRIDS = [U8, S8, S8_EVEN, *SYMMETRIC]

ends = st.floats(0, 2.0**100, width=32)


def rounded(x: torch.Tensor, grid: Grid, low: float, high: float) -> torch.Tensor:
    scale, zero_point = grid.parameters(low, high)
    q = ((x.double() / scale.double()).round() + zero_point).clamp(grid.qmin, grid.qmax)
    return (q - zero_point) * scale.double()


@settings(deadline=None)
@given(ends, ends, st.sampled_from(GRIDS))
def test_zero_is_exact_and_values_round_to_half_a_step(below: float, above: float, grid: Grid) -> None:
    scale, zero_point = grid.parameters(-below, above)
    assert scale.dtype is torch.float32
    assert grid.qmin <= int(zero_point) <= grid.qmax
    assert torch.isfinite(scale)
    assert float(scale) >= torch.finfo(torch.float32).tiny
    assert torch.isfinite(1 / scale)
    assert float(rounded(torch.zeros(1), grid, -below, above)) == 0
    x = torch.linspace(-below, above, 999, dtype=torch.float64)
    y = rounded(x, grid, -below, above)
    assert float((x - y).abs().max()) <= float(scale) / 2 * (1 + 1e-4)
    assert bool((y.diff() >= 0).all())


@settings(deadline=None)
@given(st.lists(st.tuples(ends, ends), min_size=1, max_size=5), st.sampled_from(GRIDS))
def test_channels_are_quantized_as_each_alone(pairs: list[tuple[float, float]], grid: Grid) -> None:
    lows, highs = torch.tensor([-a for a, _ in pairs]), torch.tensor([b for _, b in pairs])
    scales, zero_points = grid.parameters(lows, highs)
    for i, (a, b) in enumerate(pairs):
        assert (scales[i], zero_points[i]) == grid.parameters(-a, b)


@settings(deadline=None)
@given(st.floats(2.0**-60, 2.0**60), st.floats(0, 1), st.sampled_from([U8, S8, S8_EVEN]))
def test_the_zero_point_is_even_and_costs_under_one_percent(extent: float, share: float, grid: Grid) -> None:
    scale, zero_point = grid.parameters(-extent * share, extent * (1 - share))
    assert int(zero_point) % 2 == 0
    assert float(scale) <= 1.01 * extent / (grid.qmax - grid.qmin)


@pytest.mark.parametrize("levels", [4, 17, 33, 256])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.5, 1.0), (-2.0, 0.5), (0.0, 1.0)])
def test_all_ways_of_rounding_agree_on_data_of_few_levels(levels: int, low: float, high: float) -> None:
    """Levels lie right between two integers: the ways differ in where they add the zero point."""
    x = torch.linspace(low, high, levels)
    scale, zero_point = (value.item() for value in U8.parameters(low, high))
    ways = [
        torch.quantize_per_tensor(x, scale, int(zero_point), torch.quint8).int_repr(),
        quantized.QUANTIZE(x, scale, int(zero_point), 0, 255, torch.uint8),
        torch.fake_quantize_per_tensor_affine(x, scale, int(zero_point), 0, 255) / scale + zero_point,
    ]
    for a, b in itertools.combinations(ways, 2):
        assert torch.equal(a.float().round(), b.float().round())
