"""Linears with int4 weights in groups, on the kernel that PyTorch ships for them; weights take half a byte.

    linear(x, dequantize_per_channel_group(w int4, s), b)   →   _weight_int4pack_mm_for_cpu(x, packed w, s) + b

The kernel is fast in bfloat16 alone, so float32 activations are rounded to it, and so are results: 60 dB, where int4
weights leave about 20. Zen 4, 4096 × 4096, in ms: 1 row 0.4 (bf16 weights 1.5, float32 3.2); 16 rows 3.1 (2.3, 7.8);
128 rows 27 (12, 33). In float32 the kernel itself takes 14 for one row, in float16 15.
"""

from __future__ import annotations

import functools

import torch
from torch import fx

from fxopt import ops
from fxopt.backends._torch_int8_kernels import fresh
from fxopt.backends._torch_int8_packer import Int8Packer, through_casts
from fxopt.backends._torch_packer import read
from fxopt.quantized import DEQUANTIZE_GROUP

_pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default
_multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default
_GROUPS = (32, 64, 128, 256)
_OUTPUTS = 16  # a multiple of it
_ZERO = 8  # what the kernel subtracts from a nibble


def lower(packer: Int8Packer, node: fx.Node) -> bool:
    """Turn the linear *node* into a call of the kernel, if its weight is int4 and fits; returns whether it is one."""
    fused = read(node)
    dequantize = None if fused is None else through_casts(fused.weight)
    if fused is None or dequantize is None or dequantize.target is not DEQUANTIZE_GROUP:
        return False
    a = ops.arguments(dequantize)
    values, scales, zeros = (packer.tensor(a[name]) for name in ("input", "scales", "zero_points"))
    group, dtype = a["group_size"], fused.x.meta["val"].dtype
    if values is None or scales is None or zeros is None or bool(zeros.any()) or not values.is_cpu:
        return False
    if group not in _GROUPS or len(values) % _OUTPUTS or dtype not in (torch.float32, torch.bfloat16):
        return False
    if int(values.min()) < -_ZERO or int(values.max()) >= _ZERO:
        return False
    weight = packer.constant(a["input"], ("int4",), lambda w: _pack((w + _ZERO).int().contiguous(), 1))
    packed = packer.program.constants[str(weight.target)]
    packer.originals[str(a["input"].target)] = functools.partial(_unpacked, packed, values.shape, group)
    pairs = torch.stack([scales.T, torch.zeros_like(scales.T)], -1).bfloat16().contiguous()
    y = packer.call(linear, (fused.x, weight, group, packer.add(f"{a['scales'].target}_pairs", pairs)), node)
    if fused.bias is not None:
        y = packer.call(torch.ops.aten.add.Tensor, (y, fused.bias), node)
    packer.finish(fused, y, add=fused.residual is not None, activate=True)
    return True


@fresh
def linear(x: torch.Tensor, weight: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
    """*x* times a packed *weight*, computed in bfloat16; the result has the dtype of *x*."""
    rows = x.reshape(-1, x.shape[-1]).bfloat16().contiguous()
    y = _multiply(rows, weight, group, scales) if len(rows) else rows.new_zeros(0, len(weight))
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def _unpacked(packed: torch.Tensor, shape: torch.Size, group: int) -> torch.Tensor:
    """The integers behind *packed*: what unit vectors are multiplied to, exact in bfloat16."""
    ones = torch.zeros(shape[1] // group, shape[0], 2, dtype=torch.bfloat16)
    ones[..., 0] = 1
    rows = torch.eye(shape[1], dtype=torch.bfloat16).split(1024)
    return torch.cat([_multiply(part, packed, group, ones) for part in rows]).T.to(torch.int8).contiguous()
