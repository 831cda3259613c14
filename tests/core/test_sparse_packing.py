"""Packed weights come back bit by bit, in as few bytes as promised; what is damaged is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fxopt import sparse_packing
from fxopt.artifact import tensors
from fxopt.errors import ArtifactError
from fxopt.sparse_packing import Packed, pack, smallest
from fxopt.sparsity import Pattern, like, matrix

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sparse(shape: tuple[int, ...], pattern: Pattern, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 40
    return torch.where(pattern.kept(weight.abs()), weight, 0).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(_BITS[tensor.dtype.itemsize])


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float16, 0.57), (torch.bfloat16, 0.57), (torch.int8, 0.65), (torch.float32, 0.54)]
)
@pytest.mark.parametrize("shape", [(64, 128), (32, 64, 3, 3)])
def test_bytes_of_2_4(shape: tuple[int, ...], dtype: torch.dtype, most: float, tmp_path: Path) -> None:
    weight = sparse(shape, Pattern(), dtype)
    packed = pack(weight, Pattern())
    assert packed is not None
    assert packed.nbytes <= most * weight.nbytes
    assert torch.equal(bits(packed.unpack()), bits(weight))
    assert sparse_packing.saving({"w": weight, "same": weight}) == weight.nbytes - packed.nbytes
    entries = tensors.save({"w": weight}, tmp_path / "w")
    save_file({"w": weight}, tmp_path / "dense")
    big = (tmp_path / "dense").stat().st_size
    assert (tmp_path / "w").stat().st_size <= most * weight.nbytes + (big - weight.nbytes) + 1024
    found = tensors.Tensors(tmp_path / "w", 0, (tmp_path / "w").stat().st_size, entries).all()["w"]
    assert torch.equal(bits(found), bits(weight))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([Pattern(1, 2), Pattern(1, 4), Pattern(2, 4), Pattern(3, 4), Pattern(4, 8), Pattern(5, 7)]),
    st.lists(st.integers(1, 3), min_size=0, max_size=2),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8]),
    st.integers(0, 2**32 - 1),
)
def test_any_weight_comes_back(
    pattern: Pattern, kernel: list[int], rows: int, groups: int, dtype: torch.dtype, seed: int
) -> None:
    weight = sparse((rows, groups * pattern.m, *kernel), pattern, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    weight[torch.rand(weight.shape, generator=generator) < 0.2] = 0  # groups with fewer than n others
    if dtype.is_floating_point:
        weight[torch.rand(rows, generator=generator) < 0.5] *= -1  # −0 in whole rows
        places = weight.flatten().nonzero().flatten()
        weight.view(-1)[places[:1]] = torch.nan
    packed = pack(weight, pattern)
    assert packed is not None
    assert torch.equal(bits(packed.unpack()), bits(weight))
    assert torch.equal(bits(like(matrix(weight), weight)), bits(weight))


def test_what_does_not_have_the_pattern_is_not_packed() -> None:
    weight = sparse((8, 16), Pattern(), torch.float32)
    crowded = weight.clone()
    crowded[3, :4] = 1
    odd_zeros = weight.clone()
    odd_zeros[2, int((odd_zeros[2] == 0).nonzero()[0])] = -0.0
    assert pack(crowded, Pattern()) is None
    assert pack(odd_zeros, Pattern()) is None, "one −0 among zeros that are left out would not come back"
    assert pack(torch.randn(8, 15), Pattern()) is None
    assert pack(torch.zeros(8), Pattern()) is None
    assert pack(torch.zeros(8, 0), Pattern()) is None
    assert pack(torch.zeros(4, 4, dtype=torch.bool), Pattern()) is None


def test_the_pattern_that_takes_the_fewest_bytes() -> None:
    packed = smallest(sparse((8, 16), Pattern(1, 4), torch.float32))
    assert packed is not None
    assert packed.pattern == Pattern(1, 4)
    assert smallest(torch.randn(8, 16)) is None


def test_damage_is_found() -> None:
    packed = pack(sparse((8, 16), Pattern(), torch.float32), Pattern())
    assert packed is not None
    for broken in (
        Packed(packed.values, packed.places[:-1], None, packed.shape, Pattern()),
        Packed(packed.values[:, :-4], packed.places, None, packed.shape, Pattern()),
        Packed(packed.values, packed.places, None, (8, 24), Pattern()),
        Packed(packed.values, packed.places.float(), None, packed.shape, Pattern()),
        Packed(packed.values, torch.full_like(packed.places, 255), None, (8, 12), Pattern(2, 3)),
    ):
        with pytest.raises(ArtifactError, match="damaged"):
            broken.unpack()
