"""cast-precision and masks: the least fp32 number is -inf in low precision, and a row of -inf has no softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.passes.models import Model
from tests.passes.test_cast_precision import DTYPES, check, dtypes

pytestmark = pytest.mark.filterwarnings("ignore:cast-precision")
FUSED = ("canonicalize", "fold-constants", "fuse-conv-bn-relu")
LEAST = torch.finfo(torch.float32).min


def padding(shape: tuple[int, ...] = (2, 1, 4, 4)) -> torch.Tensor:
    """A mask as transformers builds them: 0 to attend, the least fp32 number not to. The first row is masked whole."""
    hidden = torch.ones(shape).triu(1).bool()
    hidden[..., 0, :] = True
    return torch.zeros(shape).masked_fill(hidden, LEAST)


def attend(m: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    q, k = m.q(x).unflatten(-1, (2, 4)).transpose(1, 2), m.k(x).unflatten(-1, (2, 4)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)


def attention(mask: Callable[[Any, torch.Tensor], torch.Tensor]) -> Model:
    parts = {"q": nn.Linear(8, 8), "k": nn.Linear(8, 8), "held": padding()}
    return Model(lambda m, x, user: attend(m, x, mask(m, user)), **parts)


@pytest.mark.parametrize("before", ["canonicalize", FUSED])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "mask",
    [
        lambda m, user: user,
        lambda m, user: m.held,
        lambda m, user: user + user,  # -inf, in fp32 too
        lambda m, user: user * 0.75,
        lambda m, user: (user < 0).float() * LEAST,
        lambda m, user: user.clamp(min=-1e9) + m.held.clamp(min=-1e9),
        lambda m, user: torch.maximum(user + m.held, torch.tensor(LEAST)),
    ],
)
def test_attention_masks_survive(mask: Callable[..., torch.Tensor], dtype: str, before: Any) -> None:
    checked = check(attention(mask), torch.randn(2, 4, 8), padding(), dtype=dtype, before=before)
    bf16 = dtype == "bf16"
    assert dtypes(checked)["scaled_dot_product_attention"] is (torch.bfloat16 if bf16 else torch.float32)
    assert bf16 or "which may hold numbers beyond fp16" in checked.reasons()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_attention_bias_within_range_runs_low(dtype: str) -> None:
    """Relative position bias and the -100 of shifted windows are no reason to stay in fp32."""
    model = attention(lambda m, user: m.table[user.argsort(-1)] * 1.5 + m.shift)
    model.table, model.shift = nn.Parameter(torch.randn(4)), nn.Buffer(torch.eye(4) * -100.0)
    checked = check(model, torch.randn(2, 4, 8), torch.randn(2, 1, 4, 4), dtype=dtype)
    assert dtypes(checked)["scaled_dot_product_attention"] is DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_of_infinities_stays_one(dtype: str) -> None:
    mask = torch.zeros(2, 1, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf"))
    check(attention(lambda m, user: user), torch.randn(2, 4, 8), mask, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("user", [True, False])
def test_a_mask_that_rides_on_a_linear_survives(user: bool, dtype: str) -> None:
    def forward(m: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = m.layer(x) + (mask if user else torch.where(mask < 0, LEAST, 0.0))
        return y.softmax(-1)

    model = Model(forward, layer=nn.Linear(4, 4))
    checked = check(model, torch.randn(4, 4), padding((4, 4)), dtype=dtype, before=FUSED)
    linear, add, softmax = list(dtypes(checked).values())[-3:]
    assert (linear, add, softmax) == (DTYPES[dtype], torch.float32, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batched", [True, False])
def test_a_mask_that_a_matmul_adds_survives(batched: bool, dtype: str) -> None:
    add = torch.baddbmm if batched else torch.addmm
    model = Model(lambda m, x, mask: add(mask, m.layer(x), x).softmax(-1), layer=nn.Linear(4, 4))
    shape = (2, 4, 4) if batched else (4, 4)
    checked = check(model, torch.randn(shape), padding(shape), dtype=dtype)
    assert dtypes(checked)[add.__name__] is (torch.bfloat16 if dtype == "bf16" else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [-1e4, -1e9, torch.finfo(torch.float32).min, float("-inf")])
@pytest.mark.parametrize(
    "masked",
    [
        lambda m, y, v: y.masked_fill(m.mask, v),
        lambda m, y, v: torch.where(m.mask, v, y),
        lambda m, y, v: torch.where(m.mask, m.row, y),
        lambda m, y, v: y + torch.where(m.mask.triu(1), v, 0.0),
    ],
)
def test_masks_survive(masked: Callable[..., torch.Tensor], value: float, dtype: str) -> None:
    """Attention masks hold numbers that low precision turns into infinity, or refuses; a row is masked whole."""
    first = 1 if value == float("-inf") else 0  # a row of nothing but -inf is NaN in fp32, too
    mask = torch.ones(4, 4).triu(first).bool()
    model = Model(
        lambda m, x: masked(m, m.layer(x), value).softmax(-1), layer=nn.Linear(4, 4), mask=mask, row=torch.tensor(value)
    )
    check(model, torch.randn(4, 4), dtype=dtype, before=("canonicalize", "fold-constants"))
