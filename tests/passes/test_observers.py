"""Calibrators: extremes, dtypes, histograms, and what cannot be counted."""

from __future__ import annotations

import math

import pytest
import torch

from fxopt.errors import InputError, SpecError
from fxopt.passes.insert_fake_quant import histogram, observers
from fxopt.passes.insert_fake_quant.grid import Grid
from fxopt.passes.insert_fake_quant.histogram import Histogram
from tests.passes.observer_ranges import HISTOGRAMS, U8, every_grid, every_name, found, gaussian, histogram_of, uniform


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
