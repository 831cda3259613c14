"""Matmuls and convs in low precision, everything that is sensitive in fp32. Lossy.

    conv(x, @w)  (fp32)   →   conv(x.to(bf16), @w_bf16)  (bf16) … .to(fp32) where fp32 is needed

Each op is one of four (``ops.precision``): *low* gains from bf16 and accumulates in fp32 inside; *full* (softmax,
norms, exp, log, large sums) stays in fp32; *follow* moves or selects values and runs in whatever its inputs have, so
that a chain of low ops does not bounce through fp32; *same* (a reinterpretation of bits, everything unknown) sees the
dtypes of capture. Inputs and outputs keep the user's dtypes.

A sum with an fp32 value is made in fp32, so that the residual stream of a transformer is not rounded in each layer:

    linear(x, @w, residual=r)   →   linear(x.to(bf16), @w_bf16).to(fp32) + r      r in fp32

Masks hold numbers that low precision turns into -inf, and a row of nothing but -inf has no softmax. What an attention
or addmm adds is therefore clamped to the range of bf16, where its end still hides any score; in fp16 the end (-65,504)
does not, and an op that adds what may be a mask stays in fp32.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt import ops, quantized
from fxopt.notice import warn
from fxopt.passbase import Pass, PassContext
from fxopt.rewriter import Rewriter, infer

aten = torch.ops.aten
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_WIDE = torch.float32

# Kinds whose results are ordinary numbers whatever their inputs are, and kinds that pass on what they are given.
_ORDINARY = {"conv", "conv_transpose", "linear", "matmul", "attention", "norm", "batch_norm", "softmax"}
_PASSED_ON = {"add", "mul", "activation", "elementwise", "reduce", "cast", "identity", "copy", "dropout", "embedding"}
_PASSED_ON |= {"shape", "permute", "select", "getitem", "cat", "pad", "pool"}
_ADDED = {"scaled_dot_product_attention": "attn_mask", "addmm": "self", "baddbmm": "self"}


@dataclasses.dataclass(frozen=True)
class CastPrecision(Pass):
    """Run matmuls and convs in *dtype*.

    Attributes:
        dtype: "bf16" (range of fp32, 8 bits of precision) or "fp16" (11 bits, overflows at 65,504).
        keep: shell patterns of the ops to leave in fp32, by their names or those of their weights.
    """

    name: ClassVar[str] = "cast-precision"
    exact: ClassVar[bool] = False
    runs_after: ClassVar[tuple[str, ...]] = (
        "canonicalize",
        "fold-constants",
        "common-subexpressions",
        "fuse-conv-bn-relu",
        "merge-linears",
    )
    dtype: Literal["bf16", "fp16"] = "bf16"
    keep: tuple[str, ...] = ()

    def untrainable(self) -> str | None:
        """Weights in low precision lose small updates."""
        return "weights in low precision lose small updates: pass it to the compile() of the prepared model"

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """One sweep: decide for each node from its kind and what its inputs have become."""
        low = _DTYPES[self.dtype]
        if low not in ctx.target.native_dtypes:
            other = [name for name, dtype in _DTYPES.items() if dtype in ctx.target.native_dtypes]
            text = f"target {ctx.target} has no native {self.dtype} arithmetic: expect it to be slower than fp32"
            text += f"; it has {other[0]}" if other else ""
            rewriter.note(text)
            warn(f"cast-precision: {text}")
        names = {name for node in rewriter.nodes() if ops.precision(node) == "low" for name in _names(node)}
        self.warn_of_unused(rewriter, self.keep, names, "matmul or conv")
        _Sweep(rewriter, low, self.keep).run()


class _Sweep:
    """State of the one sweep: which values are low now, and the casts made so far."""

    def __init__(self, rewriter: Rewriter, low: torch.dtype, keep: Sequence[str] = ()) -> None:
        self.rewriter = rewriter
        self.keep = keep
        self.low = low
        self.casts: dict[tuple[fx.Node, torch.dtype, bool], fx.Node] = {}
        self.ordinary: set[fx.Node] = set()
        self.captured = {node: _dtype(node) for node in rewriter.nodes()}

    def run(self) -> None:
        for node in self.rewriter.nodes():
            if node.op == "output":
                self._restore_outputs(node)
            elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                self._visit(node)
            elif node.op == "call_function" and any(_is_body(n) for n in node.all_input_nodes):
                self._restore_inputs(node)  # torch.cond: its bodies were captured for the dtypes of its operands
            elif node.op == "call_function":
                self._refresh(node)
            if not node._erased:
                self._note_ordinary(node)

    def _restore_inputs(self, node: fx.Node) -> None:
        """Let *node* see the dtypes that it was captured for."""
        for value in node.all_input_nodes:
            was = self.captured.get(value)
            if was is not None and _dtype(value) != was:
                node.replace_input_with(value, self._cast(value, was, node))

    def _visit(self, node: fx.Node) -> None:
        if ops.precision(node) == "same":
            self._restore_inputs(node)
            return
        if ops.kind(node) == "cast":
            self._refresh(node)
            return
        inputs = [n for n in node.all_input_nodes if _dtype(n) in (_WIDE, self.low)]
        was = node.meta["val"]
        want = self._wanted(node, inputs)
        if want == self.low and ops.is_fused(node) and _dtype(ops.arguments(node)["residual"]) == _WIDE:
            self._split(node)
            return
        mask = self._mask(node)
        for value in inputs:
            if _dtype(value) != want:
                node.replace_input_with(value, self._cast(value, want, node, clamped=value is mask))
        self._refresh(node)
        if _floats(node.meta["val"]) != _floats(was):
            self.rewriter.edits += 1

    def _split(self, node: fx.Node) -> None:
        """A fused op as its parts: the low sum of products, and what follows it in fp32."""
        a, call = ops.arguments(node), self.rewriter.call
        spatial = [a[key] for key in ("stride", "padding", "dilation", "groups") if key in a]
        plain = getattr(aten, ops.packet(node)).default
        factors = [None if v is None else self._cast(v, self.low, node) for v in (a["x"], a["weight"], a["bias"])]
        parts = [call(plain, (*factors, *spatial), before=node)]
        parts.append(call(aten.add.Tensor, (parts[-1], a["residual"]), before=node))
        if a["activation"] != "none":
            function: Any = ops.ACTIVATIONS[a["activation"]]
            target, kwargs = getattr(function, "func", function), getattr(function, "keywords", {})
            parts.append(call(target, (parts[-1], *a["activation_args"]), kwargs, before=node))
        for part in parts:
            self.captured[part] = self.captured[node]
        self.rewriter.replace(node, parts[-1])
        for part in parts:
            self._visit(part)
            self._note_ordinary(part)

    def _wanted(self, node: fx.Node, inputs: list[fx.Node]) -> torch.dtype:
        """The dtype in which *node* is to see its floating inputs."""
        precision = ops.precision(node)
        computed = [n for n in inputs if n.op != "get_attr"]
        outputs = _floats(node.meta["val"])
        if not inputs or any(d not in (_WIDE, self.low) for d in outputs):
            return _WIDE
        if not self._fits(node, precision) or any(quantized.is_dequantize(n) for n in inputs):
            return _WIDE  # what reads integers is computed in integers
        if any(n.meta["val"].layout != torch.strided for n in inputs):
            self.rewriter.skip(node, "it reads a sparse tensor")
            return _WIDE
        mask = self._mask(node)
        if self.low == torch.float16 and mask is not None:
            self.rewriter.skip(node, f"it adds {mask.name}, which may hold numbers beyond fp16 (a mask)")
            return _WIDE
        if precision == "low":
            kept = any(fnmatch.fnmatchcase(name, pattern) for name in _names(node) for pattern in self.keep)
            return _WIDE if kept else self.low
        # A sum with a vector or matrix of the model is fp32 by the rules of type promotion, too.
        sums = computed if ops.kind(node) != "add" else [n for n in inputs if n.meta["val"].dim() > 0]
        low = [n for n in sums if _dtype(n) == self.low]
        return self.low if precision == "follow" and sums and len(low) == len(sums) else _WIDE

    def _mask(self, node: fx.Node) -> fx.Node | None:
        """What *node* adds to its sum of products, if it is in fp32 and may hold numbers beyond the low dtype."""
        name = _ADDED.get(ops.packet(node))
        added = ops.arguments(node)[name] if name else None
        return added if added is not None and _dtype(added) == _WIDE and added not in self.ordinary else None

    def _note_ordinary(self, node: fx.Node) -> None:
        if self._is_ordinary(node):
            self.ordinary.add(node)

    def _is_ordinary(self, node: fx.Node) -> bool:
        """Whether the values of *node* are surely no mask: arithmetic on weights and activations."""
        if node.op == "get_attr":
            tensor = self.rewriter.tensor(node)
            return tensor is not None and tensor.is_floating_point() and _saturated(tensor, self.low) is tensor
        if ops.kind(node) in _ORDINARY:
            return True
        inputs = [n for n in node.all_input_nodes if _floats(n.meta.get("val"))]
        if ops.kind(node) not in _PASSED_ON or not inputs or not self._fits(node, "full"):
            return False
        return all(n in self.ordinary for n in inputs)

    def _fits(self, node: fx.Node, precision: ops.Precision) -> bool:
        """Whether every number and constant of *node* is in the range of the low dtype (a mask of -1e9 is not)."""
        limit = torch.finfo(self.low).max
        kinds = (int, float) if ops.is_pointwise(node) else (float,)  # elsewhere an int is an index or a size
        numbers = [v for v in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(v, kinds)]
        if any(limit < abs(v) < float("inf") for v in numbers):
            return False
        held = [self.rewriter.tensor(n) for n in node.all_input_nodes] if precision == "follow" else []
        return all(torch.equal(t, _saturated(t, self.low)) for t in held if t is not None and t.is_floating_point())

    def _cast(self, value: fx.Node, dtype: torch.dtype, user: fx.Node, *, clamped: bool = False) -> fx.Node:
        """*value* in *dtype*: a new constant for a constant, one cast op for all users of anything else.

        *clamped*: finite numbers stay finite.
        """
        key = (value, dtype, clamped)
        if _dtype(value) == dtype:
            return value
        if key not in self.casts:
            tensor = self.rewriter.tensor(value)
            if tensor is not None:
                self.casts[key] = self.rewriter.constant(f"{value.target}", _saturated(tensor, dtype).to(dtype))
            else:
                place = value.next if value.op == "call_function" else self.rewriter.first_call()
                source = self._clamp(value, dtype, place) if clamped else value
                kind = {"dtype": dtype}
                cast = self.rewriter.call(aten._to_copy.default, (source,), kind, before=place, origin=user)
                self.casts[key] = cast
        return self.casts[key]

    def _clamp(self, value: fx.Node, dtype: torch.dtype, place: fx.Node) -> fx.Node:
        """``_saturated`` as ops."""
        limit = torch.finfo(dtype).max
        within = self.rewriter.call(aten.clamp.default, (value, -limit, limit), before=place)
        infinite = self.rewriter.call(aten.isinf.default, (value,), before=place)
        return self.rewriter.call(aten.where.self, (infinite, value, within), before=place)

    def _refresh(self, node: fx.Node) -> None:
        """Fresh metadata after an input changed its dtype."""
        node.meta["val"] = infer(node, self.rewriter._mode)

    def _restore_outputs(self, node: fx.Node) -> None:
        """Every output in the dtype that the signature promises."""
        program = self.rewriter.program
        wanted = [leaf.dtype for leaf in program.signature.outputs]
        for back in program.signature.writebacks:
            place = program.placeholders[back.input] if back.input is not None else None
            wanted.append(_dtype(place) if place is not None else program.constants[str(back.constant)].dtype)
        results: list[Any] = list(node.args[0])  # type: ignore[arg-type]
        for i, (value, dtype) in enumerate(zip(results, wanted, strict=True)):
            if isinstance(value, fx.Node) and dtype is not None and _dtype(value) != dtype:
                results[i] = self._cast(value, dtype, node)
        node.args = (tuple(results),)


def _saturated(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """*tensor* with finite values beyond the range of *dtype* at its ends; infinities stay."""
    limit = torch.finfo(dtype).max
    if tensor.numel() == 0 or max(abs(float(end)) for end in torch.aminmax(tensor)) <= limit:
        return tensor
    return tensor.clamp(-limit, limit).where(tensor.isfinite(), tensor)


def _names(node: fx.Node) -> list[str]:
    """The name of *node*, and that of its weight."""
    weight = ops.arguments(node).get("weight")
    return [node.name, *([str(weight.target)] if isinstance(weight, fx.Node) and weight.op == "get_attr" else [])]


def _is_body(node: fx.Node) -> bool:
    """Whether *node* stands for a subgraph, which has no value of its own."""
    return node.op == "get_attr" and node.meta.get("val") is None


def _dtype(node: fx.Node | None) -> torch.dtype | None:
    value = node.meta.get("val") if node is not None else None
    return value.dtype if isinstance(value, torch.Tensor) else None


def _floats(value: Any) -> list[torch.dtype]:
    if isinstance(value, torch.Tensor):
        return [value.dtype] if value.dtype.is_floating_point else []
    return [d for v in value for d in _floats(v)] if isinstance(value, (tuple, list)) else []
