"""How important each channel of a group is, from its weights.

    l1, l2     the magnitudes of all elements that the channel has in any parameter (Li et al., ICLR 2017)
    bn-scale   |γ| of its batch norms (Liu et al., Network Slimming, ICCV 2017)
    fpgm       the distance of its filter to all others (He et al., CVPR 2019): what is nearest to the rest goes
    random     a permutation, the same for the same seed

The scores of all parameters of a group are added up, each normalized by its mean, so that no parameter drowns another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fxopt.passes.prune_channels.coupling import Member
from fxopt.passes.prune_channels.groups import Group

Score = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def scores(group: Group, constants: Mapping[str, torch.Tensor], criterion: str, seed: int = 0) -> torch.Tensor:
    """The importance of each channel of *group*: f64[size]."""
    if criterion == "random":
        return torch.randperm(group.size, generator=torch.Generator().manual_seed(seed)).double()
    members = [m for m in group.members if criterion != "bn-scale" or _is_scale(m, constants)]
    members = members or list(group.members)
    total = torch.zeros(group.size, dtype=torch.float64)
    for member in members:
        moved = constants[member.constant].detach().double().movedim(member.axis, 0)
        rows = moved.reshape(len(moved), -1)
        if rows.numel() == 0 or member.constant.endswith(("running_mean", "running_var")):
            continue
        own = _measure(rows, member.index(group.atom), group.size, criterion)
        mean = own.mean()
        total += own / mean if mean > 0 else own
    return total


def _measure(rows: torch.Tensor, index: torch.Tensor, size: int, criterion: str) -> torch.Tensor:
    known = index >= 0
    rows, index = rows[known], index[known]
    if criterion == "fpgm":
        value = torch.cdist(rows, rows).sum(1) if rows.shape[1] > 1 else rows.abs().sum(1)
    elif criterion == "l2":
        value = rows.square().sum(1)
    else:
        value = rows.abs().sum(1)
    result = torch.zeros(size, dtype=torch.float64).index_add_(0, index, value)
    return result.sqrt() if criterion == "l2" else result


def _is_scale(member: Member, constants: Mapping[str, torch.Tensor]) -> bool:
    """Whether a parameter is the weight of a batch norm, by its neighbours."""
    return member.constant.rpartition(".")[0] + ".running_var" in constants and member.constant.endswith("weight")
