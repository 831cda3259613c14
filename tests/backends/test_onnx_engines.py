"""What onnxruntime and OpenVINO must compute as eager does, or refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt.errors import InputError, SpecError, UnsupportedOp
from tests.backends.engine_models import ENGINES, Function


@ENGINES
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("heads", [2, 1])
def test_a_query_that_a_mask_leaves_no_key_gets_zeros(backend: str, kind: torch.dtype, heads: int) -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    right = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    left = right.clone()
    left[..., :2, :] = False

    def mask(kept: torch.Tensor) -> torch.Tensor:
        return kept if kind is torch.bool else torch.zeros(kept.shape).masked_fill(~kept, float("-inf"))

    k, v = k[:, :heads], v[:, :heads]
    model = Function(
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=0.3, enable_gqa=heads == 1)
    )
    compiled = fxopt.compile(model, example_inputs=(q, k, v, mask(right)), backend=backend)
    for kept in (right, left):
        torch.testing.assert_close(compiled(q, k, v, mask(kept)), model(q, k, v, mask(kept)), atol=1e-5, rtol=1e-4)


ATTENTION: list[dict[str, Any]] = [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.ones(5, 5).tril() > 0}]


@ENGINES
@pytest.mark.parametrize("options", ATTENTION, ids=lambda options: "".join(options))
@pytest.mark.parametrize("rank", [2, 3, 5])
def test_attention_of_any_rank(backend: str, rank: int, options: dict[str, Any]) -> None:
    inputs = tuple(torch.randn(2, 3, 4, 5, 8)[(0,) * (5 - rank)] for _ in range(3))
    model = Function(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options))
    compiled = fxopt.compile(model, example_inputs=inputs, backend=backend)
    torch.testing.assert_close(compiled(*inputs), model(*inputs), atol=1e-5, rtol=1e-4)


@ENGINES
def test_causal_attention_of_one_head_over_any_length(backend: str) -> None:
    model = Function(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True))
    sizes = {"inputs": ({0: "batch", 1: "length"},)}
    compiled = fxopt.compile(model, example_inputs=(torch.randn(2, 5, 8),), dynamic_shapes=sizes, backend=backend)
    for x in (torch.randn(2, 5, 8), torch.randn(3, 9, 8)):
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)


@ENGINES
@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x.trunc() * x.sign(), x[x > 0], (x > 0).nonzero(), x.round()),
        lambda x: x.trunc() + x.sign(),
        lambda x: (x.trunc(), x.sign(), x.trunc() * 2),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: x.amax() - x.amin(),
        lambda x: (x.amax(keepdim=True), x.amin(keepdim=True), x.sum().amax()),
    ],
)
def test_small_functions(backend: str, function: Callable[..., Any]) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    compiled = fxopt.compile(Function(function), example_inputs=(x,), backend=backend)
    for y in (x, 2 * x, -x):
        torch.testing.assert_close(compiled(y), function(y))


@pytest.mark.parametrize(
    ("function", "x", "op"),
    [
        (lambda x: x << 3, torch.arange(4), "left_shift|lshift"),
        (lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True), torch.randn(1, 1, 8, 8), "_aa"),
    ],
)
def test_openvino_declines_what_it_computes_otherwise(function: Callable[..., Any], x: torch.Tensor, op: str) -> None:
    with pytest.raises(UnsupportedOp, match=op):
        fxopt.compile(Function(function), example_inputs=(x,), backend="openvino")


@ENGINES
def test_sparse_constants_are_declined(backend: str) -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.eye(3).to_sparse())

        def forward(self, x: torch.Tensor) -> Any:
            return torch.sparse.mm(self.get_buffer("table"), x)

    model = Sparse()
    with pytest.raises(UnsupportedOp, match="sparse"):
        fxopt.compile(model, example_inputs=(torch.ones(3, 2),), backend=backend)


@ENGINES
@pytest.mark.parametrize("threads", ["two", 2.5, 0, True])
def test_threads_must_be_a_number_of_threads(backend: str, threads: Any) -> None:
    with pytest.raises(SpecError, match="whole number"):
        fxopt.compile(nn.ReLU(), example_inputs=(torch.ones(1),), backend=backend, backend_options={"threads": threads})


TABLE = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


@ENGINES
@pytest.mark.parametrize(
    ("function", "taken", "lowest"),
    [
        (lambda i: F.embedding(i, TABLE), "0 to 4", 0),
        (lambda i: F.embedding(i.view(2, 1).int().t(), TABLE), "0 to 4", 0),
        (lambda i: TABLE.index_select(0, i), "0 to 4", 0),
        (lambda i: TABLE[:2].gather(1, i[:, None]), "0 to 2", 0),
        (lambda i: TABLE[i], "-5 to 4", -5),
        (lambda i: TABLE[:, i], "-3 to 2", -3),
    ],
)
def test_an_index_out_of_range_is_an_error_as_in_eager(
    backend: str, function: Callable[..., Any], taken: str, lowest: int
) -> None:
    model = Function(function)
    compiled = fxopt.compile(model, example_inputs=(torch.tensor([0, 1]),), backend=backend)
    torch.testing.assert_close(compiled(torch.tensor([2, lowest])), model(torch.tensor([2, lowest])))
    for wrong in (lowest - 1, 5):
        with pytest.raises(InputError, match=rf"holds {wrong}, but .* at .*\.py:\d+ takes {taken}"):
            compiled(torch.tensor([wrong, 1]))


@ENGINES
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_zeros_around_a_max_pool_take_part_in_it(backend: str, dims: int) -> None:
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]
    model = Function(lambda x: pool(F.pad(x, (1, 1) * dims), 3, 2))
    x = torch.rand(1, 3, *[8] * dims, generator=torch.Generator().manual_seed(0))
    compiled = fxopt.compile(model, example_inputs=(x,), backend=backend)
    torch.testing.assert_close(compiled(-x - 0.5), model(-x - 0.5))
