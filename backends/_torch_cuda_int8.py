"""Quantized linears on the int8 tensor cores of NVIDIA GPUs, through PyTorch's own ``torch._int_mm``.

    linear(dequantize(q), dequantize(w), b)    →    integer_linear(q, wᵀ, s·s_w, z, Σw, b)

    y = s·s_w·Σ w·(q − z) + b = s·s_w·(Σ w·q − z·Σ w) + b              the sums in int32, exactly

cuBLAS takes signed integers in rows of whole groups of eight, and more than sixteen of them: fewer rows are padded.
Linears that it does not take are computed in floats, from what the integers stand for, and the remarks say why.
``torch._int_mm`` gives the same integers on a CPU.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable

import torch
from torch import fx

from fxopt import ops
from fxopt.backends._torch_int8_graph import integers
from fxopt.backends._torch_int8_kernels import fresh
from fxopt.backends._torch_int8_linears import dynamic_source
from fxopt.backends._torch_int8_packer import Int8Packer, Weight, through_casts
from fxopt.backends._torch_packer import Fused, read
from fxopt.program import Program

aten = torch.ops.aten
_FEWEST_ROWS = 32  # cuBLAS wants more than 16, in steps of its own
_MULTIPLE = 8


@fresh
def integer_linear(
    q: torch.Tensor,
    weight: torch.Tensor,
    scale: float | torch.Tensor,
    zero_point: int | torch.Tensor | None,
    scales: torch.Tensor,
    sums: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """A linear over int8 *q*, [..., in], with *scale* and *zero_point* (None for zero); float32, [..., out].

    *weight*: int8, [in, out]; *scales*: float32, one for each output; *sums*: int32, of each column of the weight.
    """
    rows = q.reshape(-1, q.shape[-1])
    count = rows.shape[0]
    if count < _FEWEST_ROWS:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, _FEWEST_ROWS - count))
    y = torch._int_mm(rows.contiguous(), weight)[:count]
    if zero_point is not None:
        y = y - zero_point * sums
    result = y * (scales * scale)
    if bias is not None:
        result += bias
    return result.reshape(*q.shape[:-1], weight.shape[1])


@fresh
def quantize_dynamic(
    x: torch.Tensor, low: int, high: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """*x* over its own range, as ``choose_qparams`` has it: int8 integers, scale, zero point; all on the device."""
    x = x.float()
    smallest, largest = torch.aminmax(x)
    bottom, top = smallest.clamp(max=0), largest.clamp(min=0)
    scale = ((top - bottom) / (high - low)).clamp(min=eps)
    zero_point = (low - (bottom / scale).round()).clamp(low, high)
    q = ((x / scale).round() + zero_point).clamp(low, high).to(torch.int8)
    return q, scale, zero_point.int()


def lower(program: Program, device: str) -> tuple[dict[str, Callable[[], torch.Tensor]], list[str]]:
    """Rewrite the quantized linears of *program*, whose tensors lie on *device*, that ``torch._int_mm`` takes.

    Returns:
        For each weight that left the program, what gets it back; and remarks.
    """
    packer = Int8Packer(program, device)
    dynamic: dict[fx.Node, tuple[fx.Node, ...]] = {}
    count, left = 0, Counter[str]()
    for node in list(program.graph.nodes):
        fused = read(node) if ops.kind(node) in ("conv", "linear") else None
        weight = None if fused is None else packer.weight(fused.weight)
        if fused is None or weight is None:
            continue
        reason = _refusal(fused, weight, device)
        if reason:
            left[reason] += 1
            continue
        _replace(packer, fused, weight, device, dynamic)
        count += 1
    packer.drop_unused()
    notes = [f"int8: {count} linears on integer tensor cores"] if count else []
    return packer.originals, notes + [f"int8: in floats, {n} ×: {reason}" for reason, n in left.items()]


def _refusal(fused: Fused, weight: Weight, device: str) -> str:
    """Why the kernel does not take *fused*; "" where it does."""
    if ops.kind(fused.node) != "linear" or weight.values.dim() != 2:
        return "a convolution: PyTorch has an int8 kernel for matrices alone"
    if weight.values.shape[0] % _MULTIPLE or weight.values.shape[1] % _MULTIPLE:
        sizes = " × ".join(map(str, weight.values.shape))
        return f"{sizes}: sizes must be multiples of {_MULTIPLE}"
    known, found = integers(through_casts(fused.x), device), dynamic_source(fused.x, device)
    if known is None and found is None:
        return "its activations are not quantized"
    dtype = known.qparams.dtype if known is not None else found[2] if found is not None else None
    return "" if dtype == torch.int8 else f"its activations are {dtype}, not int8"


def _replace(
    packer: Int8Packer, fused: Fused, weight: Weight, device: str, dynamic: dict[fx.Node, tuple[fx.Node, ...]]
) -> None:
    known = integers(through_casts(fused.x), device)
    if known is not None:
        q, scale, zero_point = known.node, known.scale, known.zero_point or None
    else:
        q, scale, zero_point = _quantized_at_call(packer, fused, device, dynamic)  # type: ignore[assignment]
    holder, name = weight.holder, str(weight.holder.target)
    turned = packer.constant(holder, ("int_mm",), lambda w: w.contiguous().t())
    packer.originals[name] = functools.partial(_turned_back, packer.program, str(turned.target))
    sums = packer.add(f"{name}_sums", weight.values.sum(1, dtype=torch.int32))
    bias = None if fused.bias is None else through_casts(fused.bias)
    args = (q, turned, scale, zero_point, packer.scales(weight), sums, bias)
    y = packer.call(integer_linear, args, fused.node)
    value = fused.node.meta["val"]
    if value.dtype != torch.float32:
        y.meta["val"] = value.float()
        y = packer.call(aten._to_copy.default, (y,), fused.node, dtype=value.dtype)
    packer.finish(fused, y, add=fused.residual is not None, activate=True)


def _turned_back(program: Program, name: str) -> torch.Tensor:
    weight: torch.Tensor = program.constants[name]
    return weight.t().contiguous()


def _quantized_at_call(
    packer: Int8Packer, fused: Fused, device: str, dynamic: dict[fx.Node, tuple[fx.Node, ...]]
) -> tuple[fx.Node, ...]:
    """Integers, scale and zero point of the input of *fused*, found at each call, once for all that read it."""
    found, dequantize = dynamic_source(fused.x, device), through_casts(fused.x)
    assert found is not None
    if dequantize not in dynamic:
        x, choice, dtype = found
        call = packer.call(quantize_dynamic, (x, *choice), x, dequantize)
        parts = [packer.call(operator.getitem, (call, i), x, dequantize) for i in range(3)]
        parts[0].meta["val"] = x.meta["val"].to(dtype)
        for part in (call, *parts[1:]):
            del part.meta["val"]
        dynamic[dequantize] = tuple(parts)
    return dynamic[dequantize]
