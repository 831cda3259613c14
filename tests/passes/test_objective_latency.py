"""objective=latency: what the engine runs faster in float or bf16 is left so, as measured, and said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import measure, ops, quantized
from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.passbase import PassContext
from fxopt.passes.insert_fake_quant import InsertFakeQuant
from fxopt.program import Program
from fxopt.rewriter import Rewriter
from fxopt.target import resolve_target

IMAGE = (1, 8, 8, 8)


def net() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)]
    return nn.Sequential(*layers).eval()


def variant(conv: Any) -> str:
    """What *conv* of a finished graph runs in."""
    if quantized.is_dequantize(ops.arguments(conv)["weight"]):
        return "int8"
    return "bf16" if conv.meta["val"].dtype is torch.bfloat16 else "float"


def plan(program: Program) -> list[str]:
    return [variant(node) for node in program.graph.nodes if ops.kind(node) == "conv"]


def choose(
    cost: dict[tuple[int, str], float], *, overrides: tuple[str, ...] = (), native: bool = True
) -> tuple[list[str], Any]:
    """The variant of each conv of *net* where a conv costs what *cost* says of its groups and variant; the rewriter."""
    data = [(torch.randn(IMAGE),) for _ in range(4)]
    captured = capture(net(), data[0])

    def build(program: Program) -> Callable[[], float]:
        convs = [node for node in program.graph.nodes if ops.kind(node) == "conv"]
        milliseconds = 5 + sum(cost[ops.arguments(conv)["groups"], variant(conv)] for conv in convs)
        return lambda: milliseconds

    dtypes = frozenset({torch.float32, torch.bfloat16} if native else {torch.float32})
    target = dataclasses.replace(resolve_target("x86"), features=frozenset({"avx512_vnni"}), native_dtypes=dtypes)
    calibration = Calibration(data, captured.program.signature)
    ctx = PassContext(target, captured.inputs, calibration, engine="torch", build=build)
    rewriter = Rewriter(captured.program)
    InsertFakeQuant(objective="latency", smooth=False, overrides=overrides).run(rewriter, ctx)
    return plan(captured.program), rewriter


COSTS = {
    "int8": {
        (8, "int8"): 1.0,
        (8, "float"): 2.0,
        (8, "bf16"): 2.0,
        (1, "int8"): 1.0,
        (1, "float"): 2.0,
        (1, "bf16"): 2.0,
    },
    "float": {
        (8, "int8"): 3.0,
        (8, "float"): 1.0,
        (8, "bf16"): 2.0,
        (1, "int8"): 1.0,
        (1, "float"): 2.0,
        (1, "bf16"): 2.0,
    },
    "bf16": {
        (8, "int8"): 3.0,
        (8, "float"): 2.0,
        (8, "bf16"): 1.0,
        (1, "int8"): 1.0,
        (1, "float"): 2.0,
        (1, "bf16"): 2.0,
    },
}


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models do not run: a call gives the milliseconds that it pretends to take."""
    monkeypatch.setattr(measure, "race", lambda first, second: second() / first())


@pytest.mark.usefixtures("stopwatch")
@pytest.mark.parametrize("best", COSTS)
def test_each_kind_of_layer_gets_what_is_fastest(best: str) -> None:
    found, rewriter = choose(COSTS[best])
    assert found == [best, "int8"] * 4
    layers = rewriter.details["quantization"].layers
    assert [layer.mode for layer in layers] == [best if best != "int8" else "static", "static"] * 4
    if best != "int8":
        assert f"faster with it in {best}, as measured" in layers[0].reason


@pytest.mark.usefixtures("stopwatch")
def test_without_native_bf16_there_is_none() -> None:
    found, _ = choose(COSTS["bf16"], native=False)
    assert found == ["float", "int8"] * 4


@pytest.mark.usefixtures("stopwatch")
def test_what_was_asked_for_stays() -> None:
    found, _ = choose(COSTS["bf16"], overrides=("0=float",))
    assert found == ["float", "int8", *["bf16", "int8"] * 3]


def test_end_to_end_the_answer_is_close() -> None:
    data = [(torch.randn(IMAGE),) for _ in range(4)]
    spec = "insert-fake-quant{objective=latency}"
    compiled = fxopt.compile(net(), example_inputs=data[0], passes=spec, calibration=data, backend="torch")
    exact = net()(*data[0])
    assert float(nn.functional.cosine_similarity(compiled(*data[0]).flatten(), exact.flatten(), 0)) > 0.999
