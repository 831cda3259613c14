"""What each engine computes in int8, and how it wants its numbers: facts as data, one scheme per engine.

A scheme is read by the placement (which values become integers) and by nothing else; engines are compared in
``SCHEMES``, where a line that differs is a measured difference between them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch

from fxopt.errors import SpecError, near_miss
from fxopt.passes.insert_fake_quant.grid import Grid
from fxopt.target import Target

U8 = Grid(torch.uint8, symmetric=False, qmin=0, qmax=255)
S8 = Grid(torch.int8, symmetric=True, qmin=-127, qmax=127)
_SEVEN_BITS = Grid(torch.int8, symmetric=True, qmin=-63, qmax=63)

# Ops that compute nothing: the same integers with the same scale on both sides.
_MOVES = frozenset({"shape", "permute", "select", "cat", "copy", "identity", "getitem", "max_pool"})


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How one engine on one machine computes with int8.

    Attributes:
        name: as in ``insert-fake-quant{scheme=...}``.
        activation: integers of values that are computed from the inputs.
        weight: integers of weights; symmetric, one scale for each output channel if ``per_channel``.
        units: kinds of op with a weight that have an int8 kernel: "conv", "conv_transpose", "linear".
        elementwise: kinds of op without a weight that have one and gain from it; they are quantized where what they
            read is int8 already and what they give is wanted in int8.
        moves: kinds of op that hand integers on as they are.
        residual: "fused" where one kernel computes conv + residual + activation, "separate" where the add is a
            kernel of its own that wants the conv's result quantized first.
        float_results: kinds of unit whose kernel can leave its result in float. Others are always quantized.
        fused_activations: those that ride on a unit whose kernel cannot leave its result in float.
        dynamic: the engine is told how to quantize activations at each call; where it does that by itself given int8
            weights, only those are quantized.
        integer_bias: biases are added to the sums as 32-bit integers, in steps of input scale times weight scale.
        half: the dtype of ``cast-precision`` in which this engine computes floats faster, where the target has it; ""
            for engines that have none, or choose it by themselves.
        group_multiple: what the size of a group of int4 weights must be a multiple of, where a row has several.
        declined: why a kind is left in float, for the report.
    """

    name: str
    activation: Grid = U8
    weight: Grid = S8
    per_channel: bool = True
    units: frozenset[str] = frozenset({"conv", "linear"})
    elementwise: frozenset[str] = frozenset()
    moves: frozenset[str] = _MOVES
    residual: Literal["fused", "separate"] = "fused"
    float_results: frozenset[str] = frozenset({"conv", "linear"})
    fused_activations: frozenset[str] = frozenset({"relu", "hardtanh"})
    dynamic: bool = True
    integer_bias: bool = False
    half: Literal["", "bf16"] = ""
    group_multiple: int = 1
    declined: Mapping[str, str] = dataclasses.field(default_factory=dict)


_NO_TRANSPOSED = {"conv_transpose": "this engine has no int8 kernel for transposed convolutions"}

TORCH = Scheme(
    "torch",
    half="bf16",
    elementwise=frozenset({"add", "mul", "avg_pool"}),
    declined=_NO_TRANSPOSED,
)
ONNXRUNTIME = Scheme(
    "onnxruntime",
    elementwise=frozenset({"add", "mul", "avg_pool", "sigmoid", "leaky_relu"}),
    integer_bias=True,
    residual="separate",  # QLinearConv has no residual operand, QLinearAdd is a kernel of its own
    float_results=frozenset({"linear"}),  # QGemm may give floats, QLinearConv may not
    declined=_NO_TRANSPOSED,
)
OPENVINO = Scheme(
    "openvino",
    units=frozenset({"conv", "conv_transpose", "linear"}),
    elementwise=frozenset({"add", "mul", "avg_pool"}),
    float_results=frozenset({"conv", "conv_transpose", "linear"}),
    dynamic=False,
    group_multiple=2,  # of several groups of odd size its kernel reads other memory
)
TVM = Scheme(
    "tvm",  # what stands after a sum in the graph is computed with it, in floats: a residual costs nothing
    declined=_NO_TRANSPOSED,
)
TENSORRT = Scheme(
    "tensorrt",  # explicit quantization: s8, symmetric; the residual add wants both operands quantized
    activation=Grid(torch.int8, symmetric=True, qmin=-127, qmax=127),
    units=frozenset({"conv", "conv_transpose", "linear"}),
    elementwise=frozenset({"add", "avg_pool"}),
)
CUDA = Scheme(
    "cuda",  # PyTorch on an NVIDIA GPU: torch._int_mm, s8 by s8, and no int8 kernel beside it
    activation=Grid(torch.int8, symmetric=True, qmin=-127, qmax=127),
    units=frozenset({"linear"}),
    declined={
        "conv": "PyTorch has no int8 kernel for convolutions on GPUs",
        "conv_transpose": "PyTorch has no int8 kernel for transposed convolutions on GPUs",
    },
)

SCHEMES = {scheme.name: scheme for scheme in (TORCH, ONNXRUNTIME, OPENVINO, TVM, TENSORRT, CUDA)}
_OF_ENGINE = {"torch": TORCH, "onnx": ONNXRUNTIME, "openvino": OPENVINO, "tvm": TVM}


def named(name: str) -> Scheme:
    """The scheme called *name*.

    Raises:
        SpecError: no such scheme.
    """
    if name not in SCHEMES:
        raise SpecError(f"insert-fake-quant: unknown scheme {name!r}.{near_miss(name, ['auto', *SCHEMES])}")
    return SCHEMES[name]


def choose(name: str, target: Target, engine: str) -> Scheme:
    """The scheme called *name*; for "auto" the one of *engine* on *target*.

    Where kernels add products in 16 bits, weights keep 7 bits.

    Raises:
        SpecError: no such scheme.
    """
    if name != "auto":
        return named(name)
    own = target.int8_scheme(engine)
    scheme = named(own) if own else _OF_ENGINE.get(engine, ONNXRUNTIME)
    return dataclasses.replace(scheme, weight=_SEVEN_BITS) if target.narrow_int8 else scheme
