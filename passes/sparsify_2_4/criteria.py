"""Which weights stay, and what becomes of them. All three see a weight as rows of ``fxopt.sparsity.matrix``.

magnitude    the largest |w|
wanda        the largest |w| · ‖x‖, x what the weight is multiplied with (Sun et al., "A Simple and Effective Pruning
             Approach for Large Language Models", ICLR 2024, equation 1)
sparsegpt    the largest w² / Uⱼⱼ², H⁻¹ = Uᵀ U, H = Σ x xᵀ; column by column, what goes is
             made up for by the columns after it (Frantar and Alistarh, "SparseGPT", ICML 2023, algorithm 1 for n:m).
             It starts from W + W Σ (x₀ − x) xᵀ H⁻¹, so that it makes up for the layers before, which gave x in place
             of x₀, as well (Li et al., "GPTAQ", ICML 2025, asymmetric calibration)
"""

from __future__ import annotations

import torch

from fxopt.passes.insert_fake_quant.layerwise import Layer
from fxopt.passes.sparsify_2_4 import moments
from fxopt.second_order import inverse_factor
from fxopt.sparsity import Pattern, like, matrix


def magnitude(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The largest weights of each group."""
    return torch.where(pattern.kept(weight.abs()), weight, 0)


def wanda(layer: Layer, pattern: Pattern) -> torch.Tensor:
    """The weights of each group that contribute most to the output of *layer*."""
    norms = moments.squares(layer).sqrt()
    rows = matrix(layer.rounded.detach()).double().abs().unflatten(0, (len(norms), -1))
    scores = like((rows * norms[:, None]).flatten(0, 1), layer.rounded)
    return torch.where(pattern.kept(scores), layer.rounded.detach(), 0)


def sparsegpt(layer: Layer, pattern: Pattern, damping: float, block: int) -> torch.Tensor | None:
    """The weight of *layer* with the pattern, moved to make up for what goes; None where H cannot be inverted."""
    weight = layer.rounded.detach()
    hessians, crosses = moments.second_moments(layer), moments.cross_moments(layer)
    rows = matrix(weight).double().unflatten(0, (len(hessians), -1))
    solved = []
    for own, hessian, cross in zip(rows, hessians, crosses, strict=True):
        factor = inverse_factor(hessian, damping)
        if factor is None:
            return None
        made_up_for = own @ (cross - hessian) @ (factor.T @ factor)
        own = torch.where(own != 0, own + made_up_for, 0)
        importance = torch.where(hessian.diagonal() > 0, factor.diagonal().reciprocal(), 0)
        solved.append(_solve(own, factor, importance, pattern, block))
    return like(torch.cat(solved), weight).to(weight.dtype)


def _solve(
    weight: torch.Tensor, factor: torch.Tensor, importance: torch.Tensor, pattern: Pattern, block: int
) -> torch.Tensor:
    """*weight*, f64[outputs, inputs], in blocks of columns after which the rest is brought up to date.

    What is zero already, as other pruning leaves it, stays zero.
    """
    width = max(1, block // pattern.m) * pattern.m
    inputs, alive = weight.shape[1], weight != 0
    result = torch.zeros_like(weight)
    for start in range(0, inputs, width):
        end = min(start + width, inputs)
        errors = torch.zeros(len(weight), end - start, dtype=weight.dtype)
        for j in range(start, end):
            if (j - start) % pattern.m == 0:
                ahead = slice(j, j + pattern.m)
                scores = (weight[:, ahead] * importance[ahead]).square()
                kept = alive[:, ahead] & pattern.kept(scores.where(alive[:, ahead], -1))
            stays = torch.where(kept[:, (j - start) % pattern.m], weight[:, j], 0)
            error = (weight[:, j] - stays) / factor[j, j]
            result[:, j], errors[:, j - start] = stays, error
            weight[:, j:end] -= error[:, None] * factor[j, j:end]
        weight[:, end:] -= errors @ factor[start:end, end:]
    return result
