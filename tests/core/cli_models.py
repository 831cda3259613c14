"""Models and data that the tests of the command line name."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(16, 10)).eval()


def pair() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return net(), (X,)


def other() -> nn.Module:
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1)
    return model


class Keywords(nn.Module):
    def forward(self, *, q: torch.Tensor) -> torch.Tensor:
        return q + 1


def keywords() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Keywords(), {"q": X}


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


def twice() -> nn.Module:
    return Twice()


@dataclasses.dataclass
class Answer:
    first: torch.Tensor
    second: torch.Tensor


class Answers(nn.Module):
    def forward(self, x: torch.Tensor) -> Answer:
        return Answer(x + 1, x * 2)


def odd() -> tuple[nn.Module, int]:
    return net(), 3


def data() -> list[tuple[torch.Tensor]]:
    return [(torch.randn(8, 3, 16, 16),) for _ in range(8)]


def broken() -> nn.Module:
    raise RuntimeError("no weights here")


NUMBER = 3
