"""Operators that are imported in a form of our own, since TVM's importer has none for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt

pytest.importorskip("tvm")


def test_layer_norms_of_bfloat16() -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        nn.LayerNorm(24), nn.Linear(24, 16), nn.LayerNorm((5, 16), elementwise_affine=False)
    )
    with torch.no_grad():
        model[0].weight.uniform_(0.5, 2)  # type: ignore[index]
        model[0].bias.normal_()  # type: ignore[index]
    x = torch.randn(3, 5, 24).bfloat16()
    compiled = fxopt.compile(model.bfloat16().eval(), example_inputs=(x,), backend="tvm")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_batch_norms_keep_their_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.BatchNorm2d(3), torch.randn(2, 3, 4, 5).to(dtype)
    model.running_mean.normal_()  # type: ignore[union-attr]
    model.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    compiled = fxopt.compile(model.to(dtype).eval(), example_inputs=(x,), backend="tvm")
    torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("features", [96, 100])
def test_weights_of_four_bits_are_the_numbers_of_the_graph(features: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 33)), torch.randn(4, features)
    passes = "insert-fake-quant{activations=none,weights=int4}"
    compiled = fxopt.compile(model.eval(), example_inputs=(x,), backend="tvm", passes=passes)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), compiled.graph(x)[0], rtol=1e-4, atol=1e-5)
        assert (compiled(x) - model(x)).abs().max() > 1e-3  # they are of four bits


class Grouped(nn.Module):
    """Attention whose heads of queries share heads of keys and values."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        attend = F.scaled_dot_product_attention
        causal = attend(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
        return attend(q, k, v, enable_gqa=True) + causal, attend(q, q, q, enable_gqa=True)


def test_heads_of_keys_that_several_of_queries_share() -> None:
    torch.manual_seed(0)
    model, dynamic = Grouped(), {0: "batch", 2: "tokens"}

    def heads(batch: int, tokens: int) -> list[torch.Tensor]:
        return [torch.randn(batch, count, tokens, 8) for count in (4, 2, 2)]

    compiled = fxopt.compile(
        model, example_inputs=tuple(heads(2, 6)), backend="tvm", dynamic_shapes=(dynamic, dynamic, dynamic)
    )
    for inputs in (heads(2, 6), heads(3, 9)):
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
