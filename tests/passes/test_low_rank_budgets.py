"""How thin low-rank-linear makes linears: by share, energy, budget, loss of the outputs, measured latency."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxopt
from fxopt import cost, measure
from fxopt.errors import InputError, PassError, PreconditionError, SpecError
from fxopt.passbase import PassContext
from fxopt.passes.low_rank_linear import layers
from fxopt.passes.low_rank_linear.ranks import of_ratio
from fxopt.program import Program
from fxopt.rewriter import Rewriter
from fxopt.target import resolve_target
from fxopt.testing import check_pass
from tests.passes.low_rank_models import decided, linear, mlp, ranks
from tests.passes.models import chain


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
