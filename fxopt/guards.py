"""What a graph takes for granted about its dynamic sizes, checked at each call.

Tracing a branch such as ``if x.shape[0] > x.shape[1]`` keeps one side of it. torch.export lists the conditions under
which it did, ``L['x'].size()[0] > L['x'].size()[1]``, and a call that breaks one of them needs another graph.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sympy
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.utils import _pytree as pytree

from fxopt.errors import CaptureError

if TYPE_CHECKING:
    from fxopt.signature import Signature

_SIZE = re.compile(r"x\[(\d+)\](?:\.size\(\)\[(\d+)\])?")


@dataclasses.dataclass(frozen=True)
class Guard:
    """One condition on a call.

    Attributes:
        text: the condition in the user's names: ``tokens % 4 == 0``.
        code: the same as a Python expression over the input leaves ``x``: ``x[0].size()[1] % 4 == 0``.
    """

    text: str
    code: str

    def holds(self, leaves: Sequence[Any]) -> bool:
        """Whether the condition holds for these input leaves."""
        try:
            return bool(_compiled(self.code)(leaves))
        except ArithmeticError:  # a size of 0 under a division
            return False


@functools.lru_cache(maxsize=4096)
def _compiled(code: str) -> Callable[[Sequence[Any]], object]:
    test: Callable[[Sequence[Any]], object] = eval(f"lambda x: {code}", {**SYMPY_INTERP, "inf": math.inf})
    return test


def annotate(signature: Signature, conditions: Iterable[str], dim_names: Mapping[sympy.Symbol, str]) -> Signature:
    """*signature* with the names of its sizes and the conditions on them.

    Args:
        signature: as captured.
        conditions: Python expressions over ``L['argument']``, as ``ExportedProgram._guards_code`` has them.
        dim_names: the user's names of sizes.

    Raises:
        CaptureError: a condition is about something that is not among the inputs.
    """

    def name(match: re.Match[str]) -> str:
        leaf = signature.inputs[int(match[1])]
        if match[2] is None or leaf.shape is None:
            return leaf.name
        return dim_names.get(leaf.shape[int(match[2])], f"{leaf.name}.shape[{match[2]}]")

    places = _places(signature)
    sources = re.compile("|".join(re.escape(source) for source in sorted(places, key=len, reverse=True)))
    found: dict[str, Guard] = {}
    for condition in conditions:
        code = sources.sub(lambda m: f"x[{places[m[0]]}]", condition)
        if "L[" in code:
            raise CaptureError(
                f"the model branches on a size that is no input size: {condition}. Make the sizes static that this "
                "branch looks at."
            )
        found.setdefault(code, Guard(ast.unparse(ast.parse(_SIZE.sub(name, code), mode="eval")), code))
    return dataclasses.replace(signature, dim_names=dim_names, guards=tuple(found.values()))


def _places(signature: Signature) -> dict[str, int]:
    """Index of the input leaf that torch.export calls ``L['argument'][0]``, for each."""
    count, forward = signature.in_spec.num_leaves, signature.forward
    args, kwargs = pytree.tree_unflatten(range(count), signature.in_spec)
    named = {} if forward is None else dict(forward.bind(*args, **kwargs).arguments)
    paths = pytree.tree_leaves_with_path(named)
    places = {f"L{pytree.keystr(path)}": index for path, index in paths}
    for path, index in paths:  # an ExportedProgram spells *xs as xs_0, xs_1; its conditions do not
        varied = re.fullmatch(r"L\['(.+)_(\d+)'\](.*)", f"L{pytree.keystr(path)}")
        if varied:
            places.setdefault(f"L['{varied[1]}'][{varied[2]}]{varied[3]}", index)
    return {f"L['flat_args'][{i}]": i for i in range(count)} | places
