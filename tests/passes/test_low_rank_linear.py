"""low-rank-linear: linears become two thin ones in a graph, and only where that pays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.testing import check_pass
from tests.passes.low_rank_models import decided, linear, mlp, ranks
from tests.passes.models import Model, chain
from tools import models


def test_rank_256_of_4096_is_8_times_fewer_parameters() -> None:
    checked = check_pass("low-rank-linear{rank=256}", chain(nn.Linear(4096, 4096, bias=False)), (torch.randn(1, 4096),))
    [one] = decided(checked).values()
    assert one.parameters == (4096 * 4096, 4096 * 4096 // 8)
    assert checked.program.numel() * 8 == 4096 * 4096


@pytest.mark.parametrize(("rank", "pays"), [(409, True), (410, False)])
def test_break_even_of_512_by_2048_is_rank_409(rank: int, pays: bool) -> None:
    checked = check_pass(f"low-rank-linear{{rank={rank}}}", chain(nn.Linear(2048, 512)), (torch.randn(2, 2048),))
    assert ranks(checked) == {"0.weight": rank if pays else None}
    assert ("up to rank 409" in checked.reasons()) is not pays


def test_at_break_even_itself_nothing_is_gained() -> None:
    """64×64 at rank 32 has as many parameters as before."""
    checked = check_pass("low-rank-linear{rank=32}", chain(nn.Linear(64, 64)), (torch.randn(2, 64),))
    assert checked.record.edits == 0
    assert "up to rank 31" in checked.reasons()


def test_a_linear_becomes_two_and_keeps_its_bias() -> None:
    model, x = mlp(), torch.randn(3, 5, 64)
    checked = check_pass("low-rank-linear{rank=30}", model, (x,))
    assert checked.ops().count("aten.linear") == 6
    assert checked.difference.error < 0.05
    assert torch.equal(checked.program.constants["0.bias"], model.get_parameter("0.bias"))
    assert "0.weight" not in checked.program.constants


def test_fused_linears_keep_activation_and_residual() -> None:
    model = Model(lambda m, x: m.b(m.a(x).relu()) + x, a=linear(128, 64), b=linear(64, 128))
    fused = "canonicalize,fuse-conv-bn-relu"
    for remainder in ("none", "int8", "'2:4'"):
        spec = f"low-rank-linear{{rank=20,remainder={remainder}}}"
        checked = check_pass(spec, model, (torch.randn(4, 64),), before=fused)
        assert checked.ops().count("fxopt.linear") == 2
        assert checked.difference.cosine > 0.98


def test_merged_projections_get_one_pair_of_factors() -> None:
    parts = {name: linear(64, 64) for name in "qkv"}
    model = Model(lambda m, x: (m.q(x) @ m.k(x).transpose(1, 2)).softmax(-1) @ m.v(x), **parts)
    x = (torch.randn(2, 8, 64),)
    merged = fxopt.compile(model, example_inputs=x, passes="merge-linears,low-rank-linear{rank=24}", backend="torch")
    apart = fxopt.compile(model, example_inputs=x, passes="low-rank-linear{rank=24}", backend="torch")
    assert merged.report.parameters[1] == 24 * (64 + 192) + 192
    assert apart.report.parameters[1] == 3 * 24 * 128 + 192
    shapes = [list(v.shape) for name, v in apart.graph.state_dict().items() if name.endswith("merged")]
    assert [72, 64] in shapes  # the first halves of the three are one linear


def test_transformers_conv1d_is_factorised() -> None:
    model, inputs = models.load("gpt2")
    checked = check_pass("low-rank-linear{rank=16}", model, inputs)
    names = [name for name, rank in ranks(checked).items() if rank]
    assert len(names) == 8  # attention and MLP of two layers: two each
    assert checked.difference.cosine > 0.5


def test_a_shared_weight_gets_factors_that_are_shared() -> None:
    model = Model(lambda m, x: m.a(m.a(x).relu()), a=linear(64, 64))
    checked = check_pass(
        "low-rank-linear{rank=16,method=whitened}", model, (torch.randn(4, 64),), calibration=[torch.randn(8, 64)]
    )
    assert {n for n in checked.program.constants if "low_rank" in n} == {"a.low_rank_a", "a.low_rank_b"}
    assert checked.ops().count("aten.linear") == 4


def test_a_table_that_is_tied_to_an_embedding_is_left_alone() -> None:
    def forward(m: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = F.linear(m.get_submodule("table")(ids), m.get_parameter("table.weight"))
        return y

    model = Model(forward, table=nn.Embedding(100, 64))
    checked = check_pass("low-rank-linear{rank=8}", model, (torch.arange(5),))
    assert checked.record.edits == 0
    assert "tied: embedding reads it too, and needs it whole; a copy could be factorised" in checked.reasons()


def test_what_is_computed_tiny_zero_or_not_finite_is_left_alone() -> None:
    parts = {"zero": nn.Linear(64, 64), "inf": nn.Linear(64, 64), "tiny": nn.Linear(64, 4), "made": nn.Linear(64, 64)}
    parts["zero"].weight.data.zero_()
    parts["inf"].weight.data[0, 0] = torch.inf

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        made = F.linear(x, m.get_parameter("made.weight") * x.mean())
        y = m.get_submodule("zero")(x) + m.get_submodule("inf")(x).clamp(-9, 9) + made
        return torch.cat([y, m.get_submodule("tiny")(x)], 1)

    checked = check_pass("low-rank-linear{rank=8}", Model(forward, **parts), (torch.randn(3, 64),))
    assert checked.record.edits == 0
    for reason in ("all zeros", "not finite", "fewer than 32", "not a constant"):
        assert reason in checked.reasons()


def test_what_is_rank_deficient_gets_its_own_rank() -> None:
    layer = nn.Linear(96, 64)
    layer.weight.data = torch.randn(64, 5) @ torch.randn(5, 96)
    for spec in ("low-rank-linear{energy=1.0,multiple=1}", "low-rank-linear{rank=30}", "low-rank-linear{rank=500}"):
        checked = check_pass(spec, chain(layer), (torch.randn(7, 96),))
        assert ranks(checked) == {"0.weight": 5}
        assert checked.difference.error < 1e-5


def test_dynamic_batches_stay_dynamic() -> None:
    compiled = fxopt.compile(
        mlp(),
        example_inputs=(torch.randn(4, 64),),
        dynamic_shapes=({0: "n"},),
        passes="low-rank-linear",
        backend="torch",
    )
    assert compiled(torch.randn(9, 64)).shape == (9, 64)
