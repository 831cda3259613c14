"""Outputs and inputs that are objects: teach torch's pytree how to take them apart and put them together.

torch.export knows tuples, lists, dicts, named tuples and what is registered. Two kinds are registered here when a
model is seen to use them: dataclasses (as ``torch.export.register_dataclass`` asks users to do by hand), and plain
objects whose attributes hold tensors, such as a cache of keys and values. Tensor-holding attributes become children;
all others are kept as they were at capture.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from fxopt.errors import InputError


def register(value: Any, within: tuple[Any, ...] = ()) -> None:
    """Register every type within *value* that pytree does not know and that holds tensors.

    Raises:
        InputError: an object with tensors refers back to itself: it cannot be taken apart.
    """
    if any(value is outer for outer in within):
        if not _holds_tensor(value):
            return
        raise InputError(f"a {type(value).__name__} among the inputs or outputs refers back to itself")
    for child in _children(value):
        register(child, (*within, value))
    kind = type(value)
    if (
        kind in pytree.SUPPORTED_NODES
        or isinstance(value, (torch.Tensor, type))
        or pytree.is_namedtuple_instance(value)
    ):
        return
    if dataclasses.is_dataclass(value) and not isinstance(value, Mapping):
        torch.export.register_dataclass(kind)
    elif _is_plain_object(value) and _holds_tensor(value):
        pytree.register_pytree_node(
            kind,
            _flatten,
            lambda children, context: _unflatten(kind, children, context),
            serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
            flatten_with_keys_fn=_flatten_with_keys,
        )


def _is_plain_object(value: Any) -> bool:
    """Whether the value is its ``__dict__`` and nothing else."""
    builtin = isinstance(value, (Mapping, list, tuple, set, str, bytes, torch.nn.Module)) or callable(value)
    return hasattr(value, "__dict__") and not builtin


def _children(value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor):
        return []
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return list(value)
    return list(vars(value).values()) if _is_plain_object(value) and not isinstance(value, type) else []


def _holds_tensor(value: Any, depth: int = 8) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    return depth > 0 and any(_holds_tensor(child, depth - 1) for child in _children(value))


def _split(value: Any) -> tuple[list[str], dict[str, Any]]:
    held = [name for name, child in vars(value).items() if _holds_tensor(child)]
    return held, {name: child for name, child in vars(value).items() if name not in held}


def _flatten(value: Any) -> tuple[list[Any], Any]:
    held, rest = _split(value)
    return [vars(value)[name] for name in held], (tuple(held), Rest(rest))


def _flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], Any]:
    children, context = _flatten(value)
    return [(pytree.GetAttrKey(name), child) for name, child in zip(context[0], children, strict=True)], context


def _unflatten(kind: type, children: Any, context: Any) -> Any:
    held, rest = context
    value: Any = object.__new__(kind)
    value.__dict__.update(rest.attributes)
    value.__dict__.update(zip(held, children, strict=True))
    return value


class Rest:
    """Attributes without tensors. A model may branch on them, so two objects are alike only where all of them are."""

    def __init__(self, attributes: dict[str, Any], known_by: str | None = None) -> None:
        """*known_by*: the fingerprint, where the attributes themselves are not there."""
        self.attributes = attributes
        self.fingerprint = known_by or fingerprint(attributes)  # taken now: the attributes may be changed later

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rest) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Rest({self.fingerprint})"


_SCALARS = (
    int, float, complex, str, bytes, type(None), range, np.generic, torch.dtype, torch.device, torch.layout,
    torch.memory_format,
)  # fmt: skip


def fingerprint(value: Any, within: tuple[int, ...] = ()) -> str:
    """Text that is equal for two values only where no model can tell them apart.

    Containers and objects are taken apart, not trusted to print or compare themselves; what cannot be taken apart
    stands for itself alone.
    """
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, _SCALARS) and not hasattr(value, "__dict__"):
        return f"{kind} {value!r}"
    if isinstance(value, np.ndarray) and value.dtype != object:
        return f"{kind} {value.dtype}{value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, enum.Enum):
        return f"{kind} {value.name}"
    if id(value) in within:
        return f"{kind} around it, {within.index(id(value))}"
    parts = _parts(value, (*within, id(value)))
    return f"{kind} at {id(value):#x}" if parts is None else f"{kind}({', '.join(parts)})"


def _parts(value: Any, within: tuple[int, ...]) -> list[str] | None:
    """Fingerprints of what a container or object consists of; None for anything else."""
    if isinstance(value, Mapping):
        parts = [f"{fingerprint(key, within)}: {fingerprint(child, within)}" for key, child in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [fingerprint(child, within) for child in value]
    elif isinstance(value, (set, frozenset)):
        parts = sorted(fingerprint(child, within) for child in value)
    elif _is_plain_object(value) and not isinstance(value, (type, *_SCALARS)):
        parts = []
    else:
        return None
    return parts + [f"{name}={fingerprint(child, within)}" for name, child in getattr(value, "__dict__", {}).items()]


def tree_key(spec: pytree.TreeSpec) -> Hashable:
    """A key that two structures share only where they are the same, attributes included."""
    return spec.type, fingerprint(spec.context), tuple(tree_key(child) for child in spec.children())


def reordered(value: Any, spec: pytree.TreeSpec) -> Any:
    """*value* with the keys of its dicts in the order that *spec* has them, where they are the same keys."""
    if type(value) is not spec.type or type(value) not in (dict, list, tuple) or len(value) != spec.num_children:
        return value
    if type(value) is not dict:
        return type(value)(map(reordered, value, spec.children()))
    if set(value) != set(spec.context):
        return value
    return {key: reordered(value[key], child) for key, child in zip(spec.context, spec.children(), strict=True)}


def difference(expected: pytree.TreeSpec, given: pytree.TreeSpec, where: str) -> str:
    """The first place in which two structures differ, in words; *where* names the outermost one."""
    if expected.type is not given.type:
        return f"{where} is {_kind(given)}, expected {_kind(expected)}"
    if expected.type in (dict, OrderedDict) and list(expected.context) != list(given.context):
        return f"{where} has the keys {list(given.context)}, expected {list(expected.context)}"
    if expected.num_children != given.num_children:
        return f"{where} has {given.num_children} entries, expected {expected.num_children}"
    names = [f"[{key!r}]" for key in expected.context] if expected.type in (dict, OrderedDict) else None
    for i, (a, b) in enumerate(zip(expected.children(), given.children(), strict=True)):
        if a != b:
            return difference(a, b, where + (names[i] if names else f"[{i}]"))
    return f"{where}, {_kind(given)}, has other attributes that are no tensors"


def _kind(spec: pytree.TreeSpec) -> str:
    return "one value" if spec.type is None else f"a {spec.type.__name__}"
