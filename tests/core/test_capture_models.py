"""Capture: kinds of models, and what cannot be captured."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.capture import capture
from tests.core.captured import X, check, run, same
from tests.passes.models import Model, chain, image


def test_an_exported_program() -> None:
    model = chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    exported = torch.export.export(model, (image(),))
    before = str(exported.graph)
    captured = capture(exported, ())
    assert same(run(captured, image() * 0 + 1), model(image() * 0 + 1).detach())
    assert str(exported.graph) == before


def test_an_exported_program_with_in_place_ops_is_left_as_it_is() -> None:
    exported = torch.export.export(chain(nn.Linear(3, 3), nn.ReLU(inplace=True)), (X,))
    before = str(exported.graph)
    assert "aten.relu_.default" in before
    assert "aten.relu_.default" not in str(capture(exported, (X,)).program.graph)
    assert str(exported.graph) == before


def test_an_exported_program_keeps_its_dynamic_sizes() -> None:
    exported = torch.export.export(nn.Linear(3, 4).eval(), (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert run(capture(exported, ()), torch.ones(7, 3)).shape == (7, 4)


def test_an_exported_program_without_example_inputs_needs_some() -> None:
    exported = torch.export.export(nn.Linear(3, 4).eval(), (X,))
    exported.example_inputs = None
    with pytest.raises(fxopt.InputError):
        capture(exported, ())
    assert run(capture(exported, (X,)), X).shape == (2, 4)


@pytest.mark.parametrize("trace", [torch.fx.symbolic_trace, lambda m: torch.export.export(m, (image(),)).module()])
def test_a_graph_module(trace: Callable[[nn.Module], nn.Module]) -> None:
    model = chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    traced = trace(model)
    assert isinstance(traced, torch.fx.GraphModule)
    check(traced, image())


@pytest.mark.parametrize(
    "reparametrize",
    [
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
        torch.nn.utils.parametrizations.orthogonal,
        torch.nn.utils.spectral_norm,
        pytest.param(torch.nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore")),
    ],
)
def test_reparametrized_weights(reparametrize: Callable[[nn.Module], nn.Module]) -> None:
    check(reparametrize(nn.Linear(3, 4)).eval(), X)


def test_tied_weights_are_one_constant() -> None:
    table, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = table.weight
    captured = check(Model(lambda m, i: m.head(m.table(i)), table=table, head=head), torch.tensor([1, 4]))
    (name,) = captured.program.constants
    assert captured.program.constants[name].data_ptr() == table.weight.data_ptr()
    assert len(captured.program.graph.find_nodes(op="get_attr")) == 1


def test_weights_are_shared_with_the_user() -> None:
    model = nn.Linear(3, 4)
    captured = capture(model, (X,))
    assert {t.data_ptr() for t in captured.program.tensors().values()} == {p.data_ptr() for p in model.parameters()}


def test_forward_hooks_are_part_of_the_model() -> None:
    model = nn.Linear(3, 4).eval()
    model.register_forward_hook(lambda module, inputs, output: output * 2)
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    check(model, X)
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == (1, 1)


def test_branches_on_tensors_with_torch_cond() -> None:
    model = Model(
        lambda m, x: torch.cond(x.sum() > 0, lambda y: m.layer(y), lambda y: y - 1, (x,)), layer=nn.Linear(3, 3)
    )
    captured = check(model, X)
    for x in (X + 1, X - 1):
        assert torch.allclose(run(captured, x), model(x))


def test_branches_on_shapes_and_options_are_settled() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        for i in range(x.shape[0]):
            x = x + i if m.training else x - i
        return x

    check(Model(forward), X)


def data_dependent(m: Any, x: torch.Tensor) -> torch.Tensor:
    if x.sum() > 0:  # the line that the error shows
        return x
    return -x


def test_data_dependent_control_flow_shows_the_line() -> None:
    with pytest.raises(fxopt.CaptureError) as caught:
        capture(Model(data_dependent), (X,))
    text = str(caught.value)
    assert "Model cannot be captured" in text
    assert "test_capture_models.py" in text
    assert "the line that the error shows" in text
    assert "torch.where or torch.cond" in text


def test_item_shows_the_line() -> None:
    with pytest.raises(fxopt.CaptureError, match=r"test_capture_models\.py.*\n.*range\(int\(x\.max"):
        capture(Model(lambda m, x: [x for _ in range(int(x.max().item()))]), (X + 3,))


def test_a_model_that_cannot_be_copied_says_so() -> None:
    model = nn.Linear(3, 4)
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(fxopt.CaptureError, match=r"Linear cannot be copied .*copy\.deepcopy\(model\) work"):
        capture(model, (X,))


def test_an_output_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(fxopt.CaptureError, match="cannot be captured"):
        capture(Model(lambda m, x: {x * 2}), (X,))


@pytest.mark.parametrize("wrong", [3, "model", lambda x: x, None, nn.Linear])
def test_what_is_no_model_is_refused(wrong: Any) -> None:
    with pytest.raises(fxopt.InputError, match="model must be an nn"):
        capture(wrong, (X,))


def test_inputs_that_the_model_refuses() -> None:
    with pytest.raises(fxopt.InputError, match=r"the model itself fails on the example inputs: RuntimeError: mat1"):
        capture(nn.Linear(4, 4), (X,))


@pytest.mark.parametrize("where", ["weight", "running_var"])
def test_nan_weights_are_refused_by_name(where: str) -> None:
    model = chain(nn.Linear(3, 3), nn.BatchNorm1d(3))
    getattr(model[1], where).data[1] = float("nan")  # type: ignore[index]
    with pytest.raises(fxopt.InputError, match=rf"NaN in 1\.{where}"):
        capture(model, (X,))


def test_infinite_weights_are_not() -> None:
    model = chain(nn.Linear(3, 3))
    model[0].weight.data[0] = torch.tensor([float("inf"), -float("inf"), 0.0])  # type: ignore[index]
    assert capture(model, (X,)).program.numel() == 12
