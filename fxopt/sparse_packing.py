"""Weights with N:M sparsity in fewer bytes: the values that are not zero, and where in their group each one stands.

    w[rows, inputs]   →   values[rows, inputs · n/m]  and  places, ⌈log₂ m⌉ bits each, eight bits to a byte

2:4 takes 0.5625 of the bytes of fp16 and bf16, 0.625 of int8, 0.53 of fp32. What is packed comes back bit by bit, signs
of zeros included: in groups with fewer than n others, zeros fill up; all zeros that are left out of a row have one sign
(a negative batch norm scale makes them −0), which is kept for each row where any is negative. Artifacts hold them so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch

from fxopt.errors import ArtifactError
from fxopt.sparsity import Pattern, like, matrix

PATTERNS = (Pattern(1, 4), Pattern(2, 4), Pattern(2, 8), Pattern(4, 8), Pattern(1, 2), Pattern(8, 16), Pattern(4, 16))
_FEW = 64  # numbers; fewer are not worth packing as four bits
_PACKABLE = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed weight.

    Attributes:
        values: [rows, groups · n], what is kept of each group in order, dtype of the weight.
        places: u8[bytes], where in its group each value stands.
        negative: bool[rows] where zeros that are left out are −0; None where none is.
        shape: of the weight; ``pattern``: which it has.
    """

    values: torch.Tensor
    places: torch.Tensor
    negative: torch.Tensor | None
    shape: tuple[int, ...]
    pattern: Pattern

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        signs = 0 if self.negative is None else self.negative.numel()
        return self.values.nbytes + self.places.nbytes + signs

    def unpack(self) -> torch.Tensor:
        """The weight, contiguous.

        Raises:
            ArtifactError: the parts do not fit together.
        """
        pattern = self.pattern
        groups = _bits(self.values).reshape(-1, pattern.n)
        places = _from_bits(self.places, groups.numel(), _width(pattern)).reshape(groups.shape)
        whole = groups.shape[0] * pattern.m == torch.Size(self.shape).numel()
        if not whole or (places.numel() and int(places.max()) >= pattern.m):
            raise ArtifactError(f"a packed weight is damaged: {list(self.shape)} from {list(self.values.shape)} values")
        rest = torch.zeros(self.shape[0], dtype=self.values.dtype)
        if self.negative is not None:
            rest = torch.where(self.negative, -rest, rest)
        rest = _bits(rest)
        dense = rest[:, None].expand(-1, groups.shape[0] // self.shape[0]).reshape(-1, 1).repeat(1, pattern.m)
        found = like(dense.scatter_(1, places, groups), torch.empty(self.shape, device="meta"))
        return found.view(self.values.dtype)


def pack(weight: torch.Tensor, pattern: Pattern) -> Packed | None:
    """*weight* packed, or None where it does not have the *pattern*, or not in a way that comes back bit by bit."""
    if weight.dtype not in _PACKABLE or not pattern.holds(weight):
        return None
    dense = matrix(weight.detach().cpu()).contiguous()
    groups = dense.reshape(-1, pattern.m)
    other = groups != 0
    order = other.sort(dim=1, descending=True, stable=True).indices[:, : pattern.n].sort(dim=1).values
    values = _bits(groups).gather(1, order).view(weight.dtype)
    negative = None
    if weight.is_floating_point():
        left_out = torch.ones_like(other).scatter_(1, order, False).reshape(dense.shape)
        signs = dense.signbit() & left_out
        rows = signs.any(1)
        if bool((signs != (left_out & rows[:, None])).any()):
            return None
        negative = rows if bool(rows.any()) else None
    return Packed(
        values.reshape(len(dense), -1), _to_bits(order, _width(pattern)), negative, tuple(weight.shape), pattern
    )


def smallest(weight: torch.Tensor) -> Packed | None:
    """*weight* packed by the one of :data:`PATTERNS` that it has and that takes the fewest bytes; None for none."""
    found = [packed for pattern in PATTERNS if (packed := pack(weight, pattern)) is not None]
    best = min(found, key=lambda packed: packed.nbytes, default=None)
    return best if best is not None and best.nbytes < weight.nbytes else None


def saving(tensors: Mapping[str, torch.Tensor]) -> int:
    """How many bytes fewer *tensors* take in an artifact: N:M packed, or two numbers of four bits to a byte."""
    saved = dict[int, int]()
    for tensor in tensors.values():
        if tensor.layout == torch.strided and tensor.dtype in _PACKABLE:
            sizes = [_packed_bytes(tensor, pattern) for pattern in PATTERNS if pattern.holds(tensor)]
            if min(sizes, default=tensor.nbytes) >= tensor.nbytes and fits_4_bits(tensor):
                sizes.append(-(-tensor.numel() // 2))
            saved[tensor.data_ptr()] = max(0, tensor.nbytes - min(sizes, default=tensor.nbytes))
    return sum(saved.values())


def fits_4_bits(tensor: torch.Tensor) -> bool:
    """Whether *tensor* is int8, not small, and holds nothing that four bits would not."""
    if tensor.dtype is not torch.int8 or tensor.numel() < _FEW:
        return False
    low, high = tensor.aminmax()
    return int(low) >= -8 and int(high) <= 7


def _packed_bytes(weight: torch.Tensor, pattern: Pattern) -> int:
    count = weight.numel() // pattern.m * pattern.n
    return count * weight.dtype.itemsize + -(-count * _width(pattern) // 8)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """*tensor* as integers: what moves floats around may change the bits of a NaN."""
    return tensor.view(_INTEGERS[tensor.dtype.itemsize])


def _width(pattern: Pattern) -> int:
    """Bits of a place."""
    return (pattern.m - 1).bit_length()


def _to_bits(places: torch.Tensor, width: int) -> torch.Tensor:
    """u8, *width* bits for each of *places*, the lowest first."""
    bits = (places.flatten().numpy()[:, None] >> np.arange(width)) & 1
    return torch.from_numpy(np.packbits(bits.astype(np.uint8).ravel(), bitorder="little"))


def _from_bits(packed: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """The *count* places in *packed*: i64[count].

    Raises:
        ArtifactError: there are not as many.
    """
    if packed.dtype is not torch.uint8 or packed.numel() != -(-count * width // 8):
        raise ArtifactError(f"a packed weight is damaged: {packed.numel()} bytes of places for {count} values")
    bits = np.unpackbits(packed.numpy(), count=count * width, bitorder="little").reshape(count, width)
    return torch.from_numpy((bits.astype(np.int64) << np.arange(width)).sum(1))
