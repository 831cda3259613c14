"""What second-order methods share (optimal brain surgeon and its kin): the inverse of H = Σ x xᵀ, factorised."""

from __future__ import annotations

import torch

_MORE_DAMPING, _ATTEMPTS = 10.0, 5


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor | None:
    """The upper Cholesky factor U of the inverse of the damped *hessian*, f64[inputs, inputs]: H⁻¹ = Uᵀ U.

    Inputs that were always zero stay alone: their diagonal becomes one.

    Args:
        hessian: symmetric, f64[inputs, inputs].
        damping: added to the diagonal, as a fraction of its mean; ten times as much where that does not suffice.

    Returns:
        None where it cannot be inverted even so.
    """
    diagonal = hessian.diagonal()
    added = damping * float(diagonal.mean())
    missing = (diagonal <= 0).to(hessian.dtype)
    for _ in range(_ATTEMPTS):
        lower, failed = torch.linalg.cholesky_ex(hessian + torch.diag(added + missing))
        if not failed:
            upper: torch.Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(upper.isfinite().all()):
                return upper
        added *= _MORE_DAMPING
    return None
