"""What the pass tests build their models from: a module from a function, and layers that are not at their defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Model(nn.Module):
    """A module whose forward is *function*, called with the module itself first.

    Modules, parameters and tensors (as buffers) among *parts* become its own under their names.
    """

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        settle(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def settle(model: nn.Module) -> nn.Module:
    """*model* in eval mode; batch norms get statistics, scales and shifts as training leaves them."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return model.eval()


def chain(*layers: nn.Module) -> nn.Module:
    """The layers one after another, settled."""
    return settle(nn.Sequential(*layers))


def image(dims: int = 2, channels: int = 4, batch: int = 2) -> torch.Tensor:
    """A random input of shape (batch, channels, 6, ...) with *dims* spatial axes."""
    return torch.randn(batch, channels, *[6] * dims)
