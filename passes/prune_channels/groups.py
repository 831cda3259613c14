"""The groups of a graph: sets of channels that are removed together, everywhere they occur."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

from rich.table import Table

from fxopt.passes.prune_channels.coupling import Coupling, Member, groups_of
from fxopt.passes.prune_channels.dims import Atom, Product, atoms, resolve
from fxopt.passes.prune_channels.rules import rule_of
from fxopt.program import Program
from fxopt.show import as_text


@dataclasses.dataclass(frozen=True)
class Group:
    """Channels that parameters share.

    Attributes:
        name: the parameter that has them first, and which axis: ``layer1.0.conv1.weight:0``.
        atom: the channels; ``size`` how many.
        members: the axes of parameters that they are in.
        inner: how many elements of an axis one of them stands for: the head_dim, for heads.
        reason: why none may go, or "".
    """

    name: str
    atom: Atom
    members: tuple[Member, ...]
    inner: int
    reason: str = ""

    @property
    def size(self) -> int:
        """How many channels."""
        return self.atom.size


@dataclasses.dataclass(frozen=True)
class Groups:
    """All groups of a program, in the order of its parameters."""

    coupling: Coupling
    all: tuple[Group, ...]

    @property
    def prunable(self) -> list[Group]:
        """Those that channels can go from."""
        return [group for group in self.all if not group.reason]

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("group", "channels", "parameters", "kept whole because"):
            table.add_column(heading, justify="right" if heading == "channels" else "left", overflow="fold")
        for group in self.all:
            names = groups_of(group.members)
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            table.add_row(group.name, str(group.size), shown, group.reason)
        return table


def find_groups(program: Program) -> Groups:
    """The groups of *program*, by the rules of its ops."""
    coupling = Coupling(program, rule_of)
    names: Counter[str] = Counter()
    found = []
    for atom, members in coupling.members().items():
        name = members[0].key
        names[name] += 1
        name += f"#{names[name]}" if names[name] > 1 else ""
        reason = atom.frozen or ("" if atom.size > 1 else "a single channel")
        found.append(Group(name, atom, tuple(members), _inner(atom, members), reason))
    return Groups(coupling, tuple(found))


def _inner(atom: Atom, members: Sequence[Member]) -> int:
    """Elements of the first axis with *atom* that one of its channels stands for."""
    return int((members[0].index(atom) == 0).sum())


def nested(groups: Iterable[Group]) -> dict[Atom, list[Atom]]:
    """For each atom the prunable ones that lie around it in some product: heads around the channels of a head."""
    outer: dict[Atom, list[Atom]] = {}
    for group in groups:
        for member in group.members:
            _collect(member.dim, [], outer)
    return outer


def _collect(dim: object, around: list[Atom], outer: dict[Atom, list[Atom]]) -> None:
    found = resolve(dim)  # type: ignore[arg-type]
    if isinstance(found, Atom):
        outer.setdefault(found, []).extend(a for a in around if a is not found)
    elif isinstance(found, Product):
        before = list(around)
        for part in found.parts:
            _collect(part, before, outer)
            before += [atom for atom in atoms(part) if not atom.frozen and atom.size > 1]
    elif hasattr(found, "parts"):
        for part in found.parts:
            _collect(part, around, outer)
