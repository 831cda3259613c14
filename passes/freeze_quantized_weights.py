"""Weights that are quantized at each call become integers once. Exact.

    dequantize(quantize(@w, scale, 0))   →   dequantize(@w_int8, scale, 0)

Runs last: until then, passes may still move a float weight on its grid.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx

from fxopt.passbase import Pass, PassContext
from fxopt.rewriter import Rewriter


@dataclasses.dataclass(frozen=True)
class FreezeQuantizedWeights(Pass):
    """Compute every quantize whose operands are constants."""

    name: ClassVar[str] = "freeze-quantized-weights"
    runs_after: ClassVar[tuple[str, ...]] = ("insert-fake-quant",)

    def untrainable(self) -> str | None:
        """Integers have no gradients."""
        return "it leaves integers: the compile() of the prepared model runs it"

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """One sweep; a weight that only its quantize reads leaves the program. What is equal is stored once."""
        from fxopt import quantized

        frozen: dict[fx.Node, list[tuple[torch.Tensor, fx.Node]]] = {}

        for node in rewriter.nodes():
            if not quantized.is_quantize(node) or any(rewriter.tensor(n) is None for n in node.all_input_nodes):
                continue
            args = fx.node.map_arg(node.args, rewriter.tensor)
            assert callable(node.target)
            with torch.no_grad():
                value: torch.Tensor = node.target(*args, **node.kwargs)
            source = node.all_input_nodes[0]
            same = [n for v, n in frozen.get(source, ()) if v.dtype is value.dtype and torch.equal(v, value)]
            if same:  # a table whose embedding and whose linear are quantized alike
                rewriter.replace(node, same[0])
                continue
            new = rewriter.constant(f"{source.target}_{str(value.dtype).removeprefix('torch.')}", value)
            new.meta = {**node.meta, "val": new.meta["val"]}
            rewriter.replace(node, new)
            frozen.setdefault(source, []).append((value, new))
