"""The weights in an artifact: bit by bit as they were, in few bytes, refused where the file lies."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt import sparsity
from fxopt.artifact.tensors import Tensors, save
from fxopt.errors import ArtifactError


def back(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    entries = json.loads(json.dumps(save(tensors, path)))
    return Tensors(path, 0, path.stat().st_size, entries).all()


def sparse(shape: tuple[int, ...]) -> torch.Tensor:
    weight = torch.randn(shape)
    return torch.where(sparsity.Pattern().kept(weight.abs()), weight, 0)


EXAMPLES = {
    "dense": torch.randn(3, 5),
    "scalar": torch.tensor(2),
    "empty": torch.zeros(0, 4),
    "view": torch.randn(8, 8).T[1:3],
    "expanded": torch.randn(1, 8).expand(4, 8),
    "a stride of an axis of one": torch.randn(1, 100).T.contiguous(),
    "such four bits": torch.randint(-8, 8, (1, 99), dtype=torch.int8).T,
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "parameter": torch.nn.Parameter(torch.randn(4, 4)),
    "complex": torch.randn(3, 3, dtype=torch.complex128),
    "conjugate": torch.randn(70, dtype=torch.complex64).conj(),
    "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
    "one number": torch.full((10, 10), -0.0),
    "four bits": torch.randint(-8, 8, (9, 9), dtype=torch.int8),
    "eight bits": torch.randint(-128, 128, (9, 9), dtype=torch.int8),
    "2:4": sparse((16, 64)),
    "large": torch.randn(300, 300),
    **{
        str(dtype): torch.randn(100).to(dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn)
    },
}


def test_all_kinds_come_back_bit_by_bit(tmp_path: Path) -> None:
    found = back(EXAMPLES, tmp_path / "w")
    assert found.keys() == EXAMPLES.keys()
    for name, tensor in EXAMPLES.items():
        given = tensor.detach().resolve_conj()
        assert found[name].dtype == given.dtype
        assert found[name].shape == given.shape
        as_bytes = [x.flatten().view(torch.uint8) if x.dim() else x for x in (found[name], given)]
        assert torch.equal(*as_bytes), name
    assert found["channels last"].is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-9, 8), min_size=0, max_size=200))
def test_integers_of_any_count(tmp_path_factory: pytest.TempPathFactory, numbers: list[int]) -> None:
    tensor = torch.tensor(numbers, dtype=torch.int8)
    assert torch.equal(back({"w": tensor}, tmp_path_factory.mktemp("w") / "w")["w"], tensor)


def test_few_bytes(tmp_path: Path) -> None:
    for tensor, most in (
        (sparse((256, 512)).half(), 0.57),
        (torch.randint(-8, 8, (256, 512), dtype=torch.int8), 0.51),
        (torch.zeros(128, 128), 0.01),
        (torch.randn(256, 512), 1.01),
    ):
        save({"w": tensor}, tmp_path / "w")
        assert (tmp_path / "w").stat().st_size <= most * tensor.nbytes + 128


def test_tied_tensors_are_in_the_file_once(tmp_path: Path) -> None:
    weight = torch.randn(128, 64)
    found = back({"one": weight, "tied": weight, "view": weight.T}, tmp_path / "w")
    assert found["tied"] is found["one"]
    assert torch.equal(found["view"], weight.T)


def test_what_has_no_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"'graph' is a torch\.sparse_coo tensor"):
        save({"graph": torch.eye(3).to_sparse()}, tmp_path / "w")
    quantized = torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8)
    with pytest.raises(ArtifactError, match="'q' is a quantized tensor"):
        save({"q": quantized}, tmp_path / "w")


def _file(path: Path, header: Any, data: bytes = bytes(64)) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    ("header", "entries"),
    [
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 10**9]}}, {}),
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}, {}),
        ({"w": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}, {}),
        ({"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, {}),
        ({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, {"w": {"fill": True, "shape": [2**39]}}),
        ({"w#4": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, {"w": {"bits": 4, "shape": [100]}}),
        (
            {
                "w#values": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
                "w#places": {"dtype": "U8", "shape": [1], "data_offsets": [16, 17]},
            },
            {"w": {"shape": [2, 400], "pattern": [2, 4]}},
        ),
        ({"w#values": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, {"w": {"pattern": [0, 0]}}),
    ],
)
def test_a_file_that_lies_is_refused(tmp_path: Path, header: Any, entries: Any) -> None:
    path = _file(tmp_path / "w", header)
    with pytest.raises(ArtifactError):
        Tensors(path, 0, path.stat().st_size, entries).all()


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(ArtifactError, match="more than there are"):
        Tensors(tmp_path / "w", 0, 10, {})
