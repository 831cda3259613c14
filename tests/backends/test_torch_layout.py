"""Results in channels_last where the graph was captured for contiguous ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.backends.torch_models import Views, check, image


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
