"""The best approximations of a matrix by two thin ones: truncated SVD, plain, whitened or randomised.

    W ≈ B A        W (m, n),  B (m, r),  A (r, n)

**Plain** SVD minimises ‖W − B A‖; what is left is what Eckart and Young (1936) say, the singular values that are cut.

**Whitened** SVD minimises the error of the outputs, ‖(W − B A) X‖, on data X. With X Xᵀ + λI = S Sᵀ (Cholesky) it
truncates the SVD of W S (Wang et al. 2024, "SVD-LLM", arXiv:2403.07378, section 3.2); B A is U_r U_rᵀ W, with the left
singular vectors U of W S, so that no inverse is needed where W is wide. On X it is never worse than plain SVD, whatever
λ is: of all B A it has the least ‖(W − B A) X‖² + λ ‖W − B A‖², and plain SVD has the least second term.

Vectors come from the eigenvectors of the Gram matrix of the smaller side, added up in float64 from pieces: a table of
50,000 rows takes no more memory than its width squared, and squaring costs no digit that float32 weights have. Where
the smaller side is large and the rank is not, a random subspace is iterated instead (Halko et al. 2011, "Finding
structure with randomness", algorithms 4.4 and 5.1), with a fixed seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

# The smaller side from which a subspace is iterated, where the rank is at most this share of it.
_LARGE, _FEW = 2048, 0.4
_ITERATIONS, _OVERSAMPLING = 2, 0.1
_PIECE = 2048  # rows or columns that are widened to float64 at once


@dataclasses.dataclass(frozen=True)
class Directions:
    """The leading singular directions of a weight, of which the first r make its factors of rank r.

    Attributes:
        values: singular values f64[k], the largest first.
        total: the sum of the squares of all singular values, those that are not here too.
        basis: orthonormal f32[m, k] where ``B A`` is a projection of W's columns, or what A is: f32[n, k].
        dual: None for the former; for the latter f32[n, k] such that B is W times it.
    """

    values: torch.Tensor
    total: float
    basis: torch.Tensor
    dual: torch.Tensor | None

    @property
    def rank(self) -> int:
        """How many of the directions are more than rounding; at least 1."""
        if not len(self.values):
            return 1
        size = max(len(self.basis), len(self.values))
        least = float(self.values[0]) * size * torch.finfo(torch.float32).eps
        return max(1, int((self.values > least).sum()))

    def kept(self, rank: int) -> float:
        """Share of the energy, the squares of the singular values, in the first *rank* directions."""
        return float(self.values[:rank].square().sum()) / self.total if self.total else 1.0

    def rank_for(self, energy: float) -> int | None:
        """The least rank that keeps *energy*, or None where more directions than there are here are needed."""
        if self.kept(self.rank) < energy * (1 - torch.finfo(torch.float32).eps):
            return None
        shares = self.values.square().cumsum(0) / (self.total or 1.0)
        return min(self.rank, 1 + int((shares < energy * (1 - torch.finfo(torch.float32).eps)).sum()))

    def factors(self, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """B (m, rank) and A (rank, n), each direction of one norm in both, in the dtype of *weight*."""
        wide = weight.detach().to(self.basis.dtype)
        if self.dual is None:
            b = self.basis[:, :rank]
            a = b.T @ wide
        else:
            a = self.basis[:, :rank].T
            b = wide @ self.dual[:, :rank]
        ratio = (a.norm(dim=1) / b.norm(dim=0)).sqrt()
        ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
        return (b * ratio).to(weight.dtype).contiguous(), (a / ratio[:, None]).to(weight.dtype).contiguous()


def decompose(weight: torch.Tensor, most: int, moments: torch.Tensor | None = None, damping: float = 0.0) -> Directions:
    """The first *most* directions of *weight* (m, n), a floating matrix; they are f32, whatever its dtype.

    Args:
        weight: W.
        most: the largest rank asked for.
        moments: X Xᵀ (n, n) over the rows that are multiplied by W; None for plain SVD.
        damping: λ, as a fraction of the mean of the diagonal of *moments*.
    """
    whiten = None if moments is None else _square_root(moments, damping)
    side = min(weight.shape)
    most = min(most, side)
    if side > _LARGE and most <= _FEW * side:
        return _randomised(weight.detach(), most, whiten)
    return _exact(weight.detach(), most, whiten)


def _square_root(moments: torch.Tensor, damping: float) -> torch.Tensor:
    """The lower Cholesky factor of the damped *moments*, with more damping where rounding has made them indefinite."""
    size = float(moments.diagonal().mean())
    while True:
        damped = moments.clone()
        damped.diagonal().add_(damping * size)
        lower: torch.Tensor
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return lower
        damping = max(10 * damping, 1e-8)


def _pieces(weight: torch.Tensor, whiten: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """W S in float64, transposed where W is wide: blocks of rows, whose number of columns is W's smaller side."""
    rows, columns = weight.shape
    if rows > columns:
        for part in weight.split(_PIECE):
            wide = part.double()
            yield wide if whiten is None else wide @ whiten.double()
    elif whiten is None:
        yield from (part.T.double() for part in weight.split(_PIECE, 1))
    else:
        wide = weight.double()
        yield from ((wide @ part.double()).T for part in whiten.split(_PIECE, 1))


def _exact(weight: torch.Tensor, most: int, whiten: torch.Tensor | None) -> Directions:
    side = min(weight.shape)
    gram = torch.zeros(side, side, dtype=torch.float64)
    for piece in _pieces(weight, whiten):
        gram.addmm_(piece.T, piece)
    squares, vectors = torch.linalg.eigh(gram)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)[:, :most]
    return _directions(weight, vectors, squares[:most].sqrt(), float(squares.sum()), whiten)


def _randomised(weight: torch.Tensor, most: int, whiten: torch.Tensor | None) -> Directions:
    matrix = weight.float() if whiten is None else weight.float() @ whiten.float()
    matrix = matrix if weight.shape[0] <= weight.shape[1] else matrix.T
    count = min(len(matrix), most + max(8, int(_OVERSAMPLING * most)))
    start = torch.randn(matrix.shape[1], count, generator=torch.Generator().manual_seed(0))
    q = torch.linalg.qr(matrix @ start).Q
    for _ in range(_ITERATIONS):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ q).Q).Q
    small = q.T @ matrix
    squares, vectors = torch.linalg.eigh((small @ small.T).double())
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    found = q @ vectors[:, :most].float()
    total = sum(float(part.double().square().sum()) for part in matrix.split(_PIECE))
    return _directions(weight, found, squares[:most].sqrt(), total, whiten)


def _directions(
    weight: torch.Tensor, vectors: torch.Tensor, values: torch.Tensor, total: float, whiten: torch.Tensor | None
) -> Directions:
    """From the singular vectors of W S on its smaller side."""
    if weight.shape[0] <= weight.shape[1]:
        return Directions(values, total, vectors.float(), None)
    if whiten is None:
        basis = vectors.float()
        return Directions(values, total, basis, basis)
    wide = vectors.to(whiten.dtype)
    encode = torch.linalg.solve_triangular(whiten.T, wide, upper=True)
    return Directions(values, total, encode.float(), (whiten @ wide).float())
