"""The convs that can be factorised, and the thin ones that take their place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx

from fxopt import cost, ops
from fxopt.passes.low_rank_conv.decomposition import Form, Ranks, Sizes, thin
from fxopt.passes.low_rank_linear import layers as linears
from fxopt.rewriter import Rewriter

if TYPE_CHECKING:
    from fxopt.passes.low_rank_conv import LowRankConv

aten = torch.ops.aten
Choose: TypeAlias = Callable[[float], dict[str, Ranks]]


@dataclasses.dataclass(frozen=True)
class Conv:
    """A weight (outputs, inputs, *kernel) of convs.

    Attributes:
        constant: its node; ``weight``: itself.
        users: the convs that have it.
        form: how it is factorised.
        sizes: what decides the cost.
    """

    constant: fx.Node
    weight: torch.Tensor
    users: tuple[fx.Node, ...]
    form: Form
    sizes: Sizes

    @property
    def name(self) -> str:
        """Name of the weight."""
        return str(self.constant.target)

    @property
    def most(self) -> Ranks:
        """The largest ranks there are."""
        outputs, inputs, kernel = self.sizes.outputs, self.sizes.inputs, self.sizes.kernel
        if self.form == "tucker":
            return inputs, outputs
        if self.form == "spatial":
            return (min(inputs * kernel[0], outputs * kernel[1]),)
        return (min(inputs, outputs),)

    def capped(self, ranks: Ranks) -> Ranks:
        """*ranks*, none above the largest there is."""
        return tuple(min(rank, most) for rank, most in zip(ranks, self.most, strict=True))

    def pays(self, ranks: Ranks) -> bool:
        """Whether the thin convs have fewer parameters, and fewer multiply-accumulates."""
        fewer = self.sizes.parameters(self.form, ranks) < self.sizes.parameters(self.form, None)
        return fewer and self.sizes.macs(self.form, ranks) < self.sizes.macs(self.form, None)

    def loss(self, ranks: Ranks) -> str:
        """Why *ranks* do not pay."""
        before, after = (self.sizes.parameters(self.form, r) for r in (None, ranks))
        work, more = (self.sizes.macs(self.form, r) for r in (None, ranks))
        return f"low rank does not pay: parameters {before:,} → {after:,}, MACs {work:,} → {more:,}"

    def skip(self, rewriter: Rewriter, reason: str) -> None:
        """Leave *reason* at the convs."""
        for user in self.users:
            rewriter.skip(user, reason)


def find(rewriter: Rewriter, one: LowRankConv) -> list[Conv]:
    """The weights to factorise; a reason is left at the convs of others."""
    users: dict[fx.Node, list[fx.Node]] = {}
    for node in rewriter.nodes():
        if ops.kind(node) == "conv":
            users.setdefault(ops.arguments(node)["weight"], []).append(node)
        elif ops.kind(node) == "conv_transpose":
            rewriter.skip(node, "low rank is for convs, not for transposed ones")
    found = []
    for constant, readers in users.items():
        if constant.op == "get_attr" and linears.FACTOR.search(str(constant.target)):
            continue
        weight = rewriter.tensor(constant)
        reason = linears.refusal(constant, weight, readers, one.keep)
        if reason is None and weight is not None:
            reasons = [_refusal(user, weight, one) for user in readers]
            reason = next((text for text in reasons if text is not None), None)
        if reason is None and weight is not None:
            form: Form = "pointwise" if math.prod(weight.shape[2:]) == 1 else one.method
            found.append(Conv(constant, weight.detach(), tuple(readers), form, _sizes(weight, readers)))
            continue
        for user in readers:
            rewriter.skip(user, str(reason))
    return found


def _refusal(user: fx.Node, weight: torch.Tensor, one: LowRankConv) -> str | None:
    a, kernel = ops.arguments(user), weight.shape[2:]
    if a["groups"] != 1:
        depthwise = a["groups"] == len(weight) and weight.shape[1] == 1
        return "it is depthwise: each kernel has rank 1" if depthwise else f"it has {a['groups']} groups"
    if isinstance(a["padding"], str):
        return f"its padding is {a['padding']!r}, not a number"
    if min(weight.shape[:2]) < one.smallest:
        return f"it has fewer than {one.smallest} input or output channels (option smallest)"
    if one.method == "spatial" and math.prod(kernel) > 1 and (len(kernel) != 2 or 1 in kernel):
        return f"its kernel {'×'.join(map(str, kernel))} cannot be split into two directions"
    return None


def _sizes(weight: torch.Tensor, users: Sequence[fx.Node]) -> Sizes:
    outputs, inputs, *kernel = weight.shape
    before = after = between = 0
    for user in users:
        x, y = (cost.shape_of(node) for node in (user.all_input_nodes[0], user))
        dims = len(kernel)
        batch = math.prod(y[: -dims - 1])
        before += batch * math.prod(x[-dims:])
        after += batch * math.prod(y[-dims:])
        between += batch * (y[-2] * x[-1] if dims == 2 else 0)
    return Sizes(outputs, inputs, tuple(kernel), (before, after, between))


@dataclasses.dataclass
class Thin:
    """Carries out ranks for *found*; a decomposition is made once."""

    found: Sequence[Conv]
    made: dict[tuple[str, Ranks], list[torch.Tensor | None]] = dataclasses.field(default_factory=dict)

    def carry(self, rewriter: Rewriter, ranks: Mapping[str, Ranks]) -> None:
        """Replace the convs whose weights have *ranks*, in the program of *rewriter*."""
        constants = {str(node.target): node for node in rewriter.program.graph.find_nodes(op="get_attr")}
        for one in self.found:
            if one.name not in ranks:
                continue
            key = (one.name, ranks[one.name])
            if key not in self.made:
                self.made = {k: v for k, v in self.made.items() if k[0] != one.name}
                self.made[key] = thin(one.weight, one.form, ranks[one.name])
            base = one.name.removesuffix(".weight")
            names = ("a", "core", "b") if one.form == "tucker" else ("a", "b")
            nodes = [
                None if weight is None else rewriter.constant(f"{base}.low_rank_{name}", weight)
                for name, weight in zip(names, self.made[key], strict=True)
            ]
            for user in list(constants[one.name].users):
                _split(rewriter, user, one.form, nodes)


def _split(rewriter: Rewriter, user: fx.Node, form: Form, weights: Sequence[fx.Node | None]) -> None:
    """Let *user* give way to convs with *weights*, of which the last has its bias, activation and residual."""
    a = ops.arguments(user)
    dims = len(weights[-1].meta["val"].shape if weights[-1] is not None else a["weight"].meta["val"].shape) - 2
    plain = [1] * dims, [0] * dims, [1] * dims
    own = tuple(_each(a[name], dims) for name in ("stride", "padding", "dilation"))
    if form == "tucker":
        how = [plain, own, plain]
    elif form == "spatial":
        how = [tuple([v[0], p[1]] for v, p in zip(own, plain, strict=True)),
               tuple([p[0], v[1]] for v, p in zip(own, plain, strict=True))]  # fmt: skip
    else:
        how = [own, plain]
    steps = [(weight, numbers) for weight, numbers in zip(weights, how, strict=True) if weight is not None]
    value: Any = user.all_input_nodes[0]
    convolve = getattr(aten, f"conv{dims}d").default
    for weight, numbers in steps[:-1]:
        value = rewriter.call(convolve, (value, weight, None, *numbers), before=user)
    weight, numbers = steps[-1]
    tail = [a["residual"], *numbers, 1, a["activation"], a["activation_args"]] if ops.is_fused(user) else [*numbers, 1]
    assert callable(user.target)
    rewriter.replace(user, rewriter.call(user.target, (value, weight, a["bias"], *tail), before=user))


def _each(value: Any, dims: int) -> list[int]:
    """One number for all axes, or one for each, as one for each."""
    items = [value] if isinstance(value, int) else list(value)
    return items * dims if len(items) == 1 else items
