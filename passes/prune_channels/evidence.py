"""What calibration data say of channels: how strong their values are, and what the loss would do without them.

activation   mean |x| of each channel, where a conv, linear or matmul reads it
taylor       mean over batches of (Σ w·∂L/∂w)², the sum over all elements that a parameter has of the channel
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxopt import ops, progress
from fxopt.errors import InputError
from fxopt.execute import evaluate
from fxopt.passbase import Pass, PassContext
from fxopt.passes.prune_channels.coupling import Coupling
from fxopt.passes.prune_channels.criteria import read_by_batch_norms, rows
from fxopt.passes.prune_channels.dims import Atom, atoms, positions
from fxopt.passes.prune_channels.groups import Group

Found = dict[str, dict[str, torch.Tensor]]  # group → where it was measured → f64[size]
_READERS = ("conv", "conv_transpose", "linear", "matmul")


def activations(one: Pass, ctx: PassContext, coupling: Coupling, groups: Sequence[Group]) -> Found:
    """The mean magnitude of each channel, by the op that reads it.

    Raises:
        PreconditionError: there is no calibration data.
        InputError: a value is NaN or infinite.
    """
    program, wanted = coupling.program, {group.atom: group for group in groups}
    places = _places(coupling, wanted)
    found: Found = {group.name: {} for group in groups}

    def look(node: fx.Node, value: Any) -> None:
        for axis, atom, index in places.get(node, ()):
            others = [d for d in range(value.dim()) if d != axis]
            strength = value.abs().double().mean(others) if others else value.abs().double()
            if not bool(strength.isfinite().all()):
                raise InputError(f"calibration: {node.name} is not finite, so that its channels cannot be ranked")
            known = index >= 0
            own = torch.zeros(atom.size, dtype=torch.float64).index_add_(0, index[known], strength[known])
            parts = found[wanted[atom].name]
            parts[node.name] = parts.get(node.name, 0) + own

    for batch, leaves in enumerate(ctx.batches(one), start=1):
        progress.say(f"{one.name}: batch {batch}")
        evaluate(program, leaves, observe=look)
    return found


def _places(coupling: Coupling, wanted: Mapping[Atom, Group]) -> dict[fx.Node, list[tuple[int, Atom, torch.Tensor]]]:
    """Which values to look at: axis, atom, and the channel that each position of the axis belongs to."""
    places: dict[fx.Node, list[tuple[int, Atom, torch.Tensor]]] = {}
    for unit in coupling.program.graph.nodes:
        if ops.kind(unit) not in _READERS:
            continue
        for value in unit.all_input_nodes:
            if value.op == "get_attr" or value in places:
                continue
            axes = enumerate(coupling.of(value))
            places[value] = [
                (axis, atom, positions(dim, atom))
                for axis, dim in axes
                for atom in dict.fromkeys(atoms(dim))
                if atom in wanted
            ]
    return places


def taylor(one: Pass, ctx: PassContext, coupling: Coupling, groups: Sequence[Group]) -> Found:
    """The squared first-order change of the loss when a channel is zero in one parameter, a mean over batches.

    Raises:
        PreconditionError: there are no calibration data, or no loss.
        InputError: the loss is no finite number with a gradient.
    """
    program = coupling.program
    statistics = read_by_batch_norms(
        program, "running_mean", "running_var"
    )  # nothing that training changes by gradient
    names = {member.constant for group in groups for member in group.members} - statistics
    leaves_of = {
        name: value.detach().requires_grad_() if name in names and value.is_floating_point() else value
        for name, value in program.constants.items()
        if isinstance(value, torch.Tensor)
    }
    constants = program.constants | leaves_of
    found: Found = {group.name: {} for group in groups}
    for batch, (inputs, loss_of) in enumerate(ctx.losses(one), start=1):
        progress.say(f"{one.name}: batch {batch}")
        with torch.enable_grad():
            loss = loss_of(evaluate(program, inputs, constants=constants, grad=True))
        _check(loss, batch)
        wanted = [name for name in sorted(names) if constants[name].requires_grad]
        gradients = torch.autograd.grad(loss, [constants[name] for name in wanted], allow_unused=True)
        for name, gradient in zip(wanted, gradients, strict=True):
            if gradient is not None:
                _add(found, groups, name, constants[name].detach() * gradient)
    return found


def _add(found: Found, groups: Sequence[Group], name: str, product: torch.Tensor) -> None:
    """Count w·∂L/∂w of the parameter *name* for all groups that have it."""
    for group in groups:
        for member in group.members:
            if member.constant == name:
                change = rows(product, member, group.atom).double().sum(1).square()
                parts = found[group.name]
                parts[member.key] = parts.get(member.key, 0) + change


def _check(loss: object, batch: int) -> None:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise InputError("loss must give one number that depends on the outputs of the model")
    if not bool(loss.isfinite()):
        raise InputError(f"the loss of calibration batch {batch - 1} is {float(loss.detach())}")


MEASURES = {"activation": activations, "taylor": taylor}
