"""The pattern matcher: operands in either order, shared interiors, names that must agree, and reasons."""

from __future__ import annotations

from typing import Any as Anything

import pytest
import torch

from fxopt import pattern
from fxopt.capture import capture
from fxopt.pattern import Any, Match, Number, Op, Rule
from fxopt.rewriter import Rewriter
from tests.passes.models import Model

aten = torch.ops.aten
X = torch.linspace(-1, 1, 4)


def rewriter(function: Anything, *inputs: torch.Tensor) -> Rewriter:
    return Rewriter(capture(Model(lambda m, *xs: function(*xs)), inputs or (X,)).program)


def find(one: Rewriter, what: Op) -> list[Match]:
    return [match for node in one.nodes() for match in pattern.find(what, node)]


def test_a_match_binds_names_and_lists_what_is_inside() -> None:
    one = rewriter(lambda x: x.cos().relu())
    (match,) = find(one, Op("activation", Op("cos", Any("x"), name="inner"), name="outer"))
    assert match["x"] is one.program.placeholders[0]
    assert match["outer"] is match.root
    assert match.inner == [match["inner"]]
    with pytest.raises(KeyError):
        match["other"]


def test_kinds_and_packet_names_both_work() -> None:
    one = rewriter(lambda x: x.cos().relu())
    assert len(find(one, Op("relu", Any("x")))) == 1
    assert len(find(one, Op("activation", Any("x")))) == 1
    assert len(find(one, Op("conv relu linear", Any("x")))) == 1
    assert find(one, Op("conv linear", Any("x"))) == []


def test_a_commutative_op_matches_both_ways() -> None:
    wanted = Op("add", Op("cos", Any("x")), Any("y"), commutative=True)
    assert len(find(rewriter(lambda x: x.cos() + x), wanted)) == 1
    assert len(find(rewriter(lambda x: x + x.cos()), wanted)) == 1
    assert len(find(rewriter(lambda x: x.cos() + x.cos()), wanted)) == 2
    ordered = Op("add", Op("cos", Any("x")), Any("y"))
    assert find(rewriter(lambda x: x + x.cos()), ordered) == []


def test_an_op_of_one_value_with_itself_matches_once() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        y = x.cos()
        return y + y

    (match,) = find(rewriter(forward), Op("add", Op("cos", Any("x")), Any("y"), commutative=True))
    assert match["y"] in match.inner


def test_one_name_is_one_value() -> None:
    wanted = Op("mul", Any("x"), Op("sigmoid", Any("x")), commutative=True)
    assert len(find(rewriter(lambda x, y: x * y.sigmoid(), X, X + 1), wanted)) == 0
    assert len(find(rewriter(lambda x, y: y.sigmoid() * y, X, X + 1), wanted)) == 1


def test_numbers_match_within_a_millionth() -> None:
    one = rewriter(lambda x: x * 0.7978845)
    assert len(find(one, Op("mul", Any("x"), Number(0.7978845608)))) == 1
    assert find(one, Op("mul", Any("x"), Number(0.797))) == []
    assert find(rewriter(lambda x, y: x * y, X, X + 1), Op("mul", Any("x"), Number(1.0))) == []


def test_more_operands_than_there_are_do_not_match() -> None:
    assert find(rewriter(lambda x: x.cos()), Op("cos", Any("x"), Any("y"))) == []


class DoubleCos(Rule):
    """cos(cos(x)) → sin(x), unless x is the second input."""

    pattern = Op("cos", Op("cos", Any("x"), name="inner"))

    def guard(self, match: Match, rewriter: Rewriter) -> str | None:
        return "the second input is sacred" if match["x"] is rewriter.program.placeholders[-1] else None

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        rewriter.replace(match.root, rewriter.call(aten.sin.default, (match["x"],), before=match.root))


class SinToRelu(Rule):
    pattern = Op("sin", Any("x"))

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        rewriter.replace(match.root, rewriter.call(aten.relu.default, (match["x"],), before=match.root))


def calls(one: Rewriter) -> list[str]:
    return [n.target._schema.name.split("::")[1] for n in one.nodes() if n.op == "call_function"]  # type: ignore[union-attr]


def test_a_rule_is_applied_in_one_sweep() -> None:
    one = rewriter(lambda x, y: x.cos().cos().relu() + x.cos().cos(), X, X)
    pattern.apply(one, [DoubleCos()])
    assert calls(one) == ["sin", "relu", "sin", "add"]
    assert one.skips == []


def test_a_shared_interior_is_refused_by_the_matcher() -> None:
    def forward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        inner = x.cos()
        return inner.cos() + inner

    one = rewriter(forward, X, X)
    pattern.apply(one, [DoubleCos()])
    assert one.edits == 0
    assert [(s.node, s.reason) for s in one.skips] == [("cos_1", "the value of cos is also used by add")]


def test_an_interior_that_is_an_output_is_refused() -> None:
    def forward(x: torch.Tensor, y: torch.Tensor) -> Anything:
        inner = x.cos()
        return inner.cos(), inner

    one = rewriter(forward, X, X)
    pattern.apply(one, [DoubleCos()])
    assert [s.reason for s in one.skips] == ["the value of cos is also used by output"]


def test_a_guard_leaves_its_reason_and_a_later_rule_has_its_turn() -> None:
    one = rewriter(lambda x, y: y.cos().cos() + y.sin(), X, X)
    pattern.apply(one, [DoubleCos(), SinToRelu()])
    assert [s.reason for s in one.skips] == ["the second input is sacred"]
    assert calls(one) == ["cos", "cos", "relu", "add"]


def test_the_first_rule_that_fits_wins() -> None:
    one = rewriter(lambda x, y: x.cos().cos(), X, X)
    pattern.apply(one, [DoubleCos(), DoubleCos()])
    assert calls(one) == ["sin"]


def test_a_refused_order_leaves_no_reason_if_the_other_order_fits() -> None:
    class KeepFirst(Rule):
        pattern = Op("add", Op("cos", Any("x")), Any("y"), commutative=True)

        def guard(self, match: Match, rewriter: Rewriter) -> str | None:
            return None if match["y"].name == "cos" else "y is not the first cos"

        def rewrite(self, match: Match, rewriter: Rewriter) -> None:
            rewriter.replace(match.root, match["y"])

    one = rewriter(lambda x: x.cos() + (x * 2).cos())
    pattern.apply(one, [KeepFirst()])
    assert one.skips == []
    assert calls(one) == ["cos"]
