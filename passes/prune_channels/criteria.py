"""How important each channel of a group is, from its weights.

    l1, l2     the magnitudes of all elements that the channel has in any parameter (Li et al., ICLR 2017)
    bn-scale   |γ| of its batch norms (Liu et al., Network Slimming, ICCV 2017)
    fpgm       the distance of its filter to all others (He et al., CVPR 2019): what is nearest to the rest goes
    random     a permutation, the same for the same seed

The scores of all parameters of a group are added up, each normalized by its mean, so that no parameter drowns another.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fxopt.passes.prune_channels.coupling import Member
from fxopt.passes.prune_channels.groups import Group


def scores(group: Group, constants: Mapping[str, torch.Tensor], criterion: str, seed: int = 0) -> torch.Tensor:
    """The importance of each channel of *group*: f64[size]."""
    if criterion == "random":
        return torch.randperm(group.size, generator=torch.Generator().manual_seed(seed)).double()
    members = [m for m in group.members if criterion != "bn-scale" or _is_scale(m, constants)]
    members = members or list(group.members)
    total = torch.zeros(group.size, dtype=torch.float64)
    for member in members:
        if member.constant.endswith(("running_mean", "running_var")) or not constants[member.constant].numel():
            continue
        own = _measure(constants[member.constant].detach().float(), member, group, criterion)
        mean = own.mean()
        total += own / mean if mean > 0 else own
    return total


def _measure(weight: torch.Tensor, member: Member, group: Group, criterion: str) -> torch.Tensor:
    """The score of each channel in one parameter: f64[size]."""
    others = [axis for axis in range(weight.dim()) if axis != member.axis]
    if criterion == "fpgm" and others:
        rows = weight.movedim(member.axis, 0).flatten(1)
        value = torch.cdist(rows, rows).sum(1)
    else:
        value = weight.square() if criterion == "l2" else weight.abs()
        value = value.sum(others) if others else value
    index = member.index(group.atom)
    known = index >= 0
    result = torch.zeros(group.size, dtype=torch.float64).index_add_(0, index[known], value[known].double())
    return result.sqrt() if criterion == "l2" else result


def _is_scale(member: Member, constants: Mapping[str, torch.Tensor]) -> bool:
    """Whether a parameter is the weight of a batch norm, by its neighbours."""
    return member.constant.rpartition(".")[0] + ".running_var" in constants and member.constant.endswith("weight")
