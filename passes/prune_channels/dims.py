"""Axes as expressions over atoms, so that whatever moves channels around keeps track of each of them.

    conv out channels              atom c
    cat([x, y])                    c₁ + c₂                 a sum: one after the other
    view(…, heads, head_dim)       h · d                   a product: row-major, as memory lies
    channel shuffle                g · c  →  c · g

An atom is a set of indices that are removed or kept one by one, wherever the atom occurs. What couples two axes (a
residual add, a weight and what it multiplies) unifies their expressions; an atom that has to match a sum or a product
becomes one, everywhere at once. What nobody may prune is fixed, with the reason.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import torch


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Indices that stay: positions, batches, kernels."""

    size: int
    reason: str = ""


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
_Split: TypeAlias = Callable[[Dim, int], Sequence[Dim] | None]


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
        parts = _merged((part for part in parts if part.size != 1), int.__mul__) or [Fixed(1)]
        return parts[0] if len(parts) == 1 else Product(tuple(parts))
    parts = _merged((part for part in parts if part.size != 0), int.__add__) or [Fixed(0)]
    return parts[0] if len(parts) == 1 else Sum(tuple(parts))


def _merged(parts: Iterable[Dim], combine: Callable[[int, int], int]) -> list[Dim]:
    """*parts* with neighbours that are both fixed as one."""
    result = list[Dim]()
    for part in parts:
        last = result[-1] if result else None
        if isinstance(part, Fixed) and isinstance(last, Fixed):
            result[-1] = Fixed(combine(last.size, part.size), last.reason or part.reason)
        else:
            result.append(part)
    return result


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


def unify(a: Dim, b: Dim, reason: str) -> None:
    """Make *a* and *b* the same indices; where their structures cannot be matched, both are frozen for *reason*."""
    a, b = resolve(a), resolve(b)
    if a is b:
        return
    if a.size != b.size:
        freeze(a, reason)
        freeze(b, reason)
    elif isinstance(a, Fixed) or isinstance(b, Fixed):
        for one, other in ((a, b), (b, a)):
            freeze(one, (other.reason if isinstance(other, Fixed) else "") or reason)
    elif isinstance(a, Atom) and isinstance(b, Atom):
        a.frozen, a.mixed = a.frozen or b.frozen, a.mixed or b.mixed
        b.value = a
    elif isinstance(a, Atom) or isinstance(b, Atom):
        atom, other = (a, b) if isinstance(a, Atom) else (b, a)
        assert isinstance(atom, Atom)
        _define(atom, other, reason)
    elif isinstance(a, Product) and isinstance(b, Product):
        _unify_parts(list(a.parts), list(b.parts), split_product, reason)
    elif isinstance(a, Sum) and isinstance(b, Sum):
        _unify_parts(list(a.parts), list(b.parts), lambda d, n: split_sum(d, [n, d.size - n]), reason)
    else:
        freeze(a, reason)
        freeze(b, reason)


def _define(atom: Atom, other: Dim, reason: str) -> None:
    inside = list(atoms(other))
    if atom in inside:
        freeze(other, reason)
        return
    for one in inside:
        one.mixed = one.mixed or atom.mixed
    if atom.frozen:
        freeze(other, atom.frozen)
    atom.value = other


def _unify_parts(a: list[Dim], b: list[Dim], split: _Split, reason: str) -> None:
    """Match two products, or two sums, part by part; the larger of two parts is split."""
    while a and b:
        x, y = resolve(a.pop(0)), resolve(b.pop(0))
        if x.size != y.size:
            big, small, rest = (x, y, a) if x.size > y.size else (y, x, b)
            parts = split(big, small.size)
            if parts is None:
                for dim in (x, y, *a, *b):
                    freeze(dim, reason)
                return
            rest.insert(0, parts[1])
            x, y = parts[0], small
        unify(x, y, reason)


def split_product(dim: Dim, outer: int) -> tuple[Dim, Dim] | None:
    """*dim* as *outer* times the rest, in that order; None where it has another structure."""
    dim = resolve(dim)
    if outer <= 0 or dim.size % outer:
        return None
    if outer == 1:
        return Fixed(1), dim
    if outer == dim.size:
        return dim, Fixed(1)
    if isinstance(dim, Fixed):
        return Fixed(outer, dim.reason), Fixed(dim.size // outer, dim.reason)
    if isinstance(dim, Atom):
        parts = (Atom(outer, dim.name), Atom(dim.size // outer, dim.name))
        _define(dim, Product(parts), "")
        return parts
    if isinstance(dim, Sum):
        return _equal_parts(dim, outer)
    taken, rest = list[Dim](), list(dim.parts)
    left = outer
    while left > 1:
        part = rest.pop(0)
        if left % part.size == 0:
            taken.append(part)
            left //= part.size
            continue
        pieces = split_product(part, left)
        if pieces is None:
            return None
        taken.append(pieces[0])
        rest.insert(0, pieces[1])
        left = 1
    return Product(tuple(taken)), Product(tuple(rest))


def _equal_parts(dim: Sum, outer: int) -> tuple[Dim, Dim] | None:
    """A sum of *outer* equal parts: they become one, repeated."""
    parts = split_sum(dim, [dim.size // outer] * outer)
    if parts is None:
        return None
    for part in parts[1:]:
        unify(parts[0], part, "parts of a concatenation are viewed as one axis")
    return Fixed(outer), parts[0]


def split_sum(dim: Dim, sizes: Sequence[int]) -> list[Dim] | None:
    """*dim* as a sum of parts of *sizes*; None where it has another structure."""
    dim = resolve(dim)
    if len(sizes) == 1:
        return [dim]
    if isinstance(dim, Fixed):
        return [Fixed(size, dim.reason) for size in sizes]
    if isinstance(dim, Atom):
        parts = [Atom(size, dim.name) for size in sizes]
        _define(dim, Sum(tuple(parts)), "")
        return list(parts)
    if isinstance(dim, Product):
        return _split_outer(dim, sizes)
    rest, result = list(dim.parts), list[Dim]()
    for size in sizes:
        taken = list[Dim]()
        left = size
        while left > 0:
            part = resolve(rest.pop(0))
            if part.size > left:
                pieces = split_sum(part, [left, part.size - left])
                if pieces is None:
                    return None
                part = pieces[0]
                rest.insert(0, pieces[1])
            taken.append(part)
            left -= part.size
        result.append(Sum(tuple(taken)))
    return result


def _split_outer(dim: Product, sizes: Sequence[int]) -> list[Dim] | None:
    """Slices of a product along its first factor."""
    first, inner = dim.parts[0], Product(dim.parts[1:])
    if any(size % inner.size for size in sizes):
        return None
    parts = split_sum(first, [size // inner.size for size in sizes])
    return None if parts is None else [Product((part, inner)) for part in parts]


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
