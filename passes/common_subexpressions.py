"""What is computed twice is computed once.

    a = f(x); b = f(x)   →   b = a

Only pure calls with equal arguments of equal types; random ops and higher-order ops are left alone. Constants are
one if they are the same memory; equal values are not enough, since training would part them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any, ClassVar

from torch import fx

from fxopt import ops
from fxopt.passbase import Pass, PassContext
from fxopt.rewriter import Rewriter


@dataclasses.dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """Merge equal calls, and constants that share their memory."""

    name: ClassVar[str] = "common-subexpressions"
    runs_after: ClassVar[tuple[str, ...]] = ("canonicalize",)

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """One sweep in graph order: merged inputs make later calls equal."""
        first: dict[Hashable, fx.Node] = {}
        lent_out = ops.lent_out(rewriter.program.graph)  # two outputs must not come to share memory
        for node in rewriter.nodes():
            key = _constant_key(node, rewriter) if node.op == "get_attr" else _call_key(node)
            if key is None:
                continue
            known = first.setdefault(key, node)
            if known is node or (known in lent_out and node in lent_out):
                continue
            if node in lent_out:
                lent_out.add(known)
            rewriter.replace(node, known)


def _call_key(node: fx.Node) -> Hashable | None:
    if node.op != "call_function" or not ops.is_pure(node):
        return None
    return (node.target, _freeze(node.args), _freeze(node.kwargs))


def _constant_key(node: fx.Node, rewriter: Rewriter) -> Hashable | None:
    value = rewriter.tensor(node)
    if value is None:
        return None
    return ("place", value.data_ptr(), value.dtype, tuple(value.shape), value.stride())


def _freeze(value: Any) -> Hashable:
    """A hashable stand-in that tells 1, 1.0 and True apart."""
    if isinstance(value, (tuple, list)):
        return (type(value).__name__ if isinstance(value, slice) else "seq", *(_freeze(v) for v in value))
    if isinstance(value, dict):
        return tuple((k, _freeze(v)) for k, v in sorted(value.items()))
    return value if isinstance(value, fx.Node) else (type(value), repr(value))
