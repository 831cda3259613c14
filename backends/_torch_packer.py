"""What a conv or linear node computes, and the packing of its weight."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxopt import ops
from fxopt.program import ORIGIN, Program

aten, mkldnn = torch.ops.aten, torch.ops.mkldnn

# Activation of a fused op → its name, number of parameters and algorithm in oneDNN's words. elu and mish have none.
_UNARY = {
    "none": ("none", 0, ""),
    "relu": ("relu", 0, ""),
    "hardtanh": ("hardtanh", 2, ""),
    "hardswish": ("hardswish", 0, ""),
    "hardsigmoid": ("hardsigmoid", 0, ""),
    "silu": ("swish", 0, ""),
    "gelu": ("gelu", 0, "none"),
    "gelu_tanh": ("gelu", 0, "tanh"),
    "sigmoid": ("sigmoid", 0, ""),
    "tanh": ("tanh", 0, ""),
    "leaky_relu": ("leaky_relu", 1, ""),
}


@dataclasses.dataclass
class Fused:
    """What a conv or linear node computes: ``activation(op(x, weight, bias) + residual)``.

    For convolutions ``stride`` and the like have one number for each spatial dimension.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    residual: fx.Node | None
    activation: str = "none"
    activation_args: tuple[float, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1

    @property
    def unary(self) -> tuple[str, tuple[float, ...], str] | None:
        """The activation in oneDNN's words, or None where oneDNN has none."""
        name, count, algorithm = _UNARY.get(self.activation, ("", -1, ""))
        return (name, self.activation_args, algorithm) if count == len(self.activation_args) else None


def read(node: fx.Node) -> Fused | None:
    """The arguments of a conv or linear node, or None for a form that only ATen knows (``padding="same"``...)."""
    a = ops.arguments(node)
    if ops.packet(node) not in _PACKETS:
        return None
    spatial: dict[str, Any] = {k: a[k] for k in ("stride", "padding", "dilation", "output_padding") if k in a}
    x, weight = a["x" if "x" in a else "input"], a["weight"]
    dims = weight.meta["val"].dim() - 2
    for key, value in spatial.items():
        if isinstance(value, str) and value != "valid":
            return None
        numbers = (0,) if isinstance(value, str) else tuple(value)
        spatial[key] = numbers * dims if len(numbers) == 1 else numbers
    return Fused(
        node,
        x,
        weight,
        a["bias"],
        a.get("residual"),
        a.get("activation", "none"),
        tuple(a.get("activation_args", ())),
        groups=a.get("groups", 1),
        **spatial,
    )


_PACKETS = {f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3)} | {"linear"}


class Packer:
    """Packs weights of one program, each once for each use that needs another form.

    Attributes:
        originals: name of a weight that left the program → what gets it back from the packed one.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = program.graph
        self.originals: dict[str, Callable[[], torch.Tensor]] = {}
        self._packed: dict[tuple[Any, ...], fx.Node] = {}
        self._mutable = {w.constant for w in program.signature.writebacks}
        self._dtypes = {torch.float32}
        if mkldnn._is_mkldnn_bf16_supported():
            self._dtypes.add(torch.bfloat16)

    def takes(self, fused: Fused) -> bool:
        """Whether oneDNN can compute *fused*: constant weight, batched dense CPU tensors of one supported dtype."""
        weight = self.tensor(fused.weight)
        if weight is None or weight.dtype not in self._dtypes or weight.layout != torch.strided or not weight.is_cpu:
            return False
        x = fused.x.meta["val"]
        if x.dtype != weight.dtype or x.layout != torch.strided or 0 in weight.shape:
            return False
        if fused.bias is not None and fused.bias.meta["val"].dtype != weight.dtype:
            return False
        if not (x.dim() == weight.dim() if fused.stride else weight.dim() == 2):
            return False
        return fused.residual is None or _unfused_sizes(fused) == hints(fused.node)  # else the residual broadcasts it

    def tensor(self, node: fx.Node) -> torch.Tensor | None:
        """The constant behind *node*; None for anything that is computed or may change between calls."""
        if node.op != "get_attr" or node.target in self._mutable:
            return None
        value = self.program.constants[str(node.target)]
        return value if isinstance(value, torch.Tensor) else None

    def constant(
        self,
        weight: fx.Node,
        key: tuple[Any, ...],
        make: Callable[[torch.Tensor], torch.Tensor],
        groups: int | None = None,
    ) -> fx.Node:
        """A node for ``make(weight)``, made once for each *key*; *groups*: those of a transposed convolution."""
        key = (weight.target, *key)
        if key not in self._packed:
            value = self.tensor(weight)
            assert value is not None
            name = f"{weight.target}_{key[1]}_{len(self._packed)}"
            self.program.constants[name] = made = make(value.detach())
            original = functools.partial(_unpack, made, value.shape, groups)
            # Where oneDNN has the groups of a transposed convolution follows no rule that could be turned back.
            if (groups or 1) > 1 and not torch.equal(original(), value):
                original = functools.partial(torch.clone, value.clone())
            self.originals[str(weight.target)] = original
            first = next(n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr"))
            with self.graph.inserting_before(first):
                self._packed[key] = self.graph.get_attr(name)
        return self._packed[key]

    def release(self, weight: fx.Node) -> None:
        """Forget an unpacked weight that nobody reads any more."""
        if not weight.users:
            self.graph.erase_node(weight)
            del self.program.constants[str(weight.target)]

    def call(
        self, target: Any, args: Sequence[Any], like: fx.Node, before: fx.Node | None = None, **kwargs: Any
    ) -> fx.Node:
        """A new call before *before* (default: *like*), whose value has the shape and dtype of that of *like*."""
        with self.graph.inserting_before(before or like):
            node = self.graph.create_node("call_function", target, tuple(args), kwargs, name=like.name)
        node.meta["val"] = like.meta["val"]
        for key in ("stack_trace", ORIGIN):
            if key in (before or like).meta:
                node.meta[key] = (before or like).meta[key]
        return node

    def finish(self, fused: Fused, y: fx.Node, *, add: bool, activate: bool) -> None:
        """Let ``fused.node`` be what is left to do on *y*: the residual add, the activation, or nothing at all."""
        node = fused.node
        if add:
            y = self.call(aten.add.Tensor, (y, fused.residual), node)
        if activate and fused.activation != "none":
            function: Any = ops.ACTIVATIONS[fused.activation]
            kwargs = getattr(function, "keywords", {})
            y = self.call(getattr(function, "func", function), (y, *fused.activation_args), node, **kwargs)
        node.replace_all_uses_with(y)
        self.graph.erase_node(node)


def _unpack(packed: torch.Tensor, shape: torch.Size, groups: int | None) -> torch.Tensor:
    """The weight of *shape* behind a packed one. Of a transposed convolution, oneDNN keeps [out, in / groups, ...]."""
    dense = packed.to_dense() if packed.is_mkldnn else packed
    if groups is not None:
        dense = dense.unflatten(0, (groups, -1)).transpose(1, 2)
    return dense.reshape(shape)


def _unfused_sizes(fused: Fused) -> tuple[int, ...] | None:
    """Sizes of the result before the residual is added, for the example inputs."""
    x, (out, _, *kernel) = hints(fused.x), fused.weight.meta["val"].shape
    if x is None or not fused.stride:
        return None if x is None else (*x[:-1], out)
    spans = zip(x[2:], kernel, fused.stride, fused.padding, fused.dilation, strict=True)
    return (x[0], out, *((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in spans))


def hints(node: fx.Node) -> tuple[int, ...] | None:
    """Sizes of a value for the example inputs; None where a size depends on data."""
    sizes = [s if isinstance(s, int) else s.node.hint for s in node.meta["val"].shape]
    return None if None in sizes else tuple(int(s) for s in sizes)
