"""Pattern rules: an expression to look for, a guard, a rewrite.

    class AddIntoConv(Rule):
        pattern = Op("add", Op("conv", name="conv"), Any("residual"), commutative=True)
        def guard(self, match, rewriter): ...    # a reason to refuse, or None
        def rewrite(self, match, rewriter): ...

The matcher, not the author of a rule, refuses a match whose inner values somebody else needs too.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any as Anything
from typing import ClassVar, TypeAlias

from torch import fx

from fxopt import ops
from fxopt.rewriter import Rewriter


@dataclasses.dataclass(frozen=True)
class Any:
    """Matches any operand and binds it to *name*."""

    name: str


@dataclasses.dataclass(frozen=True)
class Number:
    """Matches a Python number equal to *value* within a relative 1e-6 (people write √(2/π) to a few digits)."""

    value: float


@dataclasses.dataclass(frozen=True, init=False)
class Op:
    """Matches a call of one of the *kinds* whose first operands match *operands*.

    Attributes:
        kinds: as in ``ops.kind``, or ATen packet names; separated by spaces in the constructor.
        operands: patterns for the leading arguments; further arguments are free.
        name: what the node is bound to.
        commutative: also try the first two operands swapped.
    """

    kinds: frozenset[str]
    operands: tuple[Pattern, ...]
    name: str
    commutative: bool

    def __init__(self, kinds: str, *operands: Pattern, name: str = "", commutative: bool = False) -> None:
        object.__setattr__(self, "kinds", frozenset(kinds.split()))
        object.__setattr__(self, "operands", operands)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "commutative", commutative)


Pattern: TypeAlias = Op | Any | Number


@dataclasses.dataclass
class Match:
    """Where a pattern was found.

    Attributes:
        root: the outermost node.
        inner: matched call nodes below the root.
        bound: named nodes and operands.
    """

    root: fx.Node
    inner: list[fx.Node] = dataclasses.field(default_factory=list)
    bound: dict[str, Anything] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> Anything:
        return self.bound[name]


class Rule(abc.ABC):
    """One rewrite rule."""

    pattern: ClassVar[Op]

    def guard(self, match: Match, rewriter: Rewriter) -> str | None:
        """A reason to leave *match* alone, or None to rewrite it."""
        return None

    @abc.abstractmethod
    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Replace ``match.root``."""


def apply(rewriter: Rewriter, rules: Sequence[Rule]) -> None:
    """One sweep in graph order. At each node the first rule that matches and passes its guard is applied."""
    for node in rewriter.nodes():
        if not node._erased and node.op == "call_function":
            _apply_at(node, rewriter, rules)


def _apply_at(node: fx.Node, rewriter: Rewriter, rules: Sequence[Rule]) -> None:
    reasons: list[str] = []
    for rule in rules:
        for match in find(rule.pattern, node):
            reason = _shared(match) or rule.guard(match, rewriter)
            if reason is None:
                rule.rewrite(match, rewriter)
                return
            reasons.append(reason)
    for reason in reasons[:1]:
        rewriter.skip(node, reason)


def find(pattern: Op, node: fx.Node) -> Iterator[Match]:
    """Every way in which *pattern* matches with *node* as its root."""
    for bound, inner in _find(pattern, node):
        yield Match(node, [n for n in inner if n is not node], bound)


def _find(pattern: Pattern, value: Anything) -> Iterator[tuple[dict[str, Anything], list[fx.Node]]]:
    if isinstance(pattern, Any):
        yield {pattern.name: value}, []
        return
    if isinstance(pattern, Number):
        if isinstance(value, (int, float)) and math.isclose(value, pattern.value, rel_tol=1e-6):
            yield {}, []
        return
    if not isinstance(value, fx.Node) or not pattern.kinds & {ops.kind(value), ops.packet(value)}:
        return
    own = {pattern.name: value} if pattern.name else {}
    given = list(ops.arguments(value).values()) if ops.namespace(value) else list(value.args)
    for operands in _orders(pattern, given):
        for bound, inner in _find_all(pattern.operands, operands):
            yield own | bound, [value, *inner]


def _orders(pattern: Op, given: list[Anything]) -> Iterator[list[Anything]]:
    yield given
    if pattern.commutative and len(given) >= 2 and given[0] is not given[1]:
        yield [given[1], given[0], *given[2:]]


def _find_all(
    patterns: Sequence[Pattern], values: Sequence[Anything]
) -> Iterator[tuple[dict[str, Anything], list[fx.Node]]]:
    if not patterns:
        yield {}, []
        return
    if len(values) < len(patterns):
        return
    for bound, inner in _find(patterns[0], values[0]):
        for rest_bound, rest_inner in _find_all(patterns[1:], values[1:]):
            if all(rest_bound.get(k, v) is v for k, v in bound.items()):
                yield bound | rest_bound, inner + rest_inner


def _shared(match: Match) -> str | None:
    inside = {match.root, *match.inner}
    for node in match.inner:
        others = [user for user in node.users if user not in inside]
        if others:
            return f"the value of {node.name} is also used by {others[0].name}"
    return None
