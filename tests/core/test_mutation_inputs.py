"""Writes into inputs, and into tensors that share memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.capture import capture
from tests.passes.models import Model

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def test_a_mutated_tensor_that_is_no_buffer_is_refused() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count = torch.zeros(())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.add_(1)
            return x * self.count

    model = Hidden()
    with pytest.raises(
        fxopt.CaptureError, match=r"mutates a tensor that is no buffer.*\bcount\b[\s\S]*register_buffer"
    ):
        capture(model, (X,))
    assert int(model.count) == 0


def test_a_mutated_input_is_mutated() -> None:
    def forward(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        y[0] = x[1]
        return x * y

    model = Model(forward)
    example = (X.clone(), X.clone())
    compiled = fxopt.compile(model, example_inputs=example, backend="torch")
    assert torch.equal(example[0], X)
    assert torch.equal(example[1], X)
    mine, theirs = (X.clone(), X * 3), (X.clone(), X * 3)
    assert torch.equal(compiled(*mine), model(*theirs))
    assert torch.equal(mine[0], theirs[0])
    assert torch.equal(mine[1], theirs[1])


def test_a_first_lazy_call_mutates_its_input_once() -> None:
    compiled = fxopt.compile(Model(lambda m, x: x.add_(1) * 2), backend="torch")
    x = torch.zeros(2)
    assert torch.equal(compiled(x), torch.full((2,), 2.0))
    assert torch.equal(x, torch.ones(2))


def writes(m: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a.add_(1)
    return a + b


@pytest.mark.parametrize("lazy", [False, True])
def test_inputs_that_share_memory_with_a_mutated_one_are_refused(lazy: bool) -> None:
    example = None if lazy else (torch.zeros(3), torch.zeros(3))
    compiled = fxopt.compile(Model(writes), example_inputs=example, backend="torch")
    x = torch.ones(6)
    for a, b in ((x[:3], x[:3]), (x[:3], x[2:5]), (x[2:5], x[:3])):
        with pytest.raises(
            fxopt.InputError, match=r"writes to its input 'args_0', which shares memory with .*'args_1'"
        ):
            compiled(a, b)
    with pytest.raises(fxopt.InputError, match="shares memory with itself"):
        compiled(torch.zeros(1).expand(3), x[3:])
    assert torch.equal(x, torch.ones(6))
    assert torch.equal(compiled(x[:3], x[3:]), torch.full((3,), 3.0))
    assert torch.equal(x, torch.tensor([2.0, 2, 2, 1, 1, 1]))


@pytest.mark.parametrize("same", [lambda x: (x[:3], x[:3]), lambda x: (x[:3], x[2:5]), lambda x: (x[:3],) * 2])
def test_examples_that_share_memory_are_captured_as_if_they_did_not(same: Any) -> None:
    for function in (writes, lambda m, a, b: a * 2 - b):
        compiled = fxopt.compile(Model(function), example_inputs=same(torch.ones(6)), backend="torch")
        a, b = torch.ones(3), torch.full((3,), 5.0)
        expected = function(None, a.clone(), b)
        assert torch.equal(compiled(a, b), expected)


def test_inputs_that_are_only_read_may_share_memory() -> None:
    compiled = fxopt.compile(Model(lambda m, a, b: a * 2 - b), example_inputs=(X, X), backend="torch")
    assert torch.equal(compiled(X, X), X)


class Views(nn.Module):
    """Counts in one buffer and reads another tensor over the same memory."""

    total: torch.Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        memory = torch.zeros(6)
        self.kind = kind
        self.register_buffer("total", memory[:4])
        if kind == "buffer":
            self.register_buffer("view", memory[1:5].view(2, 2))
        elif kind == "attribute":
            self.view = memory[:2]
        elif kind == "list":
            self.views = [memory[2:3]]
        elif kind == "parameter":
            self.view = nn.Parameter(memory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(1)
        seen: torch.Tensor = self.views[0] if self.kind == "list" else self.view
        return x + seen.detach().sum()


@pytest.mark.parametrize("kind", ["buffer", "attribute", "list", "parameter"])
def test_a_mutated_buffer_that_another_tensor_shows_is_refused(kind: str) -> None:
    model = Views(kind)
    other = "one that is not registered" if kind in ("attribute", "list") else "(total and view|view and total)"
    with pytest.raises(fxopt.CaptureError, match=f"mutates a buffer that shares memory with .* model: {other}"):
        capture(model, (X,))
    assert model.total.sum() == 0


def test_views_that_nobody_reads_or_writes_do_no_harm() -> None:
    model = Model(lambda m, x: x + m.a.sum() + m.b.sum(), a=(memory := torch.ones(4)), b=memory[1:])
    assert torch.equal(fxopt.compile(model, example_inputs=(X,), backend="torch")(X), X + 7)
