"""Activations that a model spells out in arithmetic become the one op that they are.

    x · sigmoid(x)                                  →   silu(x)
    x · hardsigmoid(x),  x · relu6(x + 3) / 6       →   hardswish(x)
    x · tanh(softplus(x))                           →   mish(x)
    ½x · (1 + erf(x/√2))                            →   gelu(x)
    ½x · (1 + tanh(√(2/π) · (x + 0.044715·x³)))     →   gelu(x, approximate="tanh")

One op instead of eight, and an activation that can ride on the linear before it. Sources: Hendrycks and Gimpel,
"Gaussian Error Linear Units", 2016, equation 2 and its tanh approximation; Howard et al., "Searching for MobileNetV3",
2019, section 5.2; Misra, "Mish", 2019, equation 1.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any as Value
from typing import ClassVar

import torch

from fxopt import ops
from fxopt.passbase import Pass, PassContext
from fxopt.pattern import Any, Match, Number, Op, Pattern, Rule, apply
from fxopt.rewriter import Rewriter

aten = torch.ops.aten
_X = Any("x")


def _mul(a: Pattern, b: Pattern) -> Op:
    return Op("mul", a, b, commutative=True)


def _add(a: Pattern, b: Pattern) -> Op:
    return Op("add", a, b, commutative=True)


def _gelu(inner: Op) -> tuple[Op, ...]:
    """½x · (1 + inner), in the three ways of placing the ½."""
    gate = _add(inner, Number(1.0))
    half = Number(0.5)
    return (_mul(_mul(_X, half), gate), _mul(_X, _mul(gate, half)), _mul(_mul(_X, gate), half))


_ERF = Op("erf", Op("div", _X, Number(math.sqrt(2.0)))), Op("erf", _mul(_X, Number(math.sqrt(0.5))))
_C, _K = Number(0.044715), Number(math.sqrt(2.0 / math.pi))
_CUBE = (
    _mul(Op("pow", _X, Number(3.0)), _C),
    _mul(_mul(_mul(_X, _X), _X), _C),
    _mul(_mul(_mul(_X, _C), _X), _X),
)
_TANH = (
    *(Op("tanh", _mul(_add(_X, cube), _K)) for cube in _CUBE),
    Op("tanh", _mul(_mul(_X, _K), _add(_mul(_mul(_X, _C), _X), Number(1.0)))),  # k·x·(1 + c·x²)
)
_SHIFTED = Op("relu6", _add(_X, Number(3.0))), Op("hardtanh clamp", _add(_X, Number(3.0)), Number(0.0), Number(6.0))
_OPTIONS = {"alpha": 1, "rounding_mode": None, "beta": 1, "threshold": 20}  # of add, div, softplus
_SIXTH = Number(1.0 / 6.0)


@dataclasses.dataclass(frozen=True)
class _Spelling(Rule):
    """One way to write an activation."""

    pattern: Op  # type: ignore[misc]
    target: torch._ops.OpOverload
    kwargs: tuple[tuple[str, Value], ...] = ()

    def guard(self, match: Match, rewriter: Rewriter) -> str | None:
        """The op must give the dtype and shape of the arithmetic, and no step has options of its own."""
        for node in (match.root, *match.inner):
            a = ops.arguments(node)
            changed = [key for key, default in _OPTIONS.items() if a.get(key, default) != default]
            if changed:
                return f"{node.name} has another {changed[0]} than the activation"
        x, y = match["x"].meta["val"], match.root.meta["val"]
        return None if x.dtype == y.dtype and x.shape == y.shape else "the arithmetic changes dtype or shape"

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Replace the whole expression."""
        rewriter.replace(match.root, rewriter.call(self.target, (match["x"],), dict(self.kwargs), before=match.root))


_RULES: tuple[_Spelling, ...] = (
    _Spelling(_mul(_X, Op("sigmoid", _X)), aten.silu.default),
    _Spelling(_mul(_X, Op("hardsigmoid", _X)), aten.hardswish.default),
    *(_Spelling(_mul(_X, Op("div", s, Number(6.0))), aten.hardswish.default) for s in _SHIFTED),
    *(_Spelling(Op("div", _mul(_X, s), Number(6.0)), aten.hardswish.default) for s in _SHIFTED),
    *(_Spelling(_mul(_mul(_X, s), _SIXTH), aten.hardswish.default) for s in _SHIFTED),
    _Spelling(_mul(_X, Op("tanh", Op("softplus", _X))), aten.mish.default),
    *(_Spelling(p, aten.gelu.default) for erf in _ERF for p in _gelu(erf)),
    *(_Spelling(p, aten.gelu.default, (("approximate", "tanh"),)) for tanh in _TANH for p in _gelu(tanh)),
)


@dataclasses.dataclass(frozen=True)
class RecognizeActivations(Pass):
    """Replace spelled-out activations by the ops that they are."""

    name: ClassVar[str] = "recognize-activations"
    runs_after: ClassVar[tuple[str, ...]] = ("canonicalize", "common-subexpressions")

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """One sweep over all spellings. A product that is none of them is no candidate and leaves no reason."""
        apply(rewriter, _RULES)
