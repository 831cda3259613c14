"""What tests of the onnx backend share: lowered models, compared with eager."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.backend import Executable
from fxopt.backends.onnx import OnnxBackend, OnnxExecutable
from fxopt.capture import Captured, capture
from fxopt.target import resolve_target

X86 = resolve_target("x86")


class ConvRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(F.relu(self.norm(self.conv(image))).mean((2, 3)))}


def lower(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    shapes: Any = None,
    backend: OnnxBackend | None = None,
    target: Any = X86,
) -> tuple[OnnxExecutable, Captured]:
    captured = capture(model.eval(), args, kwargs, shapes)
    executable = (backend or OnnxBackend()).lower(captured.program, target, captured.inputs)
    assert isinstance(executable, OnnxExecutable)
    return executable, captured


def assert_like_eager(executable: Executable, captured: Captured) -> None:
    outputs = executable(captured.inputs)
    assert len(outputs) == len(captured.reference)
    for actual, expected in zip(outputs, captured.reference, strict=True):
        if isinstance(expected, torch.Tensor):
            assert actual.dtype == expected.dtype
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        else:
            assert type(actual) is type(expected)
            assert actual == expected


def saved(executable: Executable, folder: Path) -> onnx.ModelProto:
    path = folder / "model.onnx"
    executable.save(path)
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(path)


def ops_of(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]
