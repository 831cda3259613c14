"""prune-channels on random graphs: what remains equals the dense model with the removed channels at zero."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.passes.models import settle
from tests.passes.pruned_models import equals_masked

Step = Callable[[list[torch.Tensor]], torch.Tensor]
SIDE = 6


class Random(nn.Module):
    """A graph of steps, each of which reads some of the values before it; all of them are read in the end."""

    def __init__(self, seed: int, steps: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.draw = random.Random(seed)
        self.parts = nn.ModuleList()
        self.widths = [3]
        self.steps: list[Step] = [self._conv(0)]
        self.widths.append(self.width)
        makers = [self._conv, self._grouped, self._depthwise, self._norm, self._add, self._cat, self._split, self._gate]
        for _ in range(steps):
            maker = self.draw.choice([*makers, self._attend])
            at = self.draw.randrange(1, len(self.widths))
            self.steps.append(maker(at))
            self.widths.append(self.width)
        self.head = nn.Linear(sum(self.widths[1:]), 5)
        settle(self)

    def forward(self, x: torch.Tensor) -> Any:
        values = [x]
        for step in self.steps:
            values.append(step(values))
        return self.head(torch.cat([value.mean((2, 3)) for value in values[1:]], 1))

    def _own(self, part: nn.Module) -> nn.Module:
        self.parts.append(part)
        return part

    def _conv(self, at: int) -> Step:
        self.width = self.draw.choice([4, 8, 12])
        conv = self._own(nn.Conv2d(self.widths[at], self.width, 3, padding=1))
        return lambda values: F.relu(conv(values[at]))

    def _grouped(self, at: int) -> Step:
        self.width = self.draw.choice([4, 8])
        groups = self.draw.choice([g for g in (1, 2, 4) if self.widths[at] % g == 0])
        conv = self._own(nn.Conv2d(self.widths[at], self.width, 1, groups=groups))
        return lambda values: conv(values[at])

    def _depthwise(self, at: int) -> Step:
        self.width = self.widths[at]
        conv = self._own(nn.Conv2d(self.width, self.width, 3, padding=1, groups=self.width))
        return lambda values: F.hardswish(conv(values[at]))

    def _norm(self, at: int) -> Step:
        self.width = self.widths[at]
        norm = self._own(nn.BatchNorm2d(self.width))
        return lambda values: F.leaky_relu(norm(values[at]), 0.1)

    def _add(self, at: int) -> Step:
        self.width = self.widths[at]
        others = [i for i, width in enumerate(self.widths) if width == self.width and i]
        other = self.draw.choice(others)
        return lambda values: values[at] + values[other]

    def _cat(self, at: int) -> Step:
        other = self.draw.randrange(1, len(self.widths))
        mix = self._own(nn.Conv2d(self.widths[at] + self.widths[other], 8, 1))
        self.width = 8
        return lambda values: mix(torch.cat([values[at], values[other]], 1))

    def _split(self, at: int) -> Step:
        if self.widths[at] % 2:
            return self._conv(at)
        self.width = half = self.widths[at] // 2
        return lambda values: F.silu(values[at][:, :half]) * values[at].split(half, 1)[1]

    def _gate(self, at: int) -> Step:
        self.width = self.widths[at]
        squeeze, excite = self._own(nn.Conv2d(self.width, 4, 1)), self._own(nn.Conv2d(4, self.width, 1))
        return lambda values: values[at] * torch.sigmoid(excite(F.relu(squeeze(values[at].mean((2, 3), keepdim=True)))))

    def _attend(self, at: int) -> Step:
        heads, self.width = self.draw.choice([2, 4]), 8
        qkv, out = self._own(nn.Linear(self.widths[at], 3 * 16)), self._own(nn.Linear(16, 8))

        def attend(values: list[torch.Tensor]) -> torch.Tensor:
            tokens = qkv(values[at].flatten(2).transpose(1, 2)).unflatten(-1, (3, heads, 16 // heads))
            q, k, v = tokens.permute(2, 0, 3, 1, 4).unbind(0)
            y = out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            result: torch.Tensor = y.transpose(1, 2).unflatten(2, (SIDE, SIDE))
            return result

        return attend


def holds(seed: int, steps: int) -> None:
    inputs = (torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)),)
    equals_masked(Random(seed, steps), inputs, least=0)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(0, 2**20), st.integers(1, 8))
def test_a_random_graph(seed: int, steps: int) -> None:
    holds(seed, steps)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**20), st.integers(4, 16))
def test_a_larger_random_graph(seed: int, steps: int) -> None:
    holds(seed, steps)
