"""Convs and linears swallow what follows them: batch_norm, residual add, activation.

    conv → batch_norm → relu             becomes   one conv
    conv → batch_norm → (+ r) → relu     becomes   one conv with a residual operand
    batch_norm → conv without padding    becomes   one conv

With s = γ/√(σ²+ε) and t = β − μ·s, a batch_norm is x·s + t, so

    batch_norm(conv(x, W, b))  = conv(x, W·s, b·s + t)             s along output channels
    conv(batch_norm(x), W, b)  = conv(x, W·s, b + Σ W·t)           s and t along input channels; padding would add
                                                                   zeros where batch_norm has t, so it is refused

The folding is computed in float64 and rounded once. Activations and residuals go into ``fxopt::conv*`` and
``fxopt::linear``: activation(conv(x, W, b) + r).
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any as Value
from typing import ClassVar

import torch
from torch import fx

from fxopt import fused, ops
from fxopt.passbase import Pass, PassContext
from fxopt.pattern import Any, Match, Op, Rule, apply
from fxopt.rewriter import Rewriter

_STATISTICS = ("weight", "bias", "running_mean", "running_var")


@dataclasses.dataclass(frozen=True)
class FuseConvBnRelu(Pass):
    """Fold batch_norm into convs and linears, then fuse residual adds and activations."""

    name: ClassVar[str] = "fuse-conv-bn-relu"
    runs_after: ClassVar[tuple[str, ...]] = tuple(
        "canonicalize common-subexpressions recognize-activations fold-constants".split()
    )

    def untrainable(self) -> str | None:
        """A folded batch_norm has no statistics to update."""
        return "it folds batch_norm, which training needs: the compile() of the prepared model runs it"

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """Four sweeps: each gives the next one its pattern."""
        folded: dict[Value, tuple[fx.Node, fx.Node]] = {}
        folds = BatchNormIntoProducer(folded), BatchNormIntoConsumer(folded)
        for rule in (*folds, AddIntoProducer(), ActivationIntoProducer()):
            apply(rewriter, [rule])


@dataclasses.dataclass(frozen=True)
class _Affine:
    """A batch_norm in inference as x·scale + shift, per channel, float64."""

    scale: torch.Tensor
    shift: torch.Tensor


def _affine(node: fx.Node, rewriter: Rewriter) -> _Affine | str:
    """The affine map of a batch_norm node, or the reason why it has none."""
    a = ops.arguments(node)
    if a["training"]:
        return "batch_norm uses the statistics of the batch"
    tensors = {name: rewriter.tensor(a[name]) for name in _STATISTICS}
    for name in _STATISTICS:
        if a[name] is not None and tensors[name] is None:
            return f"{name} of batch_norm is computed, not constant"
    mean, variance = tensors["running_mean"], tensors["running_var"]
    if mean is None or variance is None:
        return "batch_norm has no running statistics"
    scale = torch.rsqrt(variance.double() + a["eps"])
    if (weight := tensors["weight"]) is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    if (bias := tensors["bias"]) is not None:
        shift = shift + bias.double()
    return _Affine(scale, shift)


def _no_constants(producer: fx.Node, rewriter: Rewriter) -> str | None:
    """Why the weight or bias of a conv or linear cannot be rewritten, or None."""
    a = ops.arguments(producer)
    computed = [name for name in ("weight", "bias") if a[name] is not None and rewriter.tensor(a[name]) is None]
    return f"{computed[0]} of {producer.name} is computed, not constant" if computed else None


class _FoldRule(Rule):
    """What both directions of folding share: one new weight for equal folds, and no split of a shared weight."""

    side: ClassVar[str]

    def __init__(self, folded: dict[Value, tuple[fx.Node, fx.Node]]) -> None:
        self.folded = folded

    def key(self, producer: fx.Node, norm: fx.Node) -> Value:
        """What the folded weight depends on."""
        a, n = ops.arguments(producer), ops.arguments(norm)
        stats = tuple(n[s] for s in _STATISTICS)
        return (self.side, ops.packet(producer), a["weight"], a["bias"], a.get("groups"), stats, n["eps"])

    @abc.abstractmethod
    def norm_of(self, user: fx.Node) -> fx.Node | None:
        """The batch_norm that *user* would be folded with, if any."""

    def split_weight(self, producer: fx.Node, norm: fx.Node) -> str | None:
        """A reason if folding would leave two copies of a weight that is shared."""
        weight = ops.arguments(producer)["weight"]
        own = self.key(producer, norm)
        for user in weight.users:
            foldable = ops.kind(user) in ("conv", "conv_transpose", "linear") and not ops.is_fused(user)
            other = self.norm_of(user) if foldable else None
            if user is not producer and (other is None or self.key(user, other) != own):
                return f"weight shared with {user.name}"
        return None

    def finish(self, match: Match, rewriter: Rewriter, weight: torch.Tensor, bias: torch.Tensor, x: fx.Node) -> None:
        """Replace the match by the producer on *x* with new constants."""
        producer, norm = match["producer"], match["norm"]
        key = self.key(producer, norm)
        a = ops.arguments(producer)
        dtype = a["weight"].meta["val"].dtype
        if key not in self.folded:
            base = str(a["weight"].target).removesuffix(".weight").removesuffix(".t")
            self.folded[key] = (
                rewriter.constant(f"{base}.folded_weight", weight.to(dtype)),
                rewriter.constant(f"{base}.folded_bias", bias.to(dtype)),
            )
        new_weight, new_bias = self.folded[key]
        args = [x, new_weight, new_bias, *list(a.values())[3:]]
        rewriter.replace(match.root, rewriter.call(producer.target, args, before=match.root, origin=producer))


class BatchNormIntoProducer(_FoldRule):
    """batch_norm(conv(x, W, b)) → conv(x, W·s, b·s + t)."""

    side = "producer"
    pattern = Op("batch_norm", Op("conv conv_transpose linear", name="producer"), name="norm")

    def norm_of(self, user: fx.Node) -> fx.Node | None:
        """The only user of the producer, if it is a batch_norm."""
        users = list(user.users)
        return users[0] if len(users) == 1 and ops.kind(users[0]) == "batch_norm" else None

    def guard(self, match: Match, rewriter: Rewriter) -> str | None:
        """Refuse fused producers, computed weights, batch statistics, unbatched inputs, and split weights."""
        producer, norm = match["producer"], match["norm"]
        if ops.is_fused(producer):
            return f"{producer.name} already has an activation"
        if ops.kind(producer) == "linear" and producer.meta["val"].dim() != 2:
            return "batch_norm runs along another axis than the linear's outputs"
        if ops.kind(producer) != "linear" and producer.meta["val"].dim() != producer.args[1].meta["val"].dim():
            return "the conv has no batch axis"
        affine = _affine(norm, rewriter)
        if isinstance(affine, str):
            return affine
        return _no_constants(producer, rewriter) or self.split_weight(producer, norm)

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Scale the weight along its output axis."""
        producer = match["producer"]
        affine = _affine(match["norm"], rewriter)
        assert isinstance(affine, _Affine)
        a = ops.arguments(producer)
        weight, bias = rewriter.tensor(a["weight"]), rewriter.tensor(a["bias"])
        assert weight is not None
        folded = _scale_outputs(weight.double(), affine.scale, producer)
        new_bias = affine.shift if bias is None else bias.double() * affine.scale + affine.shift
        self.finish(match, rewriter, folded, new_bias, producer.args[0])


def _scale_outputs(weight: torch.Tensor, scale: torch.Tensor, producer: fx.Node) -> torch.Tensor:
    """*weight* times *scale* along output channels; a transposed conv's weight is (in, out/groups, *kernel)."""
    if ops.kind(producer) != "conv_transpose":
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    groups = ops.arguments(producer)["groups"]
    per_group = scale.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
    return (weight.reshape(groups, -1, *weight.shape[1:]) * per_group).reshape(weight.shape)


class BatchNormIntoConsumer(_FoldRule):
    """conv(batch_norm(x), W, b) → conv(x, W·s, b + Σ W·t), without padding."""

    side = "consumer"
    pattern = Op("conv linear", Op("batch_norm", Any("x"), name="norm"), name="producer")

    def norm_of(self, user: fx.Node) -> fx.Node | None:
        """The batch_norm that feeds the conv or linear."""
        x = user.args[0]
        return x if isinstance(x, fx.Node) and ops.kind(x) == "batch_norm" else None

    def guard(self, match: Match, rewriter: Rewriter) -> str | None:
        """Refuse padding, other axes, computed weights, batch statistics, and split weights."""
        consumer, norm = match["producer"], match["norm"]
        a = ops.arguments(consumer)
        if ops.kind(consumer) == "linear" and norm.meta["val"].dim() != 2:
            return "batch_norm runs along another axis than the linear's inputs"
        if ops.kind(consumer) == "conv" and any(p != 0 for p in a["padding"]):
            return "the conv pads with zeros, where batch_norm would have its shift"
        if ops.kind(consumer) == "conv" and norm.meta["val"].dim() != a["weight"].meta["val"].dim():
            return "the conv has no batch axis"
        affine = _affine(norm, rewriter)
        if isinstance(affine, str):
            return affine
        return _no_constants(consumer, rewriter) or self.split_weight(consumer, norm)

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Scale the weight along its input axis; group g reads channels g·n to (g+1)·n."""
        consumer = match["producer"]
        affine = _affine(match["norm"], rewriter)
        assert isinstance(affine, _Affine)
        a = ops.arguments(consumer)
        weight, bias = rewriter.tensor(a["weight"]), rewriter.tensor(a["bias"])
        assert weight is not None
        groups = a.get("groups", 1)
        wide = weight.double().reshape(groups, -1, *weight.shape[1:])
        axes = (groups, 1, weight.shape[1], *[1] * (weight.dim() - 2))
        scale, shift = affine.scale.reshape(axes), affine.shift.reshape(axes)
        extra = (wide * shift).flatten(2).sum(-1).reshape(-1)
        new_bias = extra if bias is None else bias.double() + extra
        self.finish(match, rewriter, (wide * scale).reshape(weight.shape), new_bias, match["x"])


class AddIntoProducer(Rule):
    """conv(x) + r → fxopt::conv(x, residual=r), if r is there before the conv runs and has its shape."""

    pattern = Op("add", Op("conv linear", name="producer"), Any("residual"), commutative=True)

    def guard(self, match: Match, rewriter: Rewriter) -> str | None:
        """Refuse scaled, broadcast or converting adds, and a residual that is computed after the conv."""
        producer, residual, root = match["producer"], match["residual"], match.root
        if not isinstance(residual, fx.Node) or not isinstance(residual.meta["val"], torch.Tensor):
            return "a number is added, not a tensor"
        if ops.arguments(root).get("alpha", 1) != 1:
            return "the residual is scaled"
        value, other, result = (n.meta["val"] for n in (producer, residual, root))
        if residual is producer or value.shape != other.shape or not (value.dtype == other.dtype == result.dtype):
            return "the residual has another shape or dtype, or is the conv itself"
        if ops.is_fused(producer) and (producer.args[3] is not None or ops.arguments(producer)["activation"] != "none"):
            return f"{producer.name} already has a residual or an activation"
        later = ops.kind(residual) in ("conv", "linear") and producer < residual and len(residual.users) == 1
        return f"{residual.name} comes later and takes the add" if later and not ops.is_fused(residual) else None

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Compute the conv where the add stands."""
        rewriter.replace(match.root, _fused(match["producer"], match.root, rewriter, residual=match["residual"]))


class ActivationIntoProducer(Rule):
    """relu(conv(x)) → fxopt::conv(x, activation="relu"), likewise for linears and all activations of the op table."""

    pattern = Op("activation", Op("conv linear", name="producer"))

    def guard(self, match: Match, rewriter: Rewriter) -> str | None:
        """Refuse a producer that has an activation already, or another dtype."""
        producer = match["producer"]
        if ops.is_fused(producer) and ops.arguments(producer)["activation"] != "none":
            return f"{producer.name} already has an activation"
        same = producer.meta["val"].dtype == match.root.meta["val"].dtype
        return None if same else "the activation changes the dtype"

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Compute the conv where the activation stands."""
        activation = ops.activation(match.root)
        assert activation is not None
        rewriter.replace(match.root, _fused(match["producer"], match.root, rewriter, activation=activation))


def _fused(
    producer: fx.Node,
    at: fx.Node,
    rewriter: Rewriter,
    *,
    residual: fx.Node | None = None,
    activation: ops.Activation = ("none", ()),
) -> fx.Node:
    """*producer* (plain or fused) as a fused op with a residual or activation more, standing before *at*."""
    a = ops.arguments(producer)
    residual = residual if residual is not None else a.get("residual")
    x = a["x"] if "x" in a else a["input"]
    tail = (activation[0], list(activation[1]))
    if ops.kind(producer) == "linear":
        args = (x, a["weight"], a["bias"], residual, *tail)
        return rewriter.call(fused.LINEAR, args, before=at, origin=producer)
    dims = a["weight"].meta["val"].dim() - 2
    numbers = [_expand(a[key], dims) for key in ("stride", "padding", "dilation")]
    args = (x, a["weight"], a["bias"], residual, *numbers, a["groups"], *tail)
    return rewriter.call(fused.CONV[dims], args, before=at, origin=producer)


def _expand(value: Value, dims: int) -> list[int]:
    """One number for all axes, or one for each, as one for each."""
    items = [value] if isinstance(value, int) else list(value)
    return items * dims if len(items) == 1 else items
