"""Convolutions and linears in int8: one oneDNN call each, with the residual, the activation and the quantization in it.

    conv2d(dequantize(q), dequantize(w), b)       →  onednn.qconv_pointwise(q, packed w, b', ...)
    the same with a residual r                    →  onednn.qconv2d_pointwise.binary(q, packed w, r, b', "sum", ...)
    linear, and some pixelwise convolutions       →  onednn.qlinear_pointwise(.binary)

"sum" writes over the residual: it gets a copy of it, unless the residual dies there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxopt.backends import _torch_int8_kernels as kernels
from fxopt.backends._torch_int8_graph import Integers, integers
from fxopt.backends._torch_int8_packer import Int8Packer, Weight, through_casts
from fxopt.backends._torch_int8_plan import Plan, plan, result_sizes_agree, runs_as_linear
from fxopt.backends._torch_int8_worth import is_tiny
from fxopt.backends._torch_memory import Aliases
from fxopt.backends._torch_packer import Fused, hints, read
from fxopt.program import ORIGIN
from fxopt.quantized import DEQUANTIZE

aten, onednn = torch.ops.aten, torch.ops.onednn
_TO_PIXELS, _TO_IMAGES = (0, 2, 3, 1), (0, 3, 1, 2)
_FLOATS = (torch.float32, torch.bfloat16)
_CONVOLUTIONS = (onednn.qconv_pointwise.default, onednn.qconv2d_pointwise.binary)
_LINEARS = (onednn.qlinear_pointwise.default, onednn.qlinear_pointwise.binary)


class Units:
    """Lowers one conv or linear after the other."""

    def __init__(self, packer: Int8Packer) -> None:
        self._packer = packer
        self._call = packer.call
        self._copies: set[fx.Node] = set()
        self._with_border: dict[tuple[fx.Node, tuple[int, ...], int], fx.Node] = {}

    def lower(self, node: fx.Node) -> bool:
        """Turn *node* into an int8 call, if it is one in all but name; returns whether it is."""
        fused = read(node)
        x = None if fused is None else integers(through_casts(fused.x))
        weight = None if fused is None else self._packer.weight(fused.weight)
        if fused is None or x is None or weight is None or not _fits(fused, x) or is_tiny(fused):
            return False
        bias = None if fused.bias is None else self._packer.tensor(through_casts(fused.bias))
        if fused.bias is not None and bias is None:
            return False
        what = plan(fused)
        what.end.meta[ORIGIN] = fused.node.meta.get(ORIGIN, "")  # what replaces it is the work of the layer
        fused.bias = self._packer.folded_bias(weight, fused.bias, x.scale, x.zero_point)
        if not fused.stride:
            y = self.linear(fused, (x.node, x.scale, 0), weight, what)
        elif runs_as_linear(fused):
            y = self._pixelwise(fused, x, weight, what)
        else:
            y = self._convolution(fused, x, weight, what)
        self.finish(fused, y, what)
        return True

    def reuse_residuals(self) -> None:
        """Drop the copies of residuals that die where they are added to: the kernel may write over them."""
        aliases = Aliases(self._packer.graph)
        for node in list(self._packer.graph.nodes):
            aliases.add(node, _overwritten(node))
            if node in self._copies:
                (source,) = node.all_input_nodes
                images = node.kwargs["memory_format"] is torch.channels_last
                if _is_dense(source, images) and aliases.is_free(source, node):
                    node.replace_all_uses_with(source)
                    self._packer.graph.erase_node(node)

    def _convolution(self, fused: Fused, x: Integers, weight: Weight, what: Plan) -> fx.Node:
        before, q, padding = what.end, x.node, fused.padding
        if x.zero_point and any(padding):
            q, padding = self._padded(x, padding), (0,) * len(padding)
        stride, dilation = fused.stride, fused.dilation
        if len(fused.stride) == 1:
            image = self._call(aten.unsqueeze.default, (q, 2), q, before)
            image.meta["val"] = q.meta["val"].unsqueeze(2)
            q, stride, padding, dilation = image, (1, *stride), (0, *padding), (1, *dilation)
        spatial = (stride, padding, dilation, fused.groups)
        packed = self._packer.convolution(weight, *spatial, hints(q))
        head: tuple[Any, ...] = (q, x.scale, 0, packed, self._packer.scales(weight), self._packer.zeros())
        tail: tuple[Any, ...] = (fused.bias, *spatial, what.scale, what.zero_point, what.dtype)
        if what.residual is not None:
            accumulator = self._copy(what.residual, torch.channels_last, before)
            tail = (accumulator, *tail, *what.residual_scale, "sum", 1.0, *what.unary)
            return self._call(onednn.qconv2d_pointwise.binary, (*head, *tail), before)
        y = self._call(onednn.qconv_pointwise.default, (*head, *tail, *what.unary), before)
        if len(fused.stride) == 1:
            y.meta["val"] = before.meta["val"].unsqueeze(2)
            y = self._call(aten.squeeze.dim, (y, 2), before)
        return y

    def linear(self, fused: Fused, x: tuple[fx.Node, Any, Any], weight: Weight, what: Plan) -> fx.Node:
        """The linear of *x* (integers, scale, zero point: numbers or nodes)."""
        packed = self._packer.linear(weight, hints(x[0]))
        head: tuple[Any, ...] = (*x, packed, self._packer.scales(weight), self._packer.zeros())
        tail: tuple[Any, ...] = (fused.bias, what.scale, what.zero_point, what.dtype)
        if what.residual is None:
            return self._call(onednn.qlinear_pointwise.default, (*head, *tail, *what.unary), what.end)
        residual = what.residual
        if what.how == "sum" and fused.stride == ():
            residual = self._copy(residual, torch.contiguous_format, what.end)
        elif what.how == "add":
            # The kernel reads it as if it were contiguous.
            residual = self._call(aten.contiguous.default, (residual,), residual, what.end)
        tail = (residual, *tail, *what.residual_scale, what.how, 1.0, *what.unary)
        return self._call(onednn.qlinear_pointwise.binary, (*head, *tail), what.end)

    def _pixelwise(self, fused: Fused, x: Integers, weight: Weight, what: Plan) -> fx.Node:
        """A convolution of one pixel at a time is a linear over the pixels; its call with a residual is shorter."""

        def pixels(node: fx.Node) -> fx.Node:
            rows = self._call(aten.permute.default, (node, _TO_PIXELS), node, what.end)
            rows.meta["val"] = node.meta["val"].permute(_TO_PIXELS)
            return rows

        residual = what.residual
        if residual is not None:
            if what.how == "sum":
                residual = self._copy(residual, torch.channels_last, what.end)
            residual = pixels(residual)
        what = dataclasses.replace(what, residual=residual)
        y = self.linear(fused, (pixels(x.node), x.scale, 0), weight, what)
        y.meta["val"] = y.meta["val"].permute(_TO_PIXELS)
        return self._call(aten.permute.default, (y, _TO_IMAGES), what.end)

    def _padded(self, x: Integers, padding: Sequence[int]) -> fx.Node:
        """Zero is not the integer zero here; a copy with a border costs far less than the kernel's compensation."""
        borders = tuple(p for pad in reversed(padding) for p in (pad, pad))
        key = (x.node, borders, x.zero_point)
        if key not in self._with_border:
            q = self._call(aten.constant_pad_nd.default, key, x.node, _behind(x.node))
            q.meta["val"] = aten.constant_pad_nd.default(x.node.meta["val"], borders, x.zero_point)
            self._with_border[key] = q
        return self._with_border[key]

    def _copy(self, value: fx.Node, layout: torch.memory_format, before: fx.Node) -> fx.Node:
        copy = self._call(aten.clone.default, (value,), value, before, memory_format=layout)
        self._copies.add(copy)
        return copy

    def finish(self, fused: Fused, y: fx.Node, what: Plan) -> None:
        """Do after the kernel what it did not, and let the readers of the unit read that."""
        if what.end is not fused.node:
            y.meta["val"] = y.meta["val"] if what.clamp is None else what.end.meta["val"]
            if what.clamp is not None:
                y = self._call(aten.clamp.default, (y, *what.clamp), what.end)
            what.end.replace_all_uses_with(y)
            self._packer.graph.erase_node(what.end)
            return
        left = dataclasses.replace(fused, residual=what.add)
        self._packer.finish(left, y, add=what.add is not None, activate=what.activate)


def _behind(node: fx.Node) -> fx.Node:
    """The first call behind *node*, whose value it may read."""
    node = node.next
    while node.op in ("placeholder", "get_attr"):
        node = node.next
    return node


def _fits(fused: Fused, x: Integers) -> bool:
    """Whether the kernels can compute the unit: batched unsigned input, floats that they can give."""
    sizes, dims = x.node.meta["val"].dim(), fused.weight.meta["val"].dim()
    if x.qparams.dtype != torch.uint8 or fused.node.meta["val"].dtype not in _FLOATS or fused.output_padding:
        return False
    if sizes != dims if fused.stride else (dims != 2 or sizes < 2):
        return False
    return result_sizes_agree(fused)


def _overwritten(node: fx.Node) -> fx.Node | None:
    """The argument that *node* adds to in place."""
    target = node.target
    if target is onednn.qconv2d_pointwise.binary or (target is _LINEARS[1] and "sum" in node.args):
        residual = node.args[6]
        assert isinstance(residual, fx.Node)
        return residual
    return None


def _is_dense(node: fx.Node, images: bool) -> bool:
    """Whether *node* surely lies in memory as channels_last (*images*) or contiguously."""
    if node.target is DEQUANTIZE or node.target is aten.clamp.default:
        return _is_dense(node.all_input_nodes[0], images)
    if not images:
        return node.target in _LINEARS
    if node.target is kernels.max_pool2d:
        return _is_dense(node.all_input_nodes[0], images)
    if node.target is aten.permute.default and tuple(node.args[1]) == _TO_IMAGES:  # type: ignore[arg-type]
        return node.all_input_nodes[0].target in _LINEARS
    return node.target in _CONVOLUTIONS and node.meta["val"].dim() == 4
