"""One call, spelled in other ways: by keyword or by position, with a default written out or left out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils import _pytree as pytree

from fxopt.errors import InputError
from fxopt.structures import difference


def children(in_spec: pytree.TreeSpec) -> tuple[list[pytree.TreeSpec], dict[str, pytree.TreeSpec]]:
    """The trees of the positional and of the keyword arguments of a call with *in_spec*."""
    args, kwargs = in_spec.children()
    return list(args.children()), dict(zip(kwargs.context or (), kwargs.children(), strict=True))


def describe_difference(expected: pytree.TreeSpec, given: pytree.TreeSpec) -> str:
    """What is other in a call with the tree *given*, in words."""
    (args, kwargs), (own_args, own_kwargs) = children(expected), children(given)
    if len(args) != len(own_args):
        return f"{len(own_args)} positional arguments, expected {len(args)}"
    if list(kwargs) != list(own_kwargs):
        return f"the keywords {list(own_kwargs)}, expected {list(kwargs)}"
    pairs = [*zip(args, own_args, strict=True), *((kwargs[name], own_kwargs[name]) for name in kwargs)]
    names = [f"argument {i}" for i in range(len(args))] + [f"argument {name!r}" for name in kwargs]
    found = (difference(a, b, name) for (a, b), name in zip(pairs, names, strict=True) if a != b)
    return next(found, "it is spelled otherwise")


def respell(
    in_spec: pytree.TreeSpec, forward: inspect.Signature | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The call ``(args, kwargs)`` with its arguments where *in_spec* has them; None where they cannot be brought there.

    Raises:
        InputError: *forward* does not take such a call.
    """
    captured_args, captured_kwargs = children(in_spec)
    if set(kwargs) == set(captured_kwargs) and len(args) == len(captured_args):
        return tuple(args), {name: kwargs[name] for name in captured_kwargs}
    if forward is None:
        return None
    try:
        given = forward.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"the call does not fit the model's forward: {error}") from None
    given.apply_defaults()
    kinds = {p.kind for p in forward.parameters.values()}
    named = dict(given.arguments)
    if inspect.Parameter.VAR_KEYWORD in kinds:
        rest = next(p.name for p in forward.parameters.values() if p.kind is p.VAR_KEYWORD)
        named |= named.pop(rest)
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return None
    names = list(forward.parameters)[: len(captured_args)] + list(captured_kwargs)
    if any(name not in named for name in names) or not _only_defaults(forward, named, set(names)):
        return None
    values = [named[name] for name in names]
    split = len(captured_args)
    return tuple(values[:split]), dict(zip(captured_kwargs, values[split:], strict=True))


def _only_defaults(forward: inspect.Signature, named: Mapping[str, Any], captured: set[str]) -> bool:
    """Whether every argument that was not captured has the value that it has when left out."""
    for name in set(named) - captured:
        parameter, given = forward.parameters.get(name), named[name]
        if parameter is None:
            return False
        if given is not parameter.default and not _is_same_scalar(given, parameter.default):
            return False
    return True


def _is_same_scalar(a: object, b: object) -> bool:
    return type(a) is type(b) and isinstance(a, (int, float, str)) and a == b
