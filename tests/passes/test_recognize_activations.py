"""recognize-activations: each spelling, and what merely looks like one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fxopt import testing
from tests.passes.models import Model

BEFORE = ("canonicalize", "common-subexpressions")
Function = Callable[[torch.Tensor], torch.Tensor]
K = math.sqrt(2.0 / math.pi)


def check(function: Callable[..., Any], *inputs: torch.Tensor) -> testing.Checked:
    model = Model(lambda m, *xs: function(*xs))
    checked = testing.check_pass("recognize-activations", model, inputs or (torch.randn(3, 5) * 3,), before=BEFORE)
    assert checked.difference.error <= 1e-5
    return checked


SPELLINGS: list[tuple[str, Function]] = [
    ("silu", lambda x: x * torch.sigmoid(x)),
    ("silu", lambda x: torch.sigmoid(x) * x),
    ("hardswish", lambda x: x * F.hardsigmoid(x)),
    ("hardswish", lambda x: x * F.relu6(x + 3) / 6),
    ("hardswish", lambda x: x * (F.relu6(x + 3) / 6)),
    ("hardswish", lambda x: x * F.hardtanh(x + 3, 0.0, 6.0) / 6),
    ("hardswish", lambda x: x * (x + 3).clamp(0, 6) / 6),
    ("hardswish", lambda x: x * F.relu6(3 + x) * (1 / 6)),
    ("mish", lambda x: x * torch.tanh(F.softplus(x))),
    ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
    ("gelu", lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2)))),
    ("gelu", lambda x: x * (0.5 * (torch.erf(x * math.sqrt(0.5)) + 1))),
    ("gelu", lambda x: 0.5 * (x * (1 + torch.erf(x / math.sqrt(2))))),
    ("gelu", lambda x: 0.5 * x * (1 + torch.tanh(K * (x + 0.044715 * x**3)))),
    ("gelu", lambda x: 0.5 * x * (1 + torch.tanh(K * (x + 0.044715 * torch.pow(x, 3.0))))),
    ("gelu", lambda x: 0.5 * x * (1 + torch.tanh(K * (x + 0.044715 * x * x * x)))),
    ("gelu", lambda x: 0.5 * x * (1 + torch.tanh(x * K * (1 + 0.044715 * x * x)))),
]


@pytest.mark.parametrize(("name", "spelled"), SPELLINGS)
def test_a_spelling_is_one_op(name: str, spelled: Function) -> None:
    checked = check(spelled)
    assert checked.ops() == [f"aten.{name}"]


@pytest.mark.parametrize(
    "almost",
    [
        lambda x: x * torch.tanh(F.softplus(x, beta=2)),
        lambda x: x * torch.tanh(F.softplus(x, threshold=1)),
        lambda x: x * F.relu6(torch.add(x, 3, alpha=2)) / 6,
        lambda x: x * torch.div(F.relu6(x + 3), 6, rounding_mode="floor"),
        lambda x: x * F.relu6(x + 2) / 6,
        lambda x: x * F.hardtanh(x + 3, 0.0, 5.0) / 6,
        lambda x: x * F.relu6(x + 3) / 5,
        lambda x: 0.5 * x * (2 + torch.erf(x / math.sqrt(2))),
        lambda x: 0.25 * x * (1 + torch.erf(x / math.sqrt(2))),
        lambda x: 0.5 * x * (1 + torch.erf(x / 2)),
        lambda x: 0.5 * x * (1 + torch.tanh(K * (x + 0.05 * x**3))),
        lambda x: 0.5 * x * (1 + torch.tanh(K * (x + 0.044715 * x**2))),
        lambda x: 0.5 * x * torch.add(1, torch.erf(x / math.sqrt(2)), alpha=3),
        lambda x: torch.sigmoid(x) * x.cos(),
    ],
)
def test_what_looks_like_one_is_left_alone(almost: Function) -> None:
    assert check(almost).record.edits == 0


def test_another_x_inside_is_none() -> None:
    assert check(lambda x, y: x * torch.sigmoid(y), torch.randn(4), torch.randn(4)).record.edits == 0
    assert (
        check(lambda x, y: 0.5 * x * (1 + torch.erf(y / math.sqrt(2))), torch.randn(4), torch.randn(4)).record.edits
        == 0
    )


def test_a_step_that_is_used_elsewhere_is_kept() -> None:
    def forward(x: torch.Tensor) -> Any:
        gate = torch.sigmoid(x)
        return x * gate, gate + 1

    checked = check(forward)
    assert checked.record.edits == 0
    assert "is also used by add" in checked.reasons()


def test_integers_are_left_alone() -> None:
    """sigmoid of integers is a float, silu of them an error."""
    assert check(lambda x: x * torch.sigmoid(x), torch.arange(-2, 3)).record.edits == 0


def test_it_then_rides_on_the_linear_before_it() -> None:
    model = Model(lambda m, x: (lambda y: y * torch.sigmoid(y))(m.layer(x)), layer=torch.nn.Linear(4, 4))
    before = ("canonicalize", "common-subexpressions", "recognize-activations")
    checked = testing.check_pass("fuse-conv-bn-relu", model, (torch.randn(2, 4),), before=before)
    assert checked.ops() == ["fxopt.linear"]
    assert "activation=silu" in checked.text
