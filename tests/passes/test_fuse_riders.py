"""fuse-conv-bn-relu: activations and residual adds that ride on a conv or linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt import ops
from tests.passes.models import CONVS, Model, chain, image
from tests.passes.test_fuse_conv_bn_relu import check

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "hardtanh": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": lambda x: F.elu(x, 0.7),
    "mish": F.mish,
}


def test_every_activation_of_the_op_table_is_tested() -> None:
    assert set(ACTIVATIONS) == set(ops.ACTIVATIONS) - {"none"}


@pytest.mark.parametrize("layer", ["conv1d", "conv2d", "conv3d", "linear"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_rides_on_its_producer(name: str, layer: str) -> None:
    producer = nn.Linear(4, 8) if layer == "linear" else CONVS[int(layer[4])](4, 8, 3)
    inputs = torch.randn(3, 4) if layer == "linear" else image(int(layer[4]))
    checked = check(Model(lambda m, x: ACTIVATIONS[name](m.layer(x)), layer=producer), inputs)
    assert checked.ops() == [f"fxopt.{layer}"]
    (node,) = [n for n in checked.program.graph.nodes if n.op == "call_function"]
    assert ops.arguments(node)["activation"] == name


@pytest.mark.parametrize(
    ("clamp", "name"),
    [
        (lambda x: x.clamp(min=0), "relu"),
        (lambda x: x.clamp(0, 6), "hardtanh"),
        (lambda x: F.hardtanh(x, -2.0, 0.5), "hardtanh"),
    ],
)
def test_clamps_are_activations(clamp: Callable[[torch.Tensor], torch.Tensor], name: str) -> None:
    checked = check(Model(lambda m, x: clamp(m.conv(x)), conv=nn.Conv2d(4, 4, 3)), image())
    assert checked.ops() == ["fxopt.conv2d"]
    assert f"activation={name}" in checked.text


@pytest.mark.parametrize("clamp", [lambda x: x.clamp(min=0.5), lambda x: x.clamp(max=6), lambda x: x.clamp(min=-1)])
def test_one_sided_clamps_are_none(clamp: Callable[[torch.Tensor], torch.Tensor]) -> None:
    checked = check(Model(lambda m, x: clamp(m.conv(x)), conv=nn.Conv2d(4, 4, 3)), image())
    assert checked.ops()[0] == "aten.conv2d"


def test_the_whole_chain_becomes_one_op() -> None:
    model = chain(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
    assert check(model, image()).ops() == ["fxopt.conv2d"]


def test_a_second_activation_stays() -> None:
    checked = check(chain(nn.Conv2d(4, 4, 3), nn.Tanh(), nn.ReLU()), image())
    assert checked.ops() == ["fxopt.conv2d", "aten.relu"]
    assert "already has an activation" in checked.reasons()


def test_an_activation_of_a_conv_with_two_users_stays() -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.conv(x)
        return y.relu(), y * 2

    checked = check(Model(forward, conv=nn.Conv2d(4, 4, 3)), image())
    assert checked.ops() == ["aten.conv2d", "aten.relu", "aten.mul"]
    assert "is also used by mul" in checked.reasons()


def test_an_activation_of_an_output_stays() -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.conv(x)
        return y, y.relu()

    checked = check(Model(forward, conv=nn.Conv2d(4, 4, 3)), image())
    assert checked.ops() == ["aten.conv2d", "aten.relu"]
    assert "is also used by output" in checked.reasons()


# --- residual adds


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_residual_rides_on_the_conv_in_either_order(first: bool, relu: bool) -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.norm(m.conv(x))
        y = y + x if first else x + y
        return y.relu() if relu else y

    model = Model(forward, conv=nn.Conv2d(4, 4, 3, padding=1), norm=nn.BatchNorm2d(4))
    checked = check(model, image())
    assert checked.ops() == ["fxopt.conv2d"]
    assert ("activation=relu" in checked.text) is relu


def test_an_in_place_residual_rides_too() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = m.conv(x)
        y += x
        return y.relu_()

    assert check(Model(forward, conv=nn.Conv2d(4, 4, 3, padding=1)), image()).ops() == ["fxopt.conv2d"]


@pytest.mark.parametrize("swapped", [True, False])
def test_of_two_convs_the_later_one_takes_the_add(swapped: bool) -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        a, b = m.down(x), m.norm(m.conv(x))
        return (b + a if swapped else a + b).relu()

    parts = {"down": nn.Conv2d(4, 4, 1), "conv": nn.Conv2d(4, 4, 3, padding=1), "norm": nn.BatchNorm2d(4)}
    checked = check(Model(forward, **parts), image())
    assert checked.ops() == ["aten.conv2d", "fxopt.conv2d"]
    assert "fxopt.conv2d(%args_0, %0) {weight=@conv.folded_weight" in checked.text


def test_a_residual_rides_on_a_linear() -> None:
    model = Model(lambda m, x: x + m.layer(x), layer=nn.Linear(4, 4))
    assert check(model, torch.randn(2, 3, 4)).ops() == ["fxopt.linear"]


def test_a_residual_that_comes_after_an_activation_stays() -> None:
    model = Model(lambda m, x: m.conv(x).relu() + x, conv=nn.Conv2d(4, 4, 3, padding=1))
    assert check(model, image()).ops() == ["fxopt.conv2d", "aten.add"]


@pytest.mark.parametrize(
    ("add", "reason"),
    [
        (lambda y, x: torch.add(y, x, alpha=2), "scaled"),
        (lambda y, x: y + x[:, :1], "another shape"),
        (lambda y, x: y + x.mean((2, 3), keepdim=True), "another shape"),
        (lambda y, x: y + 1.5, "a number is added"),
        (lambda y, x: y + y, "is the conv itself"),
        (lambda y, x: y + x.double(), "another shape or dtype"),
    ],
)
def test_other_adds_stay(add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], reason: str) -> None:
    model = Model(lambda m, x: add(m.conv(x), x), conv=nn.Conv2d(4, 4, 3, padding=1))
    checked = check(model, image())
    assert checked.ops()[-1] == "aten.add"
    assert "fxopt.conv2d" not in checked.ops()
    assert reason in checked.reasons()


def test_a_conv_that_broadcasts_into_the_sum_keeps_the_add() -> None:
    model = Model(lambda m, x, y: y + m.conv(x), conv=nn.Conv2d(4, 4, 3, padding=1))
    checked = check(model, image(batch=1), image(batch=3))
    assert checked.ops() == ["aten.conv2d", "aten.add"]


def test_a_residual_made_from_the_conv_itself_stays() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        result: torch.Tensor = y + torch.sigmoid(y)
        return result

    checked = check(Model(forward, conv=nn.Conv2d(4, 4, 3)), image())
    assert checked.ops() == ["aten.conv2d", "aten.sigmoid", "aten.add"]
