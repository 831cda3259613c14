"""Verification catches every malformation and every wrong rewrite, and lets honest rounding through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import verify
from fxopt.capture import capture
from fxopt.program import Program
from tests.passes.models import Model, chain

aten = torch.ops.aten
X = torch.linspace(-1, 1, 8).reshape(2, 4)


def program() -> Program:
    """linear → relu, with one constant weight and one bias."""
    return capture(chain(nn.Linear(4, 4), nn.ReLU()), (X,)).program


def call(target: Program, packet: Any) -> Any:
    (node,) = target.graph.find_nodes(op="call_function", target=packet)
    return node


# --- check_graph


def test_a_captured_graph_is_well_formed() -> None:
    verify.check_graph(program())


def in_place(broken: Program) -> None:
    call(broken, aten.relu.default).target = aten.relu_.default


def stale_shape(broken: Program) -> None:
    relu = call(broken, aten.relu.default)
    with relu.meta["val"].fake_mode:
        relu.meta["val"] = torch.empty(2, 5)


def stale_rank(broken: Program) -> None:
    relu = call(broken, aten.relu.default)
    with relu.meta["val"].fake_mode:
        relu.meta["val"] = torch.empty(2, 4, 1)


def stale_dtype(broken: Program) -> None:
    relu = call(broken, aten.relu.default)
    with relu.meta["val"].fake_mode:
        relu.meta["val"] = torch.empty(2, 4, dtype=torch.float64)


def no_metadata(broken: Program) -> None:
    del call(broken, aten.relu.default).meta["val"]


def dead_call(broken: Program) -> None:
    relu = call(broken, aten.relu.default)
    with broken.graph.inserting_after(relu):
        dead = broken.graph.call_function(aten.neg.default, (relu,))
    dead.meta = dict(relu.meta)


def dead_constant(broken: Program) -> None:
    broken.constants["unused"] = torch.ones(2)
    with broken.graph.inserting_before(call(broken, aten.linear.default)):
        broken.graph.get_attr("unused")


def missing_constant(broken: Program) -> None:
    del broken.constants["0.weight"]


def module_call(broken: Program) -> None:
    relu = call(broken, aten.relu.default)
    with broken.graph.inserting_before(relu):
        node = broken.graph.call_method("relu", (relu.args[0],))
    node.meta = dict(relu.meta)
    relu.replace_all_uses_with(node)


def wrong_order(broken: Program) -> None:
    call(broken, aten.relu.default).append(call(broken, aten.linear.default))


MALFORMATIONS: list[tuple[Callable[[Program], None], str]] = [
    (in_place, "writes to its input: the graph is not functional"),
    (stale_shape, r"stale metadata: torch.float32 \[2, 5\], should be torch.float32 \[2, 4\]"),
    (stale_rank, "stale metadata"),
    (stale_dtype, r"stale metadata: torch.float64"),
    (no_metadata, "has no metadata"),
    (dead_call, r"neg.* is dead: nobody uses it"),
    (dead_constant, "unused.* is dead"),
    (missing_constant, "names a constant that does not exist"),
    (module_call, "is a call_method"),
    (wrong_order, "the graph is malformed"),
]


@pytest.mark.parametrize(("malform", "message"), MALFORMATIONS)
def test_a_malformed_graph_is_refused(malform: Callable[[Program], None], message: str) -> None:
    broken = program()
    malform(broken)
    with pytest.raises(fxopt.VerifyError, match=message):
        verify.check_graph(broken)


def test_the_error_names_the_source_line() -> None:
    class Cosine(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cos().relu()

    broken = capture(Cosine(), (X,)).program
    in_place(broken)
    with pytest.raises(fxopt.VerifyError, match=r"relu.*test_verify\.py:\d+"):
        verify.check_graph(broken)


def test_an_argument_of_a_wrong_shape_is_refused() -> None:
    broken = program()
    linear = call(broken, aten.linear.default)
    linear.args = (linear.args[0], linear.args[2], linear.args[1])
    with pytest.raises((fxopt.VerifyError, RuntimeError)):
        verify.check_graph(broken)


# --- check_exact


def rewritten(change: Callable[[Program], None], model: nn.Module, x: torch.Tensor) -> verify.Difference:
    captured = capture(model, (x,))
    after = captured.program.copy()
    change(after)
    return verify.check_exact(captured.program, after, captured.inputs, captured.reference)


def test_the_same_program_is_exact() -> None:
    assert rewritten(lambda p: None, chain(nn.Linear(4, 4)), X).error == 0


def scale_weight(factor: float) -> Callable[[Program], None]:
    def change(after: Program) -> None:
        after.constants["0.weight"] = after.constants["0.weight"] * factor

    return change


def test_a_wrong_weight_is_caught() -> None:
    with pytest.raises(fxopt.VerifyError, match=r"output 'output' changed: error .* rounding does not explain it"):
        rewritten(scale_weight(1.01), chain(nn.Linear(4, 4)), X)


def test_a_wrong_op_is_caught() -> None:
    def change(after: Program) -> None:
        call(after, aten.relu.default).target = aten.sigmoid.default

    with pytest.raises(fxopt.VerifyError, match="changed"):
        rewritten(change, chain(nn.Linear(4, 4), nn.ReLU()), X)


def test_a_wrong_dtype_is_caught() -> None:
    def change(after: Program) -> None:
        call(after, aten.argmax.default).target = aten.amax.default

    with pytest.raises(fxopt.VerifyError, match="changed"):
        rewritten(change, Model(lambda m, x: x.argmax(-1)), X)


def test_rounding_within_the_tolerance_passes() -> None:
    assert 0 < rewritten(scale_weight(1 + 1e-6), chain(nn.Linear(4, 4)), X).error <= 1e-5


def test_honest_rounding_that_the_model_amplifies_is_let_through() -> None:
    """x·(a·b) for (x·a)·b, then a difference that leaves nothing but the rounding of both."""

    def change(after: Program) -> None:
        first, second = after.graph.find_nodes(op="call_function", target=aten.mul.Tensor)[:2]
        after.constants["product"] = after.constants["a"] * after.constants["b"]
        a = first.args[1]
        a.target = "product"
        second.replace_all_uses_with(first)
        after.graph.erase_node(second)
        after.remove_dead()

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x * m.a * m.b - m.c
        return result

    a, b, x = torch.tensor(1 / 3), torch.tensor(0.3), torch.linspace(1, 2, 8)
    exact = (x.double() * a.double() * b.double()).float()
    difference = rewritten(change, Model(forward, a=a, b=b, c=exact + 1e-7), x)
    assert difference.error > verify.TOLERANCE[torch.float32]


def test_what_cannot_run_in_double_is_not_let_through() -> None:
    """Bits read as integers are others in double precision: no second opinion, so the first one counts."""

    def change(after: Program) -> None:
        after.constants["0.weight"] = after.constants["0.weight"] * 1.1

    model = chain(nn.Linear(4, 4), Model(lambda m, x: x.view(torch.int32).float()))
    with pytest.raises(fxopt.VerifyError, match="rounding does not explain it"):
        rewritten(change, model, X)


def test_random_ops_are_compared_on_the_same_draw() -> None:
    captured = capture(Model(lambda m, x: x + torch.rand(4)), (X,))
    first, second = verify.run(captured.program, [X]), verify.run(captured.program, [X])
    assert torch.equal(first[0], second[0])


# --- compare


NAN, INF = float("nan"), float("inf")


def compared(a: Any, b: Any) -> verify.Difference:
    return verify.compare([a], [b])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN])),
        (torch.tensor([1.0, INF, -INF]), torch.tensor([1.0, INF, -INF])),
        (torch.tensor([NAN]), torch.tensor([NAN])),
        (torch.zeros(3), torch.zeros(3)),
        (torch.zeros(0, 3), torch.zeros(0, 3)),
        (torch.tensor([1, 2]), torch.tensor([1, 2])),
        (torch.tensor([True]), torch.tensor([True])),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 2j])),
        (3, 3),
        (None, None),
        ("a", "a"),
    ],
)
def test_equal_values(a: Any, b: Any) -> None:
    difference = compared(a, b)
    assert (difference.error, difference.mismatched, difference.within) == (0.0, 0.0, True)
    assert difference.cosine == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0])),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, NAN])),
        (torch.tensor([1.0, INF]), torch.tensor([1.0, -INF])),
        (torch.tensor([1.0, INF]), torch.tensor([1.0, NAN])),
        (torch.tensor([NAN, 1.0]), torch.tensor([1.0, NAN])),
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(1, 2), torch.zeros(2)),
        (torch.zeros(2), torch.zeros(2).double()),
        (torch.zeros(2), [0.0, 0.0]),
        (3, 3.0),
        (1, True),
        (None, 0),
        (torch.zeros(2), None),
    ],
)
def test_values_that_differ_in_kind(a: Any, b: Any) -> None:
    difference = compared(a, b)
    assert difference.error == INF
    assert not difference.within


def test_errors_are_relative_to_the_range_of_the_output() -> None:
    assert compared(torch.tensor([100.0, 200.0]), torch.tensor([100.0, 202.0])).error == pytest.approx(0.01)
    assert compared(torch.tensor([-1e-6, 1e-6]), torch.tensor([-1e-6, 2e-6])).error == pytest.approx(0.5)
    assert compared(torch.zeros(2), torch.tensor([0.0, 0.25])).error == 0.25
    assert compared(torch.tensor([1.0, NAN]), torch.tensor([1.5, NAN])).error == pytest.approx(0.5)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_each_dtype_has_its_tolerance(dtype: torch.dtype, error: float) -> None:
    base = torch.tensor([0.0, 1.0], dtype=dtype)
    assert compared(base, base + torch.tensor([error * 0.9, 0.0], dtype=dtype)).within
    assert not compared(base, base + torch.tensor([error * 1.2, 0.0], dtype=dtype)).within


def test_discrete_values_must_be_equal() -> None:
    difference = compared(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5]))
    assert (difference.mismatched, difference.within, difference.error) == (0.25, False, 0.0)
    assert "25.0% of discrete values differ" in str(difference)


def test_complex_values_are_compared_by_distance() -> None:
    a = torch.tensor([1 + 1j, 2 - 2j])
    assert compared(a, a + 1e-7).within
    assert compared(a.conj(), (a + 1e-7).conj()).within
    assert not compared(a, a + 0.1).within


def test_the_worst_output_counts() -> None:
    a = [torch.ones(2), torch.ones(2), torch.tensor([1])]
    difference = verify.compare(a, [torch.ones(2), torch.tensor([1.0, 1.5]), torch.tensor([1])])
    assert (difference.where, difference.within) == (1, False)
    with pytest.raises(ValueError, match="zip"):
        verify.compare(a, a[:2])
