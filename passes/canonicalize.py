"""One spelling for each thing, and nothing that does nothing.

    dropout(x), x.detach(), x.clone(), x.to(own dtype), x + 0, x * 1     →   x
    view(view(x, a), b)                                                  →   reshape(x, b)
    permute(permute(x))                                                  →   permute(x), or x
    conv2d(x, w, padding="same")                                         →   conv2d(x, w, padding=[1, 1])
    x.new_zeros(2, 3), torch.ones_like(x)                                →   full([2, 3], 0), a constant
    copy(x, y), which is what x[...] = y leaves                          →   y.to(dtype of x).expand_as(x)
    addmm(b, x, W), x @ W (+ b), W constant                              →   linear(x, Wᵀ, b)

A copy stays where removing it would let an output alias an input or a weight, and where the strides that it makes
are read (as_strided).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt import ops
from fxopt.passbase import Pass, PassContext
from fxopt.rewriter import Rewriter

aten = torch.ops.aten
_RESHAPES = (aten.view.default, aten._unsafe_view.default)
_NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1, "pow": 1}


@dataclasses.dataclass(frozen=True)
class Canonicalize(Pass):
    """Remove no-ops and bring synonyms to one form."""

    name: ClassVar[str] = "canonicalize"

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """One sweep in graph order; a node's inputs are canonical when it is looked at."""
        lent_out = ops.lent_out(rewriter.program.graph)
        for node in rewriter.nodes():
            if node.op != "call_function" or node._erased:
                continue
            if ops.packet(node) == "_assert_tensor_metadata":
                rewriter.program.graph.erase_node(node)
                rewriter.edits += 1
                continue
            kept = None if ctx.training and _acts_in_training(node) else _stands_for(node)
            if kept is not None and not _is_needed_copy(node, lent_out):
                rewriter.replace(node, kept)
                continue
            for rule in _RULES:
                if ctx.training and rule is _matmul_to_linear and _reads_tied(node):
                    continue
                if rule(node, rewriter):
                    break


def _acts_in_training(node: fx.Node) -> bool:
    """Whether *node* does something in training that it does not do in inference."""
    return ops.kind(node) == "dropout" or ops.packet(node) in ("detach", "detach_")


def _reads_tied(node: fx.Node) -> bool:
    """Whether a constant that *node* reads has other readers: training must not part them."""
    return any(n.op == "get_attr" and len(n.users) > 1 for n in node.all_input_nodes)


def _stands_for(node: fx.Node) -> fx.Node | None:
    """The node whose value *node* merely repeats, or None."""
    what = ops.kind(node)
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    x = node.args[0]
    if what in ("identity", "copy") or (what == "dropout" and not ops.is_random(node)):
        return x
    if what in ("cast", "shape", "permute") and _same_type(node, x):
        moved = what == "permute" and not _is_identity_order(node)
        return None if moved else x
    neutral = _NEUTRAL.get(ops.packet(node))
    if neutral is not None and ops.namespace(node) == "aten" and len(node.args) == 2 and _same_type(node, x):
        other = node.args[1]
        rounding = node.kwargs.get("rounding_mode")
        if isinstance(other, (int, float)) and other == neutral and rounding is None:
            return x
    return None


def _same_type(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return False
    sizes = len(x.shape) == len(y.shape) and all(str(p) == str(q) for p, q in zip(x.shape, y.shape, strict=True))
    return sizes and x.dtype == y.dtype and x.device == y.device


def _is_needed_copy(node: fx.Node, lent_out: set[fx.Node]) -> bool:
    """Whether somebody may tell *node* from its input: the caller, by writing to it, or an op that reads strides."""
    copies = ops.packet(node) == "contiguous" or ops.arguments(node).get("copy", False)
    if ops.is_view(node) and not copies:
        return False
    return node in lent_out or ops.layout_is_read(node)


def _order(node: fx.Node) -> list[int] | None:
    """The axis order that a permute or transpose with static axes gives, or None."""
    rank = node.meta["val"].dim()
    order = list(range(rank))
    name = ops.packet(node)
    if name == "permute":
        return [d % rank for d in ops.arguments(node)["dims"]]
    if name == "transpose":
        a = ops.arguments(node)
        i, j = a["dim0"] % rank, a["dim1"] % rank
    elif name == "t" and rank == 2:
        i, j = 0, 1
    else:
        return None
    order[i], order[j] = order[j], order[i]
    return order


def _is_identity_order(node: fx.Node) -> bool:
    order = _order(node)
    return order is not None and order == sorted(order)


def _merge_reshapes(node: fx.Node, rewriter: Rewriter) -> bool:
    """Reshape of a reshape: only the last shape counts. ``view`` becomes ``reshape``, which any layout allows."""
    if ops.packet(node) not in ("view", "_unsafe_view", "reshape") or node.target is aten.view.dtype:
        return False
    source: Any = node.args[0]
    while ops.packet(source) in ("reshape", "flatten", "squeeze", "unsqueeze", "unflatten"):
        source = source.args[0]
    if source is node.args[0] and node.target not in _RESHAPES:
        return False
    new = rewriter.call(aten.reshape.default, (source, node.args[1]), before=node)
    rewriter.replace(node, new)
    return True


def _merge_permutes(node: fx.Node, rewriter: Rewriter) -> bool:
    """permute(permute(x, p), q) = permute(x, [p[i] for i in q])."""
    inner = node.args[0] if ops.kind(node) == "permute" else None
    if not isinstance(inner, fx.Node) or ops.kind(inner) != "permute":
        return False
    first, second = _order(inner), _order(node)
    if first is None or second is None:
        return False
    order = [first[i] for i in second]
    source = inner.args[0]
    assert isinstance(source, fx.Node)
    if order == sorted(order):
        if any(user.op == "output" for user in node.users):
            return False
        rewriter.replace(node, source)
    else:
        rewriter.replace(node, rewriter.call(aten.permute.default, (source, order), before=node))
    return True


def _numeric_padding(node: fx.Node, rewriter: Rewriter) -> bool:
    """String padding in numbers; an odd total goes to the end, as ATen does, through an explicit pad."""
    a = ops.arguments(node) if ops.kind(node) == "conv" and not ops.is_fused(node) else {}
    if not isinstance(a.get("padding"), str):
        return False
    kernel = a["weight"].meta["val"].shape[2:]
    dilation = [*a["dilation"]] * (len(kernel) if len(a["dilation"]) == 1 else 1)
    total = [d * (int(k) - 1) if a["padding"] == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
    x = a["input"]
    if any(t % 2 for t in total):
        sides = [side for t in reversed(total) for side in (0, t % 2)]
        x = rewriter.call(aten.constant_pad_nd.default, (x, sides, 0.0), before=node)
    plain = getattr(aten, ops.packet(node)).default
    args = (x, a["weight"], a["bias"], a["stride"], [t // 2 for t in total], a["dilation"], a["groups"])
    rewriter.replace(node, rewriter.call(plain, args, before=node))
    return True


def _matmul_to_linear(node: fx.Node, rewriter: Rewriter) -> bool:
    """A matmul with a constant matrix on the right is a linear with its transpose (a view, not a copy)."""
    name, a = ops.packet(node), ops.arguments(node) if ops.kind(node) == "matmul" else {}
    if name == "addmm" and a["beta"] == 1 and a["alpha"] == 1:
        x, matrix, bias = a["mat1"], a["mat2"], a["self"]
    elif name in ("mm", "matmul"):
        x, matrix, bias = *node.args[:2], None
    else:
        return False
    weight = rewriter.tensor(matrix)
    if weight is None or weight.dim() != 2 or rewriter.tensor(x) is not None or x.meta["val"].dim() < 2:
        return False
    if bias is not None and (rewriter.tensor(bias) is None or bias.meta["val"].shape != weight.shape[1:]):
        return False
    transposed = rewriter.constant(f"{matrix.target}.t", weight.t())
    rewriter.replace(node, rewriter.call(aten.linear.default, (x, transposed, bias), before=node))
    return True


def _bias_into_linear(node: fx.Node, rewriter: Rewriter) -> bool:
    """linear(x, W) + b = linear(x, W, b) for a constant vector b."""
    if ops.kind(node) != "add" or node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return False
    for linear, bias in (node.args, node.args[::-1]):
        vector = rewriter.tensor(bias)
        if not isinstance(linear, fx.Node) or ops.packet(linear) != "linear" or vector is None or ops.is_fused(linear):
            continue
        a = ops.arguments(linear)
        free = a["bias"] is None and len(linear.users) == 1 and vector.dtype == linear.meta["val"].dtype
        if free and tuple(vector.shape) == (linear.meta["val"].shape[-1],) and _same_type(node, linear):
            rewriter.replace(node, rewriter.call(aten.linear.default, (a["input"], a["weight"], bias), before=node))
            return True
    return False


_FILL = {"new_zeros": 0, "new_ones": 1, "zeros_like": 0, "ones_like": 1, "new_full": None, "full_like": None}


def _factory_without_input(node: fx.Node, rewriter: Rewriter) -> bool:
    """new_zeros(x, s), ones_like(x) and their kin read nothing of x but its type: full(s, value), a constant."""
    value = node.meta.get("val")
    if ops.packet(node) not in _FILL or ops.namespace(node) != "aten" or not isinstance(value, torch.Tensor):
        return False
    fill = _FILL[ops.packet(node)]
    fill = ops.arguments(node)["fill_value"] if fill is None else fill
    if not all(isinstance(size, int) for size in value.shape) or not isinstance(fill, (int, float)):
        return False
    kind = {"dtype": value.dtype, "device": value.device}
    rewriter.replace(node, rewriter.call(aten.full.default, (list(value.shape), fill), kind, before=node))
    return True


def _assigned(node: fx.Node, rewriter: Rewriter) -> bool:
    """copy(x, y) is y in the dtype and size of x; unlike the copy, that has a derivative."""
    if node.target is not aten.copy.default or ops.layout_is_read(node):
        return False
    x, y = node.args[:2]
    if not isinstance(x, fx.Node) or not isinstance(y, fx.Node) or x.meta["val"].device != y.meta["val"].device:
        return False
    result = y
    if x.meta["val"].dtype != y.meta["val"].dtype:
        result = rewriter.call(aten._to_copy.default, (y,), {"dtype": x.meta["val"].dtype}, before=node)
    if not _same_type(node, result):
        result = rewriter.call(aten.expand_as.default, (result, x), before=node)
    if any(user.op == "output" or ops.is_view(user) for user in node.users):
        result = rewriter.call(aten.clone.default, (result,), before=node)
    rewriter.replace(node, result)
    return True


_RULES: tuple[Callable[[fx.Node, Rewriter], Any], ...] = (
    _merge_reshapes,
    _merge_permutes,
    _numeric_padding,
    _matmul_to_linear,
    _bias_into_linear,
    _factory_without_input,
    _assigned,
)
