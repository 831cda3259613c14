"""low-rank-conv: convs become thin ones of the same stride, padding and dilation, and only where that pays."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt import cost
from fxopt.errors import PassError, SpecError
from fxopt.passes.low_rank_conv import ConvRank, vbmf
from fxopt.passes.low_rank_conv.decomposition import Form, Ranks, Sizes, thin, unfold
from fxopt.passes.low_rank_conv.decomposition import matrix as as_matrix
from fxopt.testing import Checked, check_pass
from tests.digits import Residual, answers, digits, fit, top1, trained
from tests.passes.models import CONVS, Model, chain, image


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def decided(checked: Checked) -> dict[str, ConvRank]:
    return {one.name: one for one in checked.record.details["low_rank"]}


def conv(
    outputs: int = 32, inputs: int = 32, kernel: int | tuple[int, ...] = 3, dims: int = 2, **how: object
) -> nn.Module:
    """A conv whose weight has few directions and a little noise."""
    layer = CONVS[dims](inputs, outputs, kernel, **how)
    weight = layer.get_parameter("weight")
    u, v = torch.randn(outputs, 4), torch.randn(weight.shape[1], 4)
    small = torch.randn(4, 4, *weight.shape[2:])
    weight.data = torch.einsum("os,ir,sr...->oi...", u, v, small) / 20 + 0.001 * torch.randn(weight.shape)
    return layer


def whole(weight: torch.Tensor, form: Form, ranks: Ranks) -> torch.Tensor:
    """The weight that the thin ones make up."""
    parts = thin(weight, form, ranks)
    if form == "tucker":
        first, core, last = parts
        assert core is not None
        core = core if first is None else torch.einsum("sr...,ri->si...", core, first.flatten(1))
        return core if last is None else torch.einsum("os,si...->oi...", last.flatten(1), core)
    a, b = parts
    assert a is not None
    assert b is not None
    return torch.einsum("orxb,riax->oiab", b, a) if form == "spatial" else torch.einsum("or...,ri...->oi...", b, a)


# The decompositions.


@pytest.mark.parametrize("ranks", [(1, 1), (3, 5), (8, 12)])
def test_tucker_is_near_the_bound(ranks: Ranks) -> None:
    """Its error is at most that of both cuts of higher-order SVD, and at least the larger of the two."""
    weight = torch.randn(12, 8, 3, 3)
    r, s = ranks
    cuts = [torch.linalg.svdvals(unfold(weight, axis))[rank:].square().sum() for axis, rank in ((1, r), (0, s))]
    error = (weight - whole(weight, "tucker", ranks)).square().sum()
    assert max(cuts) * 0.999 - 1e-6 <= error <= sum(cuts) * 1.001 + 1e-6


@pytest.mark.parametrize("rank", [1, 4, 11])
@pytest.mark.parametrize(("form", "kernel"), [("spatial", (3, 5)), ("pointwise", (1, 1))])
def test_spatial_and_pointwise_reach_the_bound(form: Form, kernel: tuple[int, int], rank: int) -> None:
    weight = torch.randn(12, 16, *kernel)
    bound = torch.linalg.svdvals(as_matrix(weight, form))[rank:].norm()
    assert float((weight - whole(weight, form, (rank,))).norm()) == pytest.approx(float(bound), rel=1e-4, abs=1e-5)


def test_at_full_rank_the_weight_is_the_same() -> None:
    weight = torch.randn(12, 16, 3, 3)
    assert torch.allclose(whole(weight, "tucker", (16, 12)), weight)
    assert torch.allclose(whole(weight, "spatial", (36,)), weight, atol=1e-5)


@pytest.mark.parametrize("form", ["tucker", "spatial", "pointwise"])
def test_ranks_for_a_ratio_are_the_largest(form: Form) -> None:
    sizes = Sizes(48, 32, (1, 1) if form == "pointwise" else (3, 3), (100, 100, 100))
    for ratio in (0.1, 0.5, 0.9):
        ranks = sizes.for_ratio(form, ratio)
        budget = ratio * sizes.parameters(form, None)
        assert sizes.parameters(form, ranks) <= budget
        assert sizes.parameters(form, tuple(rank + 1 for rank in ranks)) > budget


@pytest.mark.parametrize("shape", [(60, 200), (200, 60), (100, 100)])
@pytest.mark.parametrize("rank", [0, 3, 10])
def test_vbmf_finds_the_rank_under_noise(shape: tuple[int, int], rank: int) -> None:
    signal = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    for noise in (0.01, 0.3):
        values = torch.linalg.svdvals((signal + noise * torch.randn(shape)).double())
        assert vbmf.rank(values, *shape) == rank
    assert vbmf.rank(torch.zeros(5), 5, 7) == 0


# In a graph.


@pytest.mark.parametrize(
    "how",
    [
        {"padding": 1},
        {"stride": 2, "padding": 1},
        {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
        {"padding": "same", "dilation": 2, "bias": False},
        {"kernel": (5, 3), "padding": (2, 1), "stride": (1, 3)},
    ],
)
@pytest.mark.parametrize("method", ["tucker", "spatial"])
def test_stride_padding_and_dilation_are_right(method: str, how: dict[str, object]) -> None:
    """At ranks that hold the whole weight but its noise, the outputs are the same."""
    model, x = chain(conv(**how)), torch.randn(2, 32, 12, 14)  # type: ignore[arg-type]
    rank = 4 if method == "tucker" else 12 if "kernel" not in how else 20
    checked = check_pass(f"low-rank-conv{{rank={rank},method={method}}}", model, (x,))
    assert checked.record.edits
    assert checked.difference.error < 0.02
    names = ("a", "core", "b") if method == "tucker" else ("a", "b")
    assert [n for n in checked.program.constants if "low_rank" in n] == [f"0.low_rank_{n}" for n in names]
    [one] = decided(checked).values()
    macs = cost.macs(checked.program)
    assert macs < cost.macs(fxopt.prepare(model, (x,), passes="").program)
    assert one.parameters[1] == sum(v.numel() for n, v in checked.program.constants.items() if "low_rank" in n)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3])
def test_any_number_of_dimensions(dims: int, kernel: int) -> None:
    model = chain(conv(dims=dims, kernel=kernel, stride=2, padding=kernel // 2))
    checked = check_pass("low-rank-conv{rank=4}", model, (image(dims, 32),))
    assert checked.ops().count(f"aten.conv{dims}d") == (3 if kernel > 1 else 2)
    assert checked.difference.error < 0.02


@pytest.mark.parametrize("method", ["tucker", "spatial"])
def test_counted_macs_are_those_of_the_graph(method: str) -> None:
    model, x = chain(conv(stride=(2, 1), padding=1), nn.ReLU(), conv(kernel=1, stride=2)), torch.randn(2, 32, 9, 11)
    checked = check_pass(f"low-rank-conv{{macs=0.5,multiple=1,method={method}}}", model, (x,))
    dense = cost.macs(fxopt.prepare(model, (x,), passes="").program)
    assert 0.4 * dense < cost.macs(checked.program) <= 0.5 * dense


def test_what_is_as_wide_as_the_channels_is_left_away() -> None:
    model = chain(conv(outputs=64, inputs=16, padding=1))
    checked = check_pass("low-rank-conv{rank=16}", model, (image(2, 16),))
    assert decided(checked)["0.weight"].ranks == (16, 16)
    assert checked.ops() == ["aten.conv2d", "aten.conv2d"]


def test_fused_convs_keep_activation_and_residual() -> None:
    model = Model(
        lambda m, x: (m.bn(m.b(m.a(x).relu())) + x).relu(),
        a=conv(padding=1),
        b=conv(padding=1),
        bn=nn.BatchNorm2d(32),
    )
    for method in ("tucker", "spatial"):
        rank = 4 if method == "tucker" else 12
        checked = check_pass(
            f"low-rank-conv{{rank={rank},method={method}}}",
            model,
            (image(2, 32),),
            before="canonicalize,fuse-conv-bn-relu",
        )
        assert checked.ops().count("fxopt.conv2d") == 2
        assert checked.difference.error < 0.03


def test_a_shared_weight_gets_factors_that_are_shared() -> None:
    model = Model(lambda m, x: m.a(m.a(x).relu()), a=conv(padding=1))
    checked = check_pass("low-rank-conv{rank=4}", model, (image(2, 32),))
    assert len([n for n in checked.program.constants if "low_rank" in n]) == 3
    assert checked.ops().count("aten.conv2d") == 6
    assert checked.difference.error < 0.02


def test_what_cannot_be_factorised_is_left_alone() -> None:
    layers = [
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.Conv2d(32, 32, 3, padding=1, groups=4),
        nn.ConvTranspose2d(32, 32, 3, padding=1),
        nn.Conv2d(32, 8, 3, padding=1),
    ]
    checked = check_pass("low-rank-conv", chain(*layers), (image(2, 32),))
    assert checked.record.edits == 0
    for reason in ("depthwise: each kernel has rank 1", "it has 4 groups", "transposed", "fewer than 16"):
        assert reason in checked.reasons()


def test_spatial_needs_two_directions() -> None:
    model = chain(conv(kernel=(1, 3)), nn.Flatten(2), conv(dims=1))
    checked = check_pass("low-rank-conv{method=spatial}", model, (image(2, 32),))
    assert checked.record.edits == 0
    assert "kernel 1×3 cannot be split" in checked.reasons()
    assert "kernel 3 cannot be split" in checked.reasons()


def test_fewer_parameters_that_compute_more_do_not_pay() -> None:
    """A conv of stride 4: the 1×1 before it would run at sixteen times as many places."""
    model = chain(nn.Conv2d(64, 64, 2, stride=4))
    checked = check_pass("low-rank-conv{rank=48}", model, (torch.randn(1, 64, 16, 16),))
    assert checked.record.edits == 0
    assert "does not pay: parameters 16,384 → 15,360, MACs 262,144 →" in checked.reasons()


def test_a_tied_weight_is_left_alone() -> None:
    model = Model(lambda m, x: m.a(x) * m.a.weight.sum(), a=conv())
    checked = check_pass("low-rank-conv{rank=4}", model, (image(2, 32),))
    assert checked.record.edits == 0
    assert "tied" in checked.reasons()


# How thin.


def net() -> nn.Module:
    return chain(
        *(conv(32, 32, padding=1), nn.BatchNorm2d(32), nn.ReLU(), conv(64, 32, stride=2), nn.ReLU()),
        *(conv(64, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


@pytest.mark.parametrize("method", ["tucker", "spatial"])
@pytest.mark.parametrize("option", ["ratio=0.3", "energy=0.95", "rank=vbmf", "params=0.5", "macs=0.5"])
def test_every_rule_finds_the_few_directions(method: str, option: str) -> None:
    checked = check_pass(f"low-rank-conv{{{option},method={method},multiple=1}}", net(), (torch.randn(2, 32, 8, 8),))
    assert all(one.ranks is not None for one in decided(checked).values())
    assert checked.difference.cosine > 0.98
    if option == "rank=vbmf" and method == "tucker":
        assert decided(checked)["0.weight"].ranks == (4, 4)


def test_noise_has_no_rank() -> None:
    checked = check_pass("low-rank-conv{rank=vbmf}", chain(nn.Conv2d(64, 64, 3)), (image(2, 64),))
    assert checked.record.edits == 0
    assert "nothing but noise" in checked.reasons()


def test_outputs_and_overrides_decide() -> None:
    batches = [torch.randn(8, 32, 8, 8) for _ in range(3)]
    model = chain(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3))
    loose, tight = (
        check_pass(f"low-rank-conv{{cosine={c},multiple=1}}", model, (batches[0],), calibration=batches)
        for c in (0.7, 0.9)
    )
    assert cost.macs(loose.program) < cost.macs(tight.program)
    assert tight.difference.cosine > 0.88
    checked = check_pass("low-rank-conv{overrides=['0.*=3'],keep=['2.*']}", model, (batches[0],))
    assert decided(checked)["0.weight"].ranks == (3, 3)
    assert "stays whole, as asked" in checked.reasons()


@pytest.mark.parametrize(
    "options",
    ["rank=0", "rank=x", "rank=3,ratio=0.2", "energy=2", "overrides=['y']", "latency_ms=-1", "latency_ms=nan"],
)
def test_options_that_make_no_sense_are_refused(options: str) -> None:
    with pytest.raises(SpecError, match="low-rank-conv"):
        check_pass(f"low-rank-conv{{{options}}}", net(), (torch.randn(2, 32, 8, 8),))


def test_a_budget_out_of_reach_is_an_error() -> None:
    with pytest.raises(PassError, match=r"macs=0.0001 cannot be reached"):
        check_pass("low-rank-conv{macs=0.0001}", net(), (torch.randn(2, 32, 8, 8),))


# Fused, quantized, trained.


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_what_is_factorised_is_fused_and_quantized(backend: str) -> None:
    model, batches = net(), [torch.randn(8, 32, 16, 16) for _ in range(6)]
    for passes in ("low-rank-conv{energy=0.99}", "low-rank-conv{energy=0.99},insert-fake-quant"):
        compiled = fxopt.compile(
            model, example_inputs=(batches[0],), passes=passes, calibration=batches, backend=backend
        )
        assert torch.cosine_similarity(compiled(batches[0]).flatten(), model(batches[0]).flatten(), 0) > 0.97
        assert not any("batch_norm" in str(node.target) for node in compiled.graph.graph.nodes)
    assert [layer.mode for layer in compiled.report.quantization.layers].count("static") >= 5


def test_measured_on_the_engine_itself() -> None:
    x = (torch.randn(2, 32, 8, 8),)
    compiled = fxopt.compile(net(), example_inputs=x, passes="low-rank-conv{objective=latency}", backend="torch")
    record = next(one for one in compiled.report.passes if one.name == "low-rank-conv")
    assert any("convs factorised" in note for note in record.notes)


def test_factors_train_and_compile_and_are_pruned() -> None:
    model, x = net(), torch.randn(8, 32, 8, 8)
    prepared = fxopt.prepare(model, (x,), passes="low-rank-conv{ratio=0.5}")
    assert {"0.low_rank_a", "0.low_rank_core", "0.low_rank_b"} <= set(dict(prepared.named_parameters()))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-2)
    before = prepared.tensor("0.low_rank_core").detach().clone()
    F.mse_loss(prepared(x), torch.zeros(8, 10)).backward()
    optimizer.step()
    assert not torch.equal(before, prepared.tensor("0.low_rank_core"))
    compiled = prepared.eval().compile(backend="torch")
    assert torch.allclose(compiled(x), prepared(x), atol=1e-4)
    again = fxopt.prepare(prepared, passes="prune-channels{ratio=0.5,multiple=1}")
    assert sum(p.numel() for p in again.parameters()) < 0.7 * sum(p.numel() for p in prepared.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tucker", "spatial"])
def test_half_of_a_trained_residual_network_is_enough(method: str) -> None:
    data, model = digits(), trained(Residual)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = fxopt.prepare(model, data.example(), passes=f"low-rank-conv{{ratio=0.5,smallest=8,method={method}}}")
    assert len([name for name, _ in prepared.named_parameters() if "low_rank" in name]) >= 4
    fit(prepared, 4, 0.02)
    assert top1(answers(prepared.eval())) >= top1(answers(model)) - 0.005
