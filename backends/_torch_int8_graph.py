"""Exact rewrites that let integers flow: what only moves values moves them before they become floats.

    quantize(x, int8)               →   quantize(x, uint8)      oneDNN's convolutions read no signed activations
    view(dequantize(q))             →   dequantize(view(q))     views, slices, cat of equal scales, padding, max pool
    quantize(dequantize(q))         →   q                       with the same scale on both sides
    quantize(relu(dequantize(q)))   →   clamp(q, zero_point)

What is left of the dequantize nodes stands before arithmetic, where ``_torch_int8_units`` and its like find it.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxopt import ops
from fxopt.backends import _torch_int8_kernels as kernels
from fxopt.backends._torch_packer import Packer
from fxopt.program import Program
from fxopt.quantized import DEQUANTIZE, QUANTIZE, QParams, parameters

aten = torch.ops.aten

_MOVES = {"shape", "permute", "select", "cat", "pad", "copy", "identity"}
_MOVES_PACKETS = {"channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "flip", "roll", "repeat", "upsample_nearest2d"}
_UNMOVED = {"expand", "expand_as", "stack", "view_as", "contiguous"}
_INTEGERS = (torch.uint8, torch.int8)


@dataclasses.dataclass(frozen=True)
class Integers:
    """A float value that is known as integers.

    Attributes:
        node: the integers.
        qparams: what they stand for.
        dtype: float dtype that they are dequantized to.
    """

    node: fx.Node
    qparams: QParams
    dtype: torch.dtype

    @property
    def scale(self) -> float:
        """The scale."""
        return float(self.qparams.scale)  # type: ignore[arg-type]

    @property
    def zero_point(self) -> int:
        """The zero point."""
        return int(self.qparams.zero_point or 0)  # type: ignore[arg-type]


def is_on(node: fx.Node, device: str) -> bool:
    """Whether the tensor *node* lies on a device of that type."""
    return bool(node.meta["val"].device.type == device)


def integers(node: object, device: str = "cpu") -> Integers | None:
    """The integers on *device* that the float value *node* is dequantized from with one constant scale, or None."""
    if not isinstance(node, fx.Node) or node.target is not DEQUANTIZE:
        return None
    (source, *_), p = node.all_input_nodes, parameters(node)
    if p.dtype not in _INTEGERS or not isinstance(p.scale, float) or not is_on(source, device):
        return None
    return Integers(source, dataclasses.replace(p, zero_point=p.zero_point or 0), node.meta["val"].dtype)


def quantized(node: fx.Node) -> QParams | None:
    """The constant scale with which the node quantizes, or None where it does something else."""
    if node.target is not QUANTIZE:
        return None
    p = parameters(node)
    return p if p.dtype in _INTEGERS and isinstance(p.scale, float) else None


def is_full(p: QParams) -> bool:
    """Whether the integers use the whole range of their dtype."""
    limits = torch.iinfo(p.dtype)
    return (p.qmin, p.qmax) == (limits.min, limits.max)


def prepare(program: Program) -> None:
    """Apply all rewrites of this module."""
    for node in list(program.graph.nodes):
        _to_unsigned(node)
    packer = Packer(program)
    for node in list(program.graph.nodes):
        if node.op == "call_function":
            _sink(packer, node)
    for node in list(program.graph.nodes):
        _cancel(packer, node)
    program.remove_dead()


def _to_unsigned(node: fx.Node) -> None:
    """Shift signed integers that nobody sees but dequantize nodes."""
    p = quantized(node)
    if p is None or p.dtype != torch.int8 or any(parameters_of(user) != p for user in node.users):
        return
    shifted = (p.scale, int(p.zero_point or 0) + 128, p.qmin + 128, p.qmax + 128, torch.uint8)  # type: ignore[arg-type]
    for call in (node, *node.users):
        call.args = (call.args[0], *shifted)
        call.kwargs = {k: v for k, v in call.kwargs.items() if k == "out_dtype"}
    node.meta["val"] = node.meta["val"].to(torch.uint8)


def parameters_of(node: fx.Node) -> QParams | None:
    """The constant scale of a dequantize node, or None for any other node."""
    found = integers(node)
    return None if found is None else found.qparams


def _sink(packer: Packer, node: fx.Node) -> None:
    """Let *node* move integers, and dequantize what comes out."""
    if not _moves(node) or not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)):
        return
    floats = [n for n in node.all_input_nodes if _is_float(n)]
    sources = [integers(n) for n in floats]
    first = sources[0] if sources else None
    if first is None or any(s is None or (s.qparams, s.dtype) != (first.qparams, first.dtype) for s in sources):
        return
    raw = {n: s.node for n, s in zip(floats, sources, strict=True) if s is not None}
    call = _on_integers(node, first)
    if call is None:
        return
    target, args, kwargs = call
    args = fx.node.map_arg(args, lambda n: raw.get(n, n))
    moved = packer.call(target, args, node, **kwargs)
    if isinstance(node.meta["val"], torch.Tensor):
        _dequantize_after(packer, node, moved, first)
        return
    moved.meta["val"] = [value.to(first.qparams.dtype) for value in node.meta["val"]]
    for user in list(node.users):
        part = packer.call(operator.getitem, (moved, user.args[1]), user)
        _dequantize_after(packer, user, part, first)


def _moves(node: fx.Node) -> bool:
    packet = ops.packet(node)
    if ops.namespace(node) != "aten" or packet in _UNMOVED or node.kwargs.get("dtype") is not None:
        return False
    if ops.kind(node) in _MOVES or packet in _MOVES_PACKETS:
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) or all(u.target is operator.getitem for u in node.users)
    return node.target is aten.max_pool2d.default


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _on_integers(node: fx.Node, x: Integers) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """The call that does with integers what *node* does with floats; None where there is none."""
    if node.target is aten.max_pool2d.default:
        a = ops.arguments(node)
        stride = a["stride"] or a["kernel_size"]
        value = node.meta["val"]
        if value.dim() != 4:
            return None
        sizes = [_pair(size) for size in (a["kernel_size"], stride, a["padding"], a["dilation"])]
        return kernels.max_pool2d, (a["self"], *sizes, a["ceil_mode"]), {}
    if ops.kind(node) == "pad":
        return _padding(node, x)
    return node.target, node.args, dict(node.kwargs)


def _pair(size: int | Sequence[int]) -> list[int]:
    sizes = [size] if isinstance(size, int) else list(size)
    return sizes * 2 if len(sizes) == 1 else sizes


def _padding(node: fx.Node, x: Integers) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    a = ops.arguments(node)
    if a.get("mode", "constant") != "constant":
        return None
    exact = (a["value"] or 0) / x.scale + x.zero_point
    if exact != int(exact) or not x.qparams.qmin <= exact <= x.qparams.qmax:
        return None
    return aten.constant_pad_nd.default, (a["self"], a["pad"], int(exact)), {}


def _dequantize_after(packer: Packer, node: fx.Node, moved: fx.Node, x: Integers) -> None:
    p = x.qparams
    moved.meta["val"] = node.meta["val"].to(p.dtype)
    kwargs: dict[str, Any] = {} if x.dtype == torch.float32 else {"out_dtype": x.dtype}
    floats = packer.call(DEQUANTIZE, (moved, p.scale, p.zero_point, p.qmin, p.qmax, p.dtype), node, **kwargs)
    node.replace_all_uses_with(floats)
    node.graph.erase_node(node)


def _cancel(packer: Packer, node: fx.Node) -> None:
    """Drop a quantize node whose input holds just these integers, clamped or not."""
    p = quantized(node)
    source = None if p is None else node.args[0]
    if p is None or not isinstance(source, fx.Node):
        return
    activation = ops.activation(source) if source.op == "call_function" else None
    x = integers(source)
    if x is None and activation is not None and activation[0] in ("relu", "hardtanh"):
        x = integers(source.args[0])
    if x is None or x.qparams != p:
        return
    q = x.node
    if activation is not None:
        low, high = (nearest(b, p) for b in activation[1] or (0.0, math.inf))
        if (low, high) != (p.qmin, p.qmax):
            q = packer.call(aten.clamp.default, (q, low, high), node)
    node.replace_all_uses_with(q)
    node.graph.erase_node(node)


def nearest(value: float, p: QParams) -> int:
    """What *value* is quantized to with the constant scale *p*."""
    assert isinstance(p.scale, float)
    assert isinstance(p.zero_point, int)
    return round(min(max(value / p.scale + p.zero_point, p.qmin), p.qmax))
