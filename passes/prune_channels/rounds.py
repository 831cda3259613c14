"""Pruning around training: how much to remove in each round, and loss terms that make channels small before that."""

from __future__ import annotations

import weakref

import torch

from fxopt.errors import InputError
from fxopt.passes.prune_channels.criteria import read_by_batch_norms, rows
from fxopt.passes.prune_channels.groups import Group, find_groups
from fxopt.prepared import PreparedModel

_groups: weakref.WeakKeyDictionary[PreparedModel, list[Group]] = weakref.WeakKeyDictionary()


def per_round(ratio: float, rounds: int) -> float:
    """The ratio of each of *rounds* equal rounds that remove *ratio* together: 1 − (1 − ratio)^(1/rounds).

    Raises:
        InputError: *ratio* is not within [0, 1), or *rounds* below 1.
    """
    if not 0 <= ratio < 1 or rounds < 1:
        raise InputError(f"per_round wants a ratio of at least 0 and below 1, and a round, not {ratio} and {rounds}")
    return float(1 - (1 - ratio) ** (1 / rounds))


def group_lasso(model: PreparedModel) -> torch.Tensor:
    """Σ over groups √n · Σ over channels ‖w‖₂, w the n weights that a channel has in all parameters of its group.

    A loss term that draws whole channels to zero (Yuan and Lin 2006; over coupled parameters: Fang et al., CVPR 2023).
    To be added to the loss of the task with a small factor, such as 1e-4, before ``prune-channels``.

    Raises:
        InputError: *model* is not prepared.
    """
    total, groups = torch.zeros(()), _prunable(model)
    skipped = read_by_batch_norms(model.program, "running_mean", "running_var")
    for group in groups:
        members = [member for member in group.members if member.constant not in skipped]
        parts = [rows(model.tensor(member.constant), member, group.atom) for member in members]
        if parts:
            matrix = torch.cat(parts, 1)
            total = total + matrix.shape[1] ** 0.5 * (matrix.square().sum(1) + _SMALL).sqrt().sum()
    return total


def batch_norm_l1(model: PreparedModel) -> torch.Tensor:
    """Σ |γ| over the batch norms whose channels can be removed (Liu et al., Network Slimming, ICCV 2017, eq. 1).

    Raises:
        InputError: *model* is not prepared.
    """
    members = [member for group in _prunable(model) for member in group.members]
    names = {member.constant for member in members} & read_by_batch_norms(model.program, "weight")
    return sum((model.tensor(name).abs().sum() for name in sorted(names)), torch.zeros(()))


_SMALL = 1e-12  # under the root, whose gradient is infinite at zero


def _prunable(model: PreparedModel) -> list[Group]:
    """Found once for each model: a graph does not change in training."""
    if not isinstance(model, PreparedModel):
        raise InputError(f"this loss term is for what fxopt.prepare gave, not for a {type(model).__name__}")
    if model not in _groups:
        _groups[model] = find_groups(model.program).prunable
    return _groups[model]
