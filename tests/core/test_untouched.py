"""The user's model, tensors and random stream are as they were, whatever fxopt does and however it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt.passbase import Pass, PassContext
from fxopt.rewriter import Rewriter
from tests.passes.models import Model, chain

X = torch.linspace(-1, 1, 2 * 3 * 5 * 5).reshape(2, 3, 5, 5)


class Snapshot:
    """Everything about a model that a user could see change."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self.values = {name: t.detach().clone() for name, t in self.tensors.items()}
        self.grads = {name: None if t.grad is None else t.grad.clone() for name, t in self.tensors.items()}
        self.flags = {name: (t.requires_grad, t.is_leaf, t._version) for name, t in self.tensors.items()}
        self.modes = [module.training for module in model.modules()]
        self.hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        self.keys = [sorted(m.__dict__) for m in model.modules()]
        self.random = torch.get_rng_state()
        self.settings = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())

    def check(self) -> None:
        model = self.model
        now = dict(model.named_parameters()) | dict(model.named_buffers())
        assert list(now) == list(self.tensors)
        assert all(now[name] is t for name, t in self.tensors.items())
        assert all(torch.equal(t, self.values[name]) for name, t in now.items())
        assert self.flags == {name: (t.requires_grad, t.is_leaf, t._version) for name, t in now.items()}
        for name, t in now.items():
            before, grad = self.grads[name], t.grad
            assert (before is None) is (grad is None)
            assert before is None or grad is None or torch.equal(grad, before)
        assert self.modes == [module.training for module in model.modules()]
        assert self.hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        assert self.keys == [sorted(m.__dict__) for m in model.modules()]
        assert torch.equal(self.random, torch.get_rng_state())
        assert self.settings == (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())


def in_training() -> nn.Module:
    """A model in the middle of training: mixed modes, gradients, a frozen layer, hooks."""
    model = chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(36, 2))
    model.train()
    model[1].eval()  # type: ignore[index]
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    model.register_forward_hook(lambda module, inputs, output: output + 1)
    model(X).sum().backward()
    return model


@pytest.mark.parametrize("passes", [None, "cast-precision"])
def test_compiling_leaves_a_model_in_training_alone(passes: str | None) -> None:
    model = in_training()
    before = Snapshot(model)
    compiled = fxopt.compile(model, example_inputs=(X,), passes=passes, backend="torch")
    before.check()
    compiled(X)
    before.check()


def test_a_training_model_is_compiled_as_eval() -> None:
    model = in_training()
    result = fxopt.compile(model, example_inputs=(X,), backend="torch")(X)
    assert not result.requires_grad
    with torch.no_grad():
        assert torch.allclose(result, model.eval()(X), atol=1e-5)


def test_a_random_model_leaves_the_random_stream_alone() -> None:
    """F.dropout is active in eval mode by default."""
    model = Model(lambda m, x: F.dropout(m.layer(x)), layer=nn.Linear(5, 5))
    before = Snapshot(model)
    compiled = fxopt.compile(model, example_inputs=(X,), backend="torch")
    before.check()
    assert compiled.report.error is None
    kept = (compiled(X) != 0).float().mean()
    assert 0.3 < float(kept) < 0.7


def test_training_goes_on_after_compiling() -> None:
    model = in_training()
    fxopt.compile(model, example_inputs=(X,), backend="torch")
    model.zero_grad()
    model(X).sum().backward()
    assert model[5].weight.grad is not None  # type: ignore[index]
    assert float(model[5].weight.grad.abs().sum()) > 0  # type: ignore[index]


class _Fails(Pass):
    """Breaks the weights that it can reach, then fails."""

    name: ClassVar[str] = "fails"

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        for node in rewriter.nodes():
            if (tensor := rewriter.tensor(node)) is not None:
                rewriter.constant("broken", tensor * 2)
        raise RuntimeError("on purpose")


def branching(m: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = m.norm(x)
    return y if y.sum() > 0 else -y


def failing(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.norm(x)
    raise ValueError("on purpose")


FAILURES: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], dict[str, Any]]] = {
    "capture": (branching, {}),
    "the model": (failing, {}),
    "a pass": (lambda m, x: m.norm(x), {"passes": [_Fails()]}),
    "calibration": (lambda m, x: m.norm(x), {"calibration": []}),
    "inputs": (lambda m, x: m.norm(x), {"example_inputs": (X[0, 0, 0],)}),
    "shapes": (lambda m, x: m.norm(x) + torch.ones(2, 1, 1, 1), {"dynamic_shapes": ({0: "n"},)}),
}


@pytest.mark.parametrize("where", FAILURES)
def test_a_failure_leaves_everything_alone(where: str) -> None:
    forward, options = FAILURES[where]
    model = Model(forward, norm=nn.BatchNorm2d(3)).train()
    before = Snapshot(model)
    with pytest.raises(fxopt.FxoptError):
        fxopt.compile(model, **({"example_inputs": (X,), "backend": "torch"} | options))
    before.check()


def test_example_inputs_and_calibration_data_stay() -> None:
    x, data = X.clone().requires_grad_(), [(X.clone(), 3)]
    compiled = fxopt.compile(in_training(), example_inputs=(x,), calibration=data, backend="torch")
    assert x.requires_grad
    assert x.grad is None
    assert torch.equal(x.detach(), X)
    assert torch.equal(data[0][0], X)
    assert compiled(X).shape == (2, 2)


def test_changing_the_users_model_later_does_not_reach_a_stateful_one() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.count.add_(1)
        result: torch.Tensor = x * m.count
        return result

    model = Model(forward, count=torch.zeros(()))
    compiled = fxopt.compile(model, example_inputs=(X,), backend="torch")
    model.count.fill_(100)  # type: ignore[operator]
    assert torch.equal(compiled(X), X)


def test_the_dialogue_with_torch_export_is_silent(
    capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    fxopt.compile(in_training(), example_inputs=(X,), backend="torch")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert [str(w.message) for w in recwarn] == []
