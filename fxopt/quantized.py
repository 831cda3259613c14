"""The ops between floats and integers: ``quantized_decomposed``, as PyTorch's own quantization spells them.

    q = quantize_per_tensor(x, scale, zero_point, qmin, qmax, dtype)     q = clamp(round(x / scale) + zero_point)
    x ≈ dequantize_per_tensor(q, scale, zero_point, qmin, qmax, dtype)   x ≈ (q − zero_point) · scale

Importing this module registers them; no other module of fxopt touches ``torch.ao``.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch import fx

from fxopt import execute, ops

_qd = torch.ops.quantized_decomposed

QUANTIZE = _qd.quantize_per_tensor.default
QUANTIZE_TENSOR = _qd.quantize_per_tensor.tensor  # scale and zero point are computed values
QUANTIZE_CHANNEL = _qd.quantize_per_channel.default
QUANTIZE_GROUP = _qd.quantize_per_channel_group.default
DEQUANTIZE = _qd.dequantize_per_tensor.default
DEQUANTIZE_TENSOR = _qd.dequantize_per_tensor.tensor
DEQUANTIZE_CHANNEL = _qd.dequantize_per_channel.default
DEQUANTIZE_GROUP = _qd.dequantize_per_channel_group.default
CHOOSE_QPARAMS = _qd.choose_qparams.tensor

_QUANTIZES = {QUANTIZE, QUANTIZE_TENSOR, QUANTIZE_CHANNEL, QUANTIZE_GROUP}
_DEQUANTIZES = {DEQUANTIZE, DEQUANTIZE_TENSOR, DEQUANTIZE_CHANNEL, DEQUANTIZE_GROUP}


@dataclasses.dataclass(frozen=True)
class QParams:
    """How integers stand for floats.

    Attributes:
        scale: a number; a node where it is computed or one for each channel.
        zero_point: likewise; None for all zeros.
        qmin: smallest integer; ``qmax``: largest.
        dtype: of the integers.
        axis: of the channels, or None for one scale for all.
    """

    scale: float | fx.Node
    zero_point: int | fx.Node | None
    qmin: int
    qmax: int
    dtype: torch.dtype
    axis: int | None = None


def is_quantize(node: object) -> bool:
    """Whether *node* turns floats into integers."""
    return isinstance(node, fx.Node) and node.target in _QUANTIZES


def is_dequantize(node: object) -> bool:
    """Whether *node* turns integers into floats."""
    return isinstance(node, fx.Node) and node.target in _DEQUANTIZES


def parameters(node: fx.Node) -> QParams:
    """The :class:`QParams` of a quantize or dequantize node."""
    a = ops.arguments(node)
    scale = a["scale"] if "scale" in a else a["scales"]
    zero_point = a["zero_point"] if "zero_point" in a else a["zero_points"]
    return QParams(scale, zero_point, a["quant_min"], a["quant_max"], a["dtype"], a.get("axis"))


def _quantize(x: torch.Tensor, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
    """One pass over the data, where the decomposed op takes five."""
    kind = torch.quint8 if dtype is torch.uint8 else torch.qint8
    if dtype not in (torch.uint8, torch.int8) or x.dtype is not torch.float32 or not x.is_cpu:
        return QUANTIZE(x, scale, zero_point, low, high, dtype)  # type: ignore[no-any-return]
    q = torch.quantize_per_tensor(x, scale, zero_point, kind).int_repr()
    full = torch.iinfo(dtype)
    return q if (low, high) == (full.min, full.max) else q.clamp_(low, high)


def _dequantize(
    q: torch.Tensor, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype, **kwargs: Any
) -> torch.Tensor:
    if dtype not in (torch.uint8, torch.int8) or kwargs.get("out_dtype") is not None or not q.is_cpu:
        return DEQUANTIZE(q, scale, zero_point, low, high, dtype, **kwargs)  # type: ignore[no-any-return]
    return torch._make_per_tensor_quantized_tensor(q, scale, zero_point).dequantize()


def _settle_warnings() -> None:
    """PyTorch says once in a process that quantized tensors are deprecated; that is for us to know, not the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _quantize(torch.zeros(1), 1.0, 0, 0, 255, torch.uint8)


_settle_warnings()
execute.FASTER.update({QUANTIZE: _quantize, DEQUANTIZE: _dequantize})
