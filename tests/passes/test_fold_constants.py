"""fold-constants: what depends on constants alone is computed once, within bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt import ops, testing, verify
from fxopt.passes.fold_constants import FoldConstants
from tests.passes.models import Model


def check(model: nn.Module, *inputs: Any, one: str | FoldConstants = "fold-constants") -> testing.Checked:
    checked = testing.check_pass(one, model, inputs)
    assert checked.difference.error <= 1e-6
    return checked


def test_a_chain_of_constants_is_one_constant() -> None:
    model = Model(lambda m, x: x + (m.a * m.b).exp().sum(0), a=torch.randn(3, 4), b=torch.randn(4))
    checked = check(model, torch.randn(4))
    assert checked.ops() == ["aten.add"]
    assert len(checked.program.constants) == 1


def test_what_has_no_inputs_at_all_is_constant() -> None:
    checked = check(Model(lambda m, x: x + torch.arange(4) * torch.ones(4)), torch.randn(4))
    assert checked.ops() == ["aten.add"]


def test_random_numbers_are_no_constants() -> None:
    checked = testing.check_pass("fold-constants", Model(lambda m, x: x + torch.rand(4)), (torch.randn(4),))
    assert "aten.rand" in checked.ops()


def test_uninitialised_memory_is_no_constant() -> None:
    model = Model(lambda m, x: torch.empty(4).fill_(2.0) + x)
    assert torch.equal(verify.run(check(model, torch.zeros(4)).program, [torch.zeros(4)])[0], torch.full((4,), 2.0))


def test_what_depends_on_an_input_stays() -> None:
    assert check(Model(lambda m, x: x * m.a, a=torch.randn(4)), torch.randn(4)).record.edits == 0


def test_a_result_over_the_limit_stays() -> None:
    """A (64, 64) mask made from two vectors of 64: 16,384 bytes out of 512."""
    model = Model(lambda m, x: x + (m.a[:, None] * m.a[None, :]), a=torch.randn(64))
    tight = check(model, torch.randn(64, 64), one=FoldConstants(limit=1000))
    assert "aten.mul" in tight.ops()
    assert "16,384 bytes, over the limit" in tight.reasons()
    assert check(model, torch.randn(64, 64), one=FoldConstants(limit=16_384)).ops() == ["aten.add"]


def test_a_buffer_that_the_model_changes_is_no_constant() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.count.add_(1)
        result: torch.Tensor = x * (m.count * m.fixed)
        return result

    checked = check(Model(forward, count=torch.zeros(()), fixed=torch.tensor(3.0)), torch.ones(2))
    assert checked.record.edits == 0
    assert checked.ops() == ["aten.add", "aten.mul", "aten.mul"]


def test_a_constant_that_the_caller_gets_is_made_anew_in_each_call() -> None:
    model = Model(lambda m, x: (x * 2, m.a * 2, (m.a * 3).view(-1)), a=torch.randn(2, 2))
    checked = check(model, torch.ones(1))
    assert checked.ops().count("aten.mul") == 3
    assert "who may write to it" in checked.reasons()
    first = [y.clone() for y in verify.run(checked.program, [torch.ones(1)])]
    for y in verify.run(checked.program, [torch.ones(1)]):
        y.zero_()
    assert all(torch.equal(a, b) for a, b in zip(first, verify.run(checked.program, [torch.ones(1)]), strict=True))


def test_several_results_of_one_op_are_right() -> None:
    model = Model(lambda m, x: x + torch.cat(m.a.split(2)[::-1]) + m.a.max(0).values, a=torch.randn(4))
    check(model, torch.randn(4))


def test_parts_of_a_weight_are_weights() -> None:
    """Projections of nn.MultiheadAttention for queries, keys and values of different origin."""
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    checked = check(model.eval(), torch.randn(2, 5, 8), torch.randn(2, 4, 8), torch.randn(2, 4, 8))
    assert checked.ops().count("aten.linear") == 4
    assert not {"aten.chunk", "getitem"} & set(checked.ops())
    names = [f"in_proj_{kind}_{index}" for kind in ("weight", "bias") for index in range(3)]
    assert {*names, "out_proj.weight", "out_proj.bias"} == set(checked.program.tensors())
    whole = torch.cat([checked.program.constants[name] for name in names[:3]])
    assert torch.equal(whole, model.get_parameter("in_proj_weight"))


def test_a_parametrized_weight_is_computed_once() -> None:
    model = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
    assert check(model, torch.randn(2, 4)).ops() == ["aten.linear"]


def attention(mask: Any) -> Model:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = F.scaled_dot_product_attention(x, x, x, attn_mask=mask(m, x))
        return result

    return Model(forward, visible=torch.ones(8, 8, dtype=torch.bool), zeros=torch.zeros(1, 8, 8))


@pytest.mark.parametrize(
    "mask",
    [
        lambda m, x: m.visible,
        lambda m, x: m.visible[None, None].expand(x.shape[0], 4, 8, 8),
        lambda m, x: torch.ones(x.shape[0], 1, 1, 8, dtype=torch.bool).expand(-1, -1, 8, -1),
        lambda m, x: m.zeros.expand(4, -1, -1),
    ],
)
@pytest.mark.parametrize("shapes", [None, {"args": ({0: "batch"},)}])
def test_a_mask_that_masks_nothing_goes(mask: Any, shapes: Any) -> None:
    checked = testing.check_pass("fold-constants", attention(mask), (torch.randn(2, 4, 8, 16),), dynamic_shapes=shapes)
    assert checked.ops() == ["aten.scaled_dot_product_attention"]
    assert not checked.program.constants
    assert checked.difference.error <= 1e-6


@pytest.mark.parametrize(
    "mask",
    [
        lambda m, x: m.visible.tril(),
        lambda m, x: m.zeros + torch.eye(8),
        lambda m, x: (x[..., 0] > 0)[:, :, None, :],
    ],
)
def test_a_mask_that_masks_something_stays(mask: Any) -> None:
    checked = check(attention(mask), torch.randn(2, 4, 8, 16))
    [node] = [n for n in checked.program.graph.nodes if n.name.startswith("scaled_dot_product_attention")]
    assert ops.arguments(node)["attn_mask"] is not None
