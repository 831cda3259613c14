"""Pruning in several rounds: a prepared model that is prepared again, and weights taken back to where they began.

prepare ──train──▶ prepare ──train──▶ …      each round has the graph and the weights that the one before it left
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxopt import masks, verify
from fxopt.capture import Captured
from fxopt.errors import InputError, PreconditionError
from fxopt.fake_quant import FAKE_QUANTIZE
from fxopt.program import Program
from fxopt.rewriter import Rewriter
from fxopt.sparsity import Pattern

# Metadata of a parameter: the axes that a pass has cut, so that it leaves them alone when it runs again; and for each
# axis which indices of the user's tensor are left, over all rounds.
CUT, KEPT = "pruned_axes", "kept_indices"
REMOVED = "removed_blocks"  # of the output: how many residual branches are gone

Tensor = Callable[[str], Any]


def captured(program: Program, model: nn.Module, inputs: list[Any], tensor: Tensor) -> Captured:
    """The graph of a prepared *model* as it is now, as if it had just been captured.

    Raises:
        PreconditionError: its weights are rounded in training already, and no pass can follow that.
    """
    again = program.copy()
    for node in again.graph.nodes:
        for key in (CUT, REMOVED):
            node.meta.pop(key, None)
        if node.target is FAKE_QUANTIZE:
            raise PreconditionError("the model was prepared for quantization: other passes go before or beside that")
    for name, value in again.constants.items():
        if isinstance(value, torch.Tensor):
            again.constants[name] = tensor(name).detach().clone()
    return Captured(again, model, inputs, verify.run(again, inputs)[: len(again.signature.outputs)])


def check(program: Program, patterns: Mapping[str, Pattern], passes: Sequence[str]) -> None:
    """That *passes* have left the weights of *program* the N:M *patterns* that an earlier round gave them, by name.

    Raises:
        PreconditionError: they have not.
    """
    settled = program.copy()
    with torch.no_grad():
        masks.fold(Rewriter(settled))
    for name, pattern in patterns.items():
        if not pattern.holds(settled.constants[name]):
            raise PreconditionError(
                f"{', '.join(passes)} would break the {pattern} sparsity that {name!r} has from an earlier "
                f"fxopt.prepare: inputs were removed from groups of {pattern.m} neighbours. Prune before sparsify-2-4, "
                f'or choose anew after it: passes="prune-channels{{multiple={pattern.m}}},sparsify-2-4"'
            )


def rewind(program: Program, tensor: Tensor, state: Mapping[str, torch.Tensor]) -> None:
    """Give the tensors of *program* the values that *state* has for the dense model, cut as they are.

    Raises:
        InputError: *state* lacks one, or has it in another shape; nothing has changed then.
    """
    found = {}
    for node in program.graph.find_nodes(op="get_attr"):
        name, own = str(node.target), tensor(str(node.target))
        if not isinstance(own, torch.Tensor) or not own.is_floating_point():
            continue
        if name not in state:
            raise InputError(f"rewind: the state has no {name!r}, which the prepared model has")
        value = state[name].detach()
        for axis, index in node.meta.get(KEPT, {}).items():
            fits = axis < value.dim() and len(index) and int(index.max()) < value.shape[axis]
            value = value.index_select(axis, index.to(value.device)) if fits else value
        if value.shape != own.shape:
            given, wanted = list(state[name].shape), list(own.shape)
            raise InputError(f"rewind: {name!r} has shape {given} in the state, from which {wanted} was not cut")
        found[name] = value
    with torch.no_grad():
        for name, value in found.items():
            tensor(name).copy_(value)
