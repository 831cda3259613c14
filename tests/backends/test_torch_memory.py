"""Results written over arguments that die, and only over these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.backends.torch_models import Conv, Function, check, image


def residual_then(after: Callable[..., Any]) -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Conv(out=4), Conv(out=4, activation="relu")

        def forward(self, x: torch.Tensor) -> Any:
            return after(self, x, self.first(x))

    return Block()


def test_residual_is_overwritten_where_it_dies() -> None:
    model = residual_then(lambda m, x, y: m.second(x, y))
    check(model, image(), calls="mkldnn__convolution_pointwise__binary")


@pytest.mark.parametrize(
    "after",
    [
        lambda m, x, y: (m.second(x, y), y),  # an output
        lambda m, x, y: m.second(x, y) * y,  # read later
        lambda m, x, y: (m.second(x, y), y.view(-1)[:7]),  # an output looks at it
        lambda m, x, y: m.second(x, y.detach()) + y[:, :1],  # read later through a view
        lambda m, x, y: m.second(y, y),  # it is the input of the convolution too
        lambda m, x, y: m.second(y.flip(1).flip(1), y),
        lambda m, x, y: m.second(y.view_as(y), y),  # the same memory by another name
        lambda m, x, y: m.second(y, x),  # an input of the model
        lambda m, x, y: m.second(y, x.view(x.shape)),
        lambda m, x, y: m.second(x, y[:1].expand(2, -1, -1, -1)),  # elements that share memory
        lambda m, x, y: m.second(x, y.transpose(2, 3)),
        lambda m, x, y: m.second(x, y.contiguous()),
        lambda m, x, y: m.second(x, m.second(y, y) + y),
    ],
)
def test_residual_that_is_still_needed(after: Callable[..., Any]) -> None:
    check(residual_then(after), image())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.relu(x),
        lambda x: x.exp().add(1).mul(2).tanh(),
        lambda x: (x + 1).relu() + (x + 1).sigmoid(),
        lambda x: (lambda y: y.relu() + y)(x + 1),
        lambda x: (lambda y: (y, y.t().mul(2)))(x + 1),
        lambda x: (lambda y: y.mul(y))(x + 1),
        lambda x: (lambda y: y.add(y.t()))(x + 1),
        lambda x: (lambda y: y.view(-1).mul(2))(x + 1),
        lambda x: (lambda y: y.expand(3, 6, 6).mul(2))(x + 1),
        lambda x: (lambda y: y[:, :1].expand(6, 6).mul(2))(x + 1),
        lambda x: (lambda y: y[0].add(y))(x + 1),
        lambda x: (lambda a, b: a.mul(2) + b)(*(x + 1).chunk(2)),
        lambda x: (x + 1).add(x.double()),
        lambda x: (x + 1).mul(2).to(torch.float32).relu(),
        lambda x: (x + 1) > 0,
        lambda x: x.sum().mul(x),
        lambda x: torch.einsum("ij->ji", x).mul(2),
        lambda x: x.reshape(36).mul(2),
        lambda x: x.unflatten(0, (2, 3)).relu(),
        lambda x: torch.where(x > 0, x + 1, x - 1).clamp(0, 1),
        lambda x: (lambda y: [y.relu(), y.relu()])(x + 1),
    ],
)
def test_pointwise_in_place(function: Callable[..., Any]) -> None:
    check(Function(function), torch.randn(6, 6))


def test_constants_are_never_written_over() -> None:
    check(Function(lambda x, c: (c * x, c.relu(), c.view(-1).mul(3)), torch.randn(5, 5)), torch.randn(5, 5))
    check(Function(lambda c: c.mul(2), torch.randn(5, 5)))


def test_pointwise_chain_is_in_place() -> None:
    source = check(Function(lambda x: x.exp().add(1).tanh()), torch.randn(4)).source
    assert "aten_add__Tensor" in source
    assert "aten_tanh_(" in source
    assert "aten_exp(" in source
