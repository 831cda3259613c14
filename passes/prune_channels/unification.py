"""What makes two axes one, and what takes an axis apart: both refine expressions over atoms. See ``dims``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import sympy

from fxopt.passes.prune_channels.dims import Atom, Dim, Fixed, Product, Sum, atoms, exact, freeze, is_dynamic, resolve

_Split: TypeAlias = Callable[[Dim, int], Sequence[Dim] | None]


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
        first = _pieces(dim, [outer])[0]
        return first, Fixed(dim.size // outer, dim.reason, exact(dim) / exact(first) if is_dynamic(dim) else None)
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
        return _pieces(dim, sizes)
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
    """Slices of a product along its first factor; a border within one index of that cuts the rest, which then stays."""
    first, inner = dim.parts[0], Product(dim.parts[1:])
    ends = list(itertools.accumulate(sizes))
    borders = sorted({0, *(n // inner.size for n in ends), *(-(-n // inner.size) for n in ends)})
    parts = None if is_dynamic(inner) else split_sum(first, [b - a for a, b in itertools.pairwise(borders)])
    if parts is None:
        return None
    if any(n % inner.size for n in ends):
        freeze(inner, "a part of it is cut off")
    result = list[Dim]()
    for start, end in zip([0, *ends], ends, strict=False):
        pieces = list[Dim]()
        for part, (a, b) in zip(parts, itertools.pairwise(n * inner.size for n in borders), strict=True):
            if start <= a and b <= end:
                pieces.append(Product((part, inner)))
            elif max(a, start) < min(b, end):  # part is a single index, which nobody removes
                pieces.append(Fixed(min(b, end) - max(a, start)))
        result.append(Sum(tuple(pieces)))
    return result


def _pieces(dim: Fixed, sizes: Sequence[int]) -> list[Dim]:
    """*dim* cut up; of a size that depends on the inputs nobody knows what the pieces are for other inputs."""
    return [Fixed(n, dim.reason, sympy.Dummy() if is_dynamic(dim) else None) for n in sizes]
