"""fuse-conv-bn-relu: folding of batch_norm in both directions, and weights that must not be folded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt import testing
from tests.passes.models import CONVS, NORMS, TRANSPOSED, Model, chain, image, settle

PASS = "fuse-conv-bn-relu"
TIGHT = 1e-5
"""Largest error that folding in float64 and rounding once may leave in fp32, relative to the range."""


def check(model: nn.Module, *inputs: Any) -> testing.Checked:
    checked = testing.check_pass(PASS, model, inputs)
    assert checked.difference.error <= TIGHT
    return checked


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_batch_norm_folds_into_the_conv_before_it(dims: int, groups: int, bias: bool) -> None:
    conv = CONVS[dims](4, 8, 3, stride=2, padding=1, groups=groups, bias=bias)
    assert check(chain(conv, NORMS[dims](8)), image(dims)).ops() == [f"aten.conv{dims}d"]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_batch_norm_folds_into_the_transposed_conv_before_it(dims: int, groups: int) -> None:
    conv = TRANSPOSED[dims](4, 8, 3, stride=2, padding=1, output_padding=1, groups=groups)
    assert check(chain(conv, NORMS[dims](8)), image(dims)).ops() == [f"aten.conv_transpose{dims}d"]


@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_folds_into_the_linear_before_and_after_it(bias: bool) -> None:
    assert check(chain(nn.Linear(4, 8, bias=bias), nn.BatchNorm1d(8)), torch.randn(3, 4)).ops() == ["aten.linear"]
    assert check(chain(nn.BatchNorm1d(4), nn.Linear(4, 8, bias=bias)), torch.randn(3, 4)).ops() == ["aten.linear"]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_batch_norm_folds_into_the_conv_after_it(dims: int, groups: int) -> None:
    conv = CONVS[dims](4, 8, 3, groups=groups, bias=groups != 2)
    assert check(chain(NORMS[dims](4), conv), image(dims)).ops() == [f"aten.conv{dims}d"]


def test_batch_norm_stays_before_a_conv_that_pads() -> None:
    checked = check(chain(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=1)), image())
    assert checked.ops() == ["aten.batch_norm", "aten.conv2d"]
    assert "pads with zeros" in checked.reasons()


def test_batch_norm_stays_before_a_conv_that_pads_along_one_axis() -> None:
    checked = check(chain(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=(0, 1))), image())
    assert checked.ops() == ["aten.batch_norm", "aten.conv2d"]


def test_batch_norm_between_two_convs_goes_into_the_first() -> None:
    checked = check(chain(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), image())
    assert checked.ops() == ["aten.conv2d", "aten.conv2d"]
    assert [name for name in checked.program.constants if "folded" in name] == ["0.folded_weight", "0.folded_bias"]


def test_batch_norm_without_affine_parameters_folds() -> None:
    assert check(chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False)), image()).ops() == ["aten.conv2d"]


def test_double_models_fold_in_double() -> None:
    model = chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    checked = testing.check_pass(PASS, model, (image().double(),))
    assert checked.ops() == ["fxopt.conv2d"]
    assert checked.difference.error <= 1e-14
    assert all(t.dtype is torch.float64 for t in checked.program.tensors().values())


@pytest.mark.parametrize(
    ("variance", "gamma", "beta", "mean"),
    [(1e-12, 1.0, 0.0, 0.0), (1.0, 1e4, 0.0, 1.0), (1.0, 0.0, 3.0, 1.0), (1e6, -2.0, 1.0, 50.0), (0.0, 1.0, 0.0, 0.0)],
)
def test_extreme_statistics(variance: float, gamma: float, beta: float, mean: float) -> None:
    norm = nn.BatchNorm2d(4)
    model = chain(nn.Conv2d(4, 4, 3), norm)
    for tensor, value in (
        (norm.running_var, variance),
        (norm.weight, gamma),
        (norm.bias, beta),
        (norm.running_mean, mean),
    ):
        assert tensor is not None
        tensor.data.fill_(value)
    assert check(model, image()).ops() == ["aten.conv2d"]


# --- shared and computed weights


def test_a_conv_used_twice_with_different_norms_is_left_alone() -> None:
    model = Model(
        lambda m, x: m.second(m.conv(m.first(m.conv(x)).relu())),
        conv=nn.Conv2d(4, 4, 3),
        first=nn.BatchNorm2d(4),
        second=nn.BatchNorm2d(4),
    )
    checked = check(model, image())
    assert checked.ops().count("aten.batch_norm") == 2
    assert "weight shared with conv2d" in checked.reasons()


def test_a_conv_used_with_and_without_norm_is_left_alone() -> None:
    model = Model(lambda m, x: m.norm(m.conv(x)) + m.conv(x + 1), conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4))
    checked = check(model, image())
    assert "aten.batch_norm" in checked.ops()
    assert "weight shared with" in checked.reasons()


def test_a_pair_used_twice_is_folded_once() -> None:
    model = Model(lambda m, x: m.norm(m.conv(m.norm(m.conv(x)))), conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4))
    checked = check(model, image())
    assert checked.ops() == ["aten.conv2d", "aten.conv2d"]
    assert set(checked.program.constants) == {"conv.folded_weight", "conv.folded_bias"}


def test_a_pair_used_twice_the_other_way_round_is_folded_once() -> None:
    model = Model(
        lambda m, x: m.conv(m.norm(m.conv(m.norm(x)).tanh().sin())), conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4)
    )
    checked = check(model, image())
    assert "aten.batch_norm" not in checked.ops()
    assert set(checked.program.constants) == {"conv.folded_weight", "conv.folded_bias"}


def test_tied_weights_are_left_alone() -> None:
    one, other = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    other.weight = one.weight
    model = Model(lambda m, x: m.norm(m.one(x)) + m.other(x), one=one, other=other, norm=nn.BatchNorm2d(4))
    checked = check(model, image())
    assert "aten.batch_norm" in checked.ops()
    assert "weight shared with" in checked.reasons()


def test_a_weight_that_is_an_output_too_is_left_alone() -> None:
    model = Model(lambda m, x: (m.norm(m.conv(x)), m.conv.weight), conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4))
    checked = check(model, image())
    assert "aten.batch_norm" in checked.ops()
    assert "weight shared with output" in checked.reasons()


def test_a_weight_tied_to_an_embedding_is_left_alone() -> None:
    """The other user of the weight is no conv and has no bias."""
    table, layer = nn.Embedding(4, 4), nn.Linear(4, 4)
    layer.weight = table.weight
    model = Model(
        lambda m, i, x: m.norm(m.table(i)) + m.other(m.layer(x)),
        table=table,
        layer=layer,
        norm=nn.BatchNorm1d(4),
        other=nn.BatchNorm1d(4),
    )
    checked = check(model, torch.tensor([0, 3, 1]), torch.randn(3, 4))
    assert checked.ops().count("aten.batch_norm") == 2
    assert "weight shared with embedding" in checked.reasons()


def test_a_conv_result_used_elsewhere_keeps_its_norm() -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.conv(x)
        return m.norm(y) + y

    checked = check(Model(forward, conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4)), image())
    assert "aten.batch_norm" in checked.ops()
    assert "conv2d is also used by add" in checked.reasons()


def test_a_norm_used_by_two_convs_stays() -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.norm(x)
        return m.a(y) + m.b(y)

    checked = check(Model(forward, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)), image())
    assert "aten.batch_norm" in checked.ops()
    assert "batch_norm is also used by" in checked.reasons()


def test_a_computed_weight_is_left_alone() -> None:
    def forward(m: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = m.norm(F.conv2d(x, w))
        return result

    checked = check(Model(forward, norm=nn.BatchNorm2d(4)), image(), torch.randn(4, 4, 3, 3))
    assert checked.ops() == ["aten.conv2d", "aten.batch_norm"]
    assert "is computed, not constant" in checked.reasons()


def test_statistics_of_the_batch_are_left_alone() -> None:
    model = chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    checked = check(model, image())
    assert checked.ops() == ["aten.conv2d", "aten.batch_norm"]
    assert "statistics of the batch" in checked.reasons()


def test_statistics_that_the_model_changes_are_left_alone() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.norm.running_mean.add_(0.5)
        result: torch.Tensor = m.norm(m.conv(x))
        return result

    checked = check(Model(forward, conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4)), image())
    assert "aten.batch_norm" in checked.ops()
    assert "running_mean of batch_norm is computed, not constant" in checked.reasons()


def test_an_unbatched_conv_before_a_norm_is_left_alone() -> None:
    """(C, L) out of an unbatched conv1d is, to the norm, C samples of L features."""
    model = Model(lambda m, x: m.norm(m.conv(x)), conv=nn.Conv1d(4, 5, 3), norm=nn.BatchNorm1d(4))
    checked = check(model, torch.randn(4, 6))
    assert checked.ops() == ["aten.conv1d", "aten.batch_norm"]
    assert "no batch axis" in checked.reasons()


def test_an_unbatched_conv_after_a_norm_is_left_alone() -> None:
    model = Model(lambda m, x: m.conv(m.norm(x)), conv=nn.Conv1d(4, 5, 3), norm=nn.BatchNorm1d(6))
    checked = check(model, torch.randn(4, 6))
    assert checked.ops() == ["aten.batch_norm", "aten.conv1d"]
    assert "no batch axis" in checked.reasons()


def test_a_norm_along_another_axis_than_the_linears_is_left_alone() -> None:
    after = Model(lambda m, x: m.norm(m.layer(x)), layer=nn.Linear(4, 4), norm=nn.BatchNorm1d(4))
    before = Model(lambda m, x: m.layer(m.norm(x)), layer=nn.Linear(4, 4), norm=nn.BatchNorm1d(4))
    for model in (after, before):
        checked = check(model, torch.randn(2, 4, 4))
        assert "aten.batch_norm" in checked.ops()
        assert "another axis" in checked.reasons()


def test_folding_leaves_the_users_weights_alone() -> None:
    model = chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check(model, image())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_dynamic_batch_folds_the_same() -> None:
    model = settle(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    checked = testing.check_pass(PASS, model, (image(),), dynamic_shapes=({0: "batch"},))
    assert checked.ops() == ["fxopt.conv2d"]
