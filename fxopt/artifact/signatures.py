"""A signature as JSON and back: structure, names, sizes, conditions on them, and what the model writes to."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch._guards import GuardSource, Source
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.value_ranges import ValueRanges

from fxopt.artifact.trees import decode_tree, encode_tree
from fxopt.artifact.values import decode, decode_size, encode, encode_size
from fxopt.errors import ArtifactError
from fxopt.guards import Guard
from fxopt.signature import UNLIMITED, Leaf, Signature, Writeback

_GUARD_CALLS = ("max", "min", "int", "abs", "IsNonOverlappingAndDenseIndicator")
_LONGEST_GUARD = 10_000  # characters
_GUARD_NODES = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult,
    ast.FloorDiv, ast.Div, ast.Mod, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Constant,
    ast.Load, ast.Subscript, ast.Call, ast.Attribute, ast.Name,
)  # fmt: skip


def encode_signature(signature: Signature, sizes: Mapping[sympy.Symbol, int]) -> dict[str, Any]:
    """*signature* as JSON; *sizes* are those of the example inputs.

    Raises:
        ArtifactError: part of it cannot be written down.
    """
    symbols: dict[str, dict[str, Any]] = {str(symbol): {"size": size} for symbol, size in sizes.items()}
    for symbol, (low, high) in signature.ranges.items():
        symbols.setdefault(str(symbol), {})["range"] = [low, high]
    for symbol, name in signature.dim_names.items():
        symbols.setdefault(str(symbol), {})["name"] = name
    for symbol, why in signature.limits.items():
        symbols.setdefault(str(symbol), {})["limit"] = why
    return {
        "in": encode_tree(signature.in_spec),
        "out": encode_tree(signature.out_spec),
        "inputs": [_encode_leaf(leaf) for leaf in signature.inputs],
        "outputs": [leaf.name for leaf in signature.outputs],
        "forward": _encode_forward(signature.forward),
        "symbols": symbols,
        "writebacks": [[back.constant, back.input] for back in signature.writebacks],
        "guards": [_encode_guard(guard, len(signature.inputs)) for guard in signature.guards],
        "layouts": [encode(layout) for layout in signature.layouts],
        "ordered": signature.ordered,
    }


def _encode_leaf(leaf: Leaf) -> dict[str, Any]:
    if leaf.shape is None:
        return {"name": leaf.name, "value": encode(leaf.value)}
    shape = [encode_size(size) for size in leaf.shape]
    return {"name": leaf.name, "shape": shape, "dtype": encode(leaf.dtype), "device": leaf.device}


def _encode_forward(forward: inspect.Signature | None) -> Any:
    """Names, kinds and defaults of the model's arguments; null where a default cannot be written down."""
    if forward is None:
        return None
    try:
        return [
            [p.name, p.kind.name, [] if p.default is p.empty else [encode(p.default)]]
            for p in forward.parameters.values()
        ]
    except ArtifactError:
        return None


@dataclasses.dataclass(frozen=True)
class _Named(Source):
    """Where a size comes from: the file. Dynamo's own kinds take a second to import."""

    word: str

    @property
    def guard_source(self) -> GuardSource:
        return GuardSource.CONSTANT

    @property
    def _name_template(self) -> str:
        return self.word


class Sizes:
    """The dynamic sizes of a loaded program: a symbol for each, in a ShapeEnv of its own.

    Attributes:
        env: what knows how large each may be.
        symbols: by the name it has in the file.
        hints: the size of each in the example inputs.
    """

    def __init__(self, entries: Mapping[str, Any]) -> None:
        """*entries* are the ``symbols`` of a signature."""
        self.env, self.symbols, self.hints = ShapeEnv(), dict[str, sympy.Symbol](), dict[sympy.Symbol, int]()
        self.ranges = dict[sympy.Symbol, tuple[int, int]]()
        for name, entry in entries.items():
            if not name.isidentifier():
                raise ArtifactError(f"an artifact has no size named {name!r:.80}")
            low, high = (_whole(bound) for bound in entry.get("range", (0, UNLIMITED)))
            if "size" in entry:
                hint = _whole(entry["size"])
                symbol = self.env.create_symbol(hint, _Named(name), DimDynamic.DYNAMIC, do_not_specialize_zero_one=True)
                self.env.var_to_range[symbol] &= ValueRanges(min(low, hint, 2), max(high, hint))
                self.hints[symbol] = hint
            else:
                symbol = sympy.Symbol(name, integer=True)
            self.symbols[name] = symbol
            if "range" in entry:
                self.ranges[symbol] = (low, high)

    def size(self, tree: Any) -> Any:
        """An int or SymInt for what ``encode_size`` wrote."""
        found = decode_size(tree, self.symbols)
        if isinstance(found, int):
            return found
        return self.env.create_symintnode(found, hint=int(found.subs(self.hints)))


def decode_signature(entry: Mapping[str, Any], sizes: Sizes) -> Signature:
    """The signature that :func:`encode_signature` wrote; its outputs have names alone.

    Raises:
        ArtifactError: it wrote no such thing.
    """
    inputs = tuple(_decode_leaf(leaf, sizes) for leaf in entry["inputs"])
    symbols = sizes.symbols
    return Signature(
        decode_tree(entry["in"], made=False),
        decode_tree(entry["out"], made=True),
        inputs,
        tuple(Leaf(_name(name)) for name in entry["outputs"]),
        _decode_forward(entry["forward"]),
        sizes.ranges,
        tuple(_writeback(back, len(inputs)) for back in entry["writebacks"]),
        {symbols[name]: str(one["name"]) for name, one in entry["symbols"].items() if "name" in one},
        tuple(_guard(text, code, len(inputs)) for text, code in entry["guards"]),
        tuple(decode(layout) for layout in entry["layouts"]),
        bool(entry["ordered"]),
        {symbols[name]: str(one["limit"]) for name, one in entry["symbols"].items() if "limit" in one},
    )


def _decode_leaf(entry: Mapping[str, Any], sizes: Sizes) -> Leaf:
    if "shape" not in entry:
        return Leaf(_name(entry["name"]), value=decode(entry["value"]))
    dtype = decode(entry["dtype"])
    if not isinstance(dtype, torch.dtype) or entry["device"] not in ("cpu", "cuda"):
        raise ArtifactError(f"an artifact has no input like {entry!r:.80}")
    shape = tuple(decode_size(size, sizes.symbols) for size in entry["shape"])
    if any(isinstance(size, int) and not 0 <= size < 2**48 for size in shape):
        raise ArtifactError(f"an input has no shape {shape!r:.80}")
    return Leaf(_name(entry["name"]), shape, dtype, device=entry["device"])


def _decode_forward(entry: Any) -> inspect.Signature | None:
    if entry is None:
        return None
    kinds = {kind.name: kind for kind in inspect._ParameterKind}
    parameters = [
        inspect.Parameter(_name(name), kinds[kind], default=decode(default[0]) if default else inspect.Parameter.empty)
        for name, kind, default in entry
    ]
    return inspect.Signature(parameters)


def _encode_guard(guard: Guard, inputs: int) -> list[str]:
    _guard(guard.text, guard.code, inputs)  # what no reader would take is not written
    return [guard.text, guard.code]


def _writeback(entry: Any, inputs: int) -> Writeback:
    constant, place = entry
    if not ((isinstance(constant, str) and place is None) or (constant is None and place in range(inputs))):
        raise ArtifactError(f"a model does not write to {entry!r:.80}")
    return Writeback(constant, place)


def _guard(text: Any, code: Any, inputs: int) -> Guard:
    """A condition, once it is known to be arithmetic on sizes and nothing else.

    Raises:
        ArtifactError: it is something else.
    """
    if not isinstance(text, str) or not isinstance(code, str) or len(code) > _LONGEST_GUARD:
        raise ArtifactError("an artifact has no condition of this kind")
    try:
        tree = ast.parse(code, mode="eval")
    except (SyntaxError, ValueError, MemoryError) as error:
        raise ArtifactError(f"a condition does not parse: {error}") from error
    for node in ast.walk(tree):
        if not isinstance(node, _GUARD_NODES) or not _is_arithmetic(node, inputs):
            raise ArtifactError(f"a condition is more than arithmetic on sizes: {code:.80}")
    return Guard(text, code)


def _is_arithmetic(node: ast.AST, inputs: int) -> bool:
    match node:
        case ast.Name(id=name):
            return name in ("x", "math", "inf") or name in _GUARD_CALLS
        case ast.Constant(value=value):
            return type(value) in (int, float, bool)
        case ast.Attribute(value=ast.Name(id="math"), attr=name):
            return name in ("ceil", "floor", "trunc")
        case ast.Attribute(value=ast.Subscript(), attr=name):
            return name == "size"
        case ast.Subscript(value=ast.Name(id="x"), slice=ast.Constant(value=index)):
            return type(index) is int and 0 <= index < inputs
        case ast.Subscript(value=ast.Call(func=ast.Attribute(attr="size"), args=[]), slice=ast.Constant(value=index)):
            return type(index) is int
        case ast.Call(func=ast.Attribute(attr="size"), args=[], keywords=[]):
            return True
        case ast.Call(func=ast.Attribute(value=ast.Name(id="math")), keywords=[]):
            return True
        case ast.Call(func=ast.Name(id=name), keywords=[]):
            return name in _GUARD_CALLS
        case ast.Attribute() | ast.Subscript() | ast.Call():
            return False
    return True


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ArtifactError(f"a size is no whole number: {value!r:.40}")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value.isidentifier():
        raise ArtifactError(f"an artifact has no input or output named {value!r:.80}")
    return value
