"""low-rank-linear: linears become two thin ones, as good as a matrix of that rank can be, and only where that pays."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import fxopt
from fxopt import cost, measure
from fxopt.errors import InputError, PassError, PreconditionError, SpecError
from fxopt.passbase import PassContext
from fxopt.passes.low_rank_linear import LayerRank, LowRankLinear, decompose, decomposition, layers
from fxopt.passes.low_rank_linear.ranks import of_ratio
from fxopt.program import Program
from fxopt.rewriter import Rewriter
from fxopt.target import resolve_target
from fxopt.testing import Checked, check_pass
from tests.digits import BATCH, TRAINED, Vision, answers, digits, top1, trained
from tests.passes.models import Model, chain
from tools import models


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def decaying(rows: int, columns: int, decay: float = 0.9) -> torch.Tensor:
    """A matrix with the singular values 1, decay, decay²…"""
    side = min(rows, columns)
    u, v = (torch.linalg.qr(torch.randn(n, side, dtype=torch.float64)).Q for n in (rows, columns))
    product: torch.Tensor = (u * decay ** torch.arange(side)) @ v.T
    return product


def linear(rows: int, columns: int, decay: float = 0.9) -> nn.Linear:
    layer = nn.Linear(columns, rows)
    layer.weight.data = decaying(rows, columns, decay).float()
    return layer


def mlp() -> nn.Module:
    return chain(linear(128, 64), nn.GELU(), linear(64, 128), nn.ReLU(), linear(64, 64))


def decided(checked: Checked) -> dict[str, LayerRank]:
    return {one.name: one for one in checked.record.details["low_rank"]}


def ranks(checked: Checked) -> dict[str, int | None]:
    return {name: one.rank for name, one in decided(checked).items()}


def product(weight: torch.Tensor, rank: int, moments: torch.Tensor | None = None, damping: float = 0.0) -> torch.Tensor:
    b, a = decompose(weight, rank, moments, damping).factors(weight, rank)
    return (b.double() @ a.double()).to(weight.dtype)


# The decomposition.


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (64, 64), (1, 5), (5, 1)])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_the_error_is_the_bound_of_eckart_and_young(shape: tuple[int, int], rank: int) -> None:
    weight = torch.randn(shape)
    rank = min(rank, *shape)
    bound = torch.linalg.svdvals(weight.double())[rank:].square().sum().sqrt()
    error = (weight - product(weight, rank)).double().norm()
    assert float(error) == pytest.approx(float(bound), rel=1e-4, abs=1e-5)


def test_singular_values_and_energy_are_those_of_the_matrix() -> None:
    weight = decaying(80, 50).float()
    found, exact = decompose(weight, 20), torch.linalg.svdvals(weight.double())
    assert torch.allclose(found.values, exact[:20], rtol=1e-5)
    assert found.total == pytest.approx(float(exact.square().sum()), rel=1e-6)
    assert found.kept(20) == pytest.approx(float(exact[:20].square().sum() / exact.square().sum()), rel=1e-6)
    rank = found.rank_for(0.9)
    assert rank is not None
    assert found.kept(rank) >= 0.9 > found.kept(rank - 1)
    assert found.rank_for(0.999) is None


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
@pytest.mark.parametrize("whiten", [False, True])
def test_at_full_rank_the_outputs_are_the_same(shape: tuple[int, int], whiten: bool) -> None:
    weight, x = torch.randn(shape), torch.randn(256, shape[1]) @ torch.randn(shape[1], shape[1])
    y = x @ weight.T
    error = y - x @ product(weight, min(shape), x.T @ x if whiten else None, 0.01).T
    assert float(error.norm() / y.norm()) <= 1e-5


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("damping", [1e-6, 0.01, 1.0])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_whitened_is_never_worse_on_its_data_than_plain(seed: int, damping: float, shape: tuple[int, int]) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(shape, dtype=torch.float64)
    rows = 30 if seed % 2 else 500  # fewer rows than inputs: moments that cannot be inverted
    x = torch.randn(rows, shape[1], dtype=torch.float64) @ torch.randn(shape[1], shape[1], dtype=torch.float64)
    for rank in (1, 8, 20):
        plain, white = (
            (x @ (weight - product(weight, rank, moments, damping)).T).norm() for moments in (None, x.T @ x)
        )
        assert white <= plain * (1 + 1e-5)


def test_whitened_is_clearly_better_where_inputs_are_correlated() -> None:
    weight = torch.randn(64, 64)
    spread = decaying(64, 64, 0.8).float()  # most of what the inputs do, they do in a few directions
    x = torch.randn(2000, 64) @ spread
    plain, white = ((x @ (weight - product(weight, 12, m, 1e-4)).T).norm() for m in (None, x.T @ x))
    assert white < 0.3 * plain


def test_whitened_outputs_are_the_best_of_that_rank() -> None:
    """No matrix of rank r has less error than the singular values of W X that are cut."""
    weight, x = torch.randn(40, 60, dtype=torch.float64), torch.randn(60, 300, dtype=torch.float64)
    bound = torch.linalg.svdvals(weight @ x)[10:].norm()
    assert float(((weight - product(weight, 10, x @ x.T, 1e-9)) @ x).norm()) == pytest.approx(float(bound), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_decomposed_in_float(dtype: torch.dtype) -> None:
    weight = decaying(64, 64).to(dtype)
    b, a = decompose(weight, 30).factors(weight, 30)
    assert b.dtype is a.dtype is dtype
    error = (weight.double() - b.double() @ a.double()).norm() / weight.double().norm()
    assert float(error) < 4 * torch.finfo(dtype).eps + 0.9**30


def test_factors_share_the_size_of_a_direction() -> None:
    weight = decaying(64, 96)
    b, a = decompose(weight, 20).factors(weight, 20)
    assert torch.allclose(b.norm(dim=0), a.norm(dim=1), rtol=1e-3)


@pytest.mark.parametrize("shape", [(300, 700), (700, 300)])
@pytest.mark.parametrize("whiten", [False, True])
def test_the_randomised_path_is_as_good(shape: tuple[int, int], whiten: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = decaying(*shape, 0.98).float() + 0.001 * torch.randn(shape), torch.randn(900, shape[1])
    moments = x.T @ x if whiten else None
    exact = product(weight, 40, moments, 0.01)
    monkeypatch.setattr(decomposition, "_LARGE", 100)
    assert not torch.equal(product(weight, 40, moments, 0.01), exact)
    errors = [
        ((weight - one) @ x.T if whiten else weight - one).norm() for one in (product(weight, 40, moments, 0.01), exact)
    ]
    assert errors[0] <= 1.02 * errors[1]
    assert torch.equal(product(weight, 40, moments, 0.01), product(weight, 40, moments, 0.01))


def test_a_tall_table_is_widened_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decomposition, "_PIECE", 7)
    widest = 0
    double = torch.Tensor.double

    def watched(x: torch.Tensor) -> torch.Tensor:
        nonlocal widest
        widest = max(widest, x.numel())
        return double(x)

    weight = torch.randn(1000, 12)
    monkeypatch.setattr(torch.Tensor, "double", watched)
    found = decompose(weight, 5)
    monkeypatch.undo()
    assert widest <= 7 * 12
    assert torch.allclose(found.values, torch.linalg.svdvals(weight.double())[:5])


@pytest.mark.slow
def test_a_large_layer_is_near_exact_truncation() -> None:
    """4096×11008, as in a language model of 7 billion parameters; the values of a Gram matrix are exact enough here."""
    spectrum = 1 / (1 + torch.arange(4096.0))
    weight = (torch.randn(4096, 4096) * spectrum) @ torch.randn(4096, 11008) / 64
    squares = torch.linalg.eigvalsh((weight @ weight.T).double()).flip(0)
    b, a = decompose(weight, 512).factors(weight, 512)
    assert float((weight - b @ a).norm()) <= 1.02 * float(squares[512:].sum().sqrt())


# Where it pays.


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


# In a graph.


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


# How thin.


def test_ratio_is_the_share_of_each_weight() -> None:
    checked = check_pass("low-rank-linear{ratio=0.4,multiple=1}", mlp(), (torch.randn(3, 64),))
    for one in decided(checked).values():
        assert 0.36 < one.parameters[1] / one.parameters[0] <= 0.4


def test_energy_is_kept_and_not_more_than_needed() -> None:
    checked = check_pass("low-rank-linear{energy=0.95,multiple=1}", mlp(), (torch.randn(3, 64),))
    for one in decided(checked).values():
        assert one.rank is not None
        assert one.energy >= 0.95 > 1 - 0.9 ** (2 * (one.rank - 1))


@pytest.mark.parametrize("spec", ["ratio=0.5,scope=global", "params=0.5", "macs=0.5"])
def test_budgets_over_all_layers_are_met_and_used_up(spec: str) -> None:
    model, x = chain(linear(128, 64, 0.7), nn.ReLU(), linear(64, 128, 0.98)), torch.randn(3, 64)
    checked = check_pass(f"low-rank-linear{{{spec},multiple=1}}", model, (x,))
    if spec.startswith("macs"):
        share = cost.macs(checked.program) / (2 * 64 * 128 * 3)
    else:
        biases = 0 if spec.startswith("ratio") else 192
        share = (checked.program.numel() - 192 + biases) / (2 * 64 * 128 + biases)
    assert 0.47 < share <= 0.5
    found = ranks(checked)
    assert (found["0.weight"] or 0) < (found["2.weight"] or 0)  # whose singular values fall more slowly


def test_a_weight_whose_directions_all_matter_stays_whole() -> None:
    model = chain(linear(64, 64, 0.6), nn.ReLU(), linear(64, 64, 1.0))
    checked = check_pass("low-rank-linear{ratio=0.7,scope=global}", model, (torch.randn(3, 64),))
    found = ranks(checked)
    assert found["2.weight"] is None
    assert found["0.weight"] is not None
    assert "does not pay" in checked.reasons()


@pytest.mark.parametrize(("option", "wanted"), [("cosine", 0.99), ("top1", 0.9)])
def test_what_the_outputs_may_lose_is_a_budget(option: str, wanted: float) -> None:
    model, batches = mlp(), [torch.randn(64, 64) for _ in range(4)]
    checked = check_pass(f"low-rank-linear{{{option}={wanted},multiple=1}}", model, (batches[0],), calibration=batches)
    tighter = check_pass(f"low-rank-linear{{{option}=0.999,multiple=1}}", model, (batches[0],), calibration=batches)
    assert checked.program.numel() < tighter.program.numel()
    if option == "cosine":
        assert checked.difference.cosine > wanted - 0.005
        kept = next(note for note in checked.record.notes if "data kept back" in note)
        assert float(kept.split("cosine ")[1].split(",")[0]) >= wanted


def test_overrides_and_keep_by_pattern() -> None:
    spec = "low-rank-linear{ratio=0.5,overrides=['0.*=10','2.*=0.2'],keep=['4.*'],multiple=1}"
    checked = check_pass(spec, mlp(), (torch.randn(3, 64),))
    assert ranks(checked) == {"0.weight": 10, "2.weight": int(0.2 * 64 * 128) // 192}
    assert "stays whole, as asked" in checked.reasons()
    with pytest.warns(UserWarning, match="fits no weight, such as"):
        check_pass("low-rank-linear{keep=['encoder.*']}", mlp(), (torch.randn(3, 64),))


def test_ranks_are_multiples_where_there_is_room() -> None:
    wide = resolve_target("x86").channel_multiple
    model = chain(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 40))
    found = ranks(check_pass("low-rank-linear{ratio=0.5}", model, (torch.randn(1, 1024),)))
    assert (found["0.weight"] or 0) % wide == 0
    assert found["2.weight"] == of_ratio(_layer(nn.Linear(1024, 40)), 0.5) // 4 * 4


def _layer(module: nn.Linear) -> layers.Layer:
    return layers.Layer(torch.fx.Graph().placeholder("w"), module.weight.detach(), (), 1)


@pytest.mark.parametrize(
    "options",
    [
        "rank=4,ratio=0.5", "ratio=0", "ratio=1.5", "rank=0", "damping=0", "overrides=['x']", "overrides=['x=1.5']",
        "scope=global,rank=4", "latency_ms=0", "latency_ms=nan", "damping=nan,method=whitened", "damping=inf",
        "overrides=['x=nan']", "overrides=['x=inf']", "smallest=0",
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options: str) -> None:
    with pytest.raises(SpecError, match="low-rank-linear"):
        check_pass(f"low-rank-linear{{{options}}}", mlp(), (torch.randn(3, 64),))


def test_budgets_that_cannot_be_reached_and_missing_data_are_errors() -> None:
    x = (torch.randn(3, 64),)
    with pytest.raises(PassError, match=r"params=0.001 cannot be reached"):
        check_pass("low-rank-linear{params=0.001}", mlp(), x)
    for options in ("method=whitened", "cosine=0.9"):
        with pytest.raises(PreconditionError, match="calibration"):
            check_pass(f"low-rank-linear{{{options}}}", mlp(), x)


@pytest.mark.parametrize(
    ("one", "what"),
    [
        ("low-rank-linear", "objective=latency"),
        ("low-rank-linear", "latency_ms=1"),
        ("low-rank-conv", "objective=latency"),
        ("low-rank-conv", "latency_ms=0.001"),
        ("prune-channels", "latency_ms=0.001"),
    ],
)
def test_what_cannot_be_measured_says_why(one: str, what: str, recwarn: pytest.WarningsRecorder) -> None:
    """One cause, that which applies, and not once for each engine."""
    model = chain(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3), nn.Flatten(), linear(64, 64), linear(64, 64))
    x, passes = (torch.randn(2, 16, 6, 6),), f"{one}{{{what}}}"
    start = rf"{one}: {what.partition('=')[0]}.* is measured, and "
    for target in ("cortex-a76", "sm_120"):
        with pytest.raises(PreconditionError, match=f"{start}target {target} cannot run here") as caught:
            fxopt.compile(model, target=target, example_inputs=x, passes=passes)
        assert "fxopt.prepare" not in str(caught.value)
        assert len(str(caught.value).splitlines()) == 2
    with pytest.raises(PreconditionError, match=f"{start}no engine is chosen yet in fxopt.prepare") as caught:
        fxopt.prepare(model, x, passes=passes)
    assert "cannot run here" not in str(caught.value)
    assert not [one for one in recwarn if "is left out" in str(one.message)]


def test_a_budget_that_no_engine_can_reach_is_one_error(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(PreconditionError, match=r"latency_ms=1e-06 cannot be reached") as caught:
        fxopt.compile(mlp(), example_inputs=(torch.randn(3, 64),), passes="low-rank-linear{latency_ms=0.000001}")
    assert str(caught.value).count("cannot be reached") == 1
    assert not [one for one in recwarn if "is left out" in str(one.message)]


@pytest.mark.parametrize("options", ["cosine=0.9", "top1=0.9"])
def test_a_budget_of_outputs_is_not_met_by_data_that_are_nan(options: str) -> None:
    x = torch.randn(3, 64)
    with pytest.raises(InputError, match="NaN on all the data kept back"):
        check_pass(f"low-rank-linear{{{options}}}", mlp(), (x,), calibration=[x * float("nan")] * 8)


def test_order_is_checked() -> None:
    for passes in (
        "low-rank-linear,prune-channels",
        "insert-fake-quant,low-rank-linear",
        "prune-weights,low-rank-linear",
    ):
        with pytest.raises(PreconditionError, match="cannot run before"):
            fxopt.compile(mlp(), example_inputs=(torch.randn(3, 64),), passes=passes)


# Measured.


def pretended(times: Callable[[Program], float]) -> PassContext:
    def build(program: Program) -> Callable[[], float]:
        milliseconds = times(program)
        return lambda: milliseconds

    return PassContext(resolve_target("x86"), (torch.randn(3, 64),), engine="torch", latency=times, build=build)


def _run(options: str, times: Callable[[Program], float]) -> Rewriter:
    from fxopt import registry, spec
    from fxopt.capture import capture

    captured = capture(mlp(), (torch.randn(3, 64),), {}, None)
    rewriter = Rewriter(captured.program)
    [one] = spec.parse(f"low-rank-linear{{{options}}}", registry.find_pass)
    one.run(rewriter, pretended(times))
    return rewriter


def test_only_what_is_faster_as_measured_is_factorised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which the layer 0 is slower in two parts, and the others are faster."""

    def times(program: Program) -> float:
        names = set(program.constants)
        return 10 + ("0.low_rank_a" in names) - ("2.low_rank_a" in names) - ("4.low_rank_a" in names)

    monkeypatch.setattr(measure, "race", lambda first, second: second() / first())
    rewriter = _run("ratio=0.5,objective=latency", times)
    assert {name.split(".")[0] for name in rewriter.program.constants if "low_rank" in name} == {"2", "4"}
    assert any("faster with the layer whole" in skip.reason for skip in rewriter.skips)
    assert "measured on torch: 10.000 → 8.000 ms" in rewriter.notes


def test_no_gain_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "race", lambda first, second: second() / first())
    rewriter = _run("latency_ms=20", lambda program: 10.0)
    assert not [name for name in rewriter.program.constants if "low_rank" in name]  # nothing needs to go
    rewriter = _run("latency_ms=9", lambda program: 8.0 if "0.low_rank_a" in program.constants else 10.0)
    assert "measured on torch: 10.000 → 8.000 ms" in rewriter.notes
    rewriter = _run("objective=latency", lambda program: 10.0)
    assert "measured on torch: 10.000 → 10.000 ms: no gain on this target" in rewriter.notes


def test_a_latency_budget_takes_no_more_than_it_needs() -> None:
    def times(program: Program) -> float:
        return (
            sum(int(v.numel()) for name, v in program.constants.items() if name.endswith(("weight", "_a", "_b"))) / 1000
        )

    rewriter = _run("latency_ms=10,multiple=1", times)
    rewriter.program.remove_dead()
    assert 9.5 < times(rewriter.program) <= 10


def test_measured_on_the_engine_itself() -> None:
    compiled = fxopt.compile(
        mlp(), example_inputs=(torch.randn(3, 64),), passes="low-rank-linear{objective=latency}", backend="torch"
    )
    record = next(one for one in compiled.report.passes if one.name == "low-rank-linear")
    assert any("factorised" in note for note in record.notes)
    assert "low_rank" in record.details


# Data.


def test_whitened_factors_keep_what_the_data_say(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(linear(96, 64, 0.99), nn.GELU(), linear(64, 96, 0.99))
    spread = decaying(64, 64, 0.85).float()
    batches = [torch.randn(64, 64) @ spread for _ in range(6)]
    errors = []
    for method, parts in (("svd", 1), ("whitened", 1), ("whitened", 2**30)):
        monkeypatch.setattr("fxopt.passes.low_rank_linear._MOMENTS", parts)  # all at once, or a layer at a time
        checked = check_pass(f"low-rank-linear{{ratio=0.4,method={method}}}", model, (batches[0],), calibration=batches)
        errors.append(1 - checked.difference.cosine)
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] == pytest.approx(errors[2], rel=1e-3)


def test_inputs_that_are_always_zero_leave_a_layer_alone() -> None:
    model = Model(lambda m, x: m.fc(x * 0) + m.own(x), fc=linear(64, 64), own=linear(64, 64))
    checked = check_pass(
        "low-rank-linear{method=whitened}", model, (torch.randn(2, 64),), calibration=[torch.randn(2, 64)]
    )
    assert set(ranks(checked)) == {"own.weight"}
    assert "what it reads is zero on the calibration data" in checked.reasons()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_whitening_with_data_that_are_not_finite(value: float) -> None:
    x = torch.randn(3, 64)
    with pytest.raises(InputError, match=r"calibration: what .* reads has squares that are not finite"):
        check_pass("low-rank-linear{method=whitened}", mlp(), (x,), calibration=[x, x * value] * 8)


# A remainder.


@pytest.mark.parametrize(("remainder", "share"), [("int8", 0.25), ("'2:4'", 0.5)])
def test_a_remainder_makes_up_for_what_is_cut(remainder: str, share: float) -> None:
    model, x = mlp(), torch.randn(16, 64)
    plain = check_pass("low-rank-linear{ratio=0.3}", model, (x,))
    fuller = check_pass(f"low-rank-linear{{ratio=0.3,remainder={remainder}}}", model, (x,))
    assert 1 - fuller.difference.cosine < 0.5 * (1 - plain.difference.cosine)
    for name, value in fuller.program.constants.items():
        if not name.endswith("remainder"):
            continue
        if remainder == "int8":
            assert value.dtype is torch.int8
        else:
            assert bool(((value.unflatten(1, (-1, 4)) != 0).sum(2) <= 2).all())
    assert (remainder == "int8") == (fuller.program.nbytes() < 0.6 * 4 * (3 * 64 * 64 + 2 * 64 * 64))


def test_a_remainder_leaves_less_room_for_the_rank() -> None:
    x = (torch.randn(2, 128),)
    for remainder, rank in (("none", 63), ("int8", 47), ("'2:4'", 29)):
        spec = f"low-rank-linear{{rank={rank},remainder={remainder}}}"
        assert ranks(check_pass(spec, chain(linear(128, 128, 0.99)), x)) == {"0.weight": rank}
        spec = f"low-rank-linear{{rank={rank + 1},remainder={remainder}}}"
        assert ranks(check_pass(spec, chain(linear(128, 128, 0.99)), x)) == {"0.weight": None}
    checked = check_pass("low-rank-linear{rank=4,remainder='2:4'}", chain(linear(64, 66)), (torch.randn(2, 66),))
    assert "no multiple of 4" in checked.reasons()


@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize("remainder", ["int8", "'2:4'"])
def test_remainders_run(backend: str, remainder: str) -> None:
    x = torch.randn(8, 64)
    spec = f"low-rank-linear{{ratio=0.3,remainder={remainder}}}"
    model = mlp()
    compiled = fxopt.compile(model, example_inputs=(x,), passes=spec, backend=backend)
    assert torch.cosine_similarity(compiled(x).flatten(), model(x).flatten(), 0) > 0.97


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_sparsity_by_data_beside_a_remainder_in_int8(method: str) -> None:
    model, x = mlp(), torch.randn(64, 64)
    before = check_pass("low-rank-linear{remainder=int8}", model, (x,)).program
    after = fxopt.compile(
        model,
        example_inputs=(x,),
        passes=f"low-rank-linear{{remainder=int8}},sparsify-2-4{{method={method}}}",
        calibration=[(torch.randn(64, 64),) for _ in range(8)],
        backend="torch",
    ).graph
    assert torch.cosine_similarity(after(x)[0].flatten(), model(x).flatten(), 0) > 0.8
    for name, value in before.constants.items():
        if name.endswith("remainder"):
            assert torch.equal(after.get_buffer(name), value)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_a_remainder_of_two_of_four_makes_the_compiled_model_smaller(backend: str) -> None:
    spec, x = "low-rank-linear{ratio=0.3,remainder='2:4'}", torch.randn(8, 64)
    report = fxopt.compile(mlp(), example_inputs=(x,), passes=spec, backend=backend).report
    assert report.packed_bytes < report.bytes[0]


# Trained, pruned, quantized.


def test_factors_train_and_compile() -> None:
    model, x = mlp(), torch.randn(16, 64)
    before = copy.deepcopy(model.state_dict())
    prepared = fxopt.prepare(model, (x,), passes="low-rank-linear{ratio=0.5}")
    names = dict(prepared.named_parameters())
    assert {"0.low_rank_a", "0.low_rank_b", "0.bias"} <= set(names)
    assert "0.weight" not in names
    target = model(x).detach()
    optimizer = torch.optim.Adam(prepared.parameters(), lr=1e-3)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(prepared(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    compiled = prepared.eval().compile(backend="torch")
    assert torch.allclose(compiled(x), prepared(x), atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_remainder_keeps_its_pattern_in_training() -> None:
    x = torch.randn(16, 64)
    prepared = fxopt.prepare(mlp(), (x,), passes="low-rank-linear{ratio=0.3,remainder='2:4'}")
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    for _ in range(3):
        prepared(x).square().mean().backward()
        optimizer.step()
    compiled = prepared.eval().compile(backend="torch")
    state = prepared.state_dict()
    for layer in "024":
        weight, mask = state[f"{layer}.low_rank_remainder"], state[f"{layer}.low_rank_remainder_mask"]
        assert bool((mask.unflatten(1, (-1, 4)).sum(2) <= 2).all())
        assert not weight[~mask].any()
    assert torch.allclose(compiled(x), prepared(x), atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_what_is_factorised_is_fused_and_quantized(backend: str) -> None:
    model, batches = mlp(), [torch.randn(256, 64) for _ in range(6)]
    compiled = fxopt.compile(
        model,
        example_inputs=(batches[0],),
        passes="low-rank-linear{energy=0.99},insert-fake-quant",
        calibration=batches,
        backend=backend,
    )
    quantized = [layer for layer in compiled.report.quantization.layers if layer.mode == "static"]
    assert len(quantized) == 6
    assert compiled.report.bytes[1] < 0.4 * compiled.report.bytes[0]
    assert torch.cosine_similarity(compiled(batches[0]).flatten(), model(batches[0]).flatten(), 0) > 0.97


def test_what_is_factorised_is_pruned() -> None:
    x = torch.randn(4, 64)
    first = fxopt.prepare(mlp(), (x,), passes="low-rank-linear{rank=24}")
    second = fxopt.prepare(first, passes="prune-channels{ratio=0.5,multiple=1}")
    assert sum(p.numel() for p in second.parameters()) < 0.6 * sum(p.numel() for p in first.parameters())
    assert second.eval().compile(backend="torch")(x).shape == (4, 64)
    both = fxopt.compile(
        mlp(), example_inputs=(x,), passes="prune-channels,low-rank-linear,prune-weights", backend="torch"
    )
    assert both(x).shape == (4, 64)


def test_nothing_depends_on_chance() -> None:
    x = (torch.randn(3, 64),)
    model = mlp()
    texts = [check_pass("low-rank-linear{ratio=0.5}", model, x).program.constants["0.low_rank_a"] for _ in range(2)]
    assert torch.equal(*texts)


def tuned(model: nn.Module) -> nn.Module:
    """*model*, trained for six epochs more with a learning rate that ends at zero."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = 6 * -(-TRAINED // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    model.train()
    for _ in range(6):
        for images, labels in digits().batches():
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["svd", "whitened"])
def test_half_of_a_trained_transformer_is_enough(method: str) -> None:
    data, model = digits(), trained(Vision)
    passes = f"low-rank-linear{{ratio=0.5,method={method},smallest=16}}"
    prepared = fxopt.prepare(model, data.example(), passes=passes, calibration=data.calibration())
    assert len([name for name, _ in prepared.named_parameters() if "low_rank" in name]) >= 12
    tuned(prepared)
    compiled = prepared.compile(backend="torch")
    assert top1(answers(compiled)) >= top1(answers(model)) - 0.005
    assert top1(answers(compiled)) >= top1(answers(tuned(copy.deepcopy(model)))) - 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "gpt2",
        "llama",
        "t5-encoder",
        "hf-swin",
        "whisper-encoder",
        "resnet18",
        "mobilenet_v3_small",
        "googlenet",
    ],
)
def test_architectures_are_factorised_and_compile(name: str) -> None:
    model, inputs = models.load(name, small=True)
    passes = "low-rank-linear{ratio=0.9,multiple=1},low-rank-conv{ratio=0.8,multiple=1}"
    prepared = fxopt.prepare(model, inputs, passes=passes).eval()
    own = sum(parameter.numel() for parameter in prepared.parameters())
    assert own < 0.97 * sum(parameter.numel() for parameter in model.parameters())
    compiled = prepared.compile(backend="torch")
    for a, b in zip(*(pytree.tree_leaves(one(*inputs)) for one in (prepared, compiled)), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


def test_the_pass_has_no_options_that_do_not_survive_their_spec() -> None:
    from fxopt import registry, spec

    one = LowRankLinear(rank=None, ratio=0.3, scope="global", keep=("a*",), remainder="2:4", overrides=("x=3",))
    assert spec.parse(spec.format([one]), registry.find_pass) == [one]
