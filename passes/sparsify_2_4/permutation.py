"""Channels in an order in which more magnitude stays: an exact rewrite, before anything is set to zero.

    conv1 → bn → relu → conv2      filters of conv1, statistics of bn and input channels of conv2 in another order

What has to move together are the groups of ``prune-channels``: an atom is a set of channels wherever it occurs, and a
new order of it is carried to all axes of all constants. Only layers whose innermost inputs are the channels of an atom
have a say in its order. The search is that of Pool and Yu, "Channel Permutations for N:M Sparsity" (NeurIPS 2021),
greedy part: two stripes of *m* columns exchange the two columns with which most is gained, here for random pairs of
stripes at a time, until nothing is gained any more. A sum adds up in another order then: outputs are equal but for
rounding, and bit by bit where sums are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fxopt.passes.prune_channels.dims import Atom, Dim, Product, Sum, kept, resolve
from fxopt.passes.prune_channels.groups import Groups
from fxopt.rewriter import Rewriter
from fxopt.rounds import KEPT
from fxopt.sparsity import Pattern, matrix

Order = Mapping[Atom, torch.Tensor]
_ROWS = 512  # of all matrices of an atom that the search looks at
_ROUNDS, _IDLE = 100, 8  # of the search, and without a gain before it ends
_ELEMENTS = 2**24  # that one step of the search holds


def find(groups: Groups, weights: Mapping[str, torch.Tensor], fixed: Sequence[str], pattern: Pattern) -> Order:
    """For each atom that gains from it a new order: i64[size].

    Args:
        groups: of the program.
        weights: that are going to have the *pattern*, by name.
        fixed: names of weights whose inputs must stay in their order, since they have the pattern already.
        pattern: of which the magnitude is to stay.
    """
    readers: dict[Atom, list[str]] = {}
    for group in groups.prunable:
        names = [member.constant for member in group.members if member.axis == 1]
        if not set(names) & set(fixed):
            readers[group.atom] = [name for name in names if name in weights]
    dims = _input_dims(groups)
    found = {}
    for atom, names in readers.items():
        pieces = [_columns(weights[name], dims[name], atom, pattern) for name in names]
        if any(piece is None for piece in pieces):
            continue  # a group of neighbours lies across channels of several kinds
        rows = [piece for piece in pieces if piece is not None and piece.numel()]
        if rows and atom.size > pattern.m:
            order = search(torch.cat(rows), pattern)
            before, after = (
                sum(_kept(weights[n], kept(dims[n], o), pattern) for n in names) for o in ({}, {atom: order})
            )
            if after > before:
                found[atom] = order
    return found


def carry(rewriter: Rewriter, groups: Groups, orders: Order) -> None:
    """Put the channels of all constants of *rewriter*'s program, which is that of *groups*, in the new *orders*."""
    program, plan = rewriter.program, dict(orders)
    changed = {}
    for node in program.graph.find_nodes(op="get_attr"):
        value = program.constants[str(node.target)]
        for axis, dim in enumerate(groups.coupling.axes[node]):
            index = kept(dim, plan)
            if not torch.equal(index, torch.arange(len(index))):
                value = value.index_select(axis, index.to(value.device))
                before = node.meta.get(KEPT, {})
                node.meta[KEPT] = {**before, axis: before[axis][index] if axis in before else index}
                changed[str(node.target)] = value
    rewriter.resize(changed, {})


def kept_magnitude(weight: torch.Tensor, pattern: Pattern) -> float:
    """Σ |w| of what the *pattern* leaves of *weight* by magnitude, as a share of all."""
    whole = float(weight.abs().sum(dtype=torch.float64))
    return _kept(weight, torch.arange(weight.shape[1]), pattern) / whole if whole else 1.0


def search(columns: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """An order of *columns*, f32[rows, n], in which at least as much magnitude stays: i64[n].

    The same for the same columns: random choices are seeded.
    """
    generator = torch.Generator().manual_seed(0)
    size = columns.shape[1]
    chosen = torch.randperm(len(columns), generator=generator)[:_ROWS].sort().values
    stripes = columns[chosen].abs().float().T.reshape(size // pattern.m, pattern.m, -1).contiguous()
    order = torch.arange(size).reshape(-1, pattern.m)
    idle = 0
    for _ in range(_ROUNDS):
        shuffled = torch.randperm(len(order), generator=generator)
        half = len(order) // 2
        gained = False
        step = max(1, _ELEMENTS // (2 * pattern.m**2 * stripes.shape[2]))
        for first, second in zip(shuffled[:half].split(step), shuffled[half : 2 * half].split(step), strict=True):
            gained |= _exchange(stripes, order, first, second, pattern)
        idle = 0 if gained else idle + 1
        if idle == _IDLE:
            break
    return order.flatten()


def _exchange(
    stripes: torch.Tensor, order: torch.Tensor, first: torch.Tensor, second: torch.Tensor, pattern: Pattern
) -> bool:
    """Let each pair of stripes exchange the columns with which most is gained, in place; whether any gained."""
    a, b = stripes[first], stripes[second]  # [pairs, m, rows]
    gain = _gain(a, b, pattern) + _gain(b, a, pattern).transpose(1, 2)
    best, place = gain.flatten(1).max(1)
    better = best > 1e-6 * stripes.abs().mean()
    one, other, place = first[better], second[better], place[better]
    rows, columns = place // pattern.m, place % pattern.m
    for values in (stripes, order):
        values[one, rows], values[other, columns] = values[other, columns], values[one, rows]
    return bool(better.any())


def _gain(stripe: torch.Tensor, other: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """How much more magnitude stays of *stripe* when its column i becomes column j of *other*: [pairs, i, j].

    With t the n-th largest of the columns but i, a new x adds x − t where it is larger; the old one did likewise.
    """
    largest = _largest(stripe, pattern.n + 1)
    among = stripe >= largest[-2][:, None]
    last = torch.where(among, largest[-1][:, None], largest[-2][:, None])
    added, had = (other[:, None] - last[:, :, None]).clamp_min_(0), (stripe - last).clamp_min_(0)
    return added.sum(-1) - had.sum(-1)[:, :, None]


def _largest(stripe: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The *count* largest of each row, the largest first: [pairs, m, rows] → [pairs, rows] each."""
    found = [torch.full_like(stripe[:, 0], -1.0) for _ in range(count)]
    for x in stripe.unbind(1):
        for k in range(count):
            found[k], x = torch.maximum(found[k], x), torch.minimum(found[k], x)
    return found


def _input_dims(groups: Groups) -> dict[str, Dim]:
    """What axis 1 of each constant is made of."""
    nodes = groups.coupling.program.graph.find_nodes(op="get_attr")
    return {str(n.target): groups.coupling.axes[n][1] for n in nodes if len(groups.coupling.axes[n]) > 1}


def _columns(weight: torch.Tensor, dim: Dim, atom: Atom, pattern: Pattern) -> torch.Tensor | None:
    """The part of *weight* whose neighbours the order of *atom* decides: [rows, atom.size], empty where none is.

    None where neighbours are some of *atom* and some of something else.
    """
    rows, dim, offset, pieces = matrix(weight).reshape(-1, weight.shape[1]), resolve(dim), 0, list[torch.Tensor]()
    for part in dim.parts if isinstance(dim, Sum) else (dim,):
        part = resolve(part)
        factors = [resolve(one) for one in part.parts] if isinstance(part, Product) else [part]
        own = rows[:, offset : offset + part.size]
        offset += part.size
        if not any(atom in _atoms(one) for one in factors):
            continue
        inner = 1
        for factor in reversed(factors[factors.index(atom) + 1 :] if atom in factors else []):
            inner *= factor.size
        if factors.count(atom) != 1 or (offset - part.size) % pattern.m or atom.size % pattern.m:
            return None
        if inner == 1:
            pieces.append(own.reshape(-1, atom.size))
        elif inner % pattern.m:
            return None
    return torch.cat(pieces) if pieces else rows[:0, :0]


def _atoms(dim: Dim) -> set[Atom]:
    dim = resolve(dim)
    inside = {one for part in getattr(dim, "parts", ()) for one in _atoms(part)}
    return inside | ({dim} if isinstance(dim, Atom) else set())


def _kept(weight: torch.Tensor, index: torch.Tensor, pattern: Pattern) -> float:
    """Σ |w| that stays of *weight* with its inputs in the order *index*."""
    groups = matrix(weight.index_select(1, index)).abs().reshape(-1, pattern.m)
    return sum(float(one.sum(dtype=torch.float64)) for one in _largest(groups.T[None], pattern.n))
