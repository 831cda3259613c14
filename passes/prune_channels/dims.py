"""Axes as expressions over atoms, so that whatever moves channels around keeps track of each of them.

    conv out channels              atom c
    cat([x, y])                    c₁ + c₂                 a sum: one after the other
    view(…, heads, head_dim)       h · d                   a product: row-major, as memory lies
    channel shuffle                g · c  →  c · g

An atom is a set of indices that are removed or kept one by one, wherever the atom occurs. What couples two axes (a
residual add, a weight and what it multiplies) unifies their expressions (``unification``); an atom that has to match a
sum or a product becomes one, everywhere at once. What nobody may prune is fixed, with the reason.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Indices that stay: positions, batches, kernels.

    Attributes:
        size: how many; of a size that depends on the inputs, how many for the example inputs.
        reason: why they stay, or "".
        exact: a size that depends on the inputs as an expression; None for one that does not.
    """

    size: int
    reason: str = ""
    exact: Any = None


@dataclasses.dataclass(eq=False)
class Atom:
    """Indices of which each can go.

    Attributes:
        size: how many.
        name: where it came from, for people.
        value: what it has turned out to be instead (union-find: another atom, or a sum or product of others).
        frozen: why none of it may go, or "".
        mixed: a norm or mean goes over it, so removing a channel changes the others.
    """

    size: int
    name: str
    value: Dim | None = None
    frozen: str = ""
    mixed: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Sum:
    """Parts one after the other."""

    parts: tuple[Dim, ...]

    @property
    def size(self) -> int:
        """All of them."""
        return sum(part.size for part in self.parts)


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """Nested parts, the last one fastest."""

    parts: tuple[Dim, ...]

    @property
    def size(self) -> int:
        """All combinations."""
        return math.prod(part.size for part in self.parts)


Dim: TypeAlias = Fixed | Atom | Sum | Product


def resolve(dim: Dim) -> Dim:
    """What *dim* is by now: atoms that have become something else are followed, nesting is flattened."""
    if isinstance(dim, Atom):
        return dim if dim.value is None else resolve(dim.value)
    if isinstance(dim, Fixed):
        return dim
    parts = list[Dim]()
    for part in dim.parts:
        part = resolve(part)
        parts.extend(part.parts if type(part) is type(dim) else [part])
    if isinstance(dim, Product):
        parts = _merged((part for part in parts if part.size != 1), operator.mul) or [Fixed(1)]
        return parts[0] if len(parts) == 1 else Product(tuple(parts))
    parts = _merged((part for part in parts if part.size != 0), operator.add) or [Fixed(0)]
    return parts[0] if len(parts) == 1 else Sum(tuple(parts))


def _merged(parts: Iterable[Dim], combine: Callable[[Any, Any], Any]) -> list[Dim]:
    """*parts* with neighbours that are both fixed as one."""
    result = list[Dim]()
    for part in parts:
        last = result[-1] if result else None
        if isinstance(part, Fixed) and isinstance(last, Fixed):
            known = last.exact is None and part.exact is None
            whole = None if known else combine(exact(last), exact(part))
            result[-1] = Fixed(combine(last.size, part.size), last.reason or part.reason, whole)
        else:
            result.append(part)
    return result


def exact(dim: Dim) -> Any:
    """The size of *dim*, as an expression where it depends on the inputs."""
    dim = resolve(dim)
    if isinstance(dim, Fixed) and dim.exact is not None:
        return dim.exact
    if isinstance(dim, (Fixed, Atom)):
        return dim.size
    return (sum if isinstance(dim, Sum) else math.prod)(map(exact, dim.parts))


def is_dynamic(dim: Dim) -> bool:
    """Whether the size of *dim* depends on the inputs."""
    return not isinstance(exact(dim), int)


def atoms(dim: Dim) -> Iterator[Atom]:
    """The atoms that *dim* is made of, with repetitions."""
    dim = resolve(dim)
    if isinstance(dim, Atom):
        yield dim
    for part in getattr(dim, "parts", ()):
        yield from atoms(part)


def freeze(dim: Dim, reason: str) -> None:
    """Keep all of *dim*."""
    for atom in atoms(dim):
        atom.frozen = atom.frozen or reason


def factors(dim: Dim) -> list[Dim]:
    """*dim* as a product."""
    dim = resolve(dim)
    return list(dim.parts) if isinstance(dim, Product) else [dim]


def kept(dim: Dim, plan: dict[Atom, torch.Tensor]) -> torch.Tensor:
    """Sorted indices of *dim* that stay: i64[n]. *plan* holds those of each atom of which something goes."""
    dim = resolve(dim)
    if isinstance(dim, Atom) and dim in plan:
        return plan[dim]
    if isinstance(dim, (Atom, Fixed)):
        return torch.arange(dim.size)
    if isinstance(dim, Sum):
        pieces, offset = [], 0
        for part in dim.parts:
            pieces.append(kept(part, plan) + offset)
            offset += part.size
        return torch.cat(pieces)
    index = torch.zeros(1, dtype=torch.int64)
    for part in dim.parts:
        index = (index[:, None] * part.size + kept(part, plan)).flatten()
    return index


def positions(dim: Dim, atom: Atom) -> torch.Tensor:
    """Which index of *atom* each index of *dim* belongs to: i64[size], −1 where none."""
    dim = resolve(dim)
    if dim is atom:
        return torch.arange(dim.size)
    if isinstance(dim, (Atom, Fixed)):
        return torch.full((dim.size,), -1)
    if isinstance(dim, Sum):
        return torch.cat([positions(part, atom) for part in dim.parts])
    index = torch.full((1,), -1)
    for part in dim.parts:
        inner = positions(part, atom)
        index = torch.where(inner >= 0, inner, index[:, None].expand(-1, len(inner))).flatten()
    return index
