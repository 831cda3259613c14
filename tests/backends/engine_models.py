"""What the tests of engines share that run the same exported file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

ENGINES = pytest.mark.parametrize("backend", ["onnx", "openvino"])


class Function(nn.Module):
    """A model that computes *function* of its inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs)
