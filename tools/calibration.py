"""Random calibration data for models whose weights are random, too."""

from __future__ import annotations

import torch
from torch.nn import functional as F

Inputs = tuple[torch.Tensor, ...]


def samples(inputs: Inputs, count: int, seed: int = 0) -> list[Inputs]:
    """*count* sets of inputs shaped like *inputs*: images f32[N,C,H,W] are smooth with some grain, integers stay ids.

    Real images have most of their energy in low frequencies; white noise would give every engine narrower ranges than
    it meets in use. The ids of an integer input lie between 0 and the largest one in *inputs*.
    """
    generator = torch.Generator().manual_seed(seed)
    return [tuple(_sample(x, generator) for x in inputs) for _ in range(count)]


def _sample(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not like.is_floating_point():
        return torch.randint(0, int(like.max()) + 1, like.shape, generator=generator, dtype=like.dtype)
    noise = torch.randn(like.shape, generator=generator)
    if like.dim() != 4:
        return noise
    image = 0.2 * noise
    for cells in (2, 5, 12):
        coarse = torch.randn(*like.shape[:2], cells, cells, generator=generator)
        image += F.interpolate(coarse, like.shape[2:], mode="bilinear", align_corners=False)
    return image / image.std()
