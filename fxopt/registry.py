"""Passes and backends by name, from the entry points ``fxopt.passes`` and ``fxopt.backends``.

fxopt's own are declared in the same way as those of other packages. A class is imported when it is first asked for.
"""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from fxopt.errors import FxoptError, SpecError, near_miss
from fxopt.notice import warn
from fxopt.passbase import Pass

if TYPE_CHECKING:
    from fxopt.backend import Backend


@functools.cache
def _entries(group: str) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=group), key=lambda e: not e.value.startswith("fxopt.")):
        if entry.name in found and found[entry.name].value != entry.value:
            warn(f"{entry.value} has the name {entry.name!r}, which is taken; it is ignored")
        found.setdefault(entry.name, entry)
    return found


def available(group: str) -> tuple[str, ...]:
    """Names in *group*, sorted."""
    return tuple(sorted(_entries(group)))


def _load(group: str, what: str, name: str) -> object:
    entries = _entries(group)
    if name not in entries:
        raise SpecError(f"unknown {what} {name!r}.{near_miss(name, entries)}")
    try:
        return entries[name].load()
    except Exception as error:
        raise FxoptError(f"{what} {name!r} ({entries[name].value}) cannot be loaded: {error}") from error


def find_pass(name: str) -> type[Pass]:
    """The pass class of that name.

    Raises:
        SpecError: no such pass; the message names the nearest one.
    """
    cls = _load("fxopt.passes", "pass", name)
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise FxoptError(f"pass {name!r} is not a subclass of fxopt.Pass")
    return cls


def find_backend(name: str) -> type[Backend]:
    """The backend class of that name.

    Raises:
        SpecError: no such backend; the message names the nearest one.
    """
    from fxopt.backend import Backend

    cls = _load("fxopt.backends", "backend", name)
    if not (isinstance(cls, type) and issubclass(cls, Backend)):
        raise FxoptError(f"backend {name!r} is not a subclass of fxopt.Backend")
    return cls
