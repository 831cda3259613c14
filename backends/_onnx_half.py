"""Reductions of float16 and bfloat16 for the exporter, which computes them in float32 and forgets to come back.

sum(x)   →   sum(x.float()).to(x.dtype)          PyTorch sums half precision up in float32 as well
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_NAMES = (
    "sum.default sum.dim_IntList prod.default prod.dim_int amax.default amin.default cumsum.default cumprod.default"
)


def _widened(reduce: Callable[..., Tensor]) -> Callable[..., Any]:
    def formula(x: Tensor, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        if x.dtype not in _HALF:
            return NotImplemented
        return reduce(x.to(torch.float32), *args, **kwargs).to(dtype or x.dtype)

    return formula


def _overload(name: str) -> Any:
    packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


FORMULAS: dict[Any, Callable[..., Any]] = {_overload(name): _widened(_overload(name)) for name in _NAMES.split()}
