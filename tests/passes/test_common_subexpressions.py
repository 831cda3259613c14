"""common-subexpressions: equal pure calls become one, everything that only looks equal does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt import testing, verify
from tests.passes.models import Model


def check(model: nn.Module, *inputs: Any) -> testing.Checked:
    checked = testing.check_pass("common-subexpressions", model, inputs)
    assert checked.difference.error <= 1e-6
    return checked


def test_equal_calls_are_one_and_what_follows_them_too() -> None:
    checked = check(Model(lambda m, x: x.cos().sin() + x.cos().sin()), torch.randn(4))
    assert checked.ops() == ["aten.cos", "aten.sin", "aten.add"]


def test_calls_with_lists_and_keywords_are_compared() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return x.sum((0, 1), keepdim=True) + x.sum((0, 1), keepdim=True) + x.sum((0,), keepdim=True)

    assert check(Model(forward), torch.randn(2, 2)).ops().count("aten.sum") == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x + 1, lambda x: x + 1.0),
        (lambda x: x + True, lambda x: x + 1),
        (lambda x: x.pow(2), lambda x: x.pow(2.0)),
        (lambda x: x * 0.0, lambda x: x * -0.0),
        (lambda x: x.sum(0), lambda x: x.sum(1)),
        (lambda x: torch.full((2, 2), 1) + x, lambda x: torch.full((2, 2), 1.0) + x),
    ],
)
def test_numbers_of_another_type_or_sign_are_other_numbers(
    one: Callable[[torch.Tensor], torch.Tensor], other: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    checked = check(Model(lambda m, x: (one(x).cos(), other(x).cos())), torch.arange(4).reshape(2, 2))
    assert checked.record.edits == 0


def test_random_calls_are_not_merged() -> None:
    model = Model(lambda m, x: F.dropout(x, 0.5, training=True) - F.dropout(x, 0.5, training=True) + torch.rand(4))
    checked = testing.check_pass("common-subexpressions", model, (torch.randn(4),))
    assert checked.ops().count("aten.dropout") == 2


def test_two_rands_are_not_merged() -> None:
    checked = testing.check_pass(
        "common-subexpressions", Model(lambda m, x: x + torch.rand(4) - torch.rand(4)), (torch.randn(4),)
    )
    assert checked.ops().count("aten.rand") == 2


def test_dropout_in_eval_is_pure() -> None:
    model = Model(lambda m, x: F.dropout(x, 0.5, False).cos() + F.dropout(x, 0.5, False).cos())
    assert testing.check_pass("common-subexpressions", model, (torch.randn(4),), before="").ops() == [
        "aten.dropout",
        "aten.cos",
        "aten.add",
    ]


def test_constants_of_one_memory_are_one() -> None:
    weight = torch.randn(4, 4)
    model = Model(lambda m, x: x @ m.w.t() + (x @ m.w.t()) * 2, w=weight)
    checked = check(model, torch.randn(3, 4))
    assert len(checked.program.constants) == 1


def test_equal_values_in_two_memories_are_two_constants() -> None:
    model = Model(lambda m, x: x * m.a + x * m.b, a=nn.Parameter(torch.ones(4)), b=nn.Parameter(torch.ones(4)))
    assert check(model, torch.randn(4)).record.edits == 0


def test_a_buffer_that_the_model_changes_is_read_each_time() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        before = x * m.count
        m.count.add_(1)
        result: torch.Tensor = before + x * m.count
        return result

    checked = check(Model(forward, count=torch.ones(())), torch.ones(2))
    assert checked.ops().count("aten.mul") == 2


@pytest.mark.parametrize(
    "outputs",
    [
        lambda x: (x.cos(), x.cos()),
        lambda x: (x.cos().view(-1), x.cos()),
        lambda x: (x.cos().view(-1), x.cos().view(-1)),
        lambda x: (x.cos()[0], x.cos()[1], x.cos()),
    ],
)
def test_outputs_do_not_come_to_share_memory(outputs: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> None:
    x = torch.randn(2, 2)
    results = verify.run(check(Model(lambda m, x: outputs(x)), x).program, [x])
    assert len({y.untyped_storage().data_ptr() for y in results}) == len(results)


def test_a_value_is_shared_with_an_output_only_once() -> None:
    """The first cos is no output; each of the other two alone could take its place, not both."""
    x = torch.randn(4)
    checked = check(Model(lambda m, x: (x.cos().sum(), x.cos(), x.cos())), x)
    assert checked.ops().count("aten.cos") == 2
    _, a, b = verify.run(checked.program, [x])
    assert a.data_ptr() != b.data_ptr()
