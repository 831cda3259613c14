"""The mean of each output channel stays what it was: by the bias, or by the batch norm that follows.

    linear(x, w, b)          →   linear(x', w', b + E[w x] − E[w' x'])
    batch_norm(conv(x, w))   →   batch_norm(conv(x', w')), its running mean by as much smaller

As bias correction does after quantization (Nagel et al., "Data-Free Quantization", ICCV 2019, section 4.2), from data.
"""

from __future__ import annotations

import torch
from torch import fx

from fxopt import ops
from fxopt.rewriter import Rewriter


def place(rewriter: Rewriter, unit: fx.Node) -> tuple[fx.Node, float] | None:
    """The constant that takes up the difference of means, and the sign with which; None where there is none."""
    bias = ops.arguments(unit)["bias"]
    if bias is not None:
        return (bias, 1.0) if _is_own(rewriter, bias) else None
    norm = next(iter(unit.users))
    if len(unit.users) != 1 or ops.kind(norm) != "batch_norm" or ops.arguments(norm).get("training"):
        return None
    mean = ops.arguments(norm)["running_mean"]
    return (mean, -1.0) if _is_own(rewriter, mean) else None


def moved(rewriter: Rewriter, constant: fx.Node, shift: torch.Tensor) -> torch.Tensor:
    """The value of *constant* plus *shift*."""
    value = rewriter.tensor(constant)
    assert value is not None
    return (value.detach() + shift.to(value.device)).to(value.dtype)


def _is_own(rewriter: Rewriter, node: object) -> bool:
    """Whether it is a constant that nobody else reads."""
    return isinstance(node, fx.Node) and rewriter.tensor(node) is not None and len(node.users) == 1
