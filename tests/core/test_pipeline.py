"""The pipeline: order, placement, verification after each pass, undo, and errors that say what happened."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import fxopt
from fxopt import registry, spec
from fxopt.calibration import Calibration
from fxopt.capture import Captured, capture
from fxopt.passbase import Pass, PassContext
from fxopt.pipeline import FIRST, LAST, Pipeline, check_order, full_pipeline
from fxopt.rewriter import Rewriter
from fxopt.target import resolve_target
from tests.passes.models import Model, chain

aten = torch.ops.aten
X = torch.linspace(-1, 1, 8).reshape(2, 4)


@dataclasses.dataclass(frozen=True)
class Does(Pass):
    """Runs a function."""

    name: ClassVar[str] = "does"
    what: Callable[[Rewriter], None] = lambda rewriter: None

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        self.what(rewriter)


@dataclasses.dataclass(frozen=True)
class DoesLossy(Does):
    name: ClassVar[str] = "does-lossy"
    exact: ClassVar[bool] = False


class Early(Does):
    name: ClassVar[str] = "early"
    runs_before: ClassVar[tuple[str, ...]] = ("late", "fuse-conv-bn-relu")


class Late(Does):
    name: ClassVar[str] = "late"
    runs_after: ClassVar[tuple[str, ...]] = ("fold-constants", "merge-linears")


def captured() -> Captured:
    return capture(chain(nn.Linear(4, 4), nn.ReLU()), (X,))


def pipeline(one: Captured, **options: Any) -> Pipeline:
    return Pipeline(PassContext(resolve_target("x86"), one.inputs), one.reference, **options)


def run(*passes: Pass, **options: Any) -> Any:
    one = captured()
    return pipeline(one, **options).run(one.program, passes)


# --- rewrites, right and wrong


def relu_becomes(op: Any) -> Callable[[Rewriter], None]:
    def change(rewriter: Rewriter) -> None:
        for node in rewriter.nodes():
            if node.target is aten.relu.default:
                rewriter.replace(node, rewriter.call(op, node.args, before=node))

    return change


def scale_weight(rewriter: Rewriter) -> None:
    node = next(n for n in rewriter.nodes() if n.target is aten.linear.default)
    weight = rewriter.tensor(node.args[1])
    assert weight is not None
    args = (node.args[0], rewriter.constant("scaled", weight * 1.01), node.args[2])
    rewriter.replace(node, rewriter.call(aten.linear.default, args, before=node))


def in_place(rewriter: Rewriter) -> None:
    relu_becomes(aten.relu_.default)(rewriter)


def stale(rewriter: Rewriter) -> None:
    relu_becomes(aten.relu.default)(rewriter)
    node = next(n for n in rewriter.nodes() if n.target is aten.relu.default)
    node.meta["val"] = node.meta["val"].double()


def crash(rewriter: Rewriter) -> None:
    relu_becomes(aten.sigmoid.default)(rewriter)
    raise ZeroDivisionError("boom")


WRONG: dict[str, tuple[Callable[[Rewriter], None], type[fxopt.FxoptError], str]] = {
    "wrong op": (relu_becomes(aten.sigmoid.default), fxopt.VerifyError, "output 'output' changed"),
    "wrong weight": (scale_weight, fxopt.VerifyError, "rounding does not explain it"),
    "in-place op": (in_place, fxopt.VerifyError, "not functional"),
    "stale metadata": (stale, fxopt.VerifyError, "stale metadata"),
    "bad call": (lambda r: relu_becomes(aten.cat.default)(r), fxopt.PassError, "cannot call aten.cat"),
    "exception": (crash, fxopt.PassError, "ZeroDivisionError: boom"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_failing_pass_names_itself_and_those_before_it(wrong: str) -> None:
    what, kind, message = WRONG[wrong]
    with pytest.raises(kind, match=message) as caught:
        run(registry.find_pass("canonicalize")(), Early(), Does(what))
    text = str(caught.value)
    assert text.startswith("pass does: ")
    assert "Passes before it: canonicalize, early." in text
    assert "The graph from before it was kept." in text
    assert isinstance(caught.value, fxopt.PassError)
    assert caught.value.dump.startswith("// fxir 1  before does  target x86\ngraph(%input_1: f32[2,4]):")
    assert "relu(" in caught.value.dump
    assert "sigmoid" not in caught.value.dump


@pytest.mark.parametrize("wrong", WRONG)
def test_a_failing_pass_is_undone(wrong: str) -> None:
    one = captured()
    nodes, constants = [n.format_node() for n in one.program.graph.nodes], dict(one.program.constants)
    with pytest.raises(fxopt.PassError):
        pipeline(one).run(one.program, [Does(WRONG[wrong][0])])
    assert [n.format_node() for n in one.program.graph.nodes] == nodes
    assert one.program.constants == constants
    program, _ = pipeline(one).run(one.program, list(full_pipeline([], registry.find_pass)))
    assert len(program.graph.nodes) <= len(nodes)


def test_the_program_that_was_given_is_left_as_it_is() -> None:
    one = captured()
    nodes = [n.format_node() for n in one.program.graph.nodes]
    program, records = pipeline(one).run(one.program, [registry.find_pass("fuse-conv-bn-relu")()])
    assert records[0].edits > 0
    assert [n.format_node() for n in one.program.graph.nodes] == nodes
    assert program is not one.program


def test_an_unverified_pass_may_do_what_it_wants() -> None:
    program, _ = run(Does(relu_becomes(aten.sigmoid.default)), check=False)
    assert any(n.target is aten.sigmoid.default for n in program.graph.nodes)


def test_a_lossy_pass_is_measured_and_moves_the_reference() -> None:
    _, records = run(DoesLossy(scale_weight), Does(relu_becomes(aten.relu6.default)))
    assert 1e-3 < records[0].difference.error < 0.02
    assert not records[0].exact
    assert records[1].difference.error == 0
    with pytest.raises(fxopt.VerifyError, match="pass does"):
        run(DoesLossy(scale_weight), Does(relu_becomes(aten.sigmoid.default)))


def test_a_lossy_pass_must_leave_a_well_formed_graph() -> None:
    with pytest.raises(fxopt.VerifyError, match="not functional"):
        run(DoesLossy(in_place))


def test_a_pass_that_does_nothing_says_so() -> None:
    one = captured()
    program, (record,) = pipeline(one).run(one.program, [Does()])
    assert (record.edits, record.skips, record.difference) == (0, (), None)
    assert program is one.program


def test_reasons_and_notes_are_kept() -> None:
    def what(rewriter: Rewriter) -> None:
        for node in rewriter.nodes():
            rewriter.skip(node, "not today")
            rewriter.skip(node, "not today")
        rewriter.note("a remark")

    _, (record,) = run(Does(what))
    assert len(record.skips) == len(captured().program.graph.nodes)
    assert {s.reason for s in record.skips} == {"not today"}
    assert record.notes == ("a remark",)


def test_a_capture_that_answers_wrongly_is_refused() -> None:
    one = captured()
    one.reference[0] += 1
    with pytest.raises(fxopt.VerifyError, match="the captured graph does not compute what the model does"):
        pipeline(one).run(one.program, [])


def test_a_pass_that_needs_data_says_so() -> None:
    class Looks(Does):
        name: ClassVar[str] = "looks"

        def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
            assert [len(batch) for batch in ctx.batches(self)] == [1, 1]

    with pytest.raises(fxopt.PreconditionError, match="looks looks at data: pass calibration="):
        run(Looks())
    one = captured()
    data = Calibration([(X, "a label"), X], one.program.signature)
    Pipeline(PassContext(resolve_target("x86"), one.inputs, data), one.reference).run(one.program, [Looks()])


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    run(Early(), Does(), progress=told.append, folder=tmp_path)
    assert told == ["early", "does"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00-capture.fxir", "01-early.fxir", "02-does.fxir"]


# --- order


def names(*passes: Pass) -> list[str]:
    return [p.name for p in full_pipeline(passes, registry.find_pass)]


def test_the_exact_passes_stand_around_the_users() -> None:
    assert names() == [*FIRST, *LAST]
    assert names(Does()) == [*FIRST, "does", *LAST]


def test_a_pass_that_freezes_weights_comes_after_the_fusions() -> None:
    assert names(registry.find_pass("cast-precision")()) == [*FIRST, *LAST, "cast-precision"]
    assert names(Late()) == [*FIRST, *LAST, "late"]
    assert names(Early(), Late()) == [*FIRST, "early", *LAST, "late"]


def test_an_exact_pass_that_the_user_lists_is_not_doubled() -> None:
    fold = registry.find_pass("fold-constants")()
    assert names(fold).count("fold-constants") == 1
    fuse = registry.find_pass("fuse-conv-bn-relu")()
    assert names(fuse, Late()).count("fuse-conv-bn-relu") == 1


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (
            (Late(), Early()),
            r"late cannot run before early: early declares runs_before late.*Given order: late → early",
        ),
        (
            ("cast-precision", "fuse-conv-bn-relu"),
            "cast-precision cannot run before fuse-conv-bn-relu: cast-precision declares runs_after fuse-conv-bn-relu",
        ),
        (("fuse-conv-bn-relu", "canonicalize"), "fuse-conv-bn-relu cannot run before canonicalize"),
        (
            ("merge-linears", "prune-channels"),
            "List prune-channels before merge-linears, or leave merge-linears out: it runs by itself. Given order",
        ),
        ((Late(), Early()), "List early before late. Given order"),
        (("insert-fake-quant", "sparsify-2-4"), r"^insert-fake-quant cannot run before sparsify-2-4"),
    ],
)
def test_a_wrong_order_is_refused_before_anything_runs(
    passes: tuple[Any, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("something ran")

    monkeypatch.setattr("fxopt.compiler.capture", never)
    with pytest.raises(fxopt.PreconditionError, match=message):
        fxopt.compile(nn.ReLU(), example_inputs=(X,), passes=passes)


def test_passes_without_rules_stand_in_any_order() -> None:
    check_order([Does(), DoesLossy(), Does()])
    check_order([])


def test_users_passes_run_inside_compile() -> None:
    ran: list[int] = []
    model = Model(lambda m, x: nn.functional.dropout(x.relu(), 0.5, False).clone() + 1)
    compiled = fxopt.compile(
        model, example_inputs=(X,), passes=[Does(lambda r: ran.append(len(r.nodes())))], backend="torch"
    )
    assert ran == [4]  # input, relu, add, output: it sees the canonical graph
    assert "does" in str(compiled.report)


def test_exact_passes_that_are_listed_first_take_their_own_places() -> None:
    names = [one.name for one in full_pipeline(spec.parse("canonicalize", registry.find_pass), registry.find_pass)]
    assert names == [one.name for one in full_pipeline([], registry.find_pass)]
    listed = spec.parse("canonicalize,fold-constants,cast-precision", registry.find_pass)
    assert [one.name for one in full_pipeline(listed, registry.find_pass)].count("fold-constants") == 1
