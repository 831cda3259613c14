"""What is to be kept of each group: a value that prints, goes to JSON, and can be applied to the same model again."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping

import torch

from fxopt.errors import PreconditionError
from fxopt.passes.prune_channels.coupling import groups_of
from fxopt.passes.prune_channels.dims import Atom
from fxopt.passes.prune_channels.groups import Group, Groups


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
            return PruningPlan(
                tuple(
                    GroupPlan(g["name"], int(g["size"]), tuple(map(int, g["kept"])), tuple(g["parameters"]))
                    for g in json.loads(text)
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            raise PreconditionError(f"this is no pruning plan: {error}") from error

    def __str__(self) -> str:
        lines = [f"{g.name}: {len(g.kept)} of {g.size} channels stay" for g in self.groups]
        return "\n".join(lines) or "nothing is removed"

    def resolve(self, groups: Groups) -> dict[Atom, torch.Tensor]:
        """Indices by atom, for the same model.

        Raises:
            PreconditionError: the model has other groups.
        """
        known = {group.name: group for group in groups.all}
        found = {}
        for planned in self.groups:
            group = known.get(planned.name)
            if group is None or group.size != planned.size or tuple(groups_of(group.members)) != planned.parameters:
                raise PreconditionError(f"the pruning plan is of another model: its group {planned.name} is not here")
            if not planned.kept or max(planned.kept) >= planned.size:
                raise PreconditionError(f"the pruning plan keeps nothing, or too much, of {planned.name}")
            found[group.atom] = torch.tensor(sorted(set(planned.kept)))
        return found


def choose(
    groups: list[Group], scored: Mapping[str, torch.Tensor], ratio: float, multiple: int, *, together: bool
) -> PruningPlan:
    """Remove *ratio* of the channels, the least important first: of each group, or of all *together*.

    *scored* has the importance of each channel, by the name of the group.
    """
    border = math.inf
    if together and groups:
        every = torch.cat([s / s.mean().clamp_min(1e-30) for s in scored.values()]).sort().values
        border = float(every[min(len(every) - 1, round(len(every) * ratio))])
    planned = []
    for group in groups:
        values = scored[group.name]
        if together:
            wanted = int((values / values.mean().clamp_min(1e-30) >= border).sum())
        else:
            wanted = math.ceil(group.size * (1 - ratio) - 1e-9)
        count = rounded(wanted, group, multiple)
        if count < group.size:
            kept = values.topk(count).indices.sort().values
            planned.append(GroupPlan(group.name, group.size, tuple(kept.tolist()), tuple(groups_of(group.members))))
    return PruningPlan(tuple(planned))


def rounded(wanted: int, group: Group, multiple: int) -> int:
    """How many channels to keep: a multiple where that is possible, never none."""
    step = multiple // math.gcd(multiple, group.inner)
    count = math.ceil(max(wanted, 1) / step) * step
    return min(count, group.size)
