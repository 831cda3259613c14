"""Capture: outputs keep their structure."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import fxopt
from fxopt.capture import capture
from tests.core.captured import Answer, X, check, run
from tests.passes.models import Model


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: Any


Pair = namedtuple("Pair", ["left", "right"])


class Typed(NamedTuple):
    a: torch.Tensor
    b: int


class Plain:
    """An object that pytree does not know."""

    def __init__(self, tensor: torch.Tensor, label: str) -> None:
        self.tensor = tensor
        self.label = label


@pytest.mark.parametrize(
    "answer",
    [
        lambda y: y,
        lambda y: (y,),
        lambda y: [y, y + 1],
        lambda y: (y, None, 3, True, 2.5, "text"),
        lambda y: {"b": y, "a": (y + 1, [y + 2])},
        lambda y: OrderedDict(z=y, a=y + 1),
        lambda y: {1: y, (2, 3): y + 1},
        lambda y: Pair(y, {"x": y + 1}),
        lambda y: Typed(y, 4),
        lambda y: Answer(y, (y + 1, y + 2)),
        lambda y: Answer(y),
        lambda y: Frozen([y, None]),
        lambda y: (y, y, y),
        lambda y: ((), y, []),
    ],
)
def test_outputs_keep_their_structure(answer: Callable[[torch.Tensor], Any]) -> None:
    check(Model(lambda m, x: answer(x * 2)), X)


def test_a_plain_object_keeps_its_other_attributes() -> None:
    result = run(capture(Model(lambda m, x: Plain(x * 2, "logits")), (X,)), X)
    assert isinstance(result, Plain)
    assert result.label == "logits"
    assert torch.equal(result.tensor, X * 2)


def test_the_outputs_of_a_transformer_are_its_own_class() -> None:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    model = Model(lambda m, x: BaseModelOutputWithPooling(last_hidden_state=x * 2, hidden_states=(x, x + 1)))
    result = run(capture(model, (X,)), X)
    assert type(result) is BaseModelOutputWithPooling
    assert result.pooler_output is None
    assert torch.equal(result["last_hidden_state"], X * 2)
    assert len(result.hidden_states) == 2


def test_an_input_can_be_an_output() -> None:
    check(Model(lambda m, x, y: (x, x + y, y)), X, X + 1)


def test_a_parameter_can_be_an_output() -> None:
    check(Model(lambda m, x: (x, m.w), w=nn.Parameter(torch.ones(2))), X)


def test_no_tensor_output_at_all() -> None:
    check(Model(lambda m, x: (1, None)), X)


def test_a_size_can_be_an_output() -> None:
    captured = capture(Model(lambda m, x: (x * 2, x.shape[0])), (X,), None, ((({0: "b"},)),))
    assert run(captured, torch.ones(5, 3))[1] == 5


def test_output_names_are_readable_and_unique() -> None:
    captured = capture(Model(lambda m, x: {"logits": x + 1, "cache": (x + 2, [x + 3])}), (X,))
    assert [leaf.name for leaf in captured.program.signature.outputs] == ["logits", "cache_0", "cache_1_0"]
    captured = capture(Model(lambda m, x: (x + 1, (x + 2, [x + 3]))), (X,))
    assert [leaf.name for leaf in captured.program.signature.outputs] == ["output_0", "output_1_0", "output_1_1_0"]


def test_an_output_that_refers_to_itself_is_refused() -> None:
    def forward(m: Any, x: torch.Tensor) -> Plain:
        result = Plain(x * 2, "loop")
        result.label = result  # type: ignore[assignment]
        return result

    with pytest.raises(fxopt.InputError, match="Plain among the inputs or outputs refers back to itself"):
        capture(Model(forward), (X,))
