"""The small graphs that every backend is tried on: one for each kind of op, and ``conformance_programs`` for the rest.

A case is a model, inputs for several calls, and what ``fxopt.compile`` is told besides. Weights and inputs are random
and the same each time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

randn = torch.randn


class Graph(nn.Module):
    """A module whose forward is *function*, called with the module itself first; *parts* are its modules and tensors.

    Tensors that are no parameters become buffers. Batch norms get statistics, scales and shifts as after training.
    """

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        for module in self.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
                for value in (module.running_mean, module.bias):
                    nn.init.normal_(value)  # type: ignore[arg-type]
                for value in (module.running_var, module.weight):
                    nn.init.uniform_(value, 0.5, 1.5)  # type: ignore[arg-type]
        self.eval()

    def forward(self, *args: Any) -> Any:
        """What *function* computes."""
        return self.function(self, *args)


@dataclasses.dataclass(frozen=True)
class Case:
    """One small graph.

    Attributes:
        name: ``topic: what``; unique.
        make: the model, drawn from torch's random numbers.
        inputs: positional inputs of a call, drawn likewise; its argument is one of *sizes*.
        sizes: one for each call; the first is captured.
        dynamic_shapes: as for :func:`fxopt.compile`.
        passes: likewise. Some are lossy: then the backend must compute what is left after them.
        calibrate: whether the passes need data.
        rounds: whether the model itself rounds to integers, so that engines may differ by a step of those.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    sizes: tuple[int, ...] = (2, 2)
    dynamic_shapes: Any = None
    passes: str | None = None
    calibrate: bool = False
    rounds: bool = False


def of(function: Callable[..., Any], *shapes: tuple[int, ...], **parts: Callable[[], Any]) -> Mapping[str, Any]:
    """``make`` and ``inputs`` of a case: *function* of the module and of random tensors of *shapes*, batch in front."""
    return {
        "make": lambda: Graph(function, **{name: part() for name, part in parts.items()}),
        "inputs": lambda n: tuple(randn(n, *shape) for shape in shapes),
    }


def layers(*makes: Callable[[], nn.Module], shape: tuple[int, ...]) -> Mapping[str, Any]:
    """``make`` and ``inputs`` of a case: layers one after another, for a random tensor of *shape*, batch in front."""
    return {
        "make": lambda: Graph(lambda m, x: m.layers(x), layers=nn.Sequential(*(make() for make in makes))),
        "inputs": lambda n: (randn(n, *shape),),
    }


def _activations(m: Any, x: torch.Tensor) -> Any:
    plain = (F.relu, F.gelu, F.silu, F.hardswish, F.elu, F.leaky_relu, F.mish, F.softplus, torch.sigmoid, torch.tanh)
    return [f(x) for f in plain] + [F.gelu(x, approximate="tanh"), F.hardsigmoid(x), F.relu6(x), F.selu(x)]


def _rounding(m: Any, x: torch.Tensor) -> Any:
    return x.floor(), x.ceil(), x.round(), x.trunc(), x.sign(), x.abs(), -x, x.frac()


def _integers(m: Any, i: torch.Tensor) -> Any:
    return i + 3, i * i, i // 3, i % 3, -i, i.clamp(-2, 5), (i > 2) & (i < 7), ~(i == 4), i.to(torch.float32) / 2


def _reductions(m: Any, x: torch.Tensor) -> Any:
    y = x.mean((1, 2)), x.sum(), x.amax(-1), x.amin((0, 1)), x.std(-1), x.var(0, correction=0), x.prod(1)
    return *y, x.logsumexp(1), x.norm(dim=-1), (x > 0).any(), (x > -9).all(1)


def _order(m: Any, x: torch.Tensor) -> Any:
    return x.argmax(-1), x.argmin(1), *x.topk(2, -1), *x.sort(-1, descending=True), x.cumsum(1)


def _moves(m: Any, x: torch.Tensor) -> Any:
    y = x.reshape(x.shape[0], -1), x.permute(0, 2, 1), x.flatten(0, 1), x.unsqueeze(1).expand(-1, 3, -1, -1)
    return *y, x[:, 1:3, ::2], x.transpose(1, 2)[..., -1], x.flip(1), x.roll(1, -1), x.repeat(1, 2, 1)


def _joins(m: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
    a, b = torch.cat([x, y], 1).chunk(2, -1)
    return a, b, torch.stack([x, y], 1), *x.split([1, 3], 1), x.unbind(-1)[0] * 2


def _pads(m: Any, x: torch.Tensor) -> Any:
    return F.pad(x, (1, 2), value=0.5), F.pad(x, (2, 1, 1, 1), "reflect"), F.pad(x, (1, 1, 2, 0), "replicate")


def _indexing(m: Any, x: torch.Tensor, i: torch.Tensor) -> Any:
    y = x[:, i[0]], x.gather(1, i[:, None, :].expand(-1, 1, x.shape[2] // 2).contiguous()), m.table[i]
    return *y, x.index_select(2, i[0] % 2), torch.where(i > 1, i, 0), F.one_hot(i, 4), F.embedding(i, m.table)


def _scatters(m: Any, x: torch.Tensor, i: torch.Tensor) -> Any:
    return x.scatter(1, i, 0.5), x.scatter_add(1, i, x[:, :3] * 2), x.masked_fill(x > 0, -1.0), x.tril(), x.triu(1)


def _attention(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    mask = torch.ones(4, 4, dtype=torch.bool).tril(1)
    added = torch.zeros(4, 4).masked_fill(~mask, -1e9)
    f = F.scaled_dot_product_attention
    return f(q, k, v), f(q, k, v, is_causal=True), f(q, k, v, attn_mask=mask), f(q, k, v, attn_mask=added, scale=0.2)


def _products(m: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
    z = x @ y, torch.bmm(x, y), torch.einsum("bik,bkj->bij", x, y), torch.addmm(m.bias, x[0], y[0])
    return *z, x @ m.matrix, x[0, 0] @ y[0], torch.outer(x[0, 0], y[0, 0]), torch.baddbmm(m.bias, x, y, beta=0.5)


class _Residual(nn.Module):
    """Conv, batch norm and relu with a residual, as in ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """*x* plus a branch, activated."""
        return F.relu(self.second(F.relu(self.norm(self.first(x)))) + x)


def _indices(high: int, *shape: int) -> Callable[[int], torch.Tensor]:
    return lambda n: torch.randint(high, (n, *shape))


OPS: tuple[Case, ...] = (
    Case("elementwise: broadcast arithmetic", **of(lambda m, x, y: ((x + y[:, :1]) * x - y / 2, 1 - x, x * m.w),
                                                   (3, 4), (3, 4), w=lambda: nn.Parameter(randn(3, 1)))),
    Case("elementwise: powers and logarithms", **of(lambda m, x: (x.exp(), x.abs().log(), x.square().sqrt(), x**3,
                                                    (x.abs() + 1).rsqrt(), x.abs().pow(0.3), x.erf(), x.log1p().isnan(),
                                                    x.reciprocal()), (3, 5))),
    Case("elementwise: trigonometry", **of(lambda m, x: (x.sin(), x.cos(), x.tan(), x.atan(), x.sinh(), x.cosh()),
                                           (6,))),
    Case("elementwise: comparisons", **of(lambda m, x, y: (x > y, x <= 0, x == x, torch.where(x > y, x, y),
                                          torch.maximum(x, y), x.minimum(y), x.clamp(-0.5, 0.5), x.clamp(min=y)),
                                          (3, 4), (3, 4))),
    Case("elementwise: activations", **of(_activations, (3, 4))),
    Case("elementwise: rounding", **of(_rounding, (5, 7))),
    Case("elementwise: integers", make=lambda: Graph(_integers), inputs=lambda n: (torch.randint(-9, 9, (n, 8)),)),
    Case("elementwise: NaN and infinity", make=lambda: Graph(lambda m, x: (x.isnan(), x.isinf(), x.nan_to_num(0.5))),
         inputs=lambda n: (torch.tensor([0.0, float("nan"), float("inf"), -float("inf")]) * randn(n, 1),)),
    Case("reduce: sums, means, extremes", **of(_reductions, (3, 4))),
    Case("reduce: order", **of(_order, (3, 8))),
    Case("linear: bias and activation", **layers(lambda: nn.Linear(12, 24), nn.ReLU, lambda: nn.Linear(24, 5),
                                                 shape=(3, 12))),
    Case("linear: no bias", **layers(lambda: nn.Linear(12, 7, bias=False), shape=(12,))),
    Case("linear: shared weight", **of(lambda m, x: m.a(x).relu() @ m.a.weight, (12,), a=lambda: nn.Linear(12, 6))),
    Case("linear: bilinear", **of(lambda m, x, y: m.a(x, y), (4,), (5,), a=lambda: nn.Bilinear(4, 5, 3))),
    Case("matmul: all forms", **of(_products, (3, 4), (4, 5), bias=lambda: randn(5), matrix=lambda: randn(4, 6))),
    Case("conv: 1d", **layers(lambda: nn.Conv1d(4, 6, 3, padding=1, stride=2), shape=(4, 11))),
    Case("conv: 2d", **layers(lambda: nn.Conv2d(3, 8, 3, padding=1), nn.ReLU, shape=(3, 9, 9))),
    Case("conv: 3d", **layers(lambda: nn.Conv3d(2, 4, 3, padding=1), shape=(2, 5, 5, 5))),
    Case("conv: strided and dilated", **layers(lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2, bias=False),
                                               shape=(4, 15, 13))),
    Case("conv: asymmetric kernel, same padding", **layers(lambda: nn.Conv2d(4, 6, (1, 4), padding="same"),
                                                           shape=(4, 6, 7))),
    Case("conv: grouped", **layers(lambda: nn.Conv2d(8, 12, 3, groups=4), shape=(8, 7, 7))),
    Case("conv: depthwise separable", **layers(lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
                                               lambda: nn.BatchNorm2d(8),
                                               nn.ReLU6, lambda: nn.Conv2d(8, 4, 1), shape=(8, 7, 7))),
    Case("conv: batch norm, relu, residual", **layers(_Residual, shape=(8, 6, 6))),
    Case("conv: transposed", **layers(lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1),
                                      shape=(6, 5, 5))),
    Case("conv: transposed 1d, grouped", **layers(lambda: nn.ConvTranspose1d(6, 4, 4, stride=2, groups=2),
                                                  shape=(6, 7))),
    Case("pool: max", **layers(lambda: nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), shape=(3, 8, 9))),
    Case("pool: average", **layers(lambda: nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), shape=(3, 8, 8))),
    Case("pool: adaptive", **of(lambda m, x: (F.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x, (3, 2)),
                                F.adaptive_max_pool2d(x, 2)), (3, 8, 8))),
    Case("pool: 1d and 3d", **of(lambda m, x: (F.max_pool1d(x[:, 0, 0], 2), F.avg_pool1d(x[:, 0, 0], 3),
                                 F.max_pool3d(x, 2), F.avg_pool3d(x, 2)), (2, 4, 6, 6))),
    Case("norm: batch", **layers(lambda: nn.BatchNorm1d(6), shape=(6, 5))),
    Case("norm: layer and RMS", **layers(lambda: nn.LayerNorm(12), lambda: nn.RMSNorm(12, eps=1e-5), shape=(4, 12))),
    Case("norm: group and instance", **layers(lambda: nn.GroupNorm(2, 8), lambda: nn.InstanceNorm2d(8, affine=True),
                                              shape=(8, 5, 5))),
    Case("softmax", **of(lambda m, x: (x.softmax(-1), x.log_softmax(1), (x * 100).softmax(-1)), (4, 6))),
    Case("attention: masks", **of(_attention, (2, 4, 8), (2, 4, 8), (2, 4, 8))),
    Case("attention: multi-head", **of(lambda m, x: m.a(x, x, x, need_weights=False)[0], (5, 16),
                                       a=lambda: nn.MultiheadAttention(16, 4, batch_first=True))),
    Case("attention: transformer layer", **layers(lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
                                                  shape=(5, 16))),
    Case("recurrent: LSTM", **of(lambda m, x: m.a(x)[0], (4, 6), a=lambda: nn.LSTM(6, 5, batch_first=True))),
    Case("recurrent: GRU, both directions", **of(lambda m, x: m.a(x)[0], (4, 6),
                                                 a=lambda: nn.GRU(6, 5, batch_first=True, bidirectional=True))),
    Case("shape: views and permutations", **of(_moves, (4, 6))),
    Case("shape: cat, stack, split", **of(_joins, (4, 6), (4, 6))),
    Case("shape: padding", **of(_pads, (3, 5, 6))),
    Case("shape: pixel shuffle", **of(lambda m, x: (F.pixel_shuffle(x, 2), F.pixel_unshuffle(x, 2)), (8, 4, 4))),
    Case("shape: resize", **of(lambda m,
                               x: (F.interpolate(x, scale_factor=2), F.interpolate(x, (7, 5), mode="bilinear"),
                               F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)), (3, 4, 6))),
    Case("index: gather and embedding", make=lambda: Graph(_indexing, table=nn.Parameter(randn(4, 3))),
         inputs=lambda n: (randn(n, 4, 4), _indices(4, 2)(n))),
    Case("index: scatter and masks", make=lambda: Graph(_scatters), inputs=lambda n: (randn(n, 5), _indices(5, 3)(n))),
    Case("index: embedding bag", make=lambda: Graph(lambda m, i: m.a(i), a=nn.EmbeddingBag(10, 4, mode="mean")),
         inputs=lambda n: (_indices(10, 3)(n),)),
    Case("fourier transform", **of(lambda m, x: torch.fft.rfft(x).abs(), (8,))),
)  # fmt: skip
