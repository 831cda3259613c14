"""N:M sparsity: of each *m* neighbours among the inputs of an output only *n* are not zero. GPUs are fast with 2:4.

    linear   w[o, i]          the neighbours are i = 0…m−1, m…2m−1, …
    conv     w[o, i, k, k]    likewise, at each position of the kernel: rows of im2col with the channels innermost

Axis 1 is that of the neighbours for both (Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv:2104.08378).

    fxopt_training::n_of_m(w, n, m, decay)      in a graph that is trained: w with the smaller ones at zero, chosen anew
                                                each time; gradients reach all of w, and *decay* pulls at what is zero
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fxopt.errors import PreconditionError


@dataclasses.dataclass(frozen=True)
class Pattern:
    """*n* of *m*.

    Attributes:
        n: how many of the neighbours may be other than zero; ``m``: how many neighbours there are.
    """

    n: int = 2
    m: int = 4

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def fits(self, weight: torch.Tensor) -> bool:
        """Whether the inputs of *weight* make up whole groups of neighbours."""
        return weight.dim() >= 2 and weight.numel() > 0 and weight.shape[1] % self.m == 0

    def kept(self, scores: torch.Tensor) -> torch.Tensor:
        """The *n* largest of each group of neighbours, of equal ones the first: bool, in the shape of *scores*."""
        groups = matrix(scores).reshape(-1, self.m)
        order = groups.sort(dim=1, descending=True, stable=True).indices[:, : self.n]
        return like(torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True), scores)

    def holds(self, weight: torch.Tensor) -> bool:
        """Whether *weight* has the pattern: no group of neighbours has more than *n* that are not zero."""
        if not self.fits(weight):
            return False
        groups = matrix(weight).reshape(-1, self.m)
        first, rest = groups[:_GLANCE], groups[_GLANCE:]  # of a dense weight a glance is enough
        return all(bool(((part != 0).sum(1) <= self.n).all()) for part in (first, rest))


_GLANCE = 256


def matrix(weight: torch.Tensor) -> torch.Tensor:
    """*weight* as (outputs, kernel positions × inputs), the inputs innermost."""
    return weight.movedim(1, -1).reshape(weight.shape[0], -1)


def like(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`matrix`: *values* in the shape of *weight*."""
    moved = (weight.shape[0], *weight.shape[2:], weight.shape[1])
    return values.reshape(moved).movedim(-1, 1).contiguous()


def check(patterns: Mapping[str, Pattern], tensor: Callable[[str], Any]) -> None:
    """That the weights named in *patterns* have them; *tensor* gives a weight by its name.

    Raises:
        PreconditionError: one has not.
    """
    for name, pattern in patterns.items():
        if not pattern.holds(tensor(name)):
            raise PreconditionError(
                f"{name!r} was prepared with {pattern} sparsity and has lost it: a state with other masks was loaded, "
                "or channels were removed after that. Prune channels first, then sparsify"
            )


class _StraightThrough(torch.autograd.Function):
    """SR-STE: ∂L/∂w = ∂L/∂w̃ + decay · (1 − mask) ⊙ w (Zhou et al., "Learning N:M", ICLR 2021, equation 9)."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, n: int, m: int, decay: float) -> torch.Tensor:
        kept = Pattern(n, m).kept(weight.abs())
        ctx.save_for_backward(weight, kept)
        ctx.decay = decay
        return torch.where(kept, weight, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        weight, kept = ctx.saved_tensors
        return gradients[0] + ctx.decay * torch.where(kept, 0, weight), None, None, None


def _n_of_m(weight: torch.Tensor, n: int, m: int, decay: float) -> torch.Tensor:
    result: torch.Tensor = _StraightThrough.apply(weight, n, m, decay)  # type: ignore[no-untyped-call]
    return result


_library = torch.library.Library("fxopt_training", "FRAGMENT")
_library.define("n_of_m(Tensor weight, int n, int m, float decay) -> Tensor")
_library.impl("n_of_m", _n_of_m, "CompositeImplicitAutograd")

N_OF_M = torch.ops.fxopt_training.n_of_m.default
