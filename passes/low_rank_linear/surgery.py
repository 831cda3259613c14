"""Two linears in place of one, with or without what low rank has left over.

    linear(x, W, b)   →   linear(linear(x, A), B, b)                         A (r, n), B (m, r)
                      →   linear(linear(x, A), B, b) + linear(x, R)          R ≈ W − B A in int8, or two of four

A remainder makes up for what the rank does not reach; it is small, and so the int8 or 2:4 form of it costs less than
that of W would. It is smaller to store than W, but computes more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import fx

from fxopt import masks, ops
from fxopt.passes.low_rank_linear.layers import Layer
from fxopt.quantized import DEQUANTIZE_CHANNEL
from fxopt.rewriter import Rewriter
from fxopt.sparsity import Pattern

Remainder = Literal["none", "int8", "2:4"]
_INT8 = 127
_TWO_OF_FOUR = Pattern(2, 4)
aten = torch.ops.aten


def stored(remainder: Remainder, weight: torch.Tensor) -> float:
    """Bytes of the remainder of *weight* over those of *weight*; of 2:4 as packed, two bits beside each value."""
    size = weight.element_size()
    return {"none": 0.0, "int8": 1 / size, "2:4": (size + 0.25) / 2 / size}[remainder]


def refusal(remainder: Remainder, weight: torch.Tensor) -> str | None:
    """Why there is no such remainder of *weight*, or None."""
    if remainder == "2:4" and not _TWO_OF_FOUR.fits(weight):
        return f"its {weight.shape[1]} inputs are no multiple of {_TWO_OF_FOUR.m}, as 2:4 needs"
    return None


def replace(
    rewriter: Rewriter, layer: Layer, b: torch.Tensor, a: torch.Tensor, remainder: Remainder, *, training: bool
) -> None:
    """Let all users of *layer* multiply by *a*, then by *b*, and by the remainder."""
    base = layer.name.removesuffix(".weight")
    inner, outer = rewriter.constant(f"{base}.low_rank_a", a), rewriter.constant(f"{base}.low_rank_b", b)
    rest = None
    if remainder != "none":
        left = (layer.weight.float() - b.float() @ a.float()).to(layer.weight.dtype)
        rest = _REMAINDERS[remainder](rewriter, base, left, layer.users[0])
    held = [_split(rewriter, user, inner, outer, rest) for user in layer.users]
    if remainder == "2:4" and training and rest is not None and held:
        masks.hold(rewriter, rest, None, rewriter.program.constants[str(rest.target)] != 0)


def _split(rewriter: Rewriter, user: fx.Node, inner: fx.Node, outer: fx.Node, rest: fx.Node | None) -> fx.Node:
    arguments = ops.arguments(user)
    x, _, bias, *tail = arguments.values()
    target: Callable[..., Any] = user.target  # type: ignore[assignment]
    z = rewriter.call(aten.linear.default, (x, inner), before=user)
    beside = None if rest is None else rewriter.call(aten.linear.default, (x, rest), before=user)
    if beside is not None and tail and tail[0] is not None:
        beside = rewriter.call(aten.add.Tensor, (beside, tail[0]), before=user)
    if tail:
        tail[0] = tail[0] if beside is None else beside
        new = rewriter.call(target, (z, outer, bias, *tail), before=user)
    else:
        new = rewriter.call(target, (z, outer) if bias is None else (z, outer, bias), before=user)
        new = new if beside is None else rewriter.call(aten.add.Tensor, (new, beside), before=user)
    rewriter.replace(user, new)
    return new


def _int8(rewriter: Rewriter, base: str, left: torch.Tensor, user: fx.Node) -> fx.Node:
    """One scale for each output, no zero points."""
    largest = left.float().abs().amax(1)
    scale = torch.where(largest > 0, largest / _INT8, 1.0)
    integers = (left.float() / scale[:, None]).round().clamp(-_INT8, _INT8).to(torch.int8)
    parts = (
        rewriter.constant(f"{base}.low_rank_remainder", integers),
        rewriter.constant(f"{base}.low_rank_remainder_scale", scale),
    )
    zeros = rewriter.constant(f"{base}.low_rank_remainder_zero_point", torch.zeros(len(scale), dtype=torch.int64))
    kwargs = {} if left.dtype is torch.float32 else {"out_dtype": left.dtype}
    args = (*parts, zeros, 0, -_INT8, _INT8, torch.int8)
    return rewriter.call(DEQUANTIZE_CHANNEL, args, kwargs, before=rewriter.first_call(), origin=user)


def _two_of_four(rewriter: Rewriter, base: str, left: torch.Tensor, user: fx.Node) -> fx.Node:
    """The two largest of each four along the inputs."""
    stay = _TWO_OF_FOUR.kept(left.abs())
    return rewriter.constant(f"{base}.low_rank_remainder", torch.where(stay, left, 0))


_REMAINDERS: dict[str, Callable[[Rewriter, str, torch.Tensor, fx.Node], fx.Node]] = {
    "int8": _int8,
    "2:4": _two_of_four,
}
