"""A plug-in: everything a package needs to bring a pass and a backend of its own to fxopt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import fxopt

aten = torch.ops.aten


@dataclass(frozen=True)
class ReluAsClamp(fxopt.Pass):
    """relu(x)   becomes   clamp_min(x, floor).  Equal where floor = 0."""

    name: ClassVar[str] = "relu-as-clamp"
    exact: ClassVar[bool] = False
    runs_after: ClassVar[tuple[str, ...]] = ("canonicalize",)
    floor: float = 0.0

    def run(self, rewriter: fxopt.Rewriter, ctx: fxopt.PassContext) -> None:
        for node in rewriter.nodes():
            if node.target is aten.relu.default:
                clamped = rewriter.call(aten.clamp_min.default, (node.args[0], self.floor), before=node)
                rewriter.replace(node, clamped)


class NodeByNode(fxopt.Executable):
    """Runs the graph as the plain fx module it is."""

    def __init__(self, program: fxopt.Program) -> None:
        self.module = program.to_module()
        self.constants = program.constants

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        with torch.no_grad():
            return list(self.module(*inputs))

    def constant(self, name: str) -> torch.Tensor:
        """What the next call reads, which matters for buffers that the model changes."""
        value: torch.Tensor = self.constants[name]
        return value


@dataclass(frozen=True)
class NodeByNodeBackend(fxopt.Backend):
    """The simplest engine there is."""

    name: ClassVar[str] = "node-by-node"

    def lower(self, program: fxopt.Program, target: fxopt.Target, inputs: Sequence[Any]) -> NodeByNode:
        return NodeByNode(program)
