"""Dropout that a graph captured in eval mode has lost: what is known from the modules of the model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from fxopt import ops
from fxopt.notice import warn
from fxopt.program import Program


def _owner(node: fx.Node, model: nn.Module) -> tuple[str, nn.Module | None]:
    """Path and module whose forward made *node*."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    try:
        return path, model.get_submodule(path)
    except AttributeError:
        return path, None


def of_attention(node: fx.Node, model: nn.Module) -> float:
    """Probability with which the attention in *node* drops weights in training: that of its nn.MultiheadAttention."""
    _, owner = _owner(node, model)
    return owner.dropout if isinstance(owner, nn.MultiheadAttention) else 0.0


def warn_of_lost(program: Program, model: nn.Module, attention: Mapping[str, float]) -> None:
    """Name the modules that drop out in training, but not in the captured graph."""
    kept = {_owner(n, model)[0] for n in program.graph.nodes if ops.kind(n) == "dropout" or attention.get(n.name)}
    lost = []
    for path, module in model.named_modules():
        rate = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0)
        drops = isinstance(module, (_DropoutNd, nn.MultiheadAttention)) and isinstance(rate, float) and rate > 0
        if drops and path not in kept:
            lost.append(path)
    if lost:
        warn(
            f"fxopt.prepare: {', '.join(lost[:3])}{' and others' if len(lost) > 3 else ''} will not drop out in "
            "training: the captured graph does not call it"
        )
