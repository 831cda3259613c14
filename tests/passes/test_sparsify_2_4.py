"""sparsify-2-4: which weights stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.sparsity import Pattern, like, matrix
from tests.passes.models import chain
from tests.passes.sparse_models import METHODS, checked, small

pytestmark = pytest.mark.filterwarnings("ignore:sparsify-2-4. no speed-up:UserWarning")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("permute", ["true", "false"])
def test_n_of_m_stay(method: str, permute: str) -> None:
    for n, m in ((2, 4), (1, 4), (4, 8)):
        done = checked(f"sparsify-2-4{{n={n},m={m},method={method},permute={permute}}}", small())
        for name in ("3.weight", "6.weight", "8.weight"):
            groups = matrix(done.program.constants[name]).reshape(-1, m)
            assert bool(((groups != 0).sum(1) == n).all()), name
            assert done.record.details["sparsity"][name] == 1 - n / m
        assert "3 inputs are no multiple" in done.reasons()


def test_magnitude_keeps_the_largest_as_they_are() -> None:
    model = small()
    done = checked("sparsify-2-4{permute=false}", model)
    for name in ("3.weight", "6.weight"):
        before, after = (
            matrix(model.get_parameter(name)).reshape(-1, 4),
            matrix(done.program.constants[name]).reshape(-1, 4),
        )
        assert torch.equal(after[after != 0], before[after != 0])
        assert torch.equal(after.abs().sum(1), before.abs().topk(2, dim=1).values.sum(1))


def test_the_neighbours_of_a_convolution_are_channels_at_one_position() -> None:
    conv = nn.Conv2d(8, 2, 3, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.arange(8.0)[None, :, None, None].expand(2, 8, 3, 3) + 1)
    kept = checked("sparsify-2-4{permute=false}", chain(conv), (torch.randn(1, 8, 5, 5),)).program.constants["0.weight"]
    assert torch.equal(kept != 0, torch.tensor([0, 0, 1, 1, 0, 0, 1, 1]).bool()[None, :, None, None].expand(2, 8, 3, 3))
    columns = F.unfold(torch.randn(1, 8, 5, 5), 3)[0].reshape(8, 9, -1).transpose(0, 1).reshape(72, -1)
    torch.testing.assert_close(matrix(kept).reshape(2, 9, 8).transpose(1, 2).reshape(2, 72), kept.flatten(1))
    assert columns.shape[0] == matrix(kept).shape[1]
    assert torch.equal(like(matrix(kept), kept), kept)


def test_equal_weights_give_the_first() -> None:
    kept = Pattern().kept(torch.ones(2, 8))
    assert torch.equal(kept, torch.tensor([1, 1, 0, 0, 1, 1, 0, 0]).bool().expand(2, 8))
