"""Results in channels_last where the graph was captured for contiguous ones, and inputs in any layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt import verify
from tests.backends.torch_models import BIG, Views, check, image, lower, strides


@pytest.mark.parametrize(
    "after",
    [
        lambda y: y,
        lambda y: y.view(2, -1),
        lambda y: y.view(2, 8, -1).transpose(1, 2),
        lambda y: y.flatten(1) + 1,
        lambda y: y.view_as(y.flatten(1)),
        lambda y: y.unflatten(2, (2, 13)),
        lambda y: y.clone().view(16, -1),
        lambda y: F.instance_norm(y).view(-1),
        lambda y: F.group_norm(y, 2).view(-1),
        lambda y: F.channel_shuffle(y, 2).view(-1),
        lambda y: y.roll(1, 3).view(-1),
        lambda y: F.max_pool2d(y, 2).view(2, -1),
        lambda y: torch.stack([y, y]).view(-1),
        lambda y: y.index_select(1, torch.tensor([1, 3])).view(-1),
        lambda y: F.pad(y, (1, 1)).view(-1),
        lambda y: y.as_strided((2, 8), (26, 3), 1),
        lambda y: y.permute(0, 2, 3, 1),
        lambda y: y.permute(1, 0, 3, 2) * 2,
        lambda y: y.mean((0, 3)),
        lambda y: y.sum(1),
        lambda y: y[:, :, 0],
        lambda y: y[..., ::2],
        lambda y: y.unbind(1),
        lambda y: y.chunk(2, 1)[1].reshape(-1),
        lambda y: torch.view_as_complex(y.view(2, 8, 26, 13, 2)).abs(),
        lambda y: y.view(torch.int32),
        lambda y: F.pixel_shuffle(y, 2),
        lambda y: torch.cat([y, y.relu()], 1),
        lambda y: y.contiguous(memory_format=torch.channels_last),
        lambda y: y.expand(3, 2, 8, 26, 26),
        lambda y: (y.max(), y.argmax(), y.flatten().topk(3).values),
        lambda y: torch.einsum("nchw->nhwc", y).softmax(-1),
        lambda y: F.interpolate(y, scale_factor=2.0, mode="bilinear"),
        lambda y: F.unfold(y, 3),
    ],
)
def test_views_of_channels_last(after: Callable[[torch.Tensor], Any]) -> None:
    check(Views(after), image())


def test_custom_ops_see_the_strides_of_capture() -> None:
    @torch.library.custom_op("fxopt_test::strides", mutates_args=())
    def strides(x: torch.Tensor) -> torch.Tensor:
        return torch.tensor(x.stride())

    strides.register_fake(lambda x: torch.empty(x.dim(), dtype=torch.int64))
    check(Views(lambda y: strides(y) + 0), image(), calls="fxopt_test_strides")


# Inputs in another layout than the example.


def gapped(x: torch.Tensor) -> torch.Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7.0)
    wide[..., ::2] = x
    return wide[..., ::2]


def turned(x: torch.Tensor) -> torch.Tensor:
    return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "gapped": gapped,
    "turned": turned,
}


@pytest.mark.parametrize("example", LAYOUTS)
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.conv(x),
        lambda m, x: m.pixel(x).relu() + x,
        lambda m, x: m.pixel(m.conv(x)) + m.conv(x),
        lambda m, x: (x + 1, x.exp().mul(2)),
        lambda m, x: x.reshape(-1, 4 * BIG * BIG),
        lambda m, x: m.layer(x.permute(0, 2, 3, 1)).sum(-1),
        lambda m, x: m.layer(x.transpose(1, 3)),
        lambda m, x: (x.flatten(1), x.softmax(1), x.max()),
        lambda m, x: torch.cat([m.conv(x), x], 1)[:, ::2],
        lambda m, x: F.adaptive_avg_pool2d(m.conv(x), 1).flatten(1),
        lambda m, x: x,
        lambda m, x: F.dropout(x, 0.0, training=True).flatten(),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_inputs_in_another_layout(function: Callable[..., Any], example: str, dynamic: bool) -> None:
    model = Layers(function)
    x = LAYOUTS[example](image(2, 4, BIG, BIG))
    executable = lower(model, (x,), {"x": {0: "batch"}} if dynamic else None)
    example_strides = [strides(y) for y in executable([x])]
    for layout in LAYOUTS.values():
        x = layout(image(2, 4, BIG, BIG))
        outputs, eager = executable([x]), model(x)
        wanted = list(eager) if isinstance(eager, tuple) else [eager]
        assert verify.compare(wanted, outputs).within, executable.source
        for y, w, expected in zip(outputs, wanted, example_strides, strict=True):
            assert strides(y) in (strides(w), expected) or y.is_contiguous()


@pytest.mark.parametrize("example", ["contiguous", "channels_last", "turned"])
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.as_strided(x.shape, x.stride()) * 2,
        lambda m, x: (x * 2).as_strided(x.shape, (x * 2).stride()) + x,
        lambda m, x: x.permute(0, 2, 1, 3).as_strided(x.shape, x.stride()),
    ],
)
def test_models_that_look_at_strides(function: Callable[..., Any], example: str) -> None:
    """They were captured for those of the example, and go on to see them."""
    model, x = Layers(function), LAYOUTS[example](image(2, 4, BIG, BIG))
    executable = lower(model, (x,))
    for layout in LAYOUTS.values():
        x = LAYOUTS[example](image(2, 4, BIG, BIG))
        assert verify.compare([model(x)], executable([layout(x)])).within, executable.source


class Layers(nn.Module):
    """A function of an image and of layers of every kind."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.conv, self.pixel, self.layer = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(4, 300)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)
