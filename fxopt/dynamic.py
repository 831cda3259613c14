"""Dynamic sizes at the border of a graph: what the user writes, what torch.export wants, what a call is checked for.

torch.export specialises a dimension whose example size is 1, so a batch of one would freeze the batch that the user
asked to keep open: ``enlarge`` gives export an example with that dimension doubled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import nn
from torch.export import Dim
from torch.export.dynamic_shapes import _combine_args, _DimHint, _tree_map_with_path
from torch.utils import _pytree as pytree

from fxopt.errors import InputError
from fxopt.signature import UNLIMITED, Leaf


def normalize(shapes: Any) -> Any:
    """*shapes* with every string replaced by the ``Dim`` of that name (the same one for the same string).

    Raises:
        InputError: a string is no identifier.
    """
    known: dict[str, Any] = {}

    def convert(value: Any) -> Any:
        if isinstance(value, str):
            if not value.isidentifier():
                raise InputError(f"dynamic_shapes names a size {value!r}: a name has letters, digits and _ only")
            return known.setdefault(value, Dim(value))
        if isinstance(value, Mapping):
            return {key: convert(v) for key, v in value.items()}
        return type(value)(convert(v) for v in value) if type(value) in (list, tuple) else value

    return convert(shapes)


def _is_dynamic(dim: Any) -> bool:
    return dim is not None and not isinstance(dim, int) and dim is not Dim.STATIC


def enlarge(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs with each dynamic dimension of size 1 doubled.

    Raises:
        InputError: *shapes* does not have the structure of the inputs.
    """
    replaced: dict[int, torch.Tensor] = {}

    def double(x: torch.Tensor, axis: int, dim: Any) -> None:
        if _is_dynamic(dim) and x.shape[axis] == 1:
            replaced[id(x)] = torch.cat([replaced.get(id(x), x)] * 2, dim=axis)

    _visit_dims(model, args, kwargs, shapes, double)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    new_args, new_kwargs = pytree.tree_unflatten([replaced.get(id(x), x) for x in leaves], spec)
    return new_args, new_kwargs


def user_dims(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, inputs: Sequence[Leaf]
) -> dict[sympy.Symbol, Any]:
    """What the user wrote for each dynamic size; *inputs* are the leaves of the captured signature."""
    dims: dict[sympy.Symbol, Any] = {}
    if shapes is None:
        return dims
    place = {id(x): leaf for x, leaf in zip(pytree.tree_leaves((args, kwargs)), inputs, strict=True)}

    def note(x: torch.Tensor, axis: int, dim: Any) -> None:
        captured = sympy.sympify((place[id(x)].shape or ())[axis])
        if _is_dynamic(dim) and len(captured.free_symbols) == 1:
            (symbol,) = captured.free_symbols
            dims[symbol] = getattr(dim, "root", dim)  # of 2 * n, the n

    _visit_dims(model, args, kwargs, normalize(shapes), note)
    return dims


def _visit_dims(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shapes: Any,
    visit: Callable[[torch.Tensor, int, Any], None],
) -> None:
    """Call *visit* with each input tensor, axis and what *shapes* says of it."""

    def dims_of(path: Any, x: Any, dims: Any) -> None:
        if not isinstance(x, torch.Tensor) or dims is None or isinstance(dims, _DimHint):
            return
        for axis, dim in dims.items() if isinstance(dims, Mapping) else enumerate(dims):
            visit(x, axis, dim)

    try:
        combined: Any = _combine_args(model, args, kwargs)
        if isinstance(shapes, (tuple, list)):
            combined = type(shapes)(combined.values())
        _tree_map_with_path(dims_of, combined, shapes, tree_name="inputs")
    except Exception as error:
        raise InputError(f"dynamic_shapes does not fit the inputs: {error}") from error


def size(dim: Any) -> int | sympy.Expr:
    """A size as a plain int, or as the sympy expression of its symbols."""
    return dim if isinstance(dim, int) else dim.node.expr


def leaf(name: str, value: Any, constant: Any) -> Leaf:
    """The :class:`Leaf` of an input or output with the fake *value*, or with a *constant* one."""
    if isinstance(value, torch.Tensor):
        shape = tuple(size(d) for d in value.shape)
        return Leaf(name, shape, value.dtype, device=value.device.type)
    return Leaf(name, value=constant)


def ranges(exported: torch.export.ExportedProgram) -> dict[sympy.Symbol, tuple[int, int]]:
    """Lowest and highest size of each symbol, as torch.export has them."""
    return {
        symbol: (_bound(interval.lower, 0), _bound(interval.upper, UNLIMITED))
        for symbol, interval in exported.range_constraints.items()
    }


def _bound(value: Any, unlimited: int) -> int:
    """An end of a sympy interval as an int; *unlimited* where it is infinite."""
    return int(value) if value.is_Integer else unlimited


def output_names(spec: pytree.TreeSpec) -> list[str]:
    """A readable unique identifier for each output leaf: ``logits``, ``past_key_values_0_1``, ``output``."""
    tree = pytree.tree_unflatten([torch.empty(0)] * spec.num_leaves, spec)
    paths, _ = pytree.tree_flatten_with_path(tree)
    names: list[str] = []
    for path, _ in paths:
        words = re.sub(r"\W+", "_", pytree.keystr(path)).strip("_")
        name = f"output_{words}" if words[:1].isdigit() else words or "output"
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names
