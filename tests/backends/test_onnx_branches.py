"""Branches and loops in an ONNX file: their weights, what they may hold, and what is declined inside them too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt.errors import UnsupportedOp
from tests.backends.engine_models import ENGINES, Function


class Branches(nn.Module):
    """Where the sum is positive *positive*, else a linear layer."""

    def __init__(self, positive: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        self.positive = positive
        self.first, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        positive = self.positive or (lambda x: self.a(x).relu())
        result: torch.Tensor = torch.cond(x.sum() > 0, positive, lambda x: self.b(x), (x,))
        return result * 2


def assert_both_branches(compiled: fxopt.CompiledModel, model: nn.Module, tolerance: float) -> None:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for scale in (10.0, -10.0):
        torch.testing.assert_close(compiled(x * scale), model(x * scale), atol=tolerance, rtol=tolerance)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@ENGINES
def test_a_condition_with_weights_in_both_branches(backend: str) -> None:
    model = Branches().eval()
    assert_both_branches(fxopt.compile(model, example_inputs=(torch.ones(4, 4),), backend=backend), model, 1e-4)


def test_low_precision_around_a_condition() -> None:
    model = Branches().eval()
    spec = "cast-precision{dtype=bf16}"
    compiled = fxopt.compile(model, example_inputs=(torch.ones(4, 4),), passes=spec, backend="openvino")
    assert_both_branches(compiled, model, 0.1)


def _masked(x: torch.Tensor) -> torch.Tensor:
    q = x.reshape(1, 1, 4, 4)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=q > 0).reshape(4, 4)


@ENGINES
def test_a_branch_is_prepared_like_the_graph_around_it(backend: str) -> None:
    model = Branches(_masked).eval()
    assert_both_branches(fxopt.compile(model, example_inputs=(torch.ones(4, 4),), backend=backend), model, 1e-4)


@ENGINES
def test_a_loop(backend: str) -> None:
    model = Function(lambda x: torch._higher_order_ops.while_loop(lambda y: y.sum() < 9, lambda y: (y + 1,), (x,))[0])
    compiled = fxopt.compile(model, example_inputs=(torch.zeros(3),), backend=backend)
    for start in (0.0, 2.5, 7.0):
        torch.testing.assert_close(compiled(torch.full((3,), start)), model(torch.full((3,), start)))


@ENGINES
@pytest.mark.parametrize(
    ("branch", "reason"),
    [
        (lambda x: x + torch.rand_like(x), "rand_like.* in a branch .*random numbers"),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]), "constant .* in a branch"),
        (lambda x: torch.special.bessel_j0(x), "special_bessel_j0.* in a branch"),
    ],
)
def test_what_no_branch_can_hold_is_declined(
    backend: str, branch: Callable[[torch.Tensor], torch.Tensor], reason: str
) -> None:
    with pytest.raises(UnsupportedOp, match=reason):
        fxopt.compile(Branches(branch).eval(), example_inputs=(torch.ones(4, 4),), backend=backend)


@pytest.mark.parametrize(
    ("branch", "reason"),
    [
        (lambda x: x.double().exp().float(), "float64.* in a branch"),
        (lambda x: (x.long() << 3).float(), "shift.* in a branch"),
        (lambda x: x.bfloat16().exp().float(), "bf16.* in a branch"),
    ],
)
def test_what_openvino_computes_otherwise_is_found_in_branches(
    branch: Callable[[torch.Tensor], torch.Tensor], reason: str
) -> None:
    with pytest.raises(UnsupportedOp, match=reason):
        fxopt.compile(Branches(branch).eval(), example_inputs=(torch.ones(4, 4),), backend="openvino")


def test_auto_falls_back_to_an_engine_that_takes_the_branch() -> None:
    model = Branches(lambda x: torch.special.bessel_j0(x)).eval()
    compiled = fxopt.compile(model, example_inputs=(torch.ones(4, 4),))
    assert compiled.backend == "torch"
    assert_both_branches(compiled, model, 1e-4)
