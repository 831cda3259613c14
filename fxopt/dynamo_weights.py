"""Weights that are constants of a compiled graph, and how a call notices that one is not what it was.

Another tensor, another place in memory or another version (which every write counts up that autograd sees) is noticed
for certain. Some writes have no version: ``weight.data.mul_(2)``, a NumPy array over the same memory, and the steps of
``torch.optim`` with ``fused=True``. For these, the numbers at up to 32 places of each weight in the CPU's memory are
compared at each call: enough for writes to a whole weight, as all of these are, and for each of a weight of that size;
a write without a version to a few numbers of a larger one goes unseen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from fxopt.memory import layout

_PLACES = 32
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """One weight, as it was when the graph was compiled.

    Attributes:
        index: of the graph's input.
        weight: the tensor itself, with its ``version`` and ``place``.
        sample: a NumPy view of some of its numbers, or None where its memory cannot be looked at.
        numbers: those, as bytes.
    """

    index: int
    weight: torch.Tensor
    version: int
    place: int
    sample: Any
    numbers: bytes

    @staticmethod
    def of(index: int, weight: torch.Tensor) -> Kept:
        """*weight*, as it is now."""
        sample = _sample(weight.detach())
        numbers = b"" if sample is None else sample.tobytes()
        return Kept(index, weight, weight._version, weight.data_ptr(), sample, numbers)

    def changed(self, args: Sequence[Any]) -> bool:
        """Whether the input at ``index`` of *args* is not what it was."""
        weight, sample = self.weight, self.sample
        return bool(
            args[self.index] is not weight
            or weight._version != self.version
            or weight.data_ptr() != self.place
            or (sample is not None and sample.tobytes() != self.numbers)
        )


def _sample(x: torch.Tensor) -> Any:
    """Numbers of *x*, evenly over its memory, as an array that is a view of it; None where there is no such view."""
    word = _WORDS.get(x.element_size())
    if x.layout is not torch.strided or x.device.type != "cpu" or x.numel() == 0 or word is None or x.is_quantized:
        return None
    kind, order = layout(x)
    if kind != "dense":
        return None
    flat = x.permute(order).reshape(-1).view(word).numpy()
    step = -(-len(flat) // _PLACES)
    return flat[:: step + (step > 1 and step % 2 == 0)]  # an odd step does not stay in one column
