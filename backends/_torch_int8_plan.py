"""What of a conv or linear unit goes into the int8 kernel, and what is left to do on its result.

    result read by one quantize node        →  the kernel gives its integers
    residual held as integers, relu         →  "sum" in the kernel, over the memory of the residual
    activation that the kernel has not      →  floats, then the activation, then whatever quantizes them

The kernels round once, at the end, so everything before that belongs inside, or the result is one of floats.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from fxopt.backends._torch_int8_graph import integers, is_full, quantized
from fxopt.backends._torch_int8_packer import through_casts
from fxopt.backends._torch_memory import same_sizes
from fxopt.backends._torch_packer import Fused, _unfused_sizes, hints
from fxopt.quantized import QParams

# What oneDNN's int8 kernels compute before they round; after a residual only relu, or nothing.
ON_CONVOLUTION = {"none", "relu", "hardtanh", "hardswish", "silu"}
_ON_VOLUMES = {"none"}
_ON_LINEAR = ON_CONVOLUTION | {"gelu", "gelu_tanh", "leaky_relu"}
_AFTER_RESIDUAL = {"none", "relu"}
_CLAMPS = {"none", "relu", "hardtanh"}

Unary = tuple[str, tuple[float, ...], str]


@dataclasses.dataclass
class Plan:
    """How one unit is computed.

    Attributes:
        end: the node that the kernel's result stands for: the unit itself, or the quantize node behind it.
        dtype: of the kernel's result.
        scale: of the kernel's result, with ``zero_point``; 1 and 0 for floats.
        unary: the activation in the kernel.
        residual: what the kernel adds, integers or floats, with its scale and zero point.
        how: "sum" overwrites the residual, "add" does not.
        add: residual to be added after the kernel.
        activate: whether the activation is still to do after it.
        clamp: integers to clamp the result to.
    """

    end: fx.Node
    dtype: torch.dtype
    scale: float = 1.0
    zero_point: int = 0
    unary: Unary = ("none", (), "")
    residual: fx.Node | None = None
    residual_scale: tuple[float, int] = (1.0, 0)
    how: str = "sum"
    add: fx.Node | None = None
    activate: bool = False
    clamp: tuple[int, int] | None = None

    def quantize(self, end: fx.Node, p: QParams) -> None:
        """Let the kernel give the integers of *end*."""
        assert isinstance(p.scale, float)
        assert isinstance(p.zero_point, int)
        self.end, self.dtype, self.scale, self.zero_point = end, p.dtype, p.scale, p.zero_point
        if not is_full(p):
            self.clamp = (p.qmin, p.qmax)


def is_pixelwise(fused: Fused) -> bool:
    """Whether *fused* is a 2-D convolution of one pixel at a time."""
    if len(fused.stride) != 2 or fused.groups != 1 or any(fused.padding) or fused.stride != (1, 1):
        return False
    return tuple(fused.weight.meta["val"].shape[2:]) == (1, 1)


def runs_as_linear(fused: Fused) -> bool:
    """Whether the linear kernel is the better one: for pixelwise convolutions that the other does not fuse as well."""
    return is_pixelwise(fused) and (fused.residual is not None or fused.activation not in ON_CONVOLUTION)


def plan(fused: Fused) -> Plan:
    """The plan for one unit."""
    linear = not fused.stride or runs_as_linear(fused)
    end = _only_quantize(fused.node)
    p = None if end is None else quantized(end)
    result = Plan(fused.node, fused.node.meta["val"].dtype)
    if fused.residual is not None:
        _plan_residual(result, fused, linear, end, p)
        return result
    known = _ON_LINEAR if linear else _ON_VOLUMES if len(fused.stride) == 3 else ON_CONVOLUTION
    unary = fused.unary if fused.activation in known else None
    if unary is None:
        result.activate = True
        return result
    result.unary = unary
    if end is not None and p is not None:
        result.quantize(end, p)
        _clamp_in_kernel(result, fused, p)
    return result


def _only_quantize(node: fx.Node) -> fx.Node | None:
    """The quantize node that alone reads *node*, perhaps through casts."""
    while len(node.users) == 1:
        (user,) = node.users
        if quantized(user) is not None:
            return user
        if through_casts(user) is user:
            return None
        node = user
    return None


def _clamp_in_kernel(result: Plan, fused: Fused, p: QParams) -> None:
    """A narrow range of integers is a clamp of the floats."""
    if result.clamp is None or fused.activation not in _CLAMPS or len(fused.stride) == 3:
        return
    low, high = ((b - result.zero_point) * result.scale for b in result.clamp)
    if fused.activation == "relu":
        low = max(low, 0.0)
    elif fused.activation == "hardtanh":
        low, high = max(low, fused.activation_args[0]), min(high, fused.activation_args[1])
    if low <= high:
        result.unary, result.clamp = ("hardtanh", (low, high), ""), None


def _plan_residual(result: Plan, fused: Fused, linear: bool, end: fx.Node | None, p: QParams | None) -> None:
    residual = fused.residual
    assert residual is not None
    known = integers(through_casts(residual))
    fits = same_sizes(residual.meta["val"], fused.node.meta["val"]) and (linear or len(fused.stride) == 2)
    if not fits:
        result.add, result.activate = residual, True
        return
    fused_activation = fused.activation in _AFTER_RESIDUAL
    if fused_activation:
        result.unary = (fused.activation, (), "")
    result.activate = not fused_activation
    if end is not None and p is not None and fused_activation and (linear or known is not None):
        if known is not None and known.qparams.dtype == p.dtype:
            result.residual, result.residual_scale = known.node, (known.scale, known.zero_point)
            result.quantize(end, p)
            return
        if linear and residual.meta["val"].dtype == result.dtype:
            result.residual, result.how = residual, "add"
            result.quantize(end, p)
            return
    if residual.meta["val"].dtype == result.dtype and (linear or result.dtype == torch.float32):
        result.residual, result.how = residual, "add" if linear else "sum"
        return
    result.unary, result.add, result.activate = ("none", (), ""), residual, True


def result_sizes_agree(fused: Fused) -> bool:
    """Whether the result has the sizes of the op before the residual: else the residual broadcasts it."""
    return fused.residual is None or _unfused_sizes(fused) == hints(fused.node)
