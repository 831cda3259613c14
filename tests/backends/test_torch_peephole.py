"""Small rewrites for ATen's CPU kernels: norms in low precision, masks that hide nothing, pooling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.backends.torch_models import Function, Views, check, image


def test_norms_take_low_precision_as_it_is() -> None:
    def block(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Any:
        y = F.layer_norm(x.to(torch.float32), (16,), w, b).transpose(0, 1).to(torch.bfloat16)
        return y, torch.softmax(x.to(torch.float32), 1).to(torch.bfloat16)

    constants = torch.randn(16), torch.randn(16)
    check(Function(block, *constants), image(3, 5, 16, dtype=torch.bfloat16), never="torch.float32)")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (lambda y: (y.to(torch.bfloat16), y + 1))(x.to(torch.float32).softmax(-1)),
        lambda x: x.to(torch.float32).softmax(-1),
        lambda x: x.to(torch.float32).softmax(-1, dtype=torch.float64).to(torch.bfloat16),
        lambda x: F.layer_norm(x.to(torch.float32), (16,)).to(torch.float16),
    ],
)
def test_norms_whose_wide_result_is_needed(function: Callable[..., Any]) -> None:
    check(Function(function), image(3, 5, 16, dtype=torch.bfloat16), calls="torch.float32")


def test_attention_masks() -> None:
    def attend(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    x = torch.randn(2, 3, 5, 8)
    assert "None" in check(Function(attend, torch.ones(5, 5, dtype=torch.bool)), x).source
    check(Function(attend, torch.ones(5, 5).tril().bool()), x, never="None")
    check(Function(attend, torch.ones(5, 5)), x, never="None")


def test_pooling_of_a_convolution() -> None:
    check(Views(lambda y: F.adaptive_avg_pool2d(y, 1)), image(), calls="aten_avg_pool2d")
    check(Views(lambda y: F.adaptive_avg_pool2d(y, 2)), image(), calls="aten_adaptive_avg_pool2d")
    check(Function(lambda x: F.adaptive_avg_pool2d(x, 1)), image(), calls="aten_adaptive_avg_pool2d")
