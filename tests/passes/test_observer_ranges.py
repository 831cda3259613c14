"""The ranges that calibrators choose, against their definitions and on random data."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.passes.insert_fake_quant import clipping, observers
from fxopt.passes.insert_fake_quant.grid import Grid
from tests.passes.observer_ranges import (
    GRIDS,
    HISTOGRAMS,
    NAMES,
    S8,
    U8,
    U8_SYMMETRIC,
    every_grid,
    every_name,
    found,
    gaussian,
    histogram_of,
    uniform,
)


def quantized(x: torch.Tensor, grid: Grid, low: float, high: float) -> torch.Tensor:
    scale, zero_point = grid.parameters(low, high)
    q = ((x.double() / scale.double()).round() + zero_point).clamp(grid.qmin, grid.qmax)
    return (q - zero_point) * scale.double()


def error(x: torch.Tensor, grid: Grid, ends: tuple[float, float]) -> float:
    return float((x.double() - quantized(x, grid, *ends)).square().sum())


@pytest.mark.parametrize("value", [0.7, -0.7, 0.0, 3e38, -1e-25])
@every_name
def test_a_constant_is_exact(name: str, value: float) -> None:
    for grid in GRIDS:
        x = torch.full((3, 5), value)
        low, high = found(name, grid, x, x)
        assert (low, high) == (min(0.0, float(x[0, 0])), max(0.0, float(x[0, 0])))
        assert torch.allclose(quantized(x, grid, low, high), x.double(), rtol=1e-6, atol=1e-31)


@every_name
@every_grid
def test_all_zeros_have_an_ordinary_scale(name: str, grid: Grid) -> None:
    low, high = found(name, grid, torch.zeros(4, 4))
    assert (low, high) == (0, 0)
    scale, _ = grid.parameters(low, high)
    assert torch.isfinite(scale)
    assert float(scale) >= torch.finfo(torch.float32).tiny


@every_grid
@pytest.mark.parametrize("seed", range(3))
def test_entropy_clips_an_outlier(seed: int, grid: Grid) -> None:
    assert found("entropy", grid, torch.cat([gaussian(seed), torch.tensor([40.0])]))[1] < 12


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_clips_an_outlier_that_costs_less_to_lose(seed: int, bits: int, symmetric: bool) -> None:
    grid = Grid(torch.int8, symmetric, -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
    x = torch.cat([gaussian(seed), torch.tensor([40.0])])
    assert found("mse", grid, x)[1] < 10
    assert error(x, grid, found("mse", grid, x)) < 0.5 * error(x, grid, found("minmax", grid, x))


@every_grid
def test_mse_clips_at_eight_bits_what_is_rare_enough(grid: Grid) -> None:
    h = observers.MSE()
    h.histogram.add(gaussian(), -5.0, 5.0, weight=1000)
    full = h.range(grid)
    h.histogram.add(torch.tensor([40.0]), 40.0, 40.0)
    assert 0.9 * full[1] <= h.range(grid)[1] < 12


@every_grid
@pytest.mark.parametrize("ends", [(0.0, 1.0), (-1.0, 1.0), (-0.2, 3.0), (-2.0, 0.0)])
@pytest.mark.parametrize("name", HISTOGRAMS)
def test_uniform_values_are_not_clipped(name: str, ends: tuple[float, float], grid: Grid) -> None:
    assert found(name, grid, uniform(*ends)) == pytest.approx(ends, abs=0.03)


@every_grid
@pytest.mark.parametrize("outlier", [1e3, 1e6, -1e6])
def test_mse_keeps_a_huge_outlier_that_costs_more_to_lose(outlier: float, grid: Grid) -> None:
    x = torch.cat([gaussian(), torch.tensor([outlier])])
    ends = found("mse", grid, x)
    assert error(x, grid, ends) <= error(x, grid, found("minmax", grid, x)) * 1.02


@every_grid
def test_percentile_leaves_a_huge_outlier_out(grid: Grid) -> None:
    low, high = found("percentile", grid, gaussian(), torch.tensor([1e6]))
    assert -1e4 < low < 0 < high < 1e4  # known to within a bin


def test_percentile_is_that_of_the_data() -> None:
    x = gaussian(5)
    low, high = found("percentile", U8, x, p=99.0)
    assert high == pytest.approx(float(x.quantile(0.99)), abs=0.02)
    assert low == pytest.approx(float(x.quantile(0.01)), abs=0.02)
    assert found("percentile", S8, x, p=99.0)[1] == pytest.approx(float(x.abs().quantile(0.99)), abs=0.02)
    # zeros count: 99 of 100 elements of this one are
    assert found("percentile", U8, torch.cat([x[:400].abs(), torch.zeros(39_600)]), p=99.0)[1] < 0.05


@pytest.mark.parametrize("grid", [U8, S8, U8_SYMMETRIC])
@pytest.mark.parametrize("kind", ["gaussian", "relu", "laplace", "skewed"])
def test_mse_is_near_the_best_of_all_thresholds(kind: str, grid: Grid) -> None:
    g = gaussian(7)
    x = {"gaussian": g, "relu": g.relu(), "laplace": g.sign() * g.abs() ** 2.5, "skewed": (g * 1.5).exp() - 1}[kind]
    best = min(
        error(x, grid, (float(x.min()) * a, float(x.max()) * b))
        for a in ([1.0] if grid.symmetric or kind == "relu" else torch.linspace(0.1, 1, 19).tolist())
        for b in torch.linspace(0.1, 1, 46).tolist()
    )
    assert error(x, grid, found("mse", grid, x)) <= best * 1.02


@every_grid
def test_the_integral_is_the_sum_over_elements(grid: Grid) -> None:
    x = torch.cat([uniform(-3, 2), uniform(-0.5, 0.1)])
    h = histogram_of(x)  # sampled, each element for more than one
    ends = [(-3.0, 2.0), (-1.0, 2.0), (-0.3, 0.5), (-0.01, 0.01)]
    lows, highs = torch.tensor(ends, dtype=torch.float64).T
    for ours, pair in zip(clipping.squared_error(h, grid, lows, highs).tolist(), ends, strict=True):
        assert ours == pytest.approx(error(x, grid, pair), rel=0.03)


@pytest.mark.parametrize("grid", [U8, S8])
@pytest.mark.parametrize("name", ["mse", "entropy"])
def test_the_zeros_of_a_relu_change_nothing(name: str, grid: Grid) -> None:
    x = (gaussian(9).abs() ** 2).clamp_max(12)
    assert found(name, grid, x, torch.zeros(60_000)) == found(name, grid, x)


def test_divergence_of_equal_distributions_is_nothing() -> None:
    counts = torch.ones(1024, dtype=torch.float64)
    found = clipping.divergence(counts, 0, torch.tensor([1024, 512]), 128)
    assert float(found[0]) == pytest.approx(0, abs=1e-9)
    assert float(found[1]) > 0.1


def test_divergence_is_that_of_the_definition() -> None:
    counts = torch.tensor([4.0, 0, 2, 2, 1, 3], dtype=torch.float64)
    p = [4 / 12, 2 / 12, 6 / 12]  # bins 0…3, the outliers' 4 in the last; bin 1 is empty
    q = [4 / 8, 2 / 8, 2 / 8]
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(clipping.divergence(counts, 0, torch.tensor([4]), 2)[0]) == pytest.approx(expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_entropy_searches_both_ends(sign: int) -> None:
    x = torch.cat([gaussian(2) * sign, torch.tensor([30.0, -60.0]) * sign])
    low, high = found("entropy", U8, x)
    assert -17 < low < -2  # no less than one bin for each integer
    assert 2 < high < 17


values = st.lists(st.floats(-(2.0**66), 2.0**66, width=32), min_size=1, max_size=30)


@settings(deadline=None)
@given(st.lists(values, min_size=1, max_size=5), st.sampled_from(NAMES), st.sampled_from(GRIDS))
def test_a_range_lies_within_what_was_seen(batches: list[list[float]], name: str, grid: Grid) -> None:
    tensors = [torch.tensor(batch) for batch in batches]
    low, high = found(name, grid, *tensors)
    full = found("minmax", grid, *tensors)
    slack = 1e-12 * (full[1] - full[0])  # an average is rounded
    assert full[0] - slack <= low <= 0 <= high <= full[1] + slack
    assert found(name, grid, *tensors) == (low, high)


@settings(deadline=None)
@given(st.lists(values, min_size=1, max_size=5))
def test_no_element_is_lost(batches: list[list[float]]) -> None:
    h = histogram_of(*[torch.tensor(batch) for batch in batches])
    assert float(h.counts.sum()) + h.zeros == sum(map(len, batches))
    assert float(h.counts.min()) >= 0


@settings(deadline=None)
@given(values, values)
def test_a_wider_range_is_never_called_narrower(a: list[float], b: list[float]) -> None:
    before = found("minmax", U8, torch.tensor(a))
    after = found("minmax", U8, torch.tensor(a), torch.tensor(b))
    assert after[0] <= before[0]
    assert before[1] <= after[1]
    assert float(U8.parameters(*before)[0]) <= float(U8.parameters(*after)[0]) or float(U8.parameters(*before)[0]) == 1
