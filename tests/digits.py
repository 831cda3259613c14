"""Small classifiers, and the 1,797 real images of handwritten digits that they are trained on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

BATCH = 32
TRAINED = 1280  # images to train on; the others are held out
Batches = list[tuple[torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images of shape (n, 1, 8, 8) in [−1, 1], and their labels."""

    images: torch.Tensor
    labels: torch.Tensor

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches to train on, in an order that the global random state decides."""
        order = torch.randperm(TRAINED)
        for start in range(0, TRAINED, BATCH):
            chosen = order[start : start + BATCH]
            yield self.images[chosen], self.labels[chosen]

    def calibration(self, count: int = 8) -> Batches:
        return [(self.images[i * BATCH : (i + 1) * BATCH],) for i in range(count)]

    def held_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A multiple of the batch size."""
        last = TRAINED + (len(self.images) - TRAINED) // BATCH * BATCH
        return self.images[TRAINED:last], self.labels[TRAINED:last]

    def example(self) -> tuple[torch.Tensor]:
        return (self.images[:BATCH],)


@functools.cache
def digits() -> Digits:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return Digits(images[order], torch.tensor(data.target)[order])


def fit(model: nn.Module, epochs: int, rate: float) -> list[float]:
    """Losses of an ordinary training loop; *model* is in eval mode then.

    On one thread: these models are small, and two threads that wait for each other are slower on a busy machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _fit(model, epochs, rate)
    finally:
        torch.set_num_threads(threads)


def _fit(model: nn.Module, epochs: int, rate: float) -> list[float]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    losses = []
    for _ in range(epochs):
        for images, labels in digits().batches():
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    model.eval()
    return losses


def answers(model: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Outputs for all held-out images, batch by batch."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in digits().held_out()[0].split(BATCH)])


def top1(outputs: torch.Tensor) -> float:
    return float((outputs.argmax(1) == digits().held_out()[1]).float().mean())


class Residual(nn.Module):
    """conv-bn-relu with a shortcut, pooling, dropout and a linear head."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(channels)
        self.a = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.b = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(0.1, inplace=True)
        self.head = nn.Linear(channels * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm0(self.stem(x)), inplace=True)
        y = self.norm2(self.b(F.relu(self.norm1(self.a(x)))))
        y = F.max_pool2d(F.relu(y + x), 2)
        result: torch.Tensor = self.head(self.drop(y.flatten(1)))
        return result


class Inverted(nn.Module):
    """A block as MobileNetV3 has it: expand, depthwise, squeeze and excite, project; hardswish between."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish())
        depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(wide), nn.Hardswish())
        self.squeeze, self.excite = nn.Conv2d(wide, 8, 1), nn.Conv2d(8, wide, 1)
        self.project = nn.Sequential(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(self.expand(x))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        result: torch.Tensor = self.project(y * gate) + x
        return result


class Mobile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.blocks = nn.Sequential(Inverted(16, 32), Inverted(16, 32))
        self.head = nn.Sequential(nn.Linear(16 * 4, 32), nn.Hardswish(), nn.Dropout(0.1, inplace=True))
        self.classify = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 2)
        result: torch.Tensor = self.classify(self.head(y.flatten(1)))
        return result


class Vision(nn.Module):
    """A vision transformer: patches of 2×2, a class token, two encoder layers."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width) * 0.1)
        layer = nn.TransformerEncoderLayer(width, 4, 64, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(len(y), -1, -1), y], 1) + self.positions
        result: torch.Tensor = self.head(self.norm(self.encoder(y))[:, 0])
        return result


RECIPES: dict[type[nn.Module], tuple[int, float]] = {Residual: (4, 0.05), Mobile: (8, 0.05), Vision: (10, 0.05)}
"""Epochs and learning rate with which a model comes to over 95 %."""


@functools.cache
def trained(kind: type[nn.Module]) -> nn.Module:
    """A trained model of *kind*, in eval mode; the same object each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind()
        fit(model, *RECIPES[kind])
    return model
