"""Outputs of a Dynamo graph that lie in the memory of its inputs or of other outputs.

    y = x[0]; y.zero_(); return y         y is a view of x for whoever goes on with it: y.add_(1) has to show in x

A compiled model computes values; which of them share memory is read from the values that Dynamo traced the graph with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP, statically_known_true
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._sympy.printers import PythonPrinter

Place = tuple[tuple[int, ...], tuple[int, ...], int]


@dataclasses.dataclass(frozen=True)
class Alias:
    """One output that is a view.

    Attributes:
        output: its index.
        input: index of the input that it is a view of, or None: it is one of the output ``base``.
        base: index of an output.
        place: size, stride, and offset from the first element of what it is a view of, for the graph's arguments.
    """

    output: int
    input: int | None
    base: int | None
    place: Callable[[Sequence[Any]], Place]

    def of(self, args: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """The view, for inputs *args* and the *outputs* so far."""
        if self.input is not None:
            whole = args[self.input]
        else:
            assert self.base is not None
            whole = outputs[self.base]
            if not whole.is_contiguous():  # the engine lays it out otherwise
                return outputs[self.output]
        size, stride, offset = self.place(args)
        if offset == 0 and whole.shape == size and whole.stride() == stride:
            return whole
        return whole.as_strided(size, stride, whole.storage_offset() + offset)


def aliases(graph: fx.Graph) -> list[Alias]:
    """The outputs of *graph* that are views of its inputs, or of another output that fills its memory."""
    holders = list(graph.find_nodes(op="placeholder"))
    inputs = [_value(node) for node in holders]
    results: Any = graph.output_node().args[0]
    outputs = [_value(node) if isinstance(node, fx.Node) else None for node in results]
    symbols, found = _symbols(holders), list[Alias]()
    for i, value in enumerate(outputs):
        if value is None:
            continue
        source = _first(inputs, value)
        base = next((j for j, one in enumerate(outputs) if _shared(one, value) and _fills(one)), None)
        if source is None and base in (None, i):
            continue
        whole = inputs[source] if source is not None else outputs[base or 0]
        place = _place(value, whole, symbols)
        if place is not None:
            found.append(Alias(i, source, None if source is not None else base, place))
    return found


def _first(tensors: Sequence[torch.Tensor | None], value: torch.Tensor) -> int | None:
    return next((i for i, one in enumerate(tensors) if _shared(one, value)), None)


def _value(node: fx.Node) -> torch.Tensor | None:
    """The traced value of *node*, if it is a tensor with strides."""
    value = node.meta.get("example_value")
    return value if isinstance(value, torch.Tensor) and value.layout is torch.strided else None


def _symbols(holders: Sequence[fx.Node]) -> Mapping[sympy.Symbol, int]:
    """The input that holds each open size."""
    values = [node.meta.get("example_value") for node in holders]
    found = {x.node.expr: i for i, x in enumerate(values) if isinstance(x, torch.SymInt)}
    return {expression: i for expression, i in found.items() if isinstance(expression, sympy.Symbol)}


def _shared(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    if a is None or a.dtype != b.dtype:
        return False
    first, second = (StorageWeakRef(x.untyped_storage()) for x in (a, b))
    return bool(first == second)


def _fills(value: Any) -> bool:
    """Whether *value* is the whole of its memory, in order, for all sizes."""
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not statically_known_true(stride == expected):
            return False
        expected = expected * size
    return statically_known_true(expected * value.element_size() == value.untyped_storage().nbytes())


def _place(value: torch.Tensor, whole: Any, symbols: Mapping[sympy.Symbol, int]) -> Callable[..., Place] | None:
    """Size, stride and offset of *value* in *whole* as a function of the graph's arguments; None where they are not."""
    offset = value.storage_offset() - whole.storage_offset()
    numbers = [x.node.expr if isinstance(x, torch.SymInt) else x for x in (*value.shape, *value.stride(), offset)]
    if all(isinstance(number, int) for number in numbers):
        fixed = tuple(value.shape), tuple(value.stride()), int(offset)
        return lambda args: fixed
    if not set[Any]().union(*(sympy.sympify(number).free_symbols for number in numbers)) <= symbols.keys():
        return None
    renamed = {symbol: sympy.Symbol(f"s{i}", integer=True, positive=True) for symbol, i in symbols.items()}
    texts = [PythonPrinter().doprint(sympy.sympify(number).xreplace(renamed)) for number in numbers]
    dim = value.dim()
    body = f"({''.join(f'{t}, ' for t in texts[:dim])}), ({''.join(f'{t}, ' for t in texts[dim:-1])}), {texts[-1]}"
    names = ", ".join(f"s{i}" for i in symbols.values())
    compute = eval(f"lambda {names}: ({body})", dict(SYMPY_INTERP))
    return lambda args: compute(*(args[i] for i in symbols.values()))
