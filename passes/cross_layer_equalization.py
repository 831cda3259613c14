"""The channels between two layers get weights of one size on both sides, so that one scale suits all of them. Exact.

    conv2(relu(conv1(x, W1, b1)), W2)   →   conv2(relu(conv1(x, W1/s, b1/s)), W2·s)         s = √(r1·r2) / r2

One s for each channel i, with r1 the largest magnitude in row i of W1 and r2 that in column i of W2 (Nagel et al. 2019,
"Data-Free Quantization", equation 11). It holds for whatever lies between and is positively homogeneous: f(s·x) =
s·f(x) for s > 0, as relu, leaky_relu and pools are. hardtanh (relu6), hardswish, gelu and the like are not, and stay.
Chains of pairs (expand, depthwise, project) are gone over until nothing moves, on magnitudes; weights are written once.

It pays where one scale serves a whole weight, or a depthwise weight has channels of very different size. No data is
needed, and activations are not looked at: a channel is therefore never scaled up so far that its bias exceeds the
largest of its layer, which is what dead channels (no weights, but a bias) would otherwise come to.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import ClassVar

import torch
from torch import fx

from fxopt import ops
from fxopt.errors import SpecError
from fxopt.passbase import Pass, PassContext
from fxopt.rewriter import Rewriter

_HOMOGENEOUS = {"none", "relu", "leaky_relu"}
_EQUALIZED = re.compile(r"_equalized(_\d+)?$")  # of a weight's name: a pair of such is not equalized again
_MOST_SWEEPS, _CONVERGED = 200, 1e-4


@dataclasses.dataclass
class _Layer:
    """A conv or linear, and by what its weight is multiplied so far.

    Attributes:
        sizes: magnitudes of the weight, (groups, outputs of one, inputs of one), largest over the kernel.
        rows: factor for each output; ``columns``: for each input.
        most: largest factor that the bias allows each output.
    """

    node: fx.Node
    weight: torch.Tensor
    bias: torch.Tensor | None
    sizes: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    most: torch.Tensor

    @property
    def now(self) -> torch.Tensor:
        """The magnitudes with the factors."""
        groups = len(self.sizes)
        return self.sizes * self.rows.reshape(groups, -1, 1) * self.columns.reshape(groups, 1, -1)


@dataclasses.dataclass(frozen=True)
class CrossLayerEqualization(Pass):
    """Equalize convs and linears that follow each other directly.

    A second run changes nothing: equalized weights are known by their names.

    Attributes:
        threshold: by how much a channel must change, as a factor, for its layers to be rewritten.
    """

    name: ClassVar[str] = "cross-layer-equalization"
    runs_after: ClassVar[tuple[str, ...]] = ("canonicalize", "fold-constants", "fuse-conv-bn-relu", "merge-linears")
    runs_before: ClassVar[tuple[str, ...]] = ("smooth-quant", "insert-fake-quant", "cast-precision")
    threshold: float = 1.1

    def __post_init__(self) -> None:
        if self.threshold < 1:
            raise SpecError(f"cross-layer-equalization: threshold must be at least 1, not {self.threshold}")

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """Find the pairs, balance them, write the weights that changed."""
        layers: dict[fx.Node, _Layer] = {}
        pairs = []
        for node in rewriter.nodes():
            if ops.kind(node) not in ("conv", "linear"):
                continue
            second = _partner(rewriter, node)
            if isinstance(second, str):
                rewriter.skip(node, second)
                continue
            if _EQUALIZED.search(_weight_name(node)) and _EQUALIZED.search(_weight_name(second)):
                continue
            for unit in (node, second):
                layers.setdefault(unit, _layer(rewriter, unit))
            pairs.append((layers[node], layers[second]))
        _balance(pairs)
        far = {first.node for first, _ in pairs if float(first.rows.log().abs().max()) > math.log(self.threshold)}
        for first, after in pairs:
            if first.node not in far:  # what is not worth it is not done on either side
                after.columns, first.rows = torch.ones_like(after.columns), torch.ones_like(first.rows)
        for layer in layers.values():
            if bool((layer.rows != 1).any() or (layer.columns != 1).any()):
                _write(rewriter, layer)


def _balance(pairs: list[tuple[_Layer, _Layer]]) -> None:
    """Equation 11 over all pairs, until no factor moves any more."""
    for _ in range(_MOST_SWEEPS):
        moved = 0.0
        for first, second in pairs:
            r1, r2 = first.now.amax(2).flatten(), second.now.amax(1).flatten()
            factor = torch.where((r1 > 0) & (r2 > 0), (r2 / r1).sqrt(), 1.0)  # 1/s
            factor = torch.minimum(factor, first.most / first.rows)
            first.rows = first.rows * factor
            second.columns = second.columns / factor
            moved = max(moved, float(factor.log().abs().max()))
        if moved < _CONVERGED:
            return


def _partner(rewriter: Rewriter, first: fx.Node) -> fx.Node | str:
    """The conv or linear that alone reads what *first* gives, or why there is none to equalize it with."""
    reason = _refuse(rewriter, first)
    if reason is not None:
        return reason
    a = ops.arguments(first)
    if a.get("residual") is not None:
        return "a residual is added to its result"
    if a.get("activation", "none") not in _HOMOGENEOUS:
        return _not_homogeneous(a["activation"])
    if a.get("bias") is not None and rewriter.tensor(a["bias"]) is None:
        return "its bias is computed, not a constant"
    value = first
    while True:
        if len(value.users) != 1:
            return f"its result is read by {len(value.users)} ops"
        [user] = value.users
        if ops.kind(user) in ("conv", "linear"):
            break
        between = _between(user)
        if between is not None:
            return between
        value = user
    alike = ops.kind(user) == ops.kind(first) and user.all_input_nodes[0] is value
    if not alike or value in (ops.arguments(user).get("residual"), ops.arguments(user)["weight"]):
        return "no layer of its kind reads its result"
    reason = _refuse(rewriter, user)
    return user if reason is None else f"the next layer, {user.name}: {reason}"


def _refuse(rewriter: Rewriter, node: fx.Node) -> str | None:
    """Why the weight of *node* cannot be scaled, or None."""
    weight = ops.arguments(node)["weight"]
    tensor = rewriter.tensor(weight)
    if tensor is None:
        return "its weight is computed, not a constant"
    if not tensor.is_floating_point():
        return "its weight is not floating"
    return "its weight is shared" if len(weight.users) > 1 else None


def _between(node: fx.Node) -> str | None:
    """Why a channel of *node*'s input cannot be scaled in place of one of its output, or None."""
    activation = ops.activation(node)
    if activation is not None:
        return None if activation[0] in _HOMOGENEOUS else _not_homogeneous(activation[0])
    if ops.kind(node) == "pool" and isinstance(node.meta["val"], torch.Tensor):
        return None
    what = {"output": "its result is an output of the model"}
    return what.get(node.op, f"{ops.packet(node) or node.name} lies between it and the next layer")


def _not_homogeneous(activation: str) -> str:
    return f"{activation} is not scale-equivariant: f(s·x) is not s·f(x)"


def _weight_name(node: fx.Node) -> str:
    return str(ops.arguments(node)["weight"].target)


def _layer(rewriter: Rewriter, node: fx.Node) -> _Layer:
    a = ops.arguments(node)
    weight, bias = rewriter.tensor(a["weight"]), rewriter.tensor(a.get("bias"))
    assert weight is not None
    groups = int(a.get("groups", 1))
    largest = weight.detach().double().abs().flatten(2).amax(2) if weight.dim() > 2 else weight.detach().double().abs()
    outputs, inputs = len(weight), weight.shape[1] * groups
    most = torch.full((outputs,), torch.inf, dtype=torch.float64)
    if bias is not None:
        size = bias.detach().double().abs()
        most = torch.where(size > 0, size.max() / size, most)
    ones = torch.ones(outputs, dtype=torch.float64), torch.ones(inputs, dtype=torch.float64)
    return _Layer(node, weight, bias, largest.reshape(groups, outputs // groups, -1), *ones, most)


def _write(rewriter: Rewriter, layer: _Layer) -> None:
    """Constants of its own for *layer*, with the factors multiplied in."""
    a, weight, groups = ops.arguments(layer.node), layer.weight.detach(), len(layer.sizes)
    parts = weight.double().reshape(groups, len(weight) // groups, weight.shape[1], -1)
    scaled = parts * layer.rows.reshape(groups, -1, 1, 1) * layer.columns.reshape(groups, 1, -1, 1)
    new = rewriter.constant(f"{a['weight'].target}_equalized", scaled.reshape(weight.shape).to(weight.dtype))
    rewriter.rewire(layer.node, a["weight"], new)
    if layer.bias is not None and bool((layer.rows != 1).any()):
        value = (layer.bias.detach().double() * layer.rows).to(layer.bias.dtype)
        rewriter.rewire(layer.node, a["bias"], rewriter.constant(f"{a['bias'].target}_equalized", value))
