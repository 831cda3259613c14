"""Capture: inputs of every kind, and calls that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.capture import capture
from tests.core.captured import Answer, X, check, run
from tests.passes.models import Model


class Inputs(nn.Module):
    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, *, scale: float = 2.5, flag: bool = False
    ) -> torch.Tensor:
        y = x * scale if mask is None else x * mask
        return -y if flag else y


def test_nested_inputs() -> None:
    model = Model(lambda m, pair, table: pair[0] + pair[1][0] * table["a"] + table["b"]["c"])
    check(model, (X, [X + 1]), {"a": X, "b": {"c": X - 1}})


def test_a_dataclass_as_input() -> None:
    check(Model(lambda m, a: a.logits * 2 + a.hidden[0]), Answer(X, (X,)))


def test_keywords_in_any_order() -> None:
    captured = capture(Model(lambda m, a, b: a - b), (), {"a": X, "b": X + 1})
    assert torch.equal(run(captured, b=X, a=X + 1), torch.ones(2, 3))


def test_positional_and_keyword_spellings_are_one() -> None:
    captured = capture(Inputs(), (X,), {"mask": X})
    expected = X * X
    for args, kwargs in [((X,), {"mask": X}), ((X, X), {}), ((), {"x": X, "mask": X}), ((), {"mask": X, "x": X})]:
        assert torch.equal(run(captured, *args, **kwargs), expected)
    captured = capture(Inputs(), (X, X))
    assert torch.equal(run(captured, X, mask=X), expected)


def test_a_default_may_be_spelled_out() -> None:
    captured = capture(Inputs(), (X,))
    assert torch.equal(run(captured, X, None, scale=float("2.5"), flag=False), X * 2.5)


def test_another_value_than_the_default_is_refused() -> None:
    captured = capture(Inputs(), (X,))
    for options in ({"scale": 3.0}, {"mask": X}, {"flag": True}):
        with pytest.raises(fxopt.InputError, match="another structure"):
            run(captured, X, **options)


def test_constants_among_the_inputs_are_fixed() -> None:
    captured = capture(Inputs(), (X, None), {"scale": 2.0, "flag": True})
    assert torch.equal(run(captured, X, None, scale=2.0, flag=True), X * -2)
    with pytest.raises(fxopt.InputError, match=r"'scale' is 3\.0, expected 2\.0"):
        run(captured, X, None, scale=3.0, flag=True)
    with pytest.raises(fxopt.InputError, match="is 1, expected True"):
        run(captured, X, None, scale=2.0, flag=1)
    with pytest.raises(fxopt.InputError, match="expected None"):
        run(captured, X, X, scale=2.0, flag=True)


def test_variable_arguments() -> None:
    class Sums(nn.Module):
        def forward(self, *xs: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
            return xs[0] + xs[1] * named["a"] - named["b"]

    captured = check(Sums(), X, X + 1, a=X, b=X)
    assert torch.equal(run(captured, X, X + 1, b=X, a=X), X + (X + 1) * X - X)
    with pytest.raises(fxopt.InputError, match="another structure"):
        run(captured, X, a=X, b=X)


def test_the_same_tensor_twice() -> None:
    captured = check(Model(lambda m, a, b: a - 2 * b), X, X)
    assert torch.equal(run(captured, X, X + 1), X - 2 * (X + 1))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "missing a required argument: 'x'"),
        ((X, None, X), {}, "too many positional arguments"),
        ((X,), {"masks": X}, "unexpected keyword argument 'masks'"),
        ((X.double(),), {}, r"'x' has dtype torch\.float64, expected torch\.float32"),
        ((X[:, :2],), {}, "has size 2 in dimension 1, expected 3"),
        ((X[0],), {}, "has 1 dimensions, expected 2"),
        (([X, X],), {}, "another structure"),
        ((3,), {}, "is int, expected a tensor"),
        ((X.to("meta"),), {}, "is on meta, expected cpu"),
    ],
)
def test_a_call_that_does_not_fit_says_why(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    captured = capture(Inputs(), (X,))
    with pytest.raises(fxopt.InputError, match=message):
        run(captured, *args, **kwargs)
