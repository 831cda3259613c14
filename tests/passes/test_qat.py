"""Quantization-aware training: the engines compute what was trained, ranges and steps are what training left."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt import PreparedModel
from fxopt.fake_quant import ActivationFakeQuantize, WeightFakeQuantize
from tests.digits import Mobile, Residual, Vision, answers, digits, fit, top1, trained

ENGINES = ("torch", "onnx", "openvino")

KINDS = {"residual": Residual, "mobile": Mobile, "vision": Vision}


@functools.cache
def tuned(kind: str, engine: str, learned: bool) -> PreparedModel:
    """A trained model after an epoch with the rounding in place, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prepared = fxopt.prepare(
            trained(KINDS[kind]),
            digits().example(),
            passes=f"insert-fake-quant{{qat=true,learnable_step={learned}}}".lower(),
            calibration=digits().calibration(),
            backend=engine,
        )
        prepared.freeze_batch_norm()
        fit(prepared, 1, 1e-4)
    return prepared


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine_computes_what_was_trained(engine: str) -> None:
    prepared = tuned("residual", engine, learned=False)
    expected, actual = answers(prepared), answers(prepared.compile(backend=engine))
    assert float((actual.argmax(1) == expected.argmax(1)).double().mean()) >= 0.999
    assert F.cosine_similarity(actual.double().flatten(), expected.double().flatten(), 0) >= 0.9999
    assert top1(actual) >= top1(answers(trained(Residual))) - 0.01


@pytest.mark.slow
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_model_on_every_engine(kind: str, engine: str, learned: bool) -> None:
    prepared = tuned(kind, engine, learned)
    expected, actual = answers(prepared), answers(prepared.compile(backend=engine))
    assert float((actual.argmax(1) == expected.argmax(1)).double().mean()) >= 0.999
    assert F.cosine_similarity(actual.double().flatten(), expected.double().flatten(), 0) >= 0.9999
    assert top1(actual) >= top1(answers(trained(KINDS[kind]))) - 0.01


def test_training_starts_where_quantization_after_training_ends() -> None:
    model, data = trained(Residual), digits().calibration()
    prepared = fxopt.prepare(model, digits().example(), calibration=data, backend="torch").eval()
    after = fxopt.compile(
        model, example_inputs=digits().example(), passes="insert-fake-quant", calibration=data, backend="torch"
    )
    assert F.cosine_similarity(answers(prepared).flatten(), answers(after).flatten(), 0) > 0.9999


def test_ranges_follow_the_data_until_they_are_frozen() -> None:
    prepared = fxopt.prepare(trained(Residual), digits().example(), calibration=digits().calibration())
    (image,) = digits().example()

    def scales() -> list[float]:
        modules = prepared.fake_quant.values()
        return [float(one.scale) for one in modules if isinstance(one, ActivationFakeQuantize)]

    start = scales()
    prepared(3 * image)
    moved = scales()
    assert moved[0] > start[0], "the input has grown"
    prepared.freeze_ranges()
    prepared(9 * image)
    assert scales() == moved
    prepared.freeze_ranges(False)
    prepared.eval()(9 * image)
    assert scales() == moved, "in eval mode nothing is observed"
    prepared.train()(9 * image)
    assert scales() != moved


def test_range_steps_end_the_observation() -> None:
    spec = "insert-fake-quant{qat=true,range_steps=2}"
    prepared = fxopt.prepare(nn.Linear(4, 4), (torch.ones(2, 4),), passes=spec)
    (module,) = [one for one in prepared.fake_quant.values() if isinstance(one, ActivationFakeQuantize)]
    for factor in (1.0, 2.0):
        prepared(factor * torch.ones(2, 4))
    known = float(module.scale)
    prepared(100 * torch.ones(2, 4))
    assert float(module.scale) == known


def test_without_rounding_it_is_the_model_itself() -> None:
    prepared = copy.deepcopy(tuned("residual", "torch", learned=False))
    plain = fxopt.prepare(trained(Residual), digits().example(), passes="").eval()
    plain.load_state_dict({k: v for k, v in prepared.state_dict().items() if not k.startswith("fake_quant.")})
    rounded = answers(prepared)
    prepared.disable_fake_quant()
    assert torch.allclose(answers(prepared), answers(plain), atol=1e-5)
    prepared.enable_fake_quant()
    assert torch.equal(answers(prepared), rounded)


def test_steps_are_learned_and_stay_near_the_range() -> None:
    spec = "insert-fake-quant{qat=true,learnable_step=true}"
    data = digits().calibration()
    prepared = fxopt.prepare(trained(Residual), digits().example(), passes=spec, calibration=data)
    steps = list(prepared.step_sizes())
    assert len(steps) == len(prepared.fake_quant)
    before = [step.detach().clone() for step in steps]
    weights = [p for name, p in prepared.named_parameters() if not name.startswith("fake_quant.")]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": steps, "lr": 100.0}]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    for images, labels in list(digits().batches())[:3]:
        optimizer.zero_grad()
        F.cross_entropy(prepared(images), labels).backward()
        optimizer.step()
    prepared.eval()(digits().example()[0])
    assert any(not torch.equal(step, start) for step, start in zip(steps, before, strict=True))
    for module, start in zip(prepared.fake_quant.values(), before, strict=True):
        widest = 1.0 if isinstance(module, WeightFakeQuantize) else 2.0
        scale = module.scale.detach()  # type: ignore[operator]
        assert bool((scale >= 0.249 * start).all())
        assert bool((scale <= 1.001 * widest * start).all())


def test_steps_are_within_their_bounds_right_after_the_optimizer() -> None:
    spec, x = "insert-fake-quant{qat=true,learnable_step=true}", torch.randn(8, 4)
    prepared = fxopt.prepare(nn.Linear(4, 3), (x,), passes=spec, calibration=[(x,)])
    with torch.no_grad():
        for step in prepared.step_sizes():
            step.mul_(100)
    compiled = prepared.eval().compile(backend="onnx")
    assert torch.allclose(compiled(x), prepared(x), atol=1e-3)


def test_gradients_stop_where_values_are_clipped() -> None:
    prepared = fxopt.prepare(nn.Linear(3, 1), (torch.ones(1, 3),), calibration=[(torch.ones(1, 3),)])
    prepared.freeze_ranges()
    x = torch.tensor([[0.5, 1.0, 5.0]], requires_grad=True)
    prepared(x).sum().backward()
    assert x.grad is not None
    assert [bool(g) for g in x.grad[0]] == [True, True, False]
