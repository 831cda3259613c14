"""Whether a graph that was captured for sizes of 2 and more also answers for a size of 1: it is tried, never assumed.

torch.export traces every dynamic size as "not 1". Most graphs hold for 1 as well, and a batch of one is what most
people run; but ``x.squeeze()`` or ``if len(x) == 1`` make it another graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxopt import dynamic, ops, verify
from fxopt.errors import InputError
from fxopt.execute import evaluate
from fxopt.program import Program
from fxopt.signature import UNLIMITED, Signature
from fxopt.twin import run_eager


def widen(program: Program, model: nn.Module, inputs: Sequence[Any], fixed: Collection[sympy.Symbol]) -> Signature:
    """The signature of *program*, each dynamic size open down to 1 where graph and *model* agree there.

    Args:
        program: as captured.
        model: what it was captured from.
        inputs: flat example inputs.
        fixed: sizes whose lowest value the user has chosen.
    """
    signature = program.signature
    ranges, limits = dict(signature.ranges), dict[sympy.Symbol, str]()
    sizes = signature.sizes(inputs)
    for symbol in sizes:
        low, high = ranges.get(symbol, (0, UNLIMITED))
        if low > 2 or symbol in fixed:
            continue
        problem = _problem(program, model, inputs, sizes | {symbol: 1})
        ranges[symbol] = (2 if problem else 1, high)
        if problem:
            limits[symbol] = f"at size 1 {problem}. Compile the model for that size alone, without dynamic_shapes"
    return dataclasses.replace(signature, ranges=ranges, limits=limits)


def _problem(program: Program, model: nn.Module, inputs: Sequence[Any], sizes: dict[sympy.Symbol, int]) -> str | None:
    """What keeps *program* from standing for *model* at these *sizes*, or None."""
    cut = _cut(program.signature, inputs, sizes)
    if cut is None:
        return "the other sizes of the example do not fit"
    for guard in program.signature.guards:
        if not guard.holds(cut):
            return f"the graph does not hold: it was captured where {guard.text}"
    try:
        reference = run_eager(model, *pytree.tree_unflatten(cut, program.signature.in_spec))
    except InputError as error:
        return str(error).replace("the example inputs", "it")
    false = list[fx.Node]()

    def observe(node: fx.Node, value: Any) -> None:
        if not _has_shape(node.meta.get("val"), value, sizes):
            false.append(node)

    try:
        with torch.random.fork_rng(devices=[]):
            answered = evaluate(program, cut, observe=observe)[: len(reference)]
    except RuntimeError as error:
        return f"the graph fails: {error}"
    same = [_kind(x) for x in reference] == [_kind(x) for x in answered]
    if same and not any(ops.is_random(node) for node in program.graph.nodes):
        same = verify.compare(reference, answered).within
    return None if same and not false else "the model computes otherwise than for larger sizes"


def _cut(signature: Signature, inputs: Sequence[Any], sizes: dict[sympy.Symbol, int]) -> list[Any] | None:
    """The example inputs cut down to *sizes*; None where they are too small for that."""
    result = []
    for leaf, x in zip(signature.inputs, inputs, strict=True):
        for axis, size in enumerate(leaf.shape or ()):
            wanted = int(sympy.sympify(size).xreplace(sizes))
            if not 0 < wanted <= x.shape[axis]:
                return None
            x = x.narrow(axis, 0, wanted).clone()  # dense, as a user would give it
        result.append(x)
    return result


def _has_shape(meta: Any, value: Any, sizes: dict[sympy.Symbol, int]) -> bool:
    """Whether a *value* has the shape that the metadata of its node promises; passes go by that."""
    if isinstance(meta, (tuple, list)) and isinstance(value, (tuple, list)):
        return all(_has_shape(m, v, sizes) for m, v in zip(meta, value, strict=True))
    if not isinstance(meta, torch.Tensor) or not isinstance(value, torch.Tensor):
        return True
    promised = [sympy.sympify(dynamic.size(d)).xreplace(sizes) for d in meta.shape]
    return len(promised) == value.dim() and all(
        p == d or not p.is_number for p, d in zip(promised, value.shape, strict=True)
    )


def _kind(value: Any) -> object:
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else type(value)
