"""merge-linears: linears over one input become one, unless that would change something or bring nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxopt import testing
from fxopt.passes.merge_linears import MergeLinears
from fxopt.sparsity import Pattern
from tests.passes.models import Model

BEFORE = ("canonicalize", "fuse-conv-bn-relu")


def check(model: nn.Module, *inputs: Any, one: str | MergeLinears = "merge-linears", **options: Any) -> testing.Checked:
    checked = testing.check_pass(one, model, inputs, before=BEFORE, **options)
    assert checked.difference.error <= 1e-5
    return checked


def attention(m: Any, x: torch.Tensor) -> Any:
    query, key, value = (layer(x) for layer in (m.query, m.key, m.value))
    return torch.softmax(query @ key.transpose(-1, -2), -1) @ value


def layers(*biases: bool) -> dict[str, nn.Module]:
    return {n: nn.Linear(8, 6, bias=b) for n, b in zip(("query", "key", "value"), biases, strict=True)}


@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, False, True)])
def test_query_key_and_value_are_one_linear(biases: tuple[bool, bool, bool]) -> None:
    checked = check(Model(attention, **layers(*biases)), torch.randn(2, 5, 8))
    assert checked.ops().count("aten.linear") == 1
    assert checked.ops().count("aten.slice") == 3
    weights = [t for t in checked.program.tensors().values() if t.dim() == 2]
    assert [tuple(w.shape) for w in weights] == [(18, 8)]
    assert ("merged_bias" in checked.text) is any(biases)


def test_linears_of_different_sizes_merge() -> None:
    model = Model(lambda m, x: m.a(x).sum(-1) + m.b(x).cos().sum(-1), a=nn.Linear(8, 3), b=nn.Linear(8, 5))
    assert check(model, torch.randn(4, 8)).ops().count("aten.linear") == 1


def test_a_vector_input_merges() -> None:
    model = Model(lambda m, x: m.a(x).sum() + m.b(x).sum(), a=nn.Linear(8, 3), b=nn.Linear(8, 5))
    assert check(model, torch.randn(8)).ops().count("aten.linear") == 1


def test_a_dynamic_batch_merges() -> None:
    checked = check(_Attention(), torch.randn(2, 5, 8), dynamic_shapes=({0: "batch", 1: "length"},))
    assert checked.ops().count("aten.linear") == 1


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, layer in layers(True, True, True).items():
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = attention(self, x)
        return result


def test_a_linear_with_an_activation_stays_alone() -> None:
    model = Model(
        lambda m, x: (m.query(x).relu() + m.key(x).cos() + m.value(x).sin()).cos(), **layers(True, True, True)
    )
    checked = check(model, torch.randn(4, 8))
    assert checked.ops().count("fxopt.linear") == 1
    assert checked.ops().count("aten.linear") == 1


def test_linears_over_different_inputs_stay() -> None:
    model = Model(lambda m, x, y: m.a(x).cos() + m.b(y).cos(), a=nn.Linear(8, 3), b=nn.Linear(8, 3))
    assert check(model, torch.randn(4, 8), torch.randn(4, 8)).record.edits == 0


def test_shared_weights_stay() -> None:
    parts = layers(True, True, True)
    parts["key"].weight = parts["query"].weight
    checked = check(Model(attention, **parts), torch.randn(2, 5, 8))
    assert checked.record.edits == 0
    assert "its weight is shared" in checked.reasons()


def test_a_linear_used_twice_stays() -> None:
    model = Model(lambda m, x: m.b(m.a(x).cos() + m.a(x.cos())).cos() + m.c(x), a=nn.Linear(8, 8), b=nn.Linear(8, 8),
                  c=nn.Linear(8, 8))  # fmt: skip
    checked = check(model, torch.randn(4, 8))
    assert "its weight is shared" in checked.reasons()


def test_a_linear_that_is_an_output_stays() -> None:
    model = Model(lambda m, x: (m.a(x), m.b(x).cos()), a=nn.Linear(8, 3), b=nn.Linear(8, 3))
    checked = check(model, torch.randn(4, 8))
    assert checked.record.edits == 0
    assert "an output of the model" in checked.reasons()


def test_a_linear_whose_strides_are_read_stays() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts = self.first(x).view(4, 2, 4).transpose(0, 1)
            result: torch.Tensor = parts.as_strided((2, 3, 2, 4), (4, 8, 8, 1)) + self.second(x).sum()
            return result

    checked = check(Windows(), torch.randn(4, 8))
    assert checked.record.edits == 0
    assert "its strides are read" in checked.reasons()


def test_a_computed_weight_stays() -> None:
    model = Model(
        lambda m, x, w: nn.functional.linear(x, w).cos() + m.a(x).cos() + m.b(x).cos(),
        a=nn.Linear(8, 3),
        b=nn.Linear(8, 3),
    )
    checked = check(model, torch.randn(4, 8), torch.randn(3, 8))
    assert checked.ops().count("aten.linear") == 2
    assert "not constant" in checked.reasons()


def test_a_weight_that_the_model_changes_stays() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.w.mul_(2)
        result: torch.Tensor = nn.functional.linear(x, m.w).cos() + m.a(x).cos()
        return result

    checked = check(Model(forward, w=torch.randn(3, 8), a=nn.Linear(8, 3)), torch.randn(4, 8))
    assert checked.ops().count("aten.linear") == 2


def test_n_of_m_sparse_weights_merge_among_themselves() -> None:
    model = Model(attention, **layers(True, True, True))
    with torch.no_grad():
        for name in ("query.weight", "key.weight"):
            model.get_parameter(name)[:, ::2] = 0
    checked = check(model, torch.randn(2, 5, 8))
    weights = [t for t in checked.program.tensors().values() if t.dim() == 2]
    assert sorted(tuple(w.shape) for w in weights) == [(6, 8), (12, 8)]
    assert any(Pattern().holds(w) for w in weights)
    assert "not all N:M sparse alike" in checked.reasons()


def test_large_weights_are_not_copied() -> None:
    model = Model(lambda m, x: m.a(x).cos() + m.b(x).cos(), a=nn.Linear(8, 3), b=nn.Linear(8, 3))
    checked = check(model, torch.randn(4, 8), one=MergeLinears(limit=47))
    assert checked.record.edits == 0
    assert "over 47 elements" in checked.reasons()
    assert check(model, torch.randn(4, 8), one=MergeLinears(limit=48)).record.edits > 0
