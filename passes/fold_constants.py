"""What depends on constants alone is computed once, at compile time.

    add(@a, @b)   →   @c          arange(0, 128)   →   @arange
    attention(q, k, v, mask=expand(@ones))   →   attention(q, k, v)
    chunk(@w, 3)[1]   →   @w_1

Bounded: a result larger than its constant inputs by more than ``limit`` bytes stays an op (a mask expanded from a
vector is cheaper to make than to keep). A buffer that the model mutates is no constant. What the model returns is
computed anew in each call: the caller may write to it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx

from fxopt import masks, ops
from fxopt.passbase import Pass, PassContext
from fxopt.rewriter import Rewriter


@dataclasses.dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace constant subexpressions by their value.

    Attributes:
        limit: bytes by which a folded value may exceed the constants it is made from.
    """

    name: ClassVar[str] = "fold-constants"
    runs_after: ClassVar[tuple[str, ...]] = ("canonicalize", "common-subexpressions")
    limit: int = 2**20

    def untrainable(self) -> str | None:
        """What is computed from parameters would become a parameter itself."""
        return "it folds what is computed from parameters: the compile() of the prepared model runs it"

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """One sweep: a folded node is a constant for the nodes after it. Weights under a mask keep their names."""
        masks.fold(rewriter)
        lent_out = ops.lent_out(rewriter.program.graph)
        for node in rewriter.nodes():
            if node.op != "call_function" or not _is_constant(node, rewriter):
                continue
            if node in lent_out:
                rewriter.skip(node, "its value goes out to the caller, who may write to it")
            else:
                self._fold(node, rewriter)
        for node in rewriter.nodes():
            if ops.kind(node) == "attention" and _masks_nothing(ops.arguments(node)["attn_mask"], rewriter):
                kwargs = {key: value for key, value in node.kwargs.items() if key != "attn_mask"}
                args = (*node.args[:3], None, *node.args[4:])
                rewriter.replace(node, rewriter.call(node.target, args, kwargs, before=node))  # type: ignore[arg-type]

    def _fold(self, node: fx.Node, rewriter: Rewriter) -> None:
        call = _call_of(node)
        values = {n: rewriter.tensor(n) for n in call.all_input_nodes}
        result_bytes = node.meta["val"].numel() * node.meta["val"].element_size()
        input_bytes = sum(v.numel() * v.element_size() for v in values.values() if v is not None)
        if result_bytes > input_bytes + self.limit:
            rewriter.skip(node, f"its constant value would take {result_bytes:,} bytes, over the limit")
            return
        args = fx.node.map_arg(call.args, values.__getitem__)
        kwargs = fx.node.map_arg(call.kwargs, values.__getitem__)
        with torch.no_grad():
            value = call.target(*args, **kwargs)  # type: ignore[operator]
        if call is not node:
            value = value[node.args[1]]
        part_of = [str(n.target) for n in values] if call is not node else []
        new = rewriter.constant(f"{part_of[0]}_{node.args[1]}" if len(part_of) == 1 else node.name, value)
        new.meta = {**node.meta, "val": new.meta["val"]}
        rewriter.replace(node, new)


def _masks_nothing(mask: fx.Node | None, rewriter: Rewriter) -> bool:
    """Whether *mask* lets every key through: True everywhere, or zeros to add; as for input without padding."""
    while isinstance(mask, fx.Node) and ops.kind(mask) in ("shape", "identity"):
        mask = mask.args[0]  # type: ignore[assignment]
    if mask is None:
        return False
    boolean, packet = mask.meta["val"].dtype is torch.bool, ops.packet(mask)
    if packet in ("ones", "zeros", "full"):  # of a size that is not known
        value = mask.args[1] if packet == "full" else int(packet == "ones")
        return not isinstance(value, fx.Node) and bool(value) is boolean
    tensor = rewriter.tensor(mask)
    return tensor is not None and bool(tensor.all() if boolean else not tensor.any())


def _is_constant(node: fx.Node, rewriter: Rewriter) -> bool:
    fake = node.meta.get("val")
    if not isinstance(fake, torch.Tensor) or not all(isinstance(d, int) for d in fake.shape):
        return False
    if ops.namespace(node) == "quantized_decomposed" and "dequantize" in ops.packet(node):
        return False  # small integers are what quantization is for
    call = _call_of(node)
    if not ops.is_pure(call) or not isinstance(call.target, torch._ops.OpOverload):
        return False
    return all(rewriter.tensor(n) is not None for n in call.all_input_nodes)


def _call_of(node: fx.Node) -> fx.Node:
    """What computes *node*: itself, or the op that has several results of which it takes one."""
    source = node.args[0] if ops.kind(node) == "getitem" else None
    return source if isinstance(source, fx.Node) and source.op == "call_function" else node
