"""Shared by the tests of passes that move what insert-fake-quant leaves: schemes with coarse weights, and data."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.passes.insert_fake_quant import quality, scheme
from fxopt.passes.insert_fake_quant.grid import Grid
from fxopt.passes.insert_fake_quant.layerwise import without_quantization
from fxopt.program import Program
from fxopt.testing import Checked, check_pass

FUSED = "canonicalize,fold-constants,fuse-conv-bn-relu"


@pytest.fixture(autouse=True)
def coarse_schemes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schemes "w4" (weights of 4 bits) and "per-tensor" (one scale for a weight)."""
    w4 = dataclasses.replace(scheme.TORCH, name="w4", weight=Grid(torch.int8, symmetric=True, qmin=-7, qmax=7))
    per_tensor = dataclasses.replace(scheme.TORCH, name="per-tensor", per_channel=False)
    for one in (w4, per_tensor):
        monkeypatch.setitem(scheme.SCHEMES, one.name, one)


def positive(*shape: int, count: int = 4, seed: int = 1) -> list[tuple[torch.Tensor]]:
    """Batches that are never negative and whose channels go together, as after a relu."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randn(shape[1], shape[1], generator=generator)

    def batch() -> torch.Tensor:
        return (torch.randn(shape, generator=generator).movedim(1, -1) @ channels).movedim(-1, 1).relu()

    return [(batch(),) for _ in range(count)]


def after(one: str, model: nn.Module, data: Any, *, scheme: str = "w4", options: str = "", more: str = "") -> Checked:
    """*model* quantized with weights of *scheme*, then the pass *one*, checked."""
    quantize = f"insert-fake-quant{{scheme={scheme},smooth=false{options}}}"
    return check_pass(one, model.eval(), data[0], before=f"{FUSED},{quantize}{more}", calibration=data)


def snr(program: Program, exact: Program, data: Any) -> float:
    """Signal-to-noise ratio of the output in decibels."""
    return quality.outputs(exact, program, data)[0].snr_db


def gain(one: str, model: nn.Module, data: Any, held: Any, **kwargs: Any) -> float:
    """By how many decibels *one* brings the output on *held* closer to float than rounding to nearest."""
    better = after(one, model, data, **kwargs).program
    quantize = f"insert-fake-quant{{scheme={kwargs.get('scheme', 'w4')},smooth=false{kwargs.get('options', '')}}}"
    plain = check_pass(quantize, model, data[0], before=FUSED, calibration=data).program
    exact = without_quantization(plain)
    return snr(better, exact, held) - snr(plain, exact, held)
