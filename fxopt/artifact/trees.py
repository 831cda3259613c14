"""How inputs and outputs are nested, as JSON: tuples, lists, dicts, named tuples, dataclasses and plain objects.

A file names the class of an object, and never makes anyone import it: where that class is loaded already it is used,
else outputs come as a named tuple that has the same names and also takes them as keys.
"""

from __future__ import annotations

import collections
import sys
from collections import OrderedDict
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt import structures
from fxopt.artifact.values import decode, encode
from fxopt.errors import ArtifactError

_PLAIN: dict[str, type] = {"tuple": tuple, "list": list, "dict": dict, "OrderedDict": OrderedDict, "Size": torch.Size}


def encode_tree(spec: pytree.TreeSpec) -> Any:
    """*spec* as JSON; a leaf is null.

    Raises:
        ArtifactError: it has a kind of object that cannot be written down.
    """
    if spec.is_leaf():
        return None
    children = [encode_tree(child) for child in spec.children()]
    kind, context = spec.type, spec.context
    if kind in (tuple, list, torch.Size):
        return {"kind": kind.__name__, "of": children}
    if kind in (dict, OrderedDict):
        return {"kind": kind.__name__, "keys": encode(list(context)), "of": children}
    named = context if pytree.is_namedtuple_class(context) else kind
    if not isinstance(named, type):
        raise ArtifactError(f"an artifact cannot hold inputs or outputs in a {kind}")
    fields, extra = _fields(named, context, len(children))
    tree = {"kind": "object", "class": f"{named.__module__}:{named.__qualname__}", "fields": fields, "of": children}
    return tree | ({"attributes": extra} if extra is not None else {})


def _fields(kind: type, context: Any, count: int) -> tuple[list[str], Any]:
    """Names of the children of an object, and what tells its other attributes from others."""
    if pytree.is_namedtuple_class(kind):
        return list(kind._fields), None  # type: ignore[attr-defined]
    if isinstance(context, tuple) and len(context) == 2 and isinstance(context[1], structures.Rest):
        try:
            values = encode(context[1].attributes)
        except ArtifactError:
            values = None
        return list(context[0]), {"fingerprint": context[1].fingerprint, "values": values}
    names = context[0] if isinstance(context, (tuple, list)) and context and isinstance(context[0], list) else context
    if isinstance(names, (list, tuple)) and len(names) == count and all(isinstance(name, str) for name in names):
        return list(names), None
    raise ArtifactError(f"an artifact cannot hold inputs or outputs in a {kind.__name__}: its parts have no names")


def decode_tree(tree: Any, *, made: bool) -> pytree.TreeSpec:
    """The spec that :func:`encode_tree` wrote.

    Args:
        tree: the JSON.
        made: whether objects will be made by it, and not only compared with it.

    Raises:
        ArtifactError: it wrote no such thing.
    """
    if tree is None:
        return pytree.tree_flatten(torch.empty(0))[1]
    kind, children = tree["kind"], [decode_tree(child, made=made) for child in tree["of"]]
    if kind in ("tuple", "list", "Size"):
        return pytree.TreeSpec(_PLAIN[kind], None, children)
    if kind in ("dict", "OrderedDict"):
        keys = decode(tree["keys"])
        if len(keys) != len(children):
            raise ArtifactError(f"an artifact has no dict of {len(keys)} keys and {len(children)} values")
        return pytree.TreeSpec(_PLAIN[kind], keys, children)
    if kind != "object" or len(tree["fields"]) != len(children):
        raise ArtifactError(f"an artifact has no {kind!r:.40}")
    return _object(tree, children, made=made)


def _object(tree: Any, children: list[pytree.TreeSpec], *, made: bool) -> pytree.TreeSpec:
    found, fields = _loaded(tree["class"]), tree["fields"]
    if "attributes" in tree:
        fingerprint, values = tree["attributes"]["fingerprint"], decode(tree["attributes"]["values"])
        if found is None or (made and (values is None or found not in pytree.SUPPORTED_NODES)):
            return _stand_in(tree["class"], fields, children)
        return pytree.TreeSpec(found, (tuple(fields), structures.Rest(values or {}, fingerprint)), children)
    if found is not None and pytree.is_namedtuple_class(found) and list(getattr(found, "_fields", ())) == fields:
        return pytree.TreeSpec(collections.namedtuple, found, children)
    if found is not None and found in pytree.SUPPORTED_NODES:
        return pytree.TreeSpec(found, _context(found, fields), children)
    return _stand_in(tree["class"], fields, children)


def _context(kind: type, fields: list[str]) -> Any:
    """What pytree keeps beside the children of *kind*: dataclasses registered by torch also keep the names of Nones."""
    import dataclasses

    if dataclasses.is_dataclass(kind) and not issubclass(kind, dict):
        names = [field.name for field in dataclasses.fields(kind)]
        return [fields, [name for name in names if name not in fields]]
    return fields


def _loaded(name: str) -> type | None:
    """The class ``module:Outer.Inner``, where its module is loaded; nothing is imported."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = vars(found).get(part) if found is not None and hasattr(found, "__dict__") else None
    return found if isinstance(found, type) else None


def _stand_in(name: str, fields: list[str], children: list[pytree.TreeSpec]) -> pytree.TreeSpec:
    """A named tuple in place of the class *name*, which is not loaded."""
    title = name.rpartition(":")[2].rpartition(".")[2]
    if not title.isidentifier():
        raise ArtifactError(f"an artifact has no class named {name!r:.80}")
    base = collections.namedtuple(title, fields)  # type: ignore[misc]

    def item(self: Any, key: Any) -> Any:
        return getattr(self, key) if isinstance(key, str) and key in fields else tuple.__getitem__(self, key)

    stand_in = type(title, (base,), {"__slots__": (), "__getitem__": item, "__doc__": f"Stands for {name}."})
    return pytree.TreeSpec(collections.namedtuple, stand_in, children)
