"""A walk over a quantized graph that stops at each layer: what it reads in float, and what it reads quantized.

    node by node:    float      values without any quantize, with the weights as they were given
                     quantized  values after every layer before has been quantized, and changed by the visitor

Methods that change one layer after the other (a bias, a rounding) need the inputs that a layer gets once those before
it have changed. All batches go through the graph side by side, so one run over the data serves all layers; as many
batches take part as fit in :data:`LIMIT` bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt import ops, quantized
from fxopt.execute import FASTER, evaluate, last_users
from fxopt.passbase import Pass, PassContext
from fxopt.passes.insert_fake_quant import calibrate, quality
from fxopt.program import Program
from fxopt.rewriter import Rewriter

# Bytes of values that a walk may hold at once.
LIMIT = 2**30


@dataclasses.dataclass(frozen=True)
class Layer:
    """One conv or linear during a walk.

    Attributes:
        node: in the graph.
        weight: float, as it was given; ``rounded``: as quantization has it now.
        bias: or None.
        exact: its input in float, one for each batch; ``noisy``: in the quantized graph.
        residuals: what a fused op adds before its activation, float and quantized for each batch; or None.
    """

    node: fx.Node
    weight: torch.Tensor
    rounded: torch.Tensor
    bias: torch.Tensor | None
    exact: Sequence[torch.Tensor]
    noisy: Sequence[torch.Tensor]
    residuals: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]] | None

    def apply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The conv or linear alone, without residual and activation."""
        return linear_part(self.node, x, weight, bias)

    def finish(self, y: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """Residual and activation."""
        if not ops.is_fused(self.node):
            return y
        a = ops.arguments(self.node)
        y = y if residual is None else y + residual
        return ops.ACTIVATIONS[a["activation"]](y, *a["activation_args"])

    @property
    def channel_axis(self) -> int:
        """Of the output channels, counted from the end."""
        return -1 if ops.kind(self.node) == "linear" else 1 - self.weight.dim()

    def shift(self, weight: torch.Tensor) -> torch.Tensor:
        """By how much each output channel is too small on average when the weight is *weight*: (channels,).

        E[W x] − E[W' x'], over all batches and positions.
        """
        total, count = torch.zeros((), dtype=torch.float64), 0
        for x, noisy in zip(self.exact, self.noisy, strict=True):
            error = self.apply(x, self.weight, None) - self.apply(noisy, weight, None)
            error = error.movedim(self.channel_axis, 0)
            error = error.reshape(len(error), -1)  # one vector has no other axis
            total, count = total + error.sum(1, dtype=torch.float64), count + error.shape[1]
        return (total / max(1, count)).float()


@dataclasses.dataclass(frozen=True)
class Change:
    """What a layer is to have instead: a weight on its grid, a bias, or None for what stays."""

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


Visit = Callable[[Layer], Change | None]


def linear_part(node: fx.Node, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The conv or linear in *node* on *x*, without what a fused op has besides."""
    a = ops.arguments(node)
    if ops.kind(node) == "linear":
        return torch.nn.functional.linear(x, weight, bias)
    if ops.is_fused(node):
        convolve = getattr(torch.ops.aten, ops.packet(node)).default
        y: torch.Tensor = convolve(x, weight, bias, a["stride"], a["padding"], a["dilation"], a["groups"])
        return y
    assert callable(node.target)
    plain: torch.Tensor = node.target(x, weight, bias, *list(a.values())[3:])
    return plain


class Walk:
    """Values of all batches at each live node. See the module."""

    def __init__(self, program: Program, batches: Sequence[Sequence[Any]], units: Container[fx.Node]) -> None:
        self.program = program
        self.batches = batches
        self.units = units
        self.exact: dict[fx.Node, list[Any]] = {}
        self.noisy: dict[fx.Node, list[Any]] = {}
        self.fixed: set[fx.Node] = set()

    def run(self, visit: Visit) -> None:
        """Go through the graph; *visit* sees each of the units and says what to change of it."""
        dying = last_users(self.program.graph)
        inputs = iter(range(len(self.program.placeholders)))
        for node in self.program.graph.nodes:
            if node.op == "output":
                return
            with torch.no_grad():
                if node.op == "placeholder":
                    i = next(inputs)
                    self.exact[node] = self.noisy[node] = [batch[i] for batch in self.batches]
                elif node.op == "get_attr":
                    value = self.program.constants[str(node.target)]
                    self.exact[node] = self.noisy[node] = [value] * len(self.batches)
                    self.fixed.add(node)
                elif node in self.units:
                    self._unit(node, visit)
                else:
                    self._call(node)
            for dead in dying[node]:
                del self.exact[dead], self.noisy[dead]

    def _unit(self, node: fx.Node, visit: Visit) -> None:
        a = ops.arguments(node)
        x, weight, bias, residual = node.all_input_nodes[0], a["weight"], a.get("bias"), a.get("residual")
        held = self.exact[bias][0] if bias is not None else None
        beside = (self.exact[residual], self.noisy[residual]) if residual is not None else None
        given, rounded = self.exact[weight][0].detach(), self.noisy[weight][0]
        layer = Layer(node, given, rounded, held, self.exact[x], self.noisy[x], beside)
        change = visit(layer) or Change()
        rounded = rounded if change.weight is None else change.weight
        moved = held if change.bias is None else change.bias
        count = range(len(self.batches))
        adds = beside or ([None] * len(count),) * 2
        self.exact[node] = [layer.finish(layer.apply(self.exact[x][i], given, held), adds[0][i]) for i in count]
        self.noisy[node] = [layer.finish(layer.apply(self.noisy[x][i], rounded, moved), adds[1][i]) for i in count]

    def _call(self, node: fx.Node) -> None:
        count, inputs = len(self.batches), node.all_input_nodes
        once = all(n in self.fixed for n in inputs) and ops.is_pure(node)
        if once:
            self.fixed.add(node)
        through = quantized.is_dequantize(node) and self.exact[inputs[0]][0].is_floating_point()
        if quantized.is_quantize(node) or through:  # a dequantize of stored integers computes
            self.exact[node] = self.exact[inputs[0]]
            self.noisy[node] = _values(node, self.noisy, count, once)
            return
        self.exact[node] = _values(node, self.exact, count, once)
        same = all(self.exact[n] is self.noisy[n] for n in inputs) or ops.is_random(node)
        self.noisy[node] = self.exact[node] if same else _values(node, self.noisy, count, once)


def _values(node: fx.Node, known: dict[fx.Node, list[Any]], count: int, once: bool) -> list[Any]:
    """The value of *node* on each batch, or *count* times the one that it has on all."""
    target = FASTER.get(node.target, node.target)
    assert callable(target)

    def compute(i: int) -> Any:
        args = fx.node.map_arg(node.args, lambda n: known[n][i])
        return target(*args, **fx.node.map_arg(node.kwargs, lambda n: known[n][i]))

    return [compute(0)] * count if once else [compute(i) for i in range(count)]


def batches(one: Pass, rewriter: Rewriter, ctx: PassContext, samples: int) -> list[Sequence[Any]]:
    """The calibration batches for a walk: those that are not kept back, up to *samples* rows, while they fit in memory.

    Raises:
        PreconditionError: there is no calibration data.
    """
    taken: list[Sequence[Any]] = []
    rows, room = 0, 1
    for batch in _learned_from(ctx.batches(one)):
        if not taken:
            room = max(1, LIMIT // max(1, 2 * _peak(rewriter.program, batch)))
        taken.append(batch)
        rows += next((len(x) for x in batch if isinstance(x, torch.Tensor) and x.dim()), 1)
        if len(taken) == room and rows < samples:
            rewriter.note(f"learned from {rows} samples: more would not fit in {LIMIT >> 20} MiB")
        if len(taken) == room or rows >= samples:
            break
    return taken


def _learned_from(given: Iterable[Sequence[Any]]) -> Iterator[Sequence[Any]]:
    yield from (batch for i, batch in enumerate(given) if not calibrate.is_kept(i))


def _peak(program: Program, batch: Sequence[Any]) -> int:
    """Bytes of all values that are alive at once on *batch*, weights aside."""
    dying, sizes = last_users(program.graph), dict[fx.Node, int]()
    most = 0

    def look(node: fx.Node, value: Any) -> None:
        nonlocal most
        tensors = [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)] if node.op != "get_attr" else []
        sizes[node] = sum(x.nbytes for x in tensors)
        most = max(most, sum(sizes.values()))
        for dead in dying[node]:
            sizes.pop(dead, None)

    evaluate(program, batch, observe=look)
    return most


def without_quantization(program: Program) -> Program:
    """*program* in float: every dequantize hands on what the quantize before it reads."""
    floated = program.copy()
    for node in floated.graph.nodes:
        if quantized.is_dequantize(node) and quantized.is_quantize(node.args[0]):
            node.replace_all_uses_with(node.args[0].args[0])
    floated.remove_dead()
    return floated


def note_outputs(one: Pass, rewriter: Rewriter, ctx: PassContext, before: Program) -> None:
    """Remark how close the outputs were to float in *before*, and how close they are now, on batches kept back."""
    kept = calibrate.kept_back(ctx.batches(one))
    exact = without_quantization(before)
    old, new = (quality.outputs(exact, noisy, kept) for noisy in (before, rewriter.program))
    for was, now in zip(old, new, strict=True):
        rewriter.note(
            f"{now.name}: cosine {was.cosine:.5f} → {now.cosine:.5f}, SNR {was.snr_db:.1f} → {now.snr_db:.1f} dB"
        )
