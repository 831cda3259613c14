"""What is to be kept of each group: a value that prints, goes to JSON, and can be applied to the same model again."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fxopt.errors import PreconditionError
from fxopt.passes.prune_channels.coupling import groups_of
from fxopt.passes.prune_channels.dims import Atom
from fxopt.passes.prune_channels.groups import Group, Groups

_STEPS = 8


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """One group.

    Attributes:
        name: of the group.
        size: its channels in the dense model.
        kept: sorted indices of those that stay.
        parameters: that hold them.
    """

    name: str
    size: int
    kept: tuple[int, ...]
    parameters: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PruningPlan:
    """All groups that something is removed from."""

    groups: tuple[GroupPlan, ...]

    def to_json(self) -> str:
        """The plan as text."""
        return json.dumps([dataclasses.asdict(group) for group in self.groups], indent=1)

    @staticmethod
    def from_json(text: str) -> PruningPlan:
        """The plan behind :meth:`to_json`.

        Raises:
            PreconditionError: *text* is no such plan.
        """
        try:
            return PruningPlan(tuple(map(_group, _typed(json.loads(text), list, "the plan"))))
        except (ValueError, KeyError, TypeError) as error:
            raise PreconditionError(f"this is no pruning plan: {error}") from error

    def mixed(self, other: PruningPlan, names: Sequence[str]) -> PruningPlan:
        """This plan, with the groups *names* as in *other*, where they may be whole."""
        mine = [group for group in self.groups if group.name not in set(names)]
        return PruningPlan(tuple(mine + [group for group in other.groups if group.name in set(names)]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, for ``prune-channels{plan=PATH}``."""
        Path(path).write_text(self.to_json())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> PruningPlan:
        """The plan that :meth:`save` wrote.

        Raises:
            PreconditionError: the file cannot be read, or holds no plan.
        """
        try:
            return PruningPlan.from_json(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise PreconditionError(f"the pruning plan cannot be read: {error}") from error

    def __str__(self) -> str:
        lines = [f"{g.name}: {len(g.kept)} of {g.size} channels stay" for g in self.groups]
        return "\n".join(lines) or "nothing is removed"

    def resolve(self, groups: Groups) -> dict[Atom, torch.Tensor]:
        """Indices by atom, for the same model.

        Raises:
            PreconditionError: the model has other groups, or cannot do without what the plan removes.
        """
        known = {group.name: group for group in groups.all}
        found = dict[Atom, torch.Tensor]()
        for planned in self.groups:
            group = known.get(planned.name)
            if group is None or group.size != planned.size or tuple(groups_of(group.members)) != planned.parameters:
                raise PreconditionError(f"the pruning plan is of another model: its group {planned.name} is not here")
            if group.reason:
                raise PreconditionError(f"the pruning plan cuts {planned.name}, which stays whole: {group.reason}")
            if not planned.kept or not set(planned.kept) <= set(range(planned.size)):
                raise PreconditionError(
                    f"the pruning plan must keep some of the channels 0 to {planned.size - 1} of {planned.name}"
                )
            if group.atom in found or len(set(planned.kept)) < len(planned.kept):
                raise PreconditionError(f"the pruning plan has {planned.name}, or a channel of it, twice")
            found[group.atom] = torch.tensor(sorted(planned.kept))
        return found


def _group(given: object) -> GroupPlan:
    """One entry of a plan file."""
    entry = _typed(given, dict, "an entry of the plan")
    kept = tuple(_typed(index, int, "a channel") for index in _typed(entry["kept"], list, "kept"))
    parameters = tuple(_typed(name, str, "a parameter") for name in _typed(entry["parameters"], list, "parameters"))
    return GroupPlan(_typed(entry["name"], str, "name"), _typed(entry["size"], int, "size"), kept, parameters)


def _typed(value: Any, wanted: type, what: str) -> Any:
    if type(value) is not wanted:
        raise TypeError(f"{what} is no {wanted.__name__}: {value!r:.60}")
    return value


def choose(
    groups: Sequence[Group],
    scored: Mapping[str, torch.Tensor],
    ratio: float,
    multiple: int | Mapping[str, int],
    *,
    together: bool,
    ratios: Mapping[str, float] | None = None,
) -> PruningPlan:
    """Remove *ratio* of the channels, the least important first: of each group, or of all *together*.

    Args:
        groups: that channels may go from.
        scored: the importance of each channel, by the name of the group; comparable between groups, for *together*.
        ratio: share of the channels to remove.
        multiple: what stays is a multiple of it, where a group has that many; or such a number for each group.
        together: rank the channels of all groups as one.
        ratios: for some groups another share, by name; they are not ranked with the others.
    """
    own = ratios or {}
    ranked = [scored[group.name] for group in groups if group.name not in own]
    border = math.inf
    if together and ranked:
        every = torch.cat(ranked).sort().values
        border = float(every[min(len(every) - 1, round(len(every) * ratio))])
    planned = []
    for group in groups:
        values = scored[group.name]
        if together and group.name not in own:
            wanted = int((values >= border).sum())
        else:
            wanted = math.floor(group.size * (1 - own.get(group.name, ratio)) + 0.5)
        count = rounded(wanted, group, multiple if isinstance(multiple, int) else multiple[group.name])
        if count < group.size:
            kept = values.topk(count).indices.sort().values
            planned.append(GroupPlan(group.name, group.size, tuple(kept.tolist()), tuple(groups_of(group.members))))
    return PruningPlan(tuple(planned))


def rounded(wanted: int, group: Group, multiple: int) -> int:
    """How many channels to keep: a multiple where that is possible, never none."""
    step = multiple // math.gcd(multiple, group.inner)
    count = math.ceil(max(wanted, 1) / step) * step
    return min(count, group.size)


def fitting(multiple: int, group: Group) -> int:
    """*multiple*, halved until it goes into *group* eight times: a small layer is not kept whole for its sake."""
    while multiple > 1 and group.size * group.inner < _STEPS * multiple:
        multiple //= 2
    return multiple
