"""Placement in a graph that trains: the places of the deployed graph, found again in the training graph.

    training   x → conv(·, @w) → batch_norm → dropout → add(·, r) → relu
    deployed   x → conv(·, @w', residual=r, relu)                          (one kernel: nothing to round inside it)

The deployed graph is made from a copy, as the engine of the scheme fuses it, and every value of it remembers the
training value that it equals. Placement, modes and calibration are those of quantization after training. Each value
that becomes integers is marked in the training graph on the edges that read integers, each weight where its unit reads
it: batch_norm follows the rounded weight, which equals rounding the folded one, since the grid of a channel scales with
the channel.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import fx, nn

from fxopt import masks, ops
from fxopt.errors import PreconditionError
from fxopt.fake_quant import FAKE_QUANTIZE, ActivationFakeQuantize, WeightFakeQuantize
from fxopt.passbase import PassContext
from fxopt.passes.fuse_conv_bn_relu import ActivationIntoProducer, AddIntoProducer, BatchNormIntoProducer
from fxopt.passes.insert_fake_quant.placement import Placement, readers
from fxopt.passes.insert_fake_quant.quantization import Quantization
from fxopt.passes.insert_fake_quant.scheme import Scheme
from fxopt.pattern import Match, apply
from fxopt.program import Program
from fxopt.rewriter import Rewriter
from fxopt.sparsity import N_OF_M

if TYPE_CHECKING:
    from fxopt.passes.insert_fake_quant import InsertFakeQuant

_UNITS = ("conv", "conv_transpose", "linear")


class Deployed(Rewriter):
    """A copy of the training graph, fused; ``image`` gives the training value that a value of it equals."""

    def __init__(self, training: Program, scheme: Scheme) -> None:
        super().__init__(training.copy())
        copies = zip(self.program.graph.nodes, training.graph.nodes, strict=True)
        self.image: dict[fx.Node, fx.Node] = dict(copies)
        for node in self.nodes():
            if ops.kind(node) == "dropout" and not ops.is_random(node):
                self.replace(node, node.all_input_nodes[0])
        masks.fold(self)
        apply(self, [BatchNormIntoProducer({})])
        apply(self, [_Add(scheme)])
        apply(self, [_Activation(scheme)])
        self.program.remove_dead()

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """As ever; *new* equals what *old* did."""
        self.image.setdefault(new, self.image[old])
        super().replace(old, new)

    def members(self, node: fx.Node) -> set[fx.Node]:
        """The training nodes that *node* stands for."""
        inputs = {self.image[n] for n in node.all_input_nodes if n in self.image}
        pending, found = [self.image[node]], set[fx.Node]()
        while pending:
            one = pending.pop()
            if one not in found and (one not in inputs or not found) and one.op != "placeholder":
                found.add(one)
                pending.extend(one.all_input_nodes)
        return found

    def unit(self, node: fx.Node) -> fx.Node:
        """The conv or linear of the training graph that became *node*."""
        [unit] = [m for m in self.members(node) if ops.kind(m) in _UNITS]
        return unit


class _Add(AddIntoProducer):
    """Only where the kernel takes a residual."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def guard(self, match: Match, rewriter: Rewriter) -> str | None:
        fused = self.scheme.residual == "fused" or ops.kind(match["producer"]) in self.scheme.float_results
        return super().guard(match, rewriter) if fused else "the engine adds in a kernel of its own"


class _Activation(ActivationIntoProducer):
    """Only where the kernel computes it."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def guard(self, match: Match, rewriter: Rewriter) -> str | None:
        name, what = ops.activation(match.root), ops.kind(match["producer"])
        assert name is not None
        if what not in self.scheme.float_results and name[0] not in self.scheme.fused_activations:
            return "the engine computes it in a kernel of its own"
        return super().guard(match, rewriter)


def insert(options: InsertFakeQuant, rewriter: Rewriter, ctx: PassContext) -> None:
    """Mark values and weights, and leave the modules that the marks name in ``rewriter.details["fake_quant"]``.

    Raises:
        PreconditionError: the scheme has one scale for all output channels, which batch_norm cannot follow.
    """
    if any(n.target is FAKE_QUANTIZE for n in rewriter.program.graph.nodes):
        return
    quantization = Quantization(options, rewriter, ctx)
    scheme = quantization.scheme
    if not scheme.per_channel:
        raise PreconditionError(f"scheme {scheme.name} has one scale for a whole weight: training wants one a channel")
    deployed = Deployed(rewriter.program, scheme)
    quantization.rewriter = deployed
    quantization.decide()
    placement = quantization.place(deployed.program)
    ranges = {}
    if ctx.calibration is not None:
        quantization.observe(deployed.program)
        ranges = {name: (one.low, one.high) for name, one in quantization.ranges.items()}
    modules: dict[str, nn.Module] = {}
    for unit in placement.units:
        _weight(rewriter, deployed.unit(unit), scheme, modules, learnable=options.learnable_step)
    for group, values in _groups(placement).items():
        sources = [v for v in values if v in placement.sources()]
        steps, learnable = options.range_steps, options.learnable_step
        module = ActivationFakeQuantize(scheme.activation, len(sources), steps, learnable=learnable)
        if ranges:
            module.calibrate([ranges[v.name] for v in sources])
        modules[f"of_{deployed.image[group].name}"] = module
        for value in values:
            source = sources.index(value) if value in sources else -1
            users = list(readers(value, placement))
            _activation(rewriter, deployed, value, users, (f"of_{deployed.image[group].name}", source))
    rewriter.details["fake_quant"] = modules
    names = {node.name: node for node in deployed.program.graph.nodes}
    for name, reason in quantization.reasons.items():
        rewriter.skip(deployed.image[names[name]], reason)


def _groups(placement: Placement) -> dict[fx.Node, list[fx.Node]]:
    groups: dict[fx.Node, list[fx.Node]] = {}
    for value, group in placement.quantized.items():
        groups.setdefault(group, []).append(value)
    return groups


def _weight(
    rewriter: Rewriter, unit: fx.Node, scheme: Scheme, modules: dict[str, nn.Module], *, learnable: bool
) -> None:
    weight = ops.arguments(unit)["weight"]
    if weight.target is FAKE_QUANTIZE:
        return
    known = next((u for u in weight.users if u.target is FAKE_QUANTIZE), None)
    if known is None:
        chosen = weight.target is N_OF_M  # anew in each step
        source, mask = masks.parts(rewriter, weight) or (weight.args[0] if chosen else weight, None)
        name, tensor, kept = (
            f"of_{str(source.target).replace('.', '_')}",
            rewriter.tensor(source),
            rewriter.tensor(mask),
        )
        assert tensor is not None
        tensor = tensor if kept is None else tensor * kept
        tensor = N_OF_M(tensor, *weight.args[1:]) if chosen else tensor
        axis = 1 if ops.kind(unit) == "conv_transpose" else 0
        modules[name] = WeightFakeQuantize(scheme.weight, tensor, axis, learnable=learnable)
        before = rewriter.first_call() if weight.op == "get_attr" else weight.next
        known = rewriter.call(FAKE_QUANTIZE, (weight, name, 0), before=before, origin=unit)
    rewriter.rewire(unit, weight, known)


def _activation(
    rewriter: Rewriter, deployed: Deployed, value: fx.Node, users: Iterable[fx.Node], how: tuple[str, int]
) -> None:
    """Mark *value* where *users* of the deployed graph read it."""
    inside = set[fx.Node]().union(*(deployed.members(user) for user in users if user.op != "output"))
    inside |= {deployed.image[user] for user in users if user.op == "output"}
    pending, made = [deployed.image[value]], set[fx.Node]()
    while pending:
        one = pending.pop()
        edges = [user for user in one.users if user in inside]
        through = [u for u in edges if ops.kind(u) == "dropout" and not inside.issuperset(u.users)]
        pending.extend(u for u in through if u not in made)  # somebody else reads the dropout in float
        edges = [user for user in edges if user not in through]
        if not edges:
            continue
        before = one.next if one.op == "call_function" else rewriter.first_call()
        mark = rewriter.call(FAKE_QUANTIZE, (one, *how), before=before, origin=one)
        made.add(mark)
        for user in edges:
            rewriter.rewire(user, one, mark)
