"""A small quantizer for tests: min-max ranges of one input, written into the graph as quantize and dequantize ops."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from fxopt import ops, registry
from fxopt.capture import capture
from fxopt.execute import evaluate
from fxopt.passbase import PassContext
from fxopt.pipeline import Pipeline, full_pipeline
from fxopt.program import Program
from fxopt.quantized import (
    CHOOSE_QPARAMS,
    DEQUANTIZE,
    DEQUANTIZE_CHANNEL,
    DEQUANTIZE_TENSOR,
    QUANTIZE,
    QUANTIZE_TENSOR,
)
from fxopt.rewriter import Rewriter
from fxopt.target import resolve_target

UNITS = ("conv", "conv_transpose", "linear")
MOVES = {"shape", "permute", "select", "cat", "pad", "getitem"}
MOVES_PACKETS = {"max_pool2d", "channel_shuffle", "relu", "hardtanh", "relu6"}
COMPUTES = {"add", "mul", "adaptive_avg_pool2d", "avg_pool2d", "mean", "hardswish", "hardsigmoid", "leaky_relu"}

Params = tuple[float, int, int, int, torch.dtype]


def _params(low: float, high: float, dtype: torch.dtype, bits: int) -> Params:
    low, high, steps = min(low, 0.0), max(high, 0.0), 2**bits - 1
    scale = max(high - low, 1e-6) / steps
    base = 0 if dtype == torch.uint8 else -(2 ** (bits - 1))
    return scale, base + round(-low / scale), base, base + steps, dtype


class Quantizer:
    """Quantizes a program in place."""

    def __init__(self, program: Program, inputs: list[Any], dtype: torch.dtype = torch.uint8, bits: int = 8) -> None:
        self.program, self.rewriter = program, Rewriter(program)
        self.dtype, self.bits = dtype, bits
        self.ranges: dict[fx.Node, tuple[float, float]] = {}

        def observe(node: fx.Node, value: Any) -> None:
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                self.ranges[node] = (float(value.min()), float(value.max()))

        evaluate(program, inputs, observe=observe)

    def run(self, *, pointwise: bool = True, residual: bool = True, outputs: bool = True, relu: bool = True) -> Program:
        """Quantize what units read, what *pointwise* ops and moves read and give, residuals, and float outputs."""
        self.outputs, self.relu = outputs, relu
        nodes = [n for n in self.program.graph.nodes if n.op == "call_function"]
        wanted: dict[fx.Node, None] = {}
        for node in nodes:
            if ops.kind(node) in UNITS:
                a = ops.arguments(node)
                wanted[a["x"] if "x" in a else a["input"]] = None
                if residual and isinstance(a.get("residual"), fx.Node):
                    wanted[a["residual"]] = None
                self._weight(node, a["weight"])
            elif pointwise and (self._moves(node) or ops.packet(node) in COMPUTES):
                covered = not relu and [ops.packet(user) for user in node.users] == ["relu"]
                wanted.update(dict.fromkeys(node.all_input_nodes if covered else [*node.all_input_nodes, node]))
        if outputs:
            wanted.update(dict.fromkeys(n for n in self.program.output.all_input_nodes if n.op == "call_function"))
        wanted = {v: None for v in wanted if v in self.ranges and v.op != "get_attr"}
        params: dict[fx.Node, Params] = {}
        for value in self.program.graph.nodes:
            if value in wanted:
                params[value] = _params(*self.ranges[value], self.dtype, self.bits)
        for _ in range(3):  # what moves values has one scale on all sides, and its neighbours with it
            for value in params:
                if self._moves(value):
                    self._share(value, params)
        for value, p in params.items():
            self._insert(value, p)
        self.rewriter.program.remove_dead()
        return self.program

    def _moves(self, node: fx.Node) -> bool:
        return ops.kind(node) in MOVES or (
            ops.packet(node) in MOVES_PACKETS and (self.relu or ops.packet(node) != "relu")
        )

    def _share(self, node: fx.Node, params: dict[fx.Node, Params]) -> None:
        sources = [m for n in node.all_input_nodes for m in ([n] if n in params else n.all_input_nodes)]
        group = [n for n in (*sources, node) if n in params]
        low, high = min(self.ranges[n][0] for n in group), max(self.ranges[n][1] for n in group)
        for member in group:
            params[member] = _params(low, high, self.dtype, self.bits)
            self.ranges[member] = (low, high)

    def _weight(self, user: fx.Node, node: fx.Node) -> None:
        value = self.rewriter.tensor(node)
        if value is None:
            return
        scales = value.flatten(1).abs().amax(1).float().clamp_min(1e-6) / 127
        wide = scales.reshape(-1, *[1] * (value.dim() - 1))
        integers = (value.float() / wide).round().clamp(-127, 127).to(torch.int8)
        holder = self.rewriter.constant(f"{node.target}_q", integers)
        channels = self.rewriter.constant(f"{node.target}_scale", scales)
        zeros = self.rewriter.constant(f"{node.target}_zero", torch.zeros(len(scales), dtype=torch.int64))
        kwargs = {} if value.dtype == torch.float32 else {"out_dtype": value.dtype}
        args = (holder, channels, zeros, 0, -127, 127, torch.int8)
        self.rewriter.rewire(user, node, self.rewriter.call(DEQUANTIZE_CHANNEL, args, kwargs, before=user))

    def _insert(self, value: fx.Node, p: Params) -> None:
        users = [u for u in value.users if u.op != "output" or self.outputs]
        after = value.next
        while after.op in ("placeholder", "get_attr"):
            after = after.next
        kwargs = {} if value.meta["val"].dtype == torch.float32 else {"out_dtype": value.meta["val"].dtype}
        q = self.rewriter.call(QUANTIZE, (value, *p), before=after)
        d = self.rewriter.call(DEQUANTIZE, (q, *p), kwargs, before=after)
        for user in users:
            user.replace_input_with(value, d)


def fused(model: nn.Module, inputs: tuple[torch.Tensor, ...], dynamic_shapes: Any = None) -> tuple[Program, list[Any]]:
    """The program as it reaches quantization, and its flat inputs."""
    captured = capture(model.eval(), inputs, dynamic_shapes=dynamic_shapes)
    pipeline = Pipeline(PassContext(resolve_target("x86"), captured.inputs), captured.reference)
    program, _ = pipeline.run(captured.program, full_pipeline([], registry.find_pass))
    return program, captured.inputs


def add_weight_only(program: Program) -> None:
    """Int8 weights alone."""
    quantizer = Quantizer.__new__(Quantizer)
    quantizer.program, quantizer.rewriter = program, Rewriter(program)
    for node in [n for n in program.graph.nodes if ops.kind(n) in UNITS]:
        quantizer._weight(node, ops.arguments(node)["weight"])
    program.remove_dead()


def add_dynamic(program: Program, dtype: torch.dtype = torch.uint8) -> None:
    """Int8 weights, and the inputs of linears quantized over the range that they have at each call."""
    add_weight_only(program)
    rewriter = Rewriter(program)
    limits = torch.iinfo(dtype)
    made: dict[fx.Node, fx.Node] = {}
    for node in [n for n in program.graph.nodes if ops.kind(n) == "linear"]:
        a = ops.arguments(node)
        x = a["x"] if "x" in a else a["input"]
        if x not in made:
            ends = (limits.min, limits.max)
            choice = rewriter.call(CHOOSE_QPARAMS, (x, *ends, 1e-7, dtype), before=node)
            how = [rewriter.call(operator.getitem, (choice, i), before=node) for i in (0, 1)]
            q = rewriter.call(QUANTIZE_TENSOR, (x, *how, *ends, dtype), before=node)
            made[x] = rewriter.call(DEQUANTIZE_TENSOR, (q, *how, *ends, dtype), before=node)
        rewriter.rewire(node, x, made[x])
