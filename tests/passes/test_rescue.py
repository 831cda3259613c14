"""On a trained model: passes that improve rounding help where integers are few, and never harm int8."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F

import fxopt
from fxopt.passes.insert_fake_quant import scheme
from fxopt.passes.insert_fake_quant.grid import Grid
from tests.digits import Mobile, answers, digits, top1, trained

FOUR_BITS = Grid(torch.int8, symmetric=True, qmin=-7, qmax=7)
SCHEMES = [
    scheme.ONNXRUNTIME,
    dataclasses.replace(scheme.ONNXRUNTIME, name="tensor4", weight=FOUR_BITS, per_channel=False),
]


@functools.cache
def quantized(name: str, further: str) -> torch.Tensor:
    """Held-out answers of a trained model that is quantized by the scheme *name*, then by the pass *further*."""
    compiled = fxopt.compile(
        trained(Mobile),
        example_inputs=digits().example(),
        passes=f"insert-fake-quant{{scheme={name},cosine=0}}{further}",
        calibration=digits().calibration(),
        backend="onnx",
    )
    return answers(compiled)


def cosine(outputs: torch.Tensor) -> float:
    return float(F.cosine_similarity(outputs.double(), answers(trained(Mobile)).double()).mean())


@pytest.mark.slow
@pytest.mark.parametrize("further", [",bias-correction", ",ada-round{iterations=200}", ",gptq"])
def test_rounding_is_improved(further: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in SCHEMES:
        monkeypatch.setitem(scheme.SCHEMES, one.name, one)
        before, after = quantized(one.name, ""), quantized(one.name, further)
        if one is scheme.ONNXRUNTIME:
            assert cosine(after) > cosine(before) - 1e-4
            assert top1(after) >= top1(before) - 0.002
        else:
            assert cosine(after) > cosine(before), one.name
