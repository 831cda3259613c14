"""Weights with N:M sparsity in the files of an exported model: packed where it is kept, whole where an engine reads it.

    model.onnx, weights   →   model.onnx, rest, packed.safetensors   →   model.onnx, weights, byte by byte

*rest* is what lies between the packed ones. They are packed as ``fxopt.sparse_packing`` does, as they lie or transposed
(a MatMul has its weight so), and in bf16 where all of their fp32 numbers are bf16 ones, as for OpenVINO.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fxopt.errors import ArtifactError
from fxopt.sparse_packing import smallest

REST, PACKED = "rest", "packed.safetensors"
_PIECE = 1 << 24  # bytes that are copied at once


def pack(model: Path, weights: Path, folder: Path) -> dict[str, Any] | None:
    """Write REST and PACKED to *folder* for the file *weights* of the ONNX file *model*.

    Returns:
        What :func:`unpack` has to know beside them; None where no weight can be packed, and nothing is written.
    """
    from fxopt.artifact.tensors import save

    places, tensors = list[tuple[int, int, bool, bool]](), dict[str, torch.Tensor]()
    with weights.open("rb") as source:
        for offset, length, tensor in _stored(model, source):
            narrow = _as_bf16(tensor)
            for turned in (False, True) if tensor.dim() == 2 else (False,):
                whole = tensor if narrow is None else narrow
                whole = whole.T.contiguous() if turned else whole
                if smallest(whole) is not None:
                    tensors[str(len(places))] = whole
                    places.append((offset, length, turned, narrow is not None))
                    break
        if not places:
            return None
        entries = save(tensors, folder / PACKED)
        with (folder / REST).open("wb") as rest:
            at = 0
            for offset, length, *_ in places:
                _copy(source, rest, at, offset - at)
                at = offset + length
            _copy(source, rest, at, weights.stat().st_size - at)
    return {"places": places, "entries": entries}


def unpack(folder: Path, weights: Path, facts: Mapping[str, Any]) -> None:
    """Write *weights* from REST and PACKED in *folder*, which go; *facts* are what :func:`pack` gave, from anyone.

    Raises:
        ArtifactError: they do not fit together.
    """
    from fxopt.artifact.tensors import Tensors

    packed, rest = folder / PACKED, folder / REST
    tensors = Tensors(packed, 0, packed.stat().st_size, facts["entries"]).all()
    with rest.open("rb") as source, weights.open("xb") as target:
        at = taken = 0
        for index, (offset, length, turned, narrow) in enumerate(facts["places"]):
            gap = offset - at
            if not 0 <= gap <= rest.stat().st_size - taken:
                raise ArtifactError(f"its packed weights do not fit its other ones: {gap} bytes between them")
            _copy(source, target, taken, gap)
            whole = tensors[str(index)]
            whole = whole.T if turned else whole
            content = (whole.float() if narrow else whole).flatten().view(torch.uint8).numpy().tobytes()
            if len(content) != length:
                raise ArtifactError(f"its packed weights do not fit: one has {len(content)} bytes, not {length}")
            target.write(content)
            at, taken = offset + length, taken + gap
        _copy(source, target, taken, rest.stat().st_size - taken)
    del tensors  # they are mapped from the file
    packed.unlink()
    rest.unlink()


def _stored(model: Path, source: BinaryIO) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Offset, bytes and value of each tensor in the file of weights, by offset; those that share bytes once."""
    import onnx

    kinds: dict[int, torch.dtype] = {
        onnx.TensorProto.FLOAT: torch.float32, onnx.TensorProto.DOUBLE: torch.float64,
        onnx.TensorProto.FLOAT16: torch.float16, onnx.TensorProto.BFLOAT16: torch.bfloat16,
        onnx.TensorProto.INT8: torch.int8, onnx.TensorProto.UINT8: torch.uint8,
    }  # fmt: skip
    found = []
    for tensor in onnx.external_data_helper._get_all_tensors(onnx.load(model, load_external_data=False)):
        place = {entry.key: entry.value for entry in tensor.external_data}
        if "length" in place and tensor.data_type in kinds:
            found.append((int(place.get("offset", 0)), int(place["length"]), kinds[tensor.data_type], tensor.dims))
    end = 0
    for offset, length, dtype, sizes in sorted(found, key=lambda one: one[:2]):
        if offset >= end and length == torch.Size(sizes).numel() * dtype.itemsize and length:
            end = offset + length
            source.seek(offset)
            yield offset, length, torch.frombuffer(bytearray(source.read(length)), dtype=dtype).reshape(list(sizes))


def _as_bf16(tensor: torch.Tensor) -> torch.Tensor | None:
    """*tensor* in bf16, where that is the same bit by bit."""
    if tensor.dtype is not torch.float32:
        return None
    narrow = tensor.bfloat16()
    return narrow if torch.equal(narrow.float().view(torch.int32), tensor.view(torch.int32)) else None


def _copy(source: BinaryIO, target: BinaryIO, offset: int, count: int) -> None:
    source.seek(offset)
    while count > 0:
        piece = source.read(min(count, _PIECE))
        if not piece:
            raise ArtifactError("a file of weights is shorter than it was")
        target.write(piece)
        count -= len(piece)
