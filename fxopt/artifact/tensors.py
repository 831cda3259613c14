"""The weights of an artifact: a safetensors file, with N:M sparsity packed, tied weights once, read by mapping.

    name              dense, as it lies in memory; one number alone where all of a tensor are the same
    name#values …     n of each m numbers and their places, where the others are zero (fxopt.sparse_packing)
    name#4            two integers to a byte, where four bits hold them

What else is to say of these (shape, pattern, order of dimensions) is JSON in the manifest. Each large tensor is mapped
by itself, so that its pages go when the engine has packed it and lets go of it.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxopt.errors import ArtifactError
from fxopt.memory import layout
from fxopt.sparse_packing import Packed, fits_4_bits, smallest
from fxopt.sparsity import Pattern

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
_REAL = {torch.complex128: torch.float64, torch.complex64: torch.float32}
_MAPPED = 1 << 16  # bytes; smaller tensors are copied
_LARGEST_FILL = 1 << 14  # numbers
_FEW = 64  # numbers; fewer are not worth packing
_LONGEST_HEADER = 1 << 27
_MOST_UNFOLDED = 1 << 28  # bytes of all tensors together that one number each stands for: nothing small becomes huge


def save(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """Write *tensors* to *path*; gives what :class:`Tensors` needs to know of them beside the file.

    Raises:
        ArtifactError: one is no dense tensor, or of a dtype that has no place in such a file.
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    parts, entries, made = dict[str, torch.Tensor](), dict[str, Any](), dict[Any, str]()
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            what = "quantized" if tensor.is_quantized else str(tensor.layout)
            raise ArtifactError(
                f"the constant {name!r} is a {what} tensor, and an artifact holds plain dense ones alone"
            )
        same = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else name
        first = made.setdefault(same, name)
        entry = {"same": first} if first != name else _write(name, tensor.detach().cpu(), parts)
        if entry:
            entries[name] = entry
    refused = next((name for name, part in parts.items() if part.dtype not in _DTYPES.values()), None)
    if refused is not None:
        raise ArtifactError(f"the constant {refused!r} is {parts[refused].dtype}, which an artifact cannot hold")
    try:
        save_file(parts, path)
    except SafetensorError as error:  # the disk is full
        raise OSError(str(error)) from error
    return entries


def _write(name: str, tensor: torch.Tensor, parts: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Put the parts of *tensor* among *parts*; what there is to say of them."""
    if tensor.dtype in _REAL:
        inner = _write(name, torch.view_as_real(tensor.resolve_conj()), parts)
        return {"complex": inner}
    if _FEW <= tensor.numel() <= _LARGEST_FILL and _is_one_number(tensor):
        parts[name] = tensor.flatten()[:1].clone()
        return {"shape": list(tensor.shape), "fill": True}
    packed = smallest(tensor)
    if packed is not None:
        parts[f"{name}#values"], parts[f"{name}#places"] = packed.values.contiguous(), packed.places
        if packed.negative is not None:
            parts[f"{name}#negative"] = packed.negative
        return {"shape": list(packed.shape), "pattern": [packed.pattern.n, packed.pattern.m]}
    if fits_4_bits(tensor):
        parts[f"{name}#4"] = _to_nibbles(tensor)
        return {"shape": list(tensor.shape), "bits": 4}
    kind, order = layout(tensor)
    permuted = kind == "dense" and list(order) != sorted(order)
    part = (tensor.permute(order) if permuted else tensor).contiguous()
    shared = any(part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for x in parts.values())
    partial = part.untyped_storage().nbytes() != part.nbytes
    parts[name] = part.clone() if shared or partial else part  # safetensors writes whole storages, each once
    return {"order": list(order)} if permuted else {}


def _is_one_number(tensor: torch.Tensor) -> bool:
    """Whether all numbers have the same bits."""
    flat = tensor.reshape(-1, 1).clone(memory_format=torch.contiguous_format)  # axes of size 1 may have any stride
    bits = flat.view(torch.uint8)
    return bool((bits == bits[0]).all())


def _to_nibbles(tensor: torch.Tensor) -> torch.Tensor:
    """u8[⌈n/2⌉]: the first number of each pair in the lower four bits."""
    flat = tensor.flatten().view(torch.uint8) & 15
    flat = torch.nn.functional.pad(flat, (0, flat.numel() % 2))
    return flat[0::2] | (flat[1::2] << 4)


def _from_nibbles(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if packed.dtype is not torch.uint8 or packed.numel() != -(-shape.numel() // 2):
        raise ArtifactError(f"a weight of 4 bits is damaged: {packed.numel()} bytes for {list(shape)}")
    pairs = torch.stack([packed & 15, packed >> 4], dim=1).flatten()[: shape.numel()].to(torch.int8)
    return torch.where(pairs > 7, pairs - 16, pairs).reshape(shape)


class Tensors:
    """The weights in an artifact."""

    def __init__(self, path: Path, offset: int, size: int, entries: Mapping[str, Any]) -> None:
        """The file *path* has *size* bytes of safetensors at *offset*; *entries* are what :func:`save` gave.

        Raises:
            ArtifactError: that is no sound safetensors file.
        """
        self._path, self._entries, self._unfolded = path, entries, 0
        with path.open("rb") as file:
            file.seek(offset)
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
            if length > min(size - 8, _LONGEST_HEADER):
                raise ArtifactError(f"{path}: its weights have a header of {length} bytes, more than there are")
            header = json.loads(file.read(length))
        self._start, self._size = offset + 8 + length, size - 8 - length
        self._header = {name: entry for name, entry in header.items() if name != "__metadata__"}

    def all(self) -> dict[str, torch.Tensor]:
        """Every tensor by its name, as it was when it was saved; tied ones are one object.

        Raises:
            ArtifactError: the parts of one do not fit together.
        """
        found: dict[str, torch.Tensor] = {}
        names = dict.fromkeys([*self._entries, *(part for part in self._header if "#" not in part)])
        for name in sorted(names, key=lambda one: "same" in self._entries.get(one, {})):  # the tied ones last
            entry = self._entries.get(name, {})
            found[name] = found[entry["same"]] if "same" in entry else self._one(name, entry)
        return found

    def _one(self, name: str, entry: Mapping[str, Any]) -> torch.Tensor:
        if "complex" in entry:
            pairs = self._one(name, entry["complex"]).contiguous()
            return torch.view_as_complex(pairs).clone()  # torch cannot make a fake tensor of a view of real numbers
        if "pattern" in entry:
            n, m = entry["pattern"]
            if not (type(n) is int and type(m) is int and 0 < n < m <= 256):
                raise ArtifactError(f"{self._path}: {name} has no pattern {entry['pattern']!r:.40}")
            values, places = self._part(f"{name}#values"), self._part(f"{name}#places")
            negative = self._part(f"{name}#negative") if f"{name}#negative" in self._header else None
            return Packed(values, places, negative, _shape(entry["shape"]), Pattern(n, m)).unpack()
        if "fill" in entry:
            return self._filled(self._part(name), _shape(entry["shape"]))
        if "bits" in entry:
            return _from_nibbles(self._part(f"{name}#4"), _shape(entry["shape"]))
        tensor = self._part(name)
        order = entry.get("order")
        return tensor if order is None else tensor.permute(*np.argsort(order).tolist())

    def _filled(self, number: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        self._unfolded += shape.numel() * number.element_size()
        if self._unfolded > _MOST_UNFOLDED:
            raise ArtifactError(f"{self._path} unfolds into more than it should")
        return number.reshape([1] * len(shape)).expand(shape).clone()

    def _part(self, name: str) -> torch.Tensor:
        """One tensor of the file, mapped where it is large."""
        entry = self._header[name]
        dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], _shape(entry["shape"]), entry["data_offsets"]
        if not 0 <= begin <= end <= self._size or end - begin != shape.numel() * dtype.itemsize:
            raise ArtifactError(f"{self._path}: the weight {name} lies outside of its file, or is of another size")
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        with self._path.open("rb") as file:
            if end - begin < _MAPPED:
                file.seek(self._start + begin)
                return torch.frombuffer(bytearray(file.read(end - begin)), dtype=dtype).reshape(shape)
            into = (self._start + begin) % mmap.ALLOCATIONGRANULARITY
            first = self._start + begin - into
            area = mmap.mmap(file.fileno(), into + end - begin, access=mmap.ACCESS_COPY, offset=first)
        return torch.frombuffer(area, dtype=dtype, count=shape.numel(), offset=into).reshape(shape)


def _shape(sizes: Any) -> torch.Size:
    if not isinstance(sizes, list) or not all(type(size) is int and 0 <= size < 2**40 for size in sizes):
        raise ArtifactError(f"a weight has no shape {sizes!r:.80}")
    return torch.Size(sizes)
