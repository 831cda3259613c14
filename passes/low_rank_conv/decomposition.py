"""Convs in place of one: their ranks, sizes and weights.

    pointwise   1×1                    →   1×1 (r outputs), 1×1                    SVD of (outputs, inputs)
    spatial     k×k'                   →   k×1 (r outputs), 1×k'                   SVD of (outputs·k', inputs·k)
    tucker      any kernel             →   1×1 (r outputs), core (s outputs), 1×1  Tucker-2

Spatial is scheme 2 of Jaderberg et al. 2014 ("Speeding up Convolutional Neural Networks with Low Rank Expansions",
arXiv:1405.3866); the SVD is its best solution (Tai et al. 2016, arXiv:1511.06067, theorem 1). Tucker-2 is that of Kim
et al. 2016 (arXiv:1511.06530): W ≈ core ×₀ U ×₁ V, from higher-order SVD, and improved by turns (higher-order
orthogonal iteration; De Lathauwer et al. 2000).

CP is not here. Its convs are depthwise ones between two 1×1, which the engines compute at the speed of memory and not
of arithmetic; its best approximation may not exist, and what is found instead trains badly (Lebedev et al. 2015,
arXiv:1412.6553, section 5). It would need a tensor library for the slower of two results.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch

from fxopt.passes.low_rank_conv import vbmf
from fxopt.passes.low_rank_linear.decomposition import Directions, decompose

Form = Literal["pointwise", "spatial", "tucker"]
Ranks = tuple[int, ...]
"""One rank, or for tucker those of inputs and outputs; one as large as the channels leaves that 1×1 away."""

_TURNS = 3


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What decides the cost of a conv.

    Attributes:
        outputs: channels; ``inputs``: likewise.
        kernel: its sizes.
        positions: of one run's inputs, of its results, and (spatial) between the two; batches and users added up.
    """

    outputs: int
    inputs: int
    kernel: tuple[int, ...]
    positions: tuple[int, int, int]

    @property
    def taps(self) -> int:
        """Elements of the kernel."""
        return math.prod(self.kernel)

    def parts(self, form: Form, ranks: Ranks) -> list[tuple[int, int]]:
        """Parameters, and positions at which they are applied, of each of the convs at *ranks*."""
        before, after, between = self.positions
        if form == "tucker":
            r, s = ranks
            first = [(self.inputs * r, before)] if r < self.inputs else []
            last = [(s * self.outputs, after)] if s < self.outputs else []
            return [*first, (r * s * self.taps, after), *last]
        [r] = ranks
        if form == "spatial":
            return [(self.inputs * self.kernel[0] * r, between), (r * self.kernel[1] * self.outputs, after)]
        return [(self.inputs * r, after), (r * self.outputs, after)]

    def parameters(self, form: Form, ranks: Ranks | None) -> int:
        """Weights at *ranks*; None for the conv as it is."""
        if ranks is None:
            return self.outputs * self.inputs * self.taps
        return sum(size for size, _ in self.parts(form, ranks))

    def macs(self, form: Form, ranks: Ranks | None) -> int:
        """Multiply-accumulates of one run at *ranks*."""
        if ranks is None:
            return self.parameters(form, None) * self.positions[1]
        return sum(size * positions for size, positions in self.parts(form, ranks))

    def for_ratio(self, form: Form, ratio: float) -> Ranks:
        """The largest ranks, in proportion to the channels, with at most *ratio* of the parameters."""
        budget = ratio * self.parameters(form, None)
        if form != "tucker":
            return (max(1, int(budget / self.parameters(form, (1,)))),)
        linear = self.inputs**2 + self.outputs**2  # (β I) I + (β O) O + (β I)(β O) taps = budget
        square = self.inputs * self.outputs * self.taps
        share = (math.sqrt(linear**2 + 4 * square * budget) - linear) / (2 * square)
        return max(1, int(share * self.inputs)), max(1, int(share * self.outputs))


def unfold(weight: torch.Tensor, axis: int) -> torch.Tensor:
    """*weight* as a matrix whose rows are *axis*."""
    return weight.movedim(axis, 0).flatten(1)


def matrix(weight: torch.Tensor, form: Form) -> torch.Tensor:
    """What pointwise and spatial take the SVD of; outputs are rows."""
    if form == "pointwise":
        return weight.flatten(1)
    return weight.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)  # (outputs·k', inputs·k)


def spectra(weight: torch.Tensor, form: Form) -> list[tuple[Directions, tuple[int, int]]]:
    """The singular values that each of the ranks cuts, with the shape of the matrix that has them."""
    matrices = [matrix(weight, form)] if form != "tucker" else [unfold(weight, 1), unfold(weight, 0)]
    return [(decompose(one, min(one.shape)), (one.shape[0], one.shape[1])) for one in matrices]


def for_energy(weight: torch.Tensor, form: Form, energy: float) -> Ranks:
    """The least ranks that each keep *energy* of the squares of their singular values."""
    return tuple(found.rank_for(energy) or len(found.values) for found, _ in spectra(weight, form))


def for_vbmf(weight: torch.Tensor, form: Form) -> Ranks:
    """The ranks by ``vbmf``; 0 where there is only noise."""
    return tuple(vbmf.rank(found.values, *shape) for found, shape in spectra(weight, form))


def thin(weight: torch.Tensor, form: Form, ranks: Ranks) -> list[torch.Tensor | None]:
    """Weights of the convs in order, in the dtype of *weight*; None for one that is left away."""
    outputs, inputs, *kernel = weight.shape
    if form == "tucker":
        return _tucker(weight, *ranks)
    [r] = ranks
    flat = matrix(weight, form)
    b, a = decompose(flat, r).factors(flat, r)
    if form == "pointwise":
        ones = [1] * len(kernel)
        return [a.reshape(r, inputs, *ones), b.reshape(outputs, r, *ones)]
    b = b.reshape(outputs, kernel[1], r).transpose(1, 2)
    return [a.reshape(r, inputs, kernel[0], 1), b.reshape(outputs, r, 1, kernel[1]).contiguous()]


def _tucker(weight: torch.Tensor, r: int, s: int) -> list[torch.Tensor | None]:
    """V (r, inputs, 1…), core (s, r, *kernel), U (outputs, s, 1…)."""
    wide = weight.detach().float()
    outputs, inputs, *kernel = wide.shape
    whole = r >= inputs, s >= outputs
    v = None if whole[0] else _leading(unfold(wide, 1), r)
    u = None if whole[1] else _leading(unfold(wide, 0), s)
    for _ in range(_TURNS if u is not None and v is not None else 0):
        u = _leading(unfold(_project(wide, 1, v), 0), s)
        v = _leading(unfold(_project(wide, 0, u), 1), r)
    core = _project(_project(wide, 1, v), 0, u)
    ones = [1] * len(kernel)
    first = None if v is None else v.T.reshape(r, inputs, *ones)
    last = None if u is None else u.reshape(outputs, s, *ones)
    return [None if one is None else one.to(weight.dtype).contiguous() for one in (first, core, last)]


def _leading(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The first *count* left singular vectors of *rows*, as columns."""
    wide = rows.double()
    vectors: torch.Tensor = torch.linalg.eigh(wide @ wide.T).eigenvectors
    return vectors.flip(1)[:, :count].float()


def _project(weight: torch.Tensor, axis: int, vectors: torch.Tensor | None) -> torch.Tensor:
    """*weight* in the coordinates of *vectors* along *axis*."""
    if vectors is None:
        return weight
    product: torch.Tensor = torch.tensordot(vectors.T, weight, ([1], [axis]))
    return product.movedim(0, axis)
