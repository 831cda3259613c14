"""Linears whose activations have no constant scale: ranges found at each call, or activations that stay floats.

    linear(dequantize(quantize(x, choose_qparams(x))), w int8)
        few rows    →  quantized.linear_dynamic(x, packed)                           23 µs where oneDNN takes 57
        more rows   →  q, scale, zero point = quantize_dynamic(x); onednn.qlinear_pointwise(q, ...)
    linear(x, w int8)
        bf16, few rows  →  aten._weight_int8pack_mm                                  20 µs where bf16 takes 33
        otherwise       →  x as two planes of 8 bits, one onednn.qlinear_pointwise over both

Of the kernels for int8 weights and float activations that PyTorch ships, the float32 one takes 0.24 ms for one row of
768 × 768 (float32 weights: 0.05) and 31 ms for 128 rows (0.7). The two planes hold 16 bits of each activation: more
than a float's product with an 8-bit weight needs to agree to 1e-4, at the speed of integers and an eighth of the bytes.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from fxopt import ops
from fxopt.backends import _torch_int8_kernels as kernels
from fxopt.backends._torch_int8_graph import is_on
from fxopt.backends._torch_int8_packer import Int8Packer, Weight, through_casts
from fxopt.backends._torch_int8_plan import plan
from fxopt.backends._torch_int8_units import Units
from fxopt.backends._torch_packer import Fused, hints, read
from fxopt.program import ORIGIN
from fxopt.quantized import CHOOSE_QPARAMS, DEQUANTIZE_TENSOR, QUANTIZE_TENSOR, parameters

aten = torch.ops.aten
_FEW_ROWS = 32  # from here on the kernel that quantizes by itself is the slower one
_FEW_ROWS_BF16 = 4
_LARGE = 2**20  # weights below are dequantized for good: reading them as floats costs less than the integer way
_SHIFT = {torch.uint8: 0, torch.int8: 128}


class Linears:
    """Lowers one linear after the other."""

    def __init__(self, packer: Int8Packer, units: Units) -> None:
        self._packer, self._units = packer, units
        self._quantized: dict[fx.Node, tuple[fx.Node, ...]] = {}

    def lower(self, node: fx.Node) -> bool:
        """Turn *node* into a call that reads its int8 weight; returns whether it is one."""
        fused = read(node)
        weight = None if fused is None else self._packer.weight(fused.weight)
        if fused is None or weight is None or fused.weight.meta["val"].dim() != 2 or fused.x.meta["val"].dim() < 2:
            return False
        if fused.bias is not None and self._packer.tensor(through_casts(fused.bias)) is None:
            return False
        source = dynamic_source(fused.x)
        if source is not None:
            x, (low, high, eps), dtype = source
            self._dynamic(fused, weight, x, (low + _SHIFT[dtype], high + _SHIFT[dtype], eps))
            return True
        return fused.x.meta["val"].dtype in (torch.float32, torch.bfloat16) and self._weight_only(fused, weight)

    def _dynamic(self, fused: Fused, weight: Weight, x: fx.Node, choice: tuple[int, int, float]) -> None:
        rows = _rows(fused)
        if rows is not None and rows < _FEW_ROWS and choice[:2] == (0, 255):
            bias = None if fused.bias is None else self._packer.tensor(through_casts(fused.bias))
            packed = self._packer.dynamic_linear(weight, bias)
            self._in_floats(fused, kernels.linear_dynamic, (x, packed))
            return
        dequantize = through_casts(fused.x)
        if dequantize not in self._quantized:
            call = self._packer.call(kernels.quantize_dynamic, (x, *choice), x, dequantize)
            parts = [self._packer.call(operator.getitem, (call, i), x, dequantize) for i in range(3)]
            parts[0].meta["val"] = x.meta["val"].to(torch.uint8)
            for part in (call, *parts[1:]):
                del part.meta["val"]
            self._quantized[dequantize] = tuple(parts)
        q, scale, zero_point = self._quantized[dequantize]
        fused.bias = self._packer.folded_bias(weight, fused.bias, 1.0, 0)
        what = plan(fused)
        what.end.meta[ORIGIN] = fused.node.meta.get(ORIGIN, "")
        y = self._units.linear(fused, (q, scale, zero_point), weight, what)
        self._units.finish(fused, y, what)

    def _weight_only(self, fused: Fused, weight: Weight) -> bool:
        rows = _rows(fused)
        outputs, inputs = weight.values.shape
        # The kernel reads past the end of other sizes, and crashes or gives infinities.
        fits = fused.x.meta["val"].dim() == 2 and inputs % 16 == 0 and outputs % 4 == 0
        low = fused.x.meta["val"].dtype == torch.bfloat16
        if fits and low and rows is not None and rows <= _FEW_ROWS_BF16:
            scales = self._packer.add(f"{weight.holder.target}_scales", weight.scales.bfloat16())
            y = self._packer.call(aten._weight_int8pack_mm.default, (fused.x, weight.holder, scales), fused.node)
            self._add_bias(fused, y)
            return True
        if weight.values.numel() < _LARGE:
            return False
        packed = self._packer.linear(weight, None)
        args = (fused.x, packed, self._packer.scales(weight), self._packer.zeros())
        self._in_floats(fused, kernels.linear_by_planes, args, bias=True)
        return True

    def _in_floats(self, fused: Fused, function: Any, args: tuple[Any, ...], *, bias: bool = False) -> None:
        """A call whose result is float32, before what is left of the unit."""
        y = self._packer.call(function, args, fused.node)
        value = fused.node.meta["val"]
        if value.dtype != torch.float32:
            y.meta["val"] = value.float()
            y = self._packer.call(aten._to_copy.default, (y,), fused.node, dtype=value.dtype)
        if bias:
            self._add_bias(fused, y)
        else:
            self._packer.finish(fused, y, add=fused.residual is not None, activate=True)

    def _add_bias(self, fused: Fused, y: fx.Node) -> None:
        if fused.bias is not None:
            y = self._packer.call(aten.add.Tensor, (y, fused.bias), fused.node)
        self._packer.finish(fused, y, add=fused.residual is not None, activate=True)


def _rows(fused: Fused) -> int | None:
    sizes = hints(fused.x)
    return None if sizes is None else math.prod(sizes[:-1])


def dynamic_source(node: fx.Node, device: str = "cpu") -> tuple[fx.Node, tuple[int, int, float], torch.dtype] | None:
    """The floats on *device* that *node* quantizes over their own range, how, and to which dtype; None for others.

    How: the smallest and largest integer, the smallest scale.
    """
    dequantize = through_casts(node)
    if dequantize.target is not DEQUANTIZE_TENSOR:
        return None
    quantize, p = dequantize.all_input_nodes[0], parameters(dequantize)
    if quantize.target is not QUANTIZE_TENSOR or parameters(quantize) != p or p.dtype not in _SHIFT:
        return None
    x, choice = quantize.all_input_nodes[0], _part(p.scale, 0)
    if choice is None or choice is not _part(p.zero_point, 1) or choice.args[0] is not x:
        return None
    a = ops.arguments(choice)
    if (a["quant_min"], a["quant_max"], a["dtype"]) != (p.qmin, p.qmax, p.dtype) or not is_on(x, device):
        return None
    return x, (p.qmin, p.qmax, a["eps"]), p.dtype


def _part(value: object, index: int) -> fx.Node | None:
    """The call that chooses scale and zero point, of which *value* is the part *index*."""
    if not isinstance(value, fx.Node) or value.target is not operator.getitem or value.args[1] != index:
        return None
    source = value.all_input_nodes[0]
    return source if source.target is CHOOSE_QPARAMS else None
