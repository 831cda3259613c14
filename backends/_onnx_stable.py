"""Formulas for ops whose own ONNX translation is inaccurate, overflows, or is wrong for some arguments.

    log1p(x)           u = 1 + x;  x where u = 1 or x = inf, else log(u)·(x / (u - 1))   (Kahan; Higham 2002, 1.14)
    expm1(x)           tanh(x / 2)·(exp(x) + 1)
    logsigmoid(x)      min(x, 0) - log1p(exp(-|x|))
    logaddexp(a, b)    max(a, b) + log1p(exp(-|a - b|)), with a difference of 0 where a = b, infinities among them
    logcumsumexp(x)    y ← logaddexp(y, y shifted by s) for s = 1, 2, 4, ...       (Hillis and Steele 1986)
    a // b of floats   (a - fmod(a, b)) / b, less 1 where the remainder and b differ in sign, rounded
    trunc(a / b)       of ints: Div of ONNX, which truncates; fmod(a, b) = a - trunc(a / b)·b
    diagonal(x)        gather of the places i·(width + 1) + offset of the rows one after another
    scatter "mean"     sum / number of summands
    scatter "amax"     without self: what is written to becomes -inf first ("amin": inf)
    pooling            in _onnx_pooling

Each function takes the arguments of its op and computes with torch, traced in place of the op. NotImplemented leaves
a call to the exporter's own translation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxopt.backends._onnx_pooling import avg_pool, max_pool

if TYPE_CHECKING:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

aten = torch.ops.aten
Size = int | torch.SymInt

_library = torch.library.Library("fxopt", "FRAGMENT")
_library.define("integer_divide(Tensor a, Tensor b) -> Tensor")


def _quotient_shape(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(torch.broadcast_shapes(a.shape, b.shape))


torch.library.register_fake("fxopt::integer_divide", _quotient_shape, lib=_library)


def _integer_divide(a: Any, b: Any) -> Any:
    from onnxscript import opset18 as op

    return op.Div(a, b)


def register(registry: ONNXRegistry) -> None:
    """Add the translations of the ops that the formulas have of their own to *registry*."""
    registry.register_op(torch.ops.fxopt.integer_divide.default, _integer_divide)


def log1p(x: Tensor) -> Any:
    """The logarithm of 1 + *x*, to the last bits for small *x* too."""
    x = _real(x)
    u = 1 + x
    plain = torch.logical_or(u == 1, x == math.inf)
    return torch.where(plain, x, torch.log(u) * (x / torch.where(plain, 1.0, u - 1)))


def expm1(x: Tensor) -> Any:
    """exp(x) - 1, to the last bits for small *x* too."""
    x = _real(x)
    return torch.tanh(x / 2) * (torch.exp(x) + 1)


def log_sigmoid(x: Tensor) -> Any:
    """log(sigmoid(x)), which is about *x* far below 0."""
    return -torch.relu(-x) - log1p(torch.exp(-x.abs()))


def log_sigmoid_forward(x: Tensor) -> Any:
    """logsigmoid, and the buffer for a backward pass that never comes."""
    return log_sigmoid(x), torch.zeros_like(x)


def logaddexp(a: Tensor, b: Tensor) -> Any:
    """log(exp(a) + exp(b))."""
    return torch.maximum(a, b) + log1p(torch.exp(_difference(a, b)))


def logaddexp2(a: Tensor, b: Tensor) -> Any:
    """log2(2^a + 2^b)."""
    return torch.maximum(a, b) + log1p(torch.exp(_difference(a, b) * math.log(2))) / math.log(2)


def _difference(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a == b, 0.0, -(a - b).abs())


def logcumsumexp(x: Tensor, dim: int) -> Any:
    """log(cumsum(exp(x))).

    Raises:
        NotImplementedError: the size is not known, nor how many steps it takes.
    """
    x = _real(x)
    if x.dim() == 0:
        return x.clone()
    size, shift = x.shape[dim], 1
    if not isinstance(size, int):
        raise NotImplementedError("logcumsumexp over a dynamic size")
    while shift < size:
        before = torch.full_like(x.narrow(dim, 0, shift), -math.inf)
        x = logaddexp(x, torch.cat([before, x.narrow(dim, 0, size - shift)], dim))
        shift *= 2
    return x


def divide(a: Tensor, b: Any, *, rounding_mode: str | None = None) -> Any:
    """A quotient with a rounding mode, exact for integers of any size."""
    if rounding_mode == "floor":
        return aten.floor_divide.default(*_alike(a, b))
    if rounding_mode is None or torch.result_type(a, b).is_floating_point:
        return NotImplemented
    return torch.ops.fxopt.integer_divide.default(*_alike(a, b))


def floor_divide(a: Tensor, b: Any) -> Any:
    """The quotient rounded down; of floats as eager computes it, from the remainder."""
    a, b = _alike(a, b)
    if not a.is_floating_point():
        return NotImplemented
    rest = _fmod(a, b)
    down = torch.logical_and(rest != 0, torch.logical_xor(rest < 0, b < 0))
    quotient = (a - rest) / b - down.to(a.dtype)
    whole = torch.floor(quotient)
    whole = whole + (quotient - whole > 0.5).to(a.dtype)
    return torch.where(b == 0, a / b, whole)


def _fmod(a: Tensor, b: Tensor) -> Tensor:
    """fmod, which of a finite number and an infinite one is the first: an engine may take it for inf·0."""
    plain = torch.logical_and(b.abs() == math.inf, a.abs() != math.inf)
    return torch.where(plain, a, aten.fmod.Tensor(a, torch.where(plain, 1.0, b)))


def fmod(a: Tensor, b: Any) -> Any:
    """The remainder with the sign of *a*, exact for integers of any size."""
    a, b = _alike(a, b)
    return NotImplemented if a.is_floating_point() else a - torch.ops.fxopt.integer_divide.default(a, b) * b


def remainder(a: Any, b: Any) -> Any:
    """The remainder with the sign of *b*; of integers left to the exporter, which knows no dynamic size as *b*."""
    size = isinstance(b, torch.SymInt)
    a, b = _alike(a, b)
    if not a.is_floating_point():
        return aten.remainder.Tensor(a, b) if size else NotImplemented
    rest = _fmod(a, b)
    other = torch.logical_and(rest != 0, torch.logical_xor(rest < 0, b < 0))
    return torch.where(other, rest + b, rest)


def _alike(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Both as tensors of the dtype of their result."""
    dtype = torch.result_type(a, b)
    x, y = (v.to(dtype) if isinstance(v, Tensor) else torch.full((), v, dtype=dtype) for v in (a, b))
    return x, y


def diagonal(x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    """The diagonal of two dimensions as the last one."""
    if (dim1 % x.dim(), dim2 % x.dim()) != (x.dim() - 2, x.dim() - 1):
        x = x.movedim((dim1, dim2), (-2, -1))
    row, column, width = max(-offset, 0), max(offset, 0), x.shape[-1]
    size = _least(x.shape[-2] - row, width - column)
    if isinstance(size, int) and size <= 0:
        return NotImplemented
    places = torch.arange(size) * (width + 1) + (row * width + column)
    return torch.index_select(x.flatten(-2), -1, places)


def linalg_diagonal(x: Tensor, *, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Any:
    """diagonal, of the last two dimensions where nothing is said."""
    return diagonal(x, offset, dim1, dim2)


def diag(x: Tensor, diagonal: int = 0) -> Any:
    """The diagonal of a matrix, or the matrix with a diagonal."""
    return torch.diag_embed(x, diagonal) if x.dim() == 1 else aten.diagonal.default(x, diagonal)


def trace(x: Tensor) -> Any:
    """The sum of the diagonal."""
    return aten.diagonal.default(x).sum()


def scatter_reduce(x: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True) -> Any:
    """scatter_reduce with "mean", or with an extreme that leaves self out."""
    if x.dim() == 0:
        return NotImplemented
    if reduce == "mean":
        total = aten.scatter_reduce.two(x, dim, index, src, "sum", include_self=include_self)
        count = (torch.ones_like if include_self else torch.zeros_like)(x)
        count = torch.scatter_add(count, dim, index, torch.ones_like(src))
        count = torch.clamp_min(count, 1)
        return total / count if x.is_floating_point() else torch.div(total, count, rounding_mode="floor")
    if reduce in ("amax", "amin") and not include_self:
        lowest = reduce == "amax"
        if x.is_floating_point():
            start = -math.inf if lowest else math.inf
        else:
            start = torch.iinfo(x.dtype).min if lowest else torch.iinfo(x.dtype).max
        x = torch.scatter(x, dim, index, torch.full_like(src, start))
        return aten.scatter_reduce.two(x, dim, index, src, reduce, include_self=True)
    return NotImplemented


def clamp(x: Tensor, min: float | None = None, max: float | None = None) -> Any:  # noqa: A002 - the op's own names
    """A clamp in the dtype of the result; with one bound only, infinities pass the other side, unlike in Clip."""
    dtype = x.dtype
    for bound in (min, max):
        dtype = torch.promote_types(dtype, torch.result_type(x, bound)) if bound is not None else dtype
    if min is None or max is None:
        side, bound = (torch.maximum, min) if max is None else (torch.minimum, max)
        return side(x.to(dtype), torch.full((), bound or 0, dtype=dtype))
    return NotImplemented if dtype is x.dtype else aten.clamp.default(x.to(dtype), float(min), float(max))


def clamp_min(x: Tensor, min: float) -> Any:  # noqa: A002
    """A clamp without an upper bound."""
    return clamp(x, min, None)


def clamp_max(x: Tensor, max: float) -> Any:  # noqa: A002
    """A clamp without a lower bound."""
    return clamp(x, None, max)


def reversed_subtract(x: Tensor, other: Any, alpha: float = 1) -> Any:
    """The difference other - alpha·x, in the dtype of the result."""
    x, other = _alike(x, other)
    return other - (x if alpha == 1 else x * alpha)


def chunk(x: Tensor, chunks: int, dim: int = 0) -> Any:
    """Chunks as slices, the last of which may be shorter. A size that is not known is left to the exporter."""
    size = x.shape[dim]
    if not isinstance(size, int) or size % chunks == 0:
        return NotImplemented
    step = -(-size // chunks)
    return [x.narrow(dim, start, min(step, size - start)) for start in range(0, size, step)]


def _least(a: Size, b: Size) -> Any:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else torch.sym_min(a, b)


def _real(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


FORMULAS: dict[Any, Callable[..., Any]] = {
    aten.log1p.default: log1p,
    aten.special_log1p.default: log1p,
    aten.expm1.default: expm1,
    aten.special_expm1.default: expm1,
    aten.log_sigmoid.default: log_sigmoid,
    aten.log_sigmoid_forward.default: log_sigmoid_forward,
    aten.logaddexp.default: logaddexp,
    aten.logaddexp2.default: logaddexp2,
    aten.logcumsumexp.default: logcumsumexp,
    aten.div.Tensor_mode: divide,
    aten.div.Scalar_mode: divide,
    aten.floor_divide.default: floor_divide,
    aten.floor_divide.Scalar: floor_divide,
    aten.fmod.Tensor: fmod,
    aten.fmod.Scalar: fmod,
    aten.remainder.Tensor: remainder,
    aten.remainder.Scalar: remainder,
    aten.diagonal.default: diagonal,
    aten.diagonal_copy.default: diagonal,
    aten.linalg_diagonal.default: linalg_diagonal,
    aten.diag.default: diag,
    aten.trace.default: trace,
    aten.scatter_reduce.two: scatter_reduce,
    aten.clamp.default: clamp,
    aten.clamp_min.default: clamp_min,
    aten.clamp_max.default: clamp_max,
    aten.rsub.Scalar: reversed_subtract,
    aten.rsub.Tensor: reversed_subtract,
    aten.chunk.default: chunk,
    aten.avg_pool1d.default: avg_pool,
    aten.avg_pool2d.default: avg_pool,
    aten.avg_pool3d.default: avg_pool,
    aten.max_pool2d.default: max_pool,
    aten.max_pool3d.default: max_pool,
}
