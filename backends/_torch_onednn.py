"""Convolutions and linears become oneDNN calls over weights that are packed once.

    fxopt.conv2d(x, w, b, r, ..., "relu")   →   mkldnn._convolution_pointwise.binary(x, r, packed(w), b, ..., "relu")
    aten.linear(x, w, b)                    →   mkldnn._linear_pointwise(x, packed(w), b, "none", [], "")

A packed convolution gives a channels_last result whatever layout it is given, so a chain of them stays in that layout.
A weight leaves the program as soon as its last user holds a packed one: the program never holds two copies of all
weights. Whatever oneDNN cannot take (computed weights, unbatched inputs, other dtypes) is left as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import fx

from fxopt import ops
from fxopt.backends._torch_memory import same_sizes
from fxopt.backends._torch_packer import Fused, Packer, hints, read
from fxopt.program import Program

aten, mkldnn = torch.ops.aten, torch.ops.mkldnn

# Below so many multiplications a plain aten::linear is done before a oneDNN call (17 µs) has found its kernel; for
# bf16, ATen's own matrix product is slow enough that oneDNN pays earlier. Measured on Zen 4, two threads, one row.
_SMALL_LINEAR = {torch.float32: 2**18, torch.bfloat16: 2**14}

# Likewise for convolutions (a oneDNN call: 28 µs), where ATen has a loop of its own: fp32, one image, no groups.
_SMALL_CONVOLUTION = 2**18

_TO_PIXELS, _TO_IMAGES = (0, 2, 3, 1), (0, 3, 1, 2)


def lower(program: Program) -> dict[str, Callable[[], torch.Tensor]]:
    """Rewrite every conv and linear of *program* that oneDNN can compute.

    Returns:
        For each weight that left the program for a packed one, what gets it back.
    """
    packer = Packer(program)
    for node in list(program.graph.nodes):
        rule = _RULES.get(ops.kind(node))
        fused = read(node) if rule is not None else None
        if rule is not None and fused is not None and packer.takes(fused):
            rule(packer, fused)
            packer.release(fused.weight)
    return packer.originals


def _convolution(packer: Packer, fused: Fused) -> None:
    if _is_pixelwise(fused):
        _pixelwise(packer, fused)
        return
    if _is_small(fused):
        spatial = (fused.stride, fused.padding, fused.dilation)
        y = packer.call(_CONVOLUTIONS[len(fused.stride)], (fused.x, fused.weight, fused.bias, *spatial), fused.node)
        packer.finish(fused, y, add=fused.residual is not None, activate=True)
        return
    if len(fused.stride) == 1:
        fused = _as_image(packer, fused)
    args = (fused.padding, fused.stride, fused.dilation, fused.groups)
    sizes = hints(fused.x)

    def pack(w: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = mkldnn._reorder_convolution_weight(w.unsqueeze(2) if w.dim() == 3 else w, *args, sizes)
        return packed

    weight = packer.constant(fused.weight, ("packed", *args, sizes), pack)
    # With groups, oneDNN's op falls back to separate ATen calls (which fail for bf16): no better than ours.
    if fused.residual is not None and fused.groups == 1 and _same(fused.residual, fused.node):
        _convolution_add(packer, fused, weight)
        return
    _unary(packer, fused, mkldnn._convolution_pointwise.default, (fused.x, weight, fused.bias, *args))


def _convolution_add(packer: Packer, fused: Fused, weight: fx.Node) -> None:
    residual = fused.residual
    assert residual is not None
    if not is_channels_last(residual):
        # With any other layout oneDNN's op falls back to separate ATen calls, which fail for bf16.
        layout = torch.channels_last if len(fused.stride) == 2 else torch.channels_last_3d
        residual = packer.call(aten.contiguous.default, (residual,), residual, fused.node, memory_format=layout)
    spatial = (fused.padding, fused.stride, fused.dilation, fused.groups)
    fits = fused.activation in ("relu", "none")  # all that oneDNN's op can do after the add
    tail = ("add", 1.0, "relu" if fused.activation == "relu" else None, (), "")
    y = packer.call(
        mkldnn._convolution_pointwise.binary,
        (fused.x, residual, weight, fused.bias, *spatial, *tail),
        fused.node,
    )
    packer.finish(fused, y, add=False, activate=not fits)


def _unary(packer: Packer, fused: Fused, target: torch._ops.OpOverload, args: tuple[object, ...]) -> None:
    """*target* with the activation in it where nothing comes between, else followed by what is missing."""
    unary = fused.unary if fused.residual is None else None
    y = packer.call(target, (*args, *(unary or ("none", (), ""))), fused.node)
    packer.finish(fused, y, add=fused.residual is not None, activate=unary is None)


def _as_image(packer: Packer, fused: Fused) -> Fused:
    """A 1-D convolution as the 2-D one over images of one row, whose result is squeezed."""

    def row(node: fx.Node) -> fx.Node:
        image = packer.call(aten.unsqueeze.default, (node, 2), node, fused.node)
        image.meta["val"] = node.meta["val"].unsqueeze(2)
        return image

    x = row(fused.x)
    residual = fused.residual
    if residual is not None and _same(residual, fused.node):
        residual = row(residual)
    inner = packer.call(fused.node.target, (), fused.node)
    inner.meta["val"] = fused.node.meta["val"].unsqueeze(2)
    fused.node.target, fused.node.args, fused.node.kwargs = aten.squeeze.dim, (inner, 2), {}
    stride, padding, dilation = (1, *fused.stride), (0, *fused.padding), (1, *fused.dilation)
    return dataclasses.replace(
        fused, node=inner, x=x, residual=residual, stride=stride, padding=padding, dilation=dilation
    )


_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


def _is_small(fused: Fused) -> bool:
    sizes, weight = hints(fused.node), fused.weight.meta["val"]
    if sizes is None or sizes[0] != 1 or fused.groups != 1 or weight.dtype != torch.float32:
        return False
    return bool(math.prod(sizes[2:]) * weight.numel() <= _SMALL_CONVOLUTION)


def _is_pixelwise(fused: Fused) -> bool:
    if len(fused.stride) != 2 or fused.groups != 1 or fused.residual is not None or any(fused.padding):
        return False
    return fused.stride == (1, 1) and tuple(fused.weight.meta["val"].shape[2:]) == (1, 1)


def _pixelwise(packer: Packer, fused: Fused) -> None:
    """conv(x, w[O, C, 1, 1])   →   permute(linear(permute(x, NHWC), w[O, C]), NCHW).

    In channels_last both permutes are free, and a linear call costs 10 µs less than a convolution. Between two such
    convolutions, and on the single pixel of squeeze-and-excitation, nothing but linears is left.
    """
    x = fused.x
    if x.target is aten.permute.default and tuple(x.args[1]) == _TO_IMAGES:  # type: ignore[arg-type]
        x = x.all_input_nodes[0]
    else:
        x = packer.call(aten.permute.default, (x, _TO_PIXELS), x, fused.node)
        x.meta["val"] = fused.x.meta["val"].permute(_TO_PIXELS)
    inner = packer.call(aten.linear.default, (), fused.node)
    inner.meta["val"] = fused.node.meta["val"].permute(_TO_PIXELS)
    fused.node.target, fused.node.args, fused.node.kwargs = aten.permute.default, (inner, _TO_IMAGES), {}
    _linear(packer, dataclasses.replace(fused, node=inner, x=x, stride=()))


def _linear(packer: Packer, fused: Fused) -> None:
    shape = hints(fused.x)
    rows = math.prod(shape[:-1]) if shape is not None else None
    matrix = fused.weight.meta["val"].flatten(1)
    if rows is not None and rows * matrix.numel() <= _SMALL_LINEAR[matrix.dtype]:
        weight = fused.weight
        if weight.meta["val"].dim() > 2:
            weight = packer.constant(weight, ("matrix",), lambda w: w.flatten(1))
        y = packer.call(aten.linear.default, (fused.x, weight, fused.bias), fused.node)
        packer.finish(fused, y, add=fused.residual is not None, activate=True)
        return
    weight = packer.constant(
        fused.weight, ("packed", rows), lambda w: mkldnn._reorder_linear_weight(w.flatten(1).contiguous(), rows)
    )
    if fused.residual is not None and _same(fused.residual, fused.node):
        args = (fused.x, fused.residual, weight, fused.bias, "add")
        y = packer.call(mkldnn._linear_pointwise.binary, args, fused.node)
        packer.finish(fused, y, add=False, activate=True)
        return
    _unary(packer, fused, mkldnn._linear_pointwise.default, (fused.x, weight, fused.bias))


def _transposed(packer: Packer, fused: Fused) -> None:
    if len(fused.stride) == 1:
        return  # oneDNN's op has no 1-D form
    args = (fused.padding, fused.output_padding, fused.stride, fused.dilation, fused.groups)
    sizes = hints(fused.x)
    weight = packer.constant(
        fused.weight,
        ("transposed", *args, sizes),
        lambda w: mkldnn._reorder_convolution_transpose_weight(w, *args, sizes),
        fused.groups,
    )
    _unary(packer, fused, mkldnn._convolution_transpose_pointwise.default, (fused.x, weight, fused.bias, *args))


_RULES = {"conv": _convolution, "conv_transpose": _transposed, "linear": _linear}


def is_channels_last(node: fx.Node) -> bool:
    """Whether *node* is a lowered convolution, whose results have that layout whatever its input has."""
    if node.target in (mkldnn._convolution_pointwise.default, mkldnn._convolution_pointwise.binary):
        return True
    return node.target is aten.permute.default and node.args[1] == _TO_IMAGES and _is_linear(node.all_input_nodes[0])


def _is_linear(node: fx.Node) -> bool:
    return node.target in (mkldnn._linear_pointwise.default, mkldnn._linear_pointwise.binary)


def _same(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return x.dtype == y.dtype and same_sizes(x, y)
