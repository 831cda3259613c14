"""Observers: exact extremes, histograms that keep their mass, ranges that are optimal where the optimum is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.errors import InputError, SpecError
from fxopt.passes.insert_fake_quant import clipping, histogram, observers
from fxopt.passes.insert_fake_quant.grid import Grid
from fxopt.passes.insert_fake_quant.histogram import Histogram

U8 = Grid(torch.uint8, symmetric=False, qmin=0, qmax=255)
U8_SYMMETRIC = Grid(torch.uint8, symmetric=True, qmin=0, qmax=255)
S8 = Grid(torch.int8, symmetric=True, qmin=-127, qmax=127)
S8_ASYMMETRIC = Grid(torch.int8, symmetric=False, qmin=-128, qmax=127)
GRIDS = [U8, U8_SYMMETRIC, S8, S8_ASYMMETRIC]
NAMES = list(observers.CALIBRATORS)
HISTOGRAMS = ["percentile", "mse", "entropy"]

every_grid = pytest.mark.parametrize("grid", GRIDS, ids=["u8", "u8-symmetric", "s8", "s8-asymmetric"])
every_name = pytest.mark.parametrize("name", NAMES)


def found(name: str, grid: Grid, *batches: torch.Tensor, **options: float) -> tuple[float, float]:
    observer = observers.create(name, **options)
    for batch in batches:
        observer.update(batch)
    low, high = observer.range(grid)
    assert low <= 0 <= high
    return low, high


def quantized(x: torch.Tensor, grid: Grid, low: float, high: float) -> torch.Tensor:
    scale, zero_point = grid.parameters(low, high)
    q = ((x.double() / scale.double()).round() + zero_point).clamp(grid.qmin, grid.qmax)
    return (q - zero_point) * scale.double()


def error(x: torch.Tensor, grid: Grid, ends: tuple[float, float]) -> float:
    return float((x.double() - quantized(x, grid, *ends)).square().sum())


def gaussian(seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (40_000,), generator=torch.Generator().manual_seed(seed))


def uniform(low: float, high: float) -> torch.Tensor:
    return torch.rand(60_000, generator=torch.Generator().manual_seed(1)) * (high - low) + low


def histogram_of(*batches: torch.Tensor) -> Histogram:
    observer = observers.MSE()
    for batch in batches:
        observer.update(batch)
    return observer.histogram


# Extremes


def test_minmax_is_exact_over_all_batches() -> None:
    assert found("minmax", U8, torch.tensor([1.5, 3.25]), torch.tensor([-0.75, 2.0])) == (-0.75, 3.25)


def test_extremes_are_exact_for_a_tensor_that_is_sampled() -> None:
    x = gaussian(0, 8, 64, 30, 30)
    x[3, 5, 7, 11], x[1, 2, 3, 4] = 77.0, -55.0
    h = histogram_of(x)
    assert (h.low, h.high) == (-55, 77)
    assert found("minmax", U8, x) == found("percentile", U8, x, p=100) == (-55, 77)


def test_moving_average_of_few_batches_is_their_mean() -> None:
    assert found("moving-average", U8, torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 6.0])) == (-2, 4)


def test_moving_average_of_many_batches_follows_the_equation() -> None:
    batches = [torch.tensor([-1.0, 2.0])] * 4 + [torch.tensor([-3.0, 6.0])]
    assert found("moving-average", U8, *batches, momentum=0.25) == (-1.5, 3.0)


@every_name
def test_a_range_holds_zero(name: str) -> None:
    assert found(name, U8, uniform(5, 6))[0] == 0
    assert found(name, U8, uniform(-6, -5))[1] == 0


# What cannot be counted


@every_name
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_forgotten(name: str, bad: float) -> None:
    observer = observers.create(name)
    observer.update(torch.tensor([-1.0, 1.0]))
    before = observer.range(U8)
    with pytest.raises(InputError, match=r"of 3 values, 1 are (NaN|infinite or beyond float32)$"):
        observer.update(torch.tensor([0.5, bad, 9.0]))
    assert observer.range(U8) == before


def test_an_error_counts_both_kinds() -> None:
    with pytest.raises(InputError, match="of 4 values, 1 are NaN and 2 are infinite"):
        observers.MinMax().update(torch.tensor([math.inf, math.nan, -math.inf, 0]))


def test_a_double_beyond_float32_is_refused() -> None:
    with pytest.raises(InputError, match="beyond float32"):
        observers.MinMax().update(torch.tensor([1e300], dtype=torch.float64))


@every_name
def test_empty_tensors_count_for_nothing(name: str) -> None:
    empty = torch.empty(0, 3, 8, 8)
    assert found(name, U8, empty) == (0, 0)
    assert found(name, U8, empty, torch.tensor([-1.0, 1.0]), empty) == found(name, U8, torch.tensor([-1.0, 1.0]))


def test_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(SpecError, match=r"Did you mean 'minmax'"):
        observers.create("min-max")
    with pytest.raises(SpecError, match="calibrator 'mse'"):
        observers.create("mse", p=3)
    for name, option, value in (("moving-average", "momentum", 0.0), ("percentile", "p", 50.0)):
        with pytest.raises(SpecError, match=f"{name}: {option} must be in"):
            observers.create(name, **{option: value})


# Dtypes, strides


@every_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_give_the_range_of_their_values(name: str, dtype: torch.dtype) -> None:
    x = gaussian().to(dtype)
    assert found(name, U8, x) == found(name, U8, x.float())


@every_name
def test_strides_do_not_matter(name: str) -> None:
    x = gaussian(0, 2, 6, 10, 10)
    expected = found(name, U8, x)
    assert found(name, U8, x.contiguous(memory_format=torch.channels_last)) == expected
    assert found(name, U8, x.transpose(1, 3)) == expected
    wide = torch.nn.functional.pad(x, (3, 3), value=100.0)
    assert found(name, U8, wide[..., 3:-3]) == expected
    assert found(name, U8, x.clone().requires_grad_()) == expected


def test_no_dense_tensor_is_copied() -> None:
    x = gaussian(0, 2, 6, 10, 10)
    for one in (x, x.contiguous(memory_format=torch.channels_last), x.permute(3, 1, 0, 2)):
        assert observers._flat(one).data_ptr() == one.data_ptr()


@every_name
def test_a_scalar_is_a_value(name: str) -> None:
    assert found(name, U8, torch.tensor(2.5)) == (0, 2.5)


# Histograms


def test_batches_in_any_order_make_the_same_histogram() -> None:
    parts = [gaussian(i, 500) * 3.0**i for i in range(6)]
    one = histogram_of(torch.cat(parts))
    for order in (parts, parts[::-1]):
        many = histogram_of(*order)
        assert (many.exponent, many.start, many.zeros) == (one.exponent, one.start, one.zeros)
        torch.testing.assert_close(many.counts, one.counts, rtol=0, atol=1)  # float32 rounds near a bin's edge


@every_grid
@pytest.mark.parametrize("name", HISTOGRAMS)
def test_one_batch_or_many_give_the_same_range(name: str, grid: Grid) -> None:
    x = gaussian(3, 64, 700)
    low, high = found(name, grid, x)
    assert found(name, grid, *x.sort(0).values.split(8)) == pytest.approx((low, high), rel=0.02)


@pytest.mark.parametrize("growth", [1e6, 1e30])
def test_growth_of_the_range_keeps_the_mass(growth: float) -> None:
    x = torch.cat([gaussian(0, 1000), torch.zeros(50)])
    h = histogram_of(x, x * growth, x * -math.sqrt(growth), x)
    assert h.zeros == 200
    assert float(h.counts.sum()) == 4000
    assert math.floor(h.low / h.width) >= h.start
    assert math.floor(h.high / h.width) < h.start + histogram.BINS


def test_bins_merge_in_pairs_and_stay_on_their_side_of_zero() -> None:
    h = histogram_of(uniform(-3, 5))
    width, before = h.width, h.counts.clone()
    first, below = h.start, float(before[: -h.start].sum())
    h.add(torch.tensor([9.0]), 9.0, 9.0)
    h.counts[math.floor(9 / h.width) - h.start] -= 1
    assert h.width == 2 * width
    assert float(h.counts[: -h.start].sum()) == below
    for i, count in enumerate(h.counts.tolist()):
        pair = [2 * (i + h.start) - first, 2 * (i + h.start) - first + 1]
        assert count == sum(float(before[j]) for j in pair if 0 <= j < histogram.BINS)


def test_at_least_half_of_the_bins_lie_within_the_range() -> None:
    for low, high in ((-3.0, 5.0), (0.0, 1.0), (-7.0, 0.0), (-1e-3, 1e3), (-1e38, 3e38), (0.0, 1e-30)):
        h = Histogram()
        h.add(torch.tensor([low, high]), low, high)
        assert histogram.BINS / 2 - 1 <= (high - low) / h.width <= histogram.BINS
        assert float(h.counts.sum()) + h.zeros == 2


def test_zeros_have_their_own_count() -> None:
    h = histogram_of(torch.tensor([0.0, -0.0, 1e-3, 2.0, -1.0]))
    assert h.zeros == 2
    assert float(h.counts.sum()) == 3


@every_name
def test_memory_does_not_grow_with_the_data(name: str) -> None:
    def size(count: int) -> int:
        observer = observers.create(name)
        for i in range(count):
            observer.update(gaussian(i, 100 * (i + 1)) * 2.0**i)
        owners = [observer, observer.histogram] if isinstance(observer, observers.HistogramObserver) else [observer]
        state = [v for owner in owners for v in vars(owner).values()]
        assert all(isinstance(v, (int, float, torch.Tensor, Histogram)) for v in state)
        return sum(v.untyped_storage().nbytes() for v in state if isinstance(v, torch.Tensor))

    assert size(1) == size(40) == (histogram.BINS * 8 if name in HISTOGRAMS else 0)


@pytest.mark.parametrize("shape", [(1, 64, 56, 56), (8, 512, 49), (2**20,), (32, 30, 7, 7, 11), (210_000,), (4, 4)])
def test_a_sample_is_bounded_and_misses_no_channel(shape: tuple[int, ...]) -> None:
    stride = histogram.sample_stride(torch.Size(shape))
    assert math.prod(shape) / stride <= histogram.SAMPLE
    assert stride == 1 or stride <= math.prod(shape) / histogram.SAMPLE + 12
    for dim, size in enumerate(shape):
        index = torch.arange(0, math.prod(shape), stride) // math.prod(shape[dim + 1 :]) % size
        assert size > 1000 or len(index.unique()) == size


def test_a_sample_stands_for_all_elements() -> None:
    h = histogram_of(torch.ones(3, 500, 500), torch.ones(10))
    assert float(h.counts.sum()) == pytest.approx(750_010)


# Ranges


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


# Properties

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
