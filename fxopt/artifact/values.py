"""Arguments of ops and sizes as JSON, and back. What JSON has no word for is an object of one key.

    (1, 2.0, torch.int8, %3, inf)  ↔  {"tuple": [1, 2.0, {"dtype": "int8"}, {"node": 3}, {"float": "inf"}]}

Sizes are written as trees of a few functions, ``["Add", "s0", 1]``, and never as text that something would evaluate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy import functions as sizes

from fxopt.errors import ArtifactError

_TORCH = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
_DEVICES = ("cpu", "cuda", "meta")

# The functions that sizes are made of, by name.
_SIZES: dict[str, Callable[..., Any]] = {
    "Add": sympy.Add, "Mul": sympy.Mul, "Pow": sympy.Pow, "Max": sizes.Max, "Min": sizes.Min,
    "Mod": sizes.Mod, "PythonMod": sizes.PythonMod, "FloorDiv": sizes.FloorDiv, "CleanDiv": sizes.CleanDiv,
    "CeilToInt": sizes.CeilToInt, "FloorToInt": sizes.FloorToInt,
    "TruncToInt": sizes.TruncToInt, "IntTrueDiv": sizes.IntTrueDiv, "PowByNatural": sizes.PowByNatural,
    "ModularIndexing": sizes.ModularIndexing,
}  # fmt: skip
_MOST_NODES = 1000  # of one size
_HIGHEST_POWER = 8


def encode(value: Any, nodes: Mapping[fx.Node, int] | None = None) -> Any:
    """*value* as what ``json.dumps`` takes; nodes by their number in *nodes*.

    Raises:
        ArtifactError: there is no way to write it.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, fx.Node):
        assert nodes is not None
        return {"node": nodes[value]}
    if type(value) is complex:
        return {"complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, slice):
        return {"slice": [encode(part, nodes) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, (list, tuple)):  # fx's own immutable lists, torch.Size and named tuples included
        items = [encode(item, nodes) for item in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item, nodes)] for key, item in value.items()]}
    if isinstance(value, torch.device):
        return {"device": value.type}
    if value is Ellipsis:
        return {"ellipsis": True}
    for name, kind in _TORCH.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise ArtifactError(f"an artifact cannot hold a {type(value).__name__}: {value!r:.80}")


def decode(value: Any, nodes: Sequence[fx.Node] = ()) -> Any:
    """What :func:`encode` wrote.

    Raises:
        ArtifactError: it wrote no such thing.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [decode(item, nodes) for item in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise ArtifactError(f"an artifact has no value like {value!r:.80}")
    ((tag, content),) = value.items()
    if tag == "node" and type(content) is int and 0 <= content < len(nodes):
        return nodes[content]
    if tag == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if tag == "complex" and isinstance(content, list) and len(content) == 2:
        return complex(*(decode(part) for part in content))
    if tag in ("tuple", "slice") and isinstance(content, list) and (tag == "tuple" or len(content) == 3):
        parts = tuple(decode(item, nodes) for item in content)
        return parts if tag == "tuple" else slice(*parts)
    if tag == "dict" and isinstance(content, list):
        return {decode(key): decode(item, nodes) for key, item in content}
    if tag == "device" and content in _DEVICES:
        return torch.device(content)
    if tag == "ellipsis":
        return Ellipsis
    found = getattr(torch, content, None) if tag in _TORCH and isinstance(content, str) else None
    if found is None or not isinstance(found, _TORCH[tag]):
        raise ArtifactError(f"an artifact has no value like {value!r:.80}")
    return found


def encode_size(size: Any) -> Any:
    """An int, or a sympy expression as a tree of names.

    Raises:
        ArtifactError: the expression has a function that is not among the known ones.
    """
    if isinstance(size, (int, sympy.Integer)):
        return int(size)
    if isinstance(size, sympy.Symbol):
        return size.name
    if isinstance(size, sympy.Rational):
        return ["Rational", int(size.p), int(size.q)]
    name = size.func.__name__
    if name not in _SIZES:
        raise ArtifactError(f"an artifact cannot hold the size {size}")
    return [name, *(encode_size(part) for part in size.args)]


def decode_size(tree: Any, symbols: Mapping[str, sympy.Symbol]) -> int | sympy.Expr:
    """What :func:`encode_size` wrote; *symbols* by the names they had then.

    Raises:
        ArtifactError: it wrote no such thing.
    """
    left = [_MOST_NODES]

    def build(part: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise ArtifactError("an artifact has no size as long as this one")
        if type(part) is int and abs(part) < 2**63:
            return sympy.Integer(part)
        if isinstance(part, str) and part in symbols:
            return symbols[part]
        if isinstance(part, list) and part and part[0] == "Rational" and len(part) == 3:
            return sympy.Rational(int(part[1]), int(part[2]))
        if isinstance(part, list) and len(part) > 1 and part[0] in _SIZES:
            if "Pow" in part[0] and not (len(part) == 3 and type(part[2]) is int and abs(part[2]) <= _HIGHEST_POWER):
                raise ArtifactError(f"an artifact has no power like {part!r:.80}")
            return _SIZES[part[0]](*(build(item) for item in part[1:]))
        raise ArtifactError(f"an artifact has no size like {part!r:.80}")

    if type(tree) is int:
        return tree
    return build(tree)
