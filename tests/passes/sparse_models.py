"""A model for n:m sparsity, and the pass on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxopt.testing import Checked, check_pass
from tests.passes.models import chain

pytestmark = pytest.mark.filterwarnings("ignore:sparsify-2-4. no speed-up:UserWarning")

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
METHODS = ("magnitude", "wanda", "sparsegpt")


def small() -> nn.Module:
    torch.manual_seed(0)
    return chain(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def checked(spec: str, model: nn.Module, inputs: tuple[torch.Tensor, ...] = (X,), **options: Any) -> Checked:
    return check_pass(spec, model, inputs, calibration=[inputs] * 2, **options)
