"""What was fake-quantized in training becomes quantize and dequantize with the same numbers. Lossy.

    conv(fake_quantized(x, s, z), @w)   →   conv(dequantize(quantize(x, s, z)), dequantize(quantize(@w, k·s')))

Weights come rounded: each output channel of @w is k·s'·q with integers q that training left, and k from a batch_norm
that was folded since. Any step on whose multiples a channel lies keeps it as it is, so the step is read off the
weight: the largest magnitude over qmax, where training used the whole grid, otherwise over the first smaller integer
that fits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt import ops, quantized
from fxopt.fake_quant import FAKE_QUANTIZED
from fxopt.passbase import Pass, PassContext
from fxopt.passes.insert_fake_quant import calibrate, trained
from fxopt.passes.insert_fake_quant.quality import Quality
from fxopt.program import Program
from fxopt.rewriter import Rewriter

# How far from an integer a weight over its step may be: float32 rounds 127 of them to within 2e-5.
_OFF_GRID = 1e-3
_QMAX = 127


@dataclasses.dataclass(frozen=True)
class ConvertFakeQuant(Pass):
    """Replace the marks of a prepared graph, and quantize the weights of the convs and linears that read them."""

    name: ClassVar[str] = "convert-fake-quant"
    exact: ClassVar[bool] = False
    runs_after: ClassVar[tuple[str, ...]] = (
        "canonicalize",
        "fold-constants",
        "common-subexpressions",
        "fuse-conv-bn-relu",
        "merge-linears",
    )

    def companions(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """In the end weights become integers."""
        return (), ("freeze-quantized-weights",)

    @classmethod
    def recall(cls, told: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102 - as in Pass
        return {"quantization": Quality.from_plain(told["quantization"])} if "quantization" in told else {}

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """Activations first: they tell which convs and linears are quantized."""
        marks = [node for node in rewriter.nodes() if node.target is FAKE_QUANTIZED]
        if not marks:
            return
        exact = _in_float(rewriter.program)
        for node in marks:
            x, *how = node.args
            q = rewriter.call(quantized.QUANTIZE, (x, *how), before=node)
            q.meta[ops.TRAINED] = True
            rewriter.replace(node, rewriter.call(quantized.DEQUANTIZE, (q, *how), before=node))
        done: dict[fx.Node, fx.Node] = {}
        for unit in rewriter.nodes():
            if ops.kind(unit) in ("conv", "conv_transpose", "linear"):
                _weight(rewriter, unit, done)
        kept = [ctx.inputs] if ctx.calibration is None else calibrate.kept_back(ctx.batches(self))
        rewriter.details["quantization"] = trained.measure(exact, rewriter.program, kept)


def _in_float(program: Program) -> Program:
    """A copy whose activations are not rounded."""
    exact = program.copy()
    for node in exact.graph.nodes:
        if node.target is FAKE_QUANTIZED:
            node.replace_all_uses_with(node.args[0])
    exact.remove_dead()
    return exact


def _weight(rewriter: Rewriter, unit: fx.Node, done: dict[fx.Node, fx.Node]) -> None:
    node = ops.arguments(unit)["weight"]
    tensor = rewriter.tensor(node)
    if tensor is None or tensor.dtype is not torch.float32 or not quantized.is_dequantize(unit.all_input_nodes[0]):
        return
    if node not in done:
        axis = 1 if ops.kind(unit) == "conv_transpose" else 0
        scale = step(tensor, axis)
        if scale is None:
            rewriter.skip(unit, "its weight was not fake-quantized")
            return
        scales = rewriter.constant(f"{node.target}_scale", scale)
        zeros = rewriter.constant(f"{node.target}_zero_point", torch.zeros(len(scale), dtype=torch.int64))
        how = (scales, zeros, axis, -_QMAX, _QMAX, torch.int8)
        q = rewriter.call(quantized.QUANTIZE_CHANNEL, (node, *how), before=rewriter.first_call(), origin=unit)
        done[node] = rewriter.call(quantized.DEQUANTIZE_CHANNEL, (q, *how), before=q.next, origin=unit)
    rewriter.rewire(unit, node, done[node])


def step(weight: torch.Tensor, axis: int) -> torch.Tensor | None:
    """For each channel along *axis* a step of which every element is an integer multiple, at most 127 times.

    Returns:
        float32, one for each channel; None if a channel has no such step.
    """
    rows = weight.detach().double().movedim(axis, 0).flatten(1)
    extent = rows.abs().amax(1)
    result = (extent == 0).double()
    for largest in range(_QMAX, 0, -1):
        left = (result == 0).nonzero().flatten()
        if not len(left):
            break
        candidate = extent[left] / largest
        multiple = rows[left] / candidate[:, None]
        fits = ((multiple - multiple.round()).abs() <= _OFF_GRID).all(1)
        result[left[fits]] = candidate[fits]
    return result.float() if bool((result > 0).all()) else None
