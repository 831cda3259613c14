"""Outlier channels move from activations, where one scale serves all, into weights, where each row has its own. Exact.

    linear(layer_norm(x, γ, β), W)   →   linear(layer_norm(x, γ/s, β/s), W·s)        s = max|x|^α / max|W|^(1−α)
    linear(x, W)                     →   linear(x · (1/s), W·s)                      where no norm can take the 1/s

s has one entry for each input channel, the maxima are over calibration data and over all weights that read the value
(Xiao et al., SmoothQuant, ICML 2023, equation 4). Where no channel stands out nothing is done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt import ops
from fxopt.errors import InputError, SpecError
from fxopt.execute import evaluate
from fxopt.passbase import Pass, PassContext
from fxopt.program import source_line
from fxopt.rewriter import Rewriter

aten = torch.ops.aten
_FEWEST_ROWS = 16  # of a value, before anything is made of its extremes
_COST = 2.5  # how much farther a channel must stand out for a multiplication of its own
_SUFFIX = "_smoothed"  # of a weight's name: it is not smoothed again


@dataclasses.dataclass(frozen=True)
class SmoothQuant(Pass):
    """Even out the input channels of linears before they are quantized.

    Attributes:
        alpha: how much of the difficulty goes to the weights, from 0 (none) to 1 (all).
        threshold: how many times the median channel the largest one must reach before anything is done.
    """

    name: ClassVar[str] = "smooth-quant"
    runs_after: ClassVar[tuple[str, ...]] = ("canonicalize", "fold-constants", "fuse-conv-bn-relu", "merge-linears")
    runs_before: ClassVar[tuple[str, ...]] = ("insert-fake-quant", "cast-precision")
    alpha: float = 0.5
    threshold: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise SpecError(f"smooth-quant: alpha must be from 0 to 1, not {self.alpha}")
        if self.threshold < 1:
            raise SpecError(f"smooth-quant: threshold must be at least 1, not {self.threshold}")

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """One run over the calibration data, then one edit for each value with outlier channels.

        Raises:
            PreconditionError: there is no calibration data.
        """
        readers = _readers(rewriter)
        if not readers:
            return
        extents, rows = _extents(rewriter, ctx.batches(self), set(readers))
        if rows < _FEWEST_ROWS:
            rewriter.note(f"{rows} rows of calibration data are too few to tell which channels stand out")
            return
        for value, linears in readers.items():
            extent = extents[value]
            median = float(extent.median())
            free = set(value.users) == set(linears) and _takes_factor(rewriter, value, extent.shape)
            if not free and _is_image(value):
                continue  # what convolutions give stays integer: a multiplication would cost more than it saves
            if median > 0 and float(extent.max()) > self.threshold * median * (1 if free else _COST):
                self._smooth(rewriter, value, linears, extent)

    def _smooth(self, rewriter: Rewriter, value: fx.Node, linears: list[fx.Node], extent: torch.Tensor) -> None:
        weights = [rewriter.tensor(ops.arguments(linear)["weight"]) for linear in linears]
        largest = torch.stack([w.detach().float().abs().amax(0) for w in weights if w is not None]).amax(0)
        scale = extent.clamp_min(1e-5) ** self.alpha / largest.clamp_min(1e-5) ** (1 - self.alpha)
        seen = extent > 0
        scale = (scale / scale[seen].log().mean().exp()).clamp(1e-4, 1e4)
        scale = scale.where(seen, 1.0)  # what a channel does that was always zero is not known
        for linear, weight in zip(linears, weights, strict=True):
            assert weight is not None
            node = ops.arguments(linear)["weight"]
            wider = rewriter.constant(f"{node.target}{_SUFFIX}", (weight.double() * scale.double()).to(weight.dtype))
            rewriter.rewire(linear, node, wider)
        divisor = 1 / scale
        if set(value.users) == set(linears) and _takes_factor(rewriter, value, divisor.shape):
            _scale_producer(rewriter, value, divisor)
            return
        factor = rewriter.constant(f"{value.name}_smoothing", divisor)
        before = value.next if value.op == "call_function" else rewriter.first_call()
        even = rewriter.call(aten.mul.Tensor, (value, factor), before=before, origin=value)
        for linear in linears:
            rewriter.rewire(linear, value, even)


def _readers(rewriter: Rewriter) -> dict[fx.Node, list[fx.Node]]:
    """For each float32 value, the linears with constant weights that read it."""
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in rewriter.nodes():
        if ops.kind(node) != "linear" or node.meta["val"].dtype is not torch.float32:
            continue
        x, weight = node.all_input_nodes[0], rewriter.tensor(ops.arguments(node)["weight"])
        smoothed = str(ops.arguments(node)["weight"].target).endswith(_SUFFIX) if weight is not None else False
        if weight is not None and not smoothed and x.op != "get_attr":
            readers.setdefault(x, []).append(node)
    return readers


def _extents(
    rewriter: Rewriter, batches: Iterable[Sequence[Any]], values: set[fx.Node]
) -> tuple[dict[fx.Node, torch.Tensor], int]:
    """Largest magnitude of each channel (the last axis) over all batches, and how many rows a value has had at least.

    Raises:
        InputError: a value is NaN or infinite.
    """
    extents: dict[fx.Node, torch.Tensor] = {}
    rows = dict.fromkeys(values, 0)

    def look(node: fx.Node, value: Any) -> None:
        if node in values and value.numel():
            flat = value.detach().abs().reshape(-1, value.shape[-1])
            largest = flat.amax(0)
            if not bool(largest.isfinite().all()):
                what = "an input" if node.op == "placeholder" else f"{node.name} ({source_line(node)})"
                raise InputError(f"calibration: {what} is not finite")
            rows[node] += len(flat)
            extents[node] = torch.maximum(extents[node], largest) if node in extents else largest

    for batch in batches:
        evaluate(rewriter.program, batch, observe=look)
    return {node: extents.get(node, torch.ones(1)) for node in values}, min(rows.values())


def _is_image(value: fx.Node) -> bool:
    """Whether *value* comes from a convolution by nothing but views, activations and pooling."""
    while ops.kind(value) in ("shape", "permute", "select", "copy", "pool", "reduce", "activation"):
        value = value.all_input_nodes[0]
    return ops.kind(value) == "conv"


def _takes_factor(rewriter: Rewriter, value: fx.Node, shape: torch.Size) -> bool:
    """Whether what makes *value* can multiply each channel by a factor: a norm, or a gain written out as a product."""
    if ops.packet(value) in ("layer_norm", "rms_norm"):
        a = ops.arguments(value)
        held = all(n is None or rewriter.tensor(n) is not None for n in (a["weight"], a.get("bias")))
        return held and tuple(a["normalized_shape"]) == tuple(shape)
    return _gain_side(rewriter, value, shape) is not None


def _gain_side(rewriter: Rewriter, value: fx.Node, shape: torch.Size) -> int | None:
    """Which operand of the product *value* is a constant gain of one entry for each channel."""
    if ops.packet(value) != "mul" or ops.namespace(value) != "aten":
        return None
    held = [rewriter.tensor(operand) for operand in value.args]
    sides = [i for i, gain in enumerate(held) if gain is not None and gain.shape == shape]
    return sides[0] if sides and isinstance(value.args[1 - sides[0]], fx.Node) else None


def _scale_producer(rewriter: Rewriter, value: fx.Node, factor: torch.Tensor) -> None:
    """Let what makes *value* multiply it by *factor*."""
    side = _gain_side(rewriter, value, factor.shape)
    if side is not None:
        gain = rewriter.tensor(value.args[side])
        assert gain is not None
        new = rewriter.constant(f"{value.name}_gain", gain * factor)
        rewriter.replace(value, rewriter.call(aten.mul.Tensor, (value.args[1 - side], new), before=value))
        return
    a = ops.arguments(value)
    gain, shift = rewriter.tensor(a["weight"]), rewriter.tensor(a.get("bias"))
    a["weight"] = rewriter.constant(f"{value.name}_weight", factor if gain is None else gain * factor)
    if shift is not None:
        a["bias"] = rewriter.constant(f"{value.name}_bias", shift * factor)
    positional = [a[name] for name in ("input", "normalized_shape", "weight", "bias", "eps") if name in a]
    assert callable(value.target)
    rewriter.replace(value, rewriter.call(value.target, positional, before=value))
