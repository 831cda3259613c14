"""The linears that can be factorised, and second moments of what they read."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxopt import cost, ops
from fxopt.execute import evaluate
from fxopt.passes.insert_fake_quant import calibrate
from fxopt.program import Program
from fxopt.rewriter import Rewriter

FACTOR = re.compile(r"(^|\.)low_rank_")  # in the name of what this makes: it is not factorised again

_DOUBLE = 1024  # inputs up to which moments are added up in float64


@dataclasses.dataclass(frozen=True)
class Layer:
    """A weight (outputs, inputs) of linears.

    Attributes:
        constant: its node.
        weight: itself.
        users: the linears that multiply by it.
        rows: how many vectors one run multiplies by it, in all of them.
    """

    constant: fx.Node
    weight: torch.Tensor
    users: tuple[fx.Node, ...]
    rows: int

    @property
    def name(self) -> str:
        """Name of the weight."""
        return str(self.constant.target)

    @property
    def size(self) -> int:
        """Elements of the weight."""
        return self.weight.numel()

    @property
    def step(self) -> int:
        """Elements that the factors have for each unit of rank."""
        return sum(self.weight.shape)

    @property
    def limit(self) -> int:
        """The largest rank at which the factors are smaller: r (m + n) < m n."""
        return (self.size - 1) // self.step


def find(rewriter: Rewriter, keep: Sequence[str], smallest: int) -> list[Layer]:
    """The weights to factorise; a reason is left at the linears of others.

    Args:
        rewriter: of the program.
        keep: shell patterns of names to leave alone.
        smallest: the least number of inputs and of outputs.
    """
    users: dict[fx.Node, list[fx.Node]] = {}
    for node in rewriter.nodes():
        if ops.kind(node) == "linear":
            users.setdefault(ops.arguments(node)["weight"], []).append(node)
    found = []
    for constant, linears in users.items():
        if constant.op == "get_attr" and FACTOR.search(str(constant.target)):
            continue
        weight = rewriter.tensor(constant)
        reason = refusal(constant, weight, linears, keep)
        if reason is None and weight is not None and min(weight.shape) < smallest:
            reason = f"it has fewer than {smallest} inputs or outputs (option smallest)"
        if reason is None and weight is not None:
            rows = sum(math.prod(cost.shape_of(linear)[:-1]) for linear in linears)
            found.append(Layer(constant, weight.detach(), tuple(linears), rows))
        else:
            for linear in linears:
                rewriter.skip(linear, str(reason))
    return found


def refusal(
    constant: fx.Node, weight: torch.Tensor | None, users: Sequence[fx.Node], keep: Sequence[str]
) -> str | None:
    """Why the *weight* that *constant* stands for, which *users* read as theirs, cannot be factorised; or None."""
    if constant.op == "call_function":
        return "its weight is not a constant but computed, as where a mask holds zeros, which factors do not keep"
    if weight is None or not weight.is_floating_point() or not weight.numel():
        return "its weight is not a constant of floating-point numbers"
    if any(fnmatch.fnmatchcase(str(constant.target), pattern) for pattern in keep):
        return "stays whole, as asked"
    others = [user.name for user in constant.users if user not in users]
    others += [user.name for user in users if list(ops.arguments(user).values()).count(constant) > 1]
    if others:
        return f"its weight is tied: {', '.join(others)} reads it too, and needs it whole; a copy could be factorised"
    if not bool(weight.isfinite().all()):
        return "its weight is not finite"
    return None if bool(weight.any()) else "its weight is all zeros"


def is_factorised(program: Program) -> bool:
    """Whether weights of *program* are factors already."""
    return any(FACTOR.search(str(node.target)) for node in program.graph.find_nodes(op="get_attr"))


def rounds(layers: Sequence[Layer], limit: int) -> Iterator[list[Layer]]:
    """*layers* in runs whose second moments take no more than *limit* bytes, or one layer."""
    run: list[Layer] = []
    for layer in layers:
        if run and _bytes([*run, layer]) > limit:
            yield run
            run = []
        run.append(layer)
    if run:
        yield run


def _bytes(layers: Sequence[Layer]) -> int:
    sizes = {user.all_input_nodes[0]: layer.weight.shape[1] for layer in layers for user in layer.users}
    return sum(size * size * _dtype(size).itemsize for size in sizes.values())


def _dtype(size: int) -> torch.dtype:
    return torch.float64 if size <= _DOUBLE else torch.float32


def moments(program: Program, layers: Iterable[Layer], batches: Sequence[Sequence[Any]]) -> dict[fx.Node, torch.Tensor]:
    """Σ x xᵀ over all rows of what the linears of *layers* read, by the node that they read: (inputs, inputs)."""
    totals: dict[fx.Node, torch.Tensor] = {}
    for layer in layers:
        size = layer.weight.shape[1]
        for user in layer.users:
            totals[user.all_input_nodes[0]] = torch.zeros(size, size, dtype=_dtype(size))

    last = max(totals)

    def look(node: fx.Node, value: Any) -> None:
        if node in totals:
            total = totals[node]
            rows = value.detach().reshape(-1, len(total)).to(total.dtype)
            total.addmm_(rows.T, rows)
        if node is last:
            raise _SeenAll

    for batch in batches:
        with contextlib.suppress(_SeenAll):
            evaluate(program, batch, observe=look)
    return totals


class _SeenAll(Exception):
    """The rest of the graph has nothing to look at."""


def learned_from(batches: Iterable[Sequence[Any]], samples: int) -> list[Sequence[Any]]:
    """The calibration batches that are not kept back to check the result on, up to *samples* rows."""
    taken, rows = list[Sequence[Any]](), 0
    for index, batch in enumerate(batches):
        if rows >= samples:
            break
        if not calibrate.is_kept(index):
            taken.append(batch)
            rows += next((len(x) for x in batch if isinstance(x, torch.Tensor) and x.dim()), 1)
    return taken
