"""The graphs that every backend is tried on, second part: dtypes, structure, sizes, state, control, low precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fxopt import quantized
from fxopt.conformance_cases import Case, Graph, layers, of, randn


def _mlp(dtype: torch.dtype) -> Mapping[str, Any]:
    """A small network in *dtype*."""

    def make() -> nn.Module:
        parts = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 8), nn.LayerNorm(8)
        return Graph(lambda m, x: m.a(x).softmax(-1), a=nn.Sequential(*parts)).to(dtype)

    return {"make": make, "inputs": lambda n: (randn(n, 3, 8, 8).to(dtype),)}


def _casts(m: Any, x: torch.Tensor, i: torch.Tensor, b: torch.Tensor) -> Any:
    return x.long() + i, i.float() * x, b.float() + 1, (x > 0) ^ b, i.bool(), x.half().float(), i.to(torch.uint8) + 1


@dataclasses.dataclass
class Parts:
    """An output of several parts.

    Attributes:
        logits: floats; ``best`` the largest of each row.
    """

    logits: torch.Tensor
    best: torch.Tensor


torch.utils._pytree.register_dataclass(Parts)


def _structure(m: Any, x: dict[str, torch.Tensor], pair: tuple[torch.Tensor, list[torch.Tensor]]) -> Any:
    logits = m.a(x["left"] + pair[0]) * pair[1][0]
    return {"parts": Parts(logits, logits.argmax(-1)), "same": (x["left"], [logits, logits]), "none": None, "seven": 7}


class _Counter(nn.Module):
    """Counts its calls in a buffer, and keeps what it saw last in another."""

    count: torch.Tensor
    last: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """*x* plus what was there before."""
        y = x + self.last + self.count
        self.count.add_(1)
        self.last.copy_(x.sum(0))
        return y


class _Cache(nn.Module):
    """Writes a row of a cache and attends over all of it, as a decoder does."""

    cache: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.register_buffer("cache", torch.zeros(6, 8))

    def forward(self, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """*x*: [1, 8]; *place*: [1], the row to write."""
        self.cache.index_copy_(0, place, self.project(x))
        return torch.softmax(x @ self.cache.T, -1) @ self.cache


def _written(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x.add_(y)
    return x * 2


def _branch(m: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = torch.cond(x.sum() > 0, lambda x: m.a(x).relu(), lambda x: m.b(x) - 1, (x,))
    return y * 2


def _loop(m: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = torch._higher_order_ops.while_loop(lambda y: y.sum() < 90, lambda y: (y.abs() + 1,), (x,))[0]
    return y


def _positions(m: Any, i: torch.Tensor) -> torch.Tensor:
    places = torch.arange(i.shape[1])
    y: torch.Tensor = m.layer(m.tokens(i) + m.places(places))
    return y[:, -1] + places.sum()


def _by_hand(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A linear between integers, as another tool may have written it: u8 activations, s8 weights by channel."""
    q = quantized.DEQUANTIZE(quantized.QUANTIZE(x, 0.05, 128, 0, 255, torch.uint8), 0.05, 128, 0, 255, torch.uint8)
    w = quantized.DEQUANTIZE_CHANNEL(m.w, m.scale, m.zero, 0, -127, 127, torch.int8)
    y = F.linear(q, w, m.bias).relu()
    return quantized.DEQUANTIZE(quantized.QUANTIZE(y, 0.1, 0, 0, 255, torch.uint8), 0.1, 0, 0, 255, torch.uint8)  # type: ignore[no-any-return]


def _integer_weights() -> nn.Module:
    scale, zero = torch.rand(32) * 0.01 + 0.001, torch.zeros(32, dtype=torch.int64)
    w = torch.randint(-127, 128, (32, 64), dtype=torch.int8)
    return Graph(_by_hand, w=w, scale=scale, zero=zero, bias=nn.Parameter(randn(32)))


# Large enough for every engine to find integers worth it.
_CNN: Mapping[str, Any] = layers(
    lambda: nn.Conv2d(8, 32, 3, padding=1), lambda: nn.BatchNorm2d(32), nn.ReLU,
    lambda: nn.Conv2d(32, 32, 3, padding=1), nn.ReLU,
    lambda: nn.AdaptiveAvgPool2d(1), nn.Flatten, lambda: nn.Linear(32, 10), shape=(8, 20, 20),
)  # fmt: skip
_WIDE: Mapping[str, Any] = layers(lambda: nn.Linear(256, 512), nn.GELU, lambda: nn.Linear(512, 64), shape=(16, 256))
_TRANSFORMER: Mapping[str, Any] = layers(
    lambda: nn.TransformerEncoderLayer(128, 4, 256, batch_first=True, activation="gelu"), shape=(16, 128)
)


_IMAGE: Mapping[str, Any] = layers(
    lambda: nn.Conv2d(3, 4, 3), nn.ReLU, nn.Flatten, lambda: nn.Linear(64, 5), shape=(3, 6, 6)
)


def _dynamic(dims: Mapping[int, Any], *sizes: int) -> Mapping[str, Any]:
    """Sizes of the first input that are open, and what is given for them in each call."""
    return {"sizes": sizes, "dynamic_shapes": ((dims,),)}


_ANY = torch.export.Dim.DYNAMIC
_LENGTH, _HEIGHT, _WIDTH = (torch.export.Dim(name, min=4, max=64) for name in ("length", "height", "width"))

PROGRAMS: tuple[Case, ...] = (
    Case("dtype: fp16", **_mlp(torch.float16)),
    Case("dtype: bf16", **_mlp(torch.bfloat16)),
    Case("dtype: fp64", **_mlp(torch.float64)),
    Case("dtype: casts", make=lambda: Graph(_casts),
         inputs=lambda n: (randn(n, 4) * 5, torch.randint(0, 9, (n, 4)), randn(n, 4) > 0)),
    Case("dtype: uint8 image", make=lambda: Graph(lambda m, x: m.a(x.float() / 255), a=nn.Conv2d(3, 4, 3)),
         inputs=lambda n: (torch.randint(0, 256, (n, 3, 6, 6), dtype=torch.uint8),)),
    Case("dtype: complex", make=lambda: Graph(lambda m, x: torch.view_as_real(x * x)),
         inputs=lambda n: (randn(n, 4, dtype=torch.complex64),)),
    Case("structure: nested inputs and outputs", make=lambda: Graph(_structure, a=nn.Linear(4, 3)),
         inputs=lambda n: ({"left": randn(n, 4)}, (randn(n, 4), [randn(n, 1)]))),
    Case("structure: an input as output", **of(lambda m, x, y: (x, x.view(-1), y + 1), (4,), (2,))),
    Case("structure: constants alone", **of(lambda m, x: (m.w * 2, torch.arange(4)), (4,),
                                            w=lambda: nn.Parameter(randn(3)))),
    Case("structure: scalars and empty tensors", **of(lambda m, x: (x.sum(), x[:, :0], x.new_zeros(())), (4,))),
    Case("structure: an input that is not used", **of(lambda m, x, y: x.relu(), (4,), (3,))),
    Case("size: batch", **{**_IMAGE, **_dynamic({0: _ANY}, 3, 1, 5)}),
    Case("size: sequence", make=lambda: Graph(_positions, tokens=nn.Embedding(20, 16), places=nn.Embedding(32, 16),
                                              layer=nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)),
         inputs=lambda n: (torch.randint(0, 20, (2, n)),), **_dynamic({1: _LENGTH}, 5, 4, 9)),
    Case("size: image", make=lambda: Graph(lambda m, x: F.interpolate(m.a(x), scale_factor=2).mean((2, 3)),
                                           a=nn.Conv2d(3, 4, 3, padding=1, stride=2)),
         inputs=lambda n: (randn(1, 3, 2 * n, n + 3),), **_dynamic({2: _HEIGHT, 3: _WIDTH}, 6, 9, 4)),
    Case("size: views of it", make=lambda: Graph(lambda m, x: (x.reshape(-1, 2), x.view(2, -1), x * x.shape[0])),
         inputs=lambda n: (randn(n, 4),), **_dynamic({0: _ANY}, 4, 6, 10)),
    Case("size: from the values", make=lambda: Graph(lambda m, x: x[x > 0] * 2), inputs=lambda n: (randn(n, 6),)),
    Case("state: buffers", make=_Counter, inputs=lambda n: (randn(n, 4),), sizes=(2, 2, 2)),
    Case("state: a cache that is written", make=_Cache,
         inputs=lambda n: (randn(1, 8), torch.tensor([n])), sizes=(0, 3, 5)),
    Case("state: an input that is written", **of(_written, (4,), (4,))),
    Case("control: cond", make=lambda: Graph(_branch, a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
         inputs=lambda n: (randn(3, 4) + n,), sizes=(2, -2)),
    Case("control: while", make=lambda: Graph(_loop), inputs=lambda n: (randn(4) + n,), sizes=(2, 30)),
    Case("bf16: cast-precision, CNN", **_CNN, passes="cast-precision{dtype=bf16}"),
    Case("bf16: cast-precision, transformer", **_TRANSFORMER, passes="cast-precision{dtype=bf16}"),
    Case("fp16: cast-precision, CNN", **_CNN, passes="cast-precision{dtype=fp16}"),
    Case("int8: static, CNN", **_CNN, passes="insert-fake-quant", calibrate=True),
    Case("int8: static, linears", **_WIDE, passes="insert-fake-quant", calibrate=True),
    Case("int8: static, transformer", **_TRANSFORMER, passes="insert-fake-quant", calibrate=True),
    Case("int8: dynamic, linears", **_WIDE, passes="insert-fake-quant{activations=dynamic}"),
    Case("int8: weights alone", **_WIDE, passes="insert-fake-quant{activations=none}"),
    Case("int4: weights alone", **_WIDE, passes="insert-fake-quant{activations=none,weights=int4}"),
    Case("int8: integers by hand", make=_integer_weights, inputs=lambda n: (randn(8, 64) * 2,), rounds=True),
    Case("2:4: linears", **_WIDE, passes="sparsify-2-4,cast-precision{dtype=bf16}"),
    Case("sparse: a weight in COO layout", inputs=lambda n: (randn(n, 4),),
         make=lambda: Graph(lambda m, x: torch.sparse.mm(m.w, x.T), w=torch.eye(4).to_sparse())),
)  # fmt: skip
