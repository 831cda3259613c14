"""Quantized programs in integer arithmetic: oneDNN's int8 convolutions and linears, and nothing but integers between.

    q ──dequantize──▶ fxopt.conv2d(·, dequantize(w int8), b, dequantize(r), "relu") ──quantize──▶ q'
                                   becomes
    q ──▶ onednn.qconv2d_pointwise.binary(q, packed w, r, b', ..., "sum", "relu") ──▶ q'

    1. values that only move are moved as integers          _torch_int8_graph
    2. convolutions and linears                             _torch_int8_units
    3. linears over floats, or over ranges found at each call   _torch_int8_linears
    4. linears with int4 weights                            _torch_int4
    5. add, mul, hardswish between integers                 _torch_int8_pointwise
    6. weights left over become floats, once; what is left quantizes and dequantizes in one pass over the data

Results agree with the reference evaluation of the graph to one quantization step: both sum in int32, the rounding of
the float that follows may differ. Without VNNI (AVX2, early AVX-512) oneDNN adds pairs of products in int16, which
saturate beyond 7-bit activations or weights; see ``saturates``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from fxopt import ops
from fxopt.backends import _torch_int4, _torch_int8_pointwise
from fxopt.backends import _torch_int8_kernels as kernels
from fxopt.backends._torch_int8_graph import integers, is_full, prepare, quantized
from fxopt.backends._torch_int8_linears import Linears
from fxopt.backends._torch_int8_packer import Int8Packer
from fxopt.backends._torch_int8_units import Units
from fxopt.program import Program
from fxopt.quantized import DEQUANTIZE, DEQUANTIZE_CHANNEL, DEQUANTIZE_GROUP, is_dequantize, is_quantize

aten = torch.ops.aten


def lower(program: Program) -> dict[str, Callable[[], torch.Tensor]]:
    """Rewrite the quantized parts of *program*; one without quantized values is left as it is.

    Returns:
        For each constant that left the program for a packed one, what gets it back.
    """
    if not any(is_quantize(node) or is_dequantize(node) for node in program.graph.nodes):
        return {}
    prepare(program)
    packer = Int8Packer(program)
    units = Units(packer)
    linears = Linears(packer, units)
    for node in list(program.graph.nodes):
        if ops.kind(node) in ("conv", "linear"):
            _ = units.lower(node) or linears.lower(node) or _torch_int4.lower(packer, node)
    for node in list(program.graph.nodes):
        if not node._erased and node.op == "call_function":
            _torch_int8_pointwise.lower(packer, node)
    packer.drop_unused()
    units.reuse_residuals()
    for node in list(program.graph.nodes):
        if node.target in (DEQUANTIZE, DEQUANTIZE_CHANNEL, DEQUANTIZE_GROUP):
            packer.dequantized(node)
        _convert_fast(packer, node)
    packer.drop_unused()
    return packer.originals


def saturates() -> bool:
    """Whether products of 8-bit numbers overflow here: uint8 activations must then stay below 128."""
    return not torch.cpu._is_vnni_supported()


def _convert_fast(packer: Int8Packer, node: fx.Node) -> None:
    """One pass over the data for what quantizes or dequantizes, where the decomposed ops take five."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_cpu:
        return
    p, x = quantized(node), integers(node)
    if p is not None and isinstance(node.args[0], fx.Node) and node.args[0].meta["val"].is_floating_point():
        fast = packer.call(kernels.quantize, (node.args[0], p.scale, p.zero_point, p.dtype), node)
        if not is_full(p):
            fast = packer.call(aten.clamp_.default, (fast, p.qmin, p.qmax), node)
    elif x is not None:
        fast = packer.call(kernels.dequantize, (x.node, x.scale, x.zero_point), node)
        if x.dtype != torch.float32:
            fast.meta["val"] = value.to(torch.float32)
            fast = packer.call(aten._to_copy.default, (fast,), node, dtype=x.dtype)
    else:
        return
    node.replace_all_uses_with(fast)
    node.graph.erase_node(node)
