"""How important each channel of a group is.

From the weights alone:
    l1, l2      the magnitudes of all elements that the channel has in any parameter (Li et al., ICLR 2017)
    bn-scale    |γ| of its batch norms (Liu et al., Network Slimming, ICCV 2017); without one a group stays whole
    fpgm        the distance of its filter to all others (He et al., CVPR 2019): what is nearest to the rest goes
    random      a permutation, the same for the same seed
From calibration data (``evidence``):
    activation  the mean magnitude of the channel where convs and linears read it (Molchanov et al., ICLR 2017, 2.2)
    taylor      what its removal does to the loss in first order, (Σ w·∂L/∂w)² (Molchanov et al., CVPR 2019, eq. 8)

Each parameter of a group gives a score to each channel. They are normalized by their mean, so that no parameter drowns
another, and aggregated. Where groups are ranked together their scores are normalized once more (:data:`NORMALIZE`);
"none" takes all scores as they are, which suits "taylor": they are changes of one loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import fx

from fxopt import ops
from fxopt.errors import PreconditionError
from fxopt.passes.prune_channels.coupling import Member
from fxopt.passes.prune_channels.dims import Atom
from fxopt.passes.prune_channels.groups import Group
from fxopt.program import Program

DATA_DRIVEN = ("activation", "taylor")
Matrices = Mapping[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Channels:
    """What a criterion judges.

    Attributes:
        name: of the group; ``size``: its channels.
        weights: for each axis of a parameter that holds them ("layer1.0.conv1.weight:0") the elements of each channel,
            f32[size, elements]. Statistics of batch norms are not among them.
        evidence: for a data-driven criterion what was measured, f64[size] for each place of measurement; else empty.
        scales: those of *weights* that are the γ of a batch norm.
    """

    name: str
    size: int
    weights: Matrices
    evidence: Matrices = dataclasses.field(default_factory=dict)
    scales: frozenset[str] = frozenset()

    def copied(self) -> Channels:
        """The same in memory of its own: *weights* are otherwise views of the model's."""
        return dataclasses.replace(self, weights={key: value.clone() for key, value in self.weights.items()})


Score = Callable[[Channels], torch.Tensor]


def rows(weight: torch.Tensor, member: Member, atom: Atom) -> torch.Tensor:
    """The elements of *weight* by channel of *atom*: [size, elements], a view where they lie so."""
    index = member.index(atom)
    moved = weight.movedim(member.axis, 0)
    if torch.equal(index, torch.arange(atom.size)):
        return moved.reshape(atom.size, -1)
    known = (index >= 0).nonzero().flatten()
    return moved[known[index[known].argsort(stable=True)]].reshape(atom.size, -1)


def channels_of(group: Group, program: Program, evidence: Matrices) -> Channels:
    """The :class:`Channels` of *group*, which is one of *program*."""
    constants = program.tensors()
    statistics, scales = (
        read_by_batch_norms(program, "running_mean", "running_var"),
        read_by_batch_norms(program, "weight"),
    )
    members = [m for m in group.members if m.constant not in statistics and constants[m.constant].numel()]
    weights = {m.key: rows(constants[m.constant].detach().float(), m, group.atom) for m in members}
    return Channels(
        group.name, group.size, weights, evidence, frozenset(m.key for m in members if m.constant in scales)
    )


def read_by_batch_norms(program: Program, *names: str) -> set[str]:
    """The constants that batch norms have for these arguments."""
    norms = [ops.arguments(node) for node in program.graph.nodes if ops.kind(node) == "batch_norm"]
    return {str(a[name].target) for a in norms for name in names if isinstance(a[name], fx.Node)}


def scores(group: Channels, criterion: str, aggregate: str, *, seed: int = 0, raw: bool = False) -> torch.Tensor:
    """The importance of each channel of *group*: f64[size]. *raw* leaves the scores of each parameter as they are."""
    if criterion == "random":
        return torch.randperm(group.size, generator=torch.Generator().manual_seed(seed)).double()
    if criterion in DATA_DRIVEN:
        parts = list(group.evidence.values())
    else:
        only = group.scales if criterion == "bn-scale" else group.weights.keys()
        parts = [_MEASURES[criterion](v).double() for key, v in group.weights.items() if key in only]
    if not raw:
        parts = [part / part.mean() if part.mean() > 0 else part for part in parts]
    return _AGGREGATE[aggregate](torch.stack(parts or [torch.zeros(group.size).double()]))


def checked(given: object, group: Channels) -> torch.Tensor:
    """What a user's function gave for *group*, if that are scores.

    Raises:
        PreconditionError: it is something else.
    """
    if not isinstance(given, torch.Tensor) or given.shape != (group.size,) or not bool(given.isfinite().all()):
        what = f"shape {list(given.shape)}" if isinstance(given, torch.Tensor) else type(given).__name__
        raise PreconditionError(
            f"score must give one finite number for each of the {group.size} channels of {group.name}, not {what}"
        )
    return given.detach().double().cpu()


def _distances(value: torch.Tensor) -> torch.Tensor:
    return torch.cdist(value, value).sum(1)


_MEASURES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "l1": lambda value: value.abs().sum(1),
    "l2": lambda value: value.square().sum(1).sqrt(),
    "bn-scale": lambda value: value.abs().sum(1),
    "fpgm": _distances,
}
_AGGREGATE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda parts: parts.sum(0),
    "mean": lambda parts: parts.mean(0),
    "max": lambda parts: parts.amax(0),
}


def _lamp(score: torch.Tensor) -> torch.Tensor:
    """s² over the sum of it and all that are larger (Lee et al., "Layer-adaptive sparsity", ICLR 2021, eq. 2)."""
    squares, order = score.square().sort(descending=True, stable=True)
    result = torch.empty_like(squares)
    result[order] = squares / squares.cumsum(0).clamp_min(1e-300)
    return result


NORMALIZE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda score: score / score.mean().clamp_min(1e-300),
    "max": lambda score: score / score.max().clamp_min(1e-300),
    "lamp": _lamp,
    "none": lambda score: score,
}
