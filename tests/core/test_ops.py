"""The op table, the fused ops, costs, and the reference interpreter."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from fxopt import cost, fused, ops
from fxopt.capture import capture
from fxopt.execute import evaluate
from tests.passes.models import CONVS, Model, chain, image

aten = torch.ops.aten
X = torch.linspace(-1, 1, 8).reshape(2, 4)


def call(function: Callable[..., Any], *inputs: Any) -> fx.Node:
    """The last call that *function* makes."""
    graph = capture(Model(lambda m, *xs: function(*xs)), inputs or (X,)).program.graph
    node: fx.Node = [n for n in graph.nodes if n.op == "call_function"][-1]
    return node


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda x: F.relu(x), "activation"),
        (lambda x: F.hardtanh(x, -2, 2), "activation"),
        (lambda x: x.clamp(0, 1), "activation"),
        (lambda x: x.clamp(max=1), "elementwise"),
        (lambda x: F.elu(x, 0.3), "activation"),
        (lambda x: F.selu(x), "elementwise"),
        (lambda x: x + 1, "add"),
        (lambda x: x.cos(), "elementwise"),
        (lambda x: x @ x.t(), "matmul"),
        (lambda x: x.view(-1), "shape"),
        (lambda x: x.view(torch.int32), "bits"),
        (lambda x: x.t(), "permute"),
        (lambda x: x[0], "select"),
        (lambda x: x.softmax(-1), "softmax"),
        (lambda x: x.double(), "cast"),
        (lambda x: x.sort()[0], "getitem"),
        (lambda x: torch.fft.fft(x), "unknown"),
        (lambda x: x.cumsum(0), "unknown"),
        (lambda x: F.dropout(x), "dropout"),
    ],
)
def test_kinds(function: Callable[..., Any], kind: str) -> None:
    assert ops.kind(call(function)) == kind


def test_kinds_of_what_is_no_call() -> None:
    graph = capture(chain(nn.Linear(4, 4)), (X,)).program.graph
    assert [ops.kind(n) for n in graph.nodes] == ["placeholder", "get_attr", "get_attr", "linear", "output"]
    assert [ops.packet(n) for n in graph.nodes] == ["", "", "", "linear", ""]


def test_arguments_have_names_and_defaults() -> None:
    node = call(lambda x: F.leaky_relu(x))
    assert ops.arguments(node) == {"self": node.args[0], "negative_slope": 0.01}
    assert ops.activation(node) == ("leaky_relu", (0.01,))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: F.relu6(x), ("hardtanh", (0.0, 6.0))),
        (lambda x: x.clamp(min=0), ("relu", ())),
        (lambda x: x.clamp_min(0), ("relu", ())),
        (lambda x: x.clamp_min(1), None),
        (lambda x: x.clamp(min=0, max=6), ("hardtanh", (0.0, 6.0))),
        (lambda x: x.clamp(min=x.sum()), None),
        (lambda x: F.gelu(x, approximate="tanh"), ("gelu_tanh", ())),
        (lambda x: F.celu(x), None),
        (lambda x: x.cos(), None),
    ],
)
def test_activations(function: Callable[..., Any], name: Any) -> None:
    node = call(function)
    assert ops.activation(node) == name
    if name is not None:
        assert torch.allclose(ops.ACTIVATIONS[name[0]](X * 5, *name[1]), function(X * 5))


def test_randomness() -> None:
    assert ops.is_random(call(lambda x: F.dropout(x)))
    assert not ops.is_random(call(lambda x: F.dropout(x, training=False)))
    assert ops.is_random(call(lambda x: torch.rand(3)))
    assert ops.is_random(call(lambda x: torch.bernoulli(x.sigmoid())))
    assert ops.is_random(call(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)))
    assert not ops.is_random(call(lambda x: F.scaled_dot_product_attention(x, x, x)))
    assert not ops.is_random(call(lambda x: x.cos()))


def test_purity() -> None:
    assert ops.is_pure(call(lambda x: x.cos()))
    assert ops.is_pure(call(lambda x: x.sort()[0]))
    assert not ops.is_pure(call(lambda x: torch.rand(3)))
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert not ops.is_pure(graph.call_function(aten.relu_.default, (x,)))
    assert not ops.is_pure(graph.call_function(aten._assert_async.default, (x,)))
    assert not ops.is_pure(graph.call_function(print, (x,)))
    assert ops.is_pure(graph.call_function(operator.add, (1, 2)))


@pytest.mark.parametrize(
    ("function", "view"),
    [
        (lambda x: x.view(-1), True),
        (lambda x: x.reshape(-1), True),
        (lambda x: x.t(), True),
        (lambda x: x[0], True),
        (lambda x: x.chunk(2)[0], True),
        (lambda x: x.t().contiguous(), True),
        (lambda x: F.dropout(x, 0.5, False), True),
        (lambda x: x.expand(2, 4), True),
        (lambda x: x.float(), True),
        (lambda x: x.clone(), False),
        (lambda x: x + 0, False),
        (lambda x: x.relu(), False),
    ],
)
def test_views(function: Callable[..., Any], view: bool) -> None:
    assert ops.is_view(call(function)) is view


def test_what_is_lent_out() -> None:
    def forward(x: torch.Tensor) -> Any:
        a = x.cos()
        b = a.view(-1)
        return b[:2], x.sin().view(-1).clone(), a.tan()

    graph = capture(Model(lambda m, x: forward(x)), (X,)).program.graph
    lent = {n.name for n in ops.lent_out(graph)}
    assert {"cos", "view", "slice_1", "clone", "tan"} <= lent
    assert not {"sin", "view_1", "args_0"} & lent


def test_functional_twins() -> None:
    assert ops.functional(aten.relu_.default) is aten.relu.default
    assert ops.functional(aten.add_.Tensor) is aten.add.Tensor
    assert ops.functional(aten.copy_.default) is aten.copy.default
    assert ops.functional(aten.set_.source_Tensor) is None or not aten.set.source_Tensor._schema.is_mutable


def test_precision() -> None:
    assert ops.precision(call(lambda x: x @ x.t())) == "low"
    assert ops.precision(call(lambda x: x.view(-1))) == "follow"
    assert ops.precision(call(lambda x: x.exp())) == "full"
    assert ops.precision(call(lambda x: torch.fft.fft(x))) == "same"
    assert ops.precision(call(lambda x: x.view(torch.int32))) == "same"
    assert ops.precision(call(lambda x: x.type_as(X.double()))) == "same"
    assert ops.precision(call(lambda x: x.double())) == "full"


# --- fused ops


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", ["none", "relu", "hardtanh", "leaky_relu"])
def test_a_fused_conv_is_what_it_says(dims: int, name: str) -> None:
    options = {"none": [], "relu": [], "hardtanh": [0.0, 6.0], "leaky_relu": [0.2]}[name]
    conv = CONVS[dims](4, 4, 3, padding=1, groups=2)
    x, residual = image(dims), image(dims)
    numbers = ([1] * dims, [1] * dims, [1] * dims, 2)
    y = fused.CONV[dims](x, conv.weight, conv.bias, residual, *numbers, name, options)
    assert torch.allclose(y, ops.ACTIVATIONS[name](conv(x) + residual, *options))


def test_gradients_flow_through_fused_ops() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    fused.LINEAR(X, weight, None, torch.randn(2, 3), "silu", []).sum().backward()
    assert weight.grad is not None
    assert float(weight.grad.abs().sum()) > 0


def test_export_keeps_fused_ops_and_decomposes_them_on_request() -> None:
    model = Model(lambda m, x: fused.LINEAR(x, m.w, None, None, "relu", []), w=nn.Parameter(torch.randn(3, 4)))
    exported = torch.export.export(model, (X,))
    assert "fxopt.linear" in str(exported.graph)
    assert "relu" in str(exported.run_decompositions().graph)
    assert "fxopt.linear" not in str(exported.run_decompositions().graph)


# --- costs and the interpreter


@pytest.mark.parametrize(
    ("model", "inputs", "macs"),
    [
        (nn.Linear(4, 3), torch.randn(5, 4), 5 * 4 * 3),
        (nn.Conv2d(4, 8, 3, groups=2), torch.randn(1, 4, 6, 6), 16 * 8 * 2 * 9),
        (nn.ConvTranspose2d(4, 8, 3, groups=2), torch.randn(1, 4, 6, 6), 36 * 4 * 4 * 9),
        (Model(lambda m, x: x @ x.t()), torch.randn(5, 4), 5 * 5 * 4),
        (Model(lambda m, x: F.scaled_dot_product_attention(x, x, x)), torch.randn(1, 5, 4), 2 * 5 * 4 * 5),
        (Model(lambda m, x: torch.addmm(x, x, x)), torch.randn(4, 4), 64),
        (Model(lambda m, x: torch.einsum("ij,jk->ik", x, x)), torch.randn(4, 4), 0),
        (nn.BatchNorm2d(4), torch.randn(1, 4, 6, 6), 0),
    ],
)
def test_macs(model: nn.Module, inputs: torch.Tensor, macs: int) -> None:
    assert cost.macs(capture(model, (inputs,)).program) == macs


def test_macs_of_a_dynamic_batch_are_those_of_the_example() -> None:
    program = capture(nn.Linear(4, 3), (torch.randn(5, 4),), None, ({0: "n"},)).program
    assert cost.macs(program) == 5 * 4 * 3


def test_evaluate_frees_observes_and_replaces() -> None:
    program = capture(chain(nn.Linear(4, 4), nn.ReLU()), (X,)).program
    seen: list[str] = []
    zeros = {name: torch.zeros_like(t) for name, t in program.constants.items()}
    (y,) = evaluate(program, [X], constants=zeros, observe=lambda node, value: seen.append(node.name))
    assert torch.equal(y, torch.zeros(2, 4))
    assert seen == [n.name for n in program.graph.nodes if n.op != "output"]


def test_evaluate_names_the_node_that_failed() -> None:
    program = capture(chain(nn.Linear(4, 4)), (X,)).program
    with pytest.raises(RuntimeError, match=r"linear = aten\.linear\.default failed"):
        evaluate(program, [torch.ones(2, 3)])
