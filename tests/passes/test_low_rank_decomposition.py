"""The decomposition of low-rank-linear: as good as a matrix of that rank can be, plain or for the data."""

from __future__ import annotations

import pytest
import torch

from fxopt.passes.low_rank_linear import decompose, decomposition
from tests.passes.low_rank_models import decaying, product


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (64, 64), (1, 5), (5, 1)])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_the_error_is_the_bound_of_eckart_and_young(shape: tuple[int, int], rank: int) -> None:
    weight = torch.randn(shape)
    rank = min(rank, *shape)
    bound = torch.linalg.svdvals(weight.double())[rank:].square().sum().sqrt()
    error = (weight - product(weight, rank)).double().norm()
    assert float(error) == pytest.approx(float(bound), rel=1e-4, abs=1e-5)


def test_singular_values_and_energy_are_those_of_the_matrix() -> None:
    weight = decaying(80, 50).float()
    found, exact = decompose(weight, 20), torch.linalg.svdvals(weight.double())
    assert torch.allclose(found.values, exact[:20], rtol=1e-5)
    assert found.total == pytest.approx(float(exact.square().sum()), rel=1e-6)
    assert found.kept(20) == pytest.approx(float(exact[:20].square().sum() / exact.square().sum()), rel=1e-6)
    rank = found.rank_for(0.9)
    assert rank is not None
    assert found.kept(rank) >= 0.9 > found.kept(rank - 1)
    assert found.rank_for(0.999) is None


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
@pytest.mark.parametrize("whiten", [False, True])
def test_at_full_rank_the_outputs_are_the_same(shape: tuple[int, int], whiten: bool) -> None:
    weight, x = torch.randn(shape), torch.randn(256, shape[1]) @ torch.randn(shape[1], shape[1])
    y = x @ weight.T
    error = y - x @ product(weight, min(shape), x.T @ x if whiten else None, 0.01).T
    assert float(error.norm() / y.norm()) <= 1e-5


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("damping", [1e-6, 0.01, 1.0])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_whitened_is_never_worse_on_its_data_than_plain(seed: int, damping: float, shape: tuple[int, int]) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(shape, dtype=torch.float64)
    rows = 30 if seed % 2 else 500  # fewer rows than inputs: moments that cannot be inverted
    x = torch.randn(rows, shape[1], dtype=torch.float64) @ torch.randn(shape[1], shape[1], dtype=torch.float64)
    for rank in (1, 8, 20):
        plain, white = (
            (x @ (weight - product(weight, rank, moments, damping)).T).norm() for moments in (None, x.T @ x)
        )
        assert white <= plain * (1 + 1e-5)


def test_whitened_is_clearly_better_where_inputs_are_correlated() -> None:
    weight = torch.randn(64, 64)
    spread = decaying(64, 64, 0.8).float()  # most of what the inputs do, they do in a few directions
    x = torch.randn(2000, 64) @ spread
    plain, white = ((x @ (weight - product(weight, 12, m, 1e-4)).T).norm() for m in (None, x.T @ x))
    assert white < 0.3 * plain


def test_whitened_outputs_are_the_best_of_that_rank() -> None:
    """No matrix of rank r has less error than the singular values of W X that are cut."""
    weight, x = torch.randn(40, 60, dtype=torch.float64), torch.randn(60, 300, dtype=torch.float64)
    bound = torch.linalg.svdvals(weight @ x)[10:].norm()
    assert float(((weight - product(weight, 10, x @ x.T, 1e-9)) @ x).norm()) == pytest.approx(float(bound), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_decomposed_in_float(dtype: torch.dtype) -> None:
    weight = decaying(64, 64).to(dtype)
    b, a = decompose(weight, 30).factors(weight, 30)
    assert b.dtype is a.dtype is dtype
    error = (weight.double() - b.double() @ a.double()).norm() / weight.double().norm()
    assert float(error) < 4 * torch.finfo(dtype).eps + 0.9**30


def test_factors_share_the_size_of_a_direction() -> None:
    weight = decaying(64, 96)
    b, a = decompose(weight, 20).factors(weight, 20)
    assert torch.allclose(b.norm(dim=0), a.norm(dim=1), rtol=1e-3)


@pytest.mark.parametrize("shape", [(300, 700), (700, 300)])
@pytest.mark.parametrize("whiten", [False, True])
def test_the_randomised_path_is_as_good(shape: tuple[int, int], whiten: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = decaying(*shape, 0.98).float() + 0.001 * torch.randn(shape), torch.randn(900, shape[1])
    moments = x.T @ x if whiten else None
    exact = product(weight, 40, moments, 0.01)
    monkeypatch.setattr(decomposition, "_LARGE", 100)
    assert not torch.equal(product(weight, 40, moments, 0.01), exact)
    errors = [
        ((weight - one) @ x.T if whiten else weight - one).norm() for one in (product(weight, 40, moments, 0.01), exact)
    ]
    assert errors[0] <= 1.02 * errors[1]
    assert torch.equal(product(weight, 40, moments, 0.01), product(weight, 40, moments, 0.01))


def test_a_tall_table_is_widened_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decomposition, "_PIECE", 7)
    widest = 0
    double = torch.Tensor.double

    def watched(x: torch.Tensor) -> torch.Tensor:
        nonlocal widest
        widest = max(widest, x.numel())
        return double(x)

    weight = torch.randn(1000, 12)
    monkeypatch.setattr(torch.Tensor, "double", watched)
    found = decompose(weight, 5)
    monkeypatch.undo()
    assert widest <= 7 * 12
    assert torch.allclose(found.values, torch.linalg.svdvals(weight.double())[:5])


@pytest.mark.slow
def test_a_large_layer_is_near_exact_truncation() -> None:
    """4096×11008, as in a language model of 7 billion parameters; the values of a Gram matrix are exact enough here."""
    spectrum = 1 / (1 + torch.arange(4096.0))
    weight = (torch.randn(4096, 4096) * spectrum) @ torch.randn(4096, 11008) / 64
    squares = torch.linalg.eigvalsh((weight @ weight.T).double()).flip(0)
    b, a = decompose(weight, 512).factors(weight, 512)
    assert float((weight - b @ a).norm()) <= 1.02 * float(squares[512:].sum().sqrt())
