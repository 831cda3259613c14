"""Keeps a program right when its 4-D values come in channels_last although its ops were captured for contiguous ones.

view(x, s)          →  reshape(x, s)            a view of a channels_last tensor may need a copy
as_strided(x, ...)  →  as_strided(contiguous(x), ...)   whatever reads strides or raw memory gets what it expects
return y            →  return contiguous(y)     the caller sees the strides that eager gives

So a program is a function of values: the layout of an input does not matter, and outputs have the strides that eager
gives for the example inputs, whatever layout those of a call have. Where a model looks at strides itself (as_strided,
custom ops), it sees those of the example inputs, for which it was captured.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._prims_common import is_contiguous_or_false

from fxopt import ops
from fxopt.backends._torch_memory import Aliases
from fxopt.program import Program

aten = torch.ops.aten

_AS_RESHAPE = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.view_as.default: aten.reshape_as.default,
}
_READS_STRIDES = {"as_strided", "view_as_complex", "sym_stride", "stride", "sym_storage_offset", "as_strided_scatter"}
_ANY_LAYOUT = {"aten", "fxopt", "mkldnn", "onednn", "quantized_decomposed"}


def settle(program: Program) -> None:
    """Make *program* independent of the layout of its values, and its outputs laid out as in eager."""
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _AS_RESHAPE:
            node.target = _AS_RESHAPE[node.target]
        elif _reads_layout(node):
            for value in node.all_input_nodes:
                if value.op != "get_attr":  # a constant is as it was
                    node.replace_input_with(value, _laid_out(value, node))
    _settle_outputs(program)


def _reads_layout(node: fx.Node) -> bool:
    """Whether the result of *node* depends on the strides of its arguments (or, with random numbers, their order)."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return isinstance(target, torch._ops.HigherOrderOperator)
    if ops.namespace(node) not in _ANY_LAYOUT:
        return True
    return ops.packet(node) in _READS_STRIDES or target is aten.view.dtype or ops.is_random(node)


def _laid_out(value: fx.Node, user: fx.Node) -> fx.Node:
    """*value* with the order of strides that it had at capture, where its memory had no gaps then."""
    fake = value.meta.get("val")
    if not isinstance(fake, torch.Tensor) or fake.layout != torch.strided or fake.dim() < 2:
        return value

    def call(target: torch._ops.OpOverload, *args: object, **kwargs: object) -> fx.Node:
        with value.graph.inserting_before(user):
            node = value.graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
        node.meta = dict(value.meta)
        return node

    if is_contiguous_or_false(fake):
        return call(aten.contiguous.default, value)
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(fake.dim())
    if any(not isinstance(size, int) for size in (*fake.shape, *fake.stride())):
        return value
    if layout is not None and fake.is_contiguous(memory_format=layout):
        return call(aten.contiguous.default, value, memory_format=layout)
    order = sorted(range(fake.dim()), key=fake.stride().__getitem__, reverse=True)
    if not fake.permute(order).is_contiguous():
        return value
    back = [order.index(d) for d in range(fake.dim())]
    return call(aten.permute.default, call(aten.contiguous.default, call(aten.permute.default, value, order)), back)


def _settle_outputs(program: Program) -> None:
    """Lay outputs out as eager does, and cut those off that the write-back of a mutated tensor would change."""
    aliases = Aliases(program.graph)
    for node in program.graph.nodes:
        aliases.add(node)
    mutated = _mutated(program)
    output = program.output
    results = list(output.args[0])  # type: ignore[arg-type]
    for i, value in enumerate(results):
        if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
            continue
        if aliases.roots[value] & mutated:
            with program.graph.inserting_before(output):
                results[i] = program.graph.call_function(aten.clone.default, (value,))
                results[i].meta = dict(value.meta)
        elif value.op == "call_function":
            results[i] = _laid_out(value, output)
            if results[i] is value:
                _lay_out_base(value)
    output.args = (tuple(results),)


def _lay_out_base(view: fx.Node) -> None:
    """For a view with gaps, such as a slice: give what it is a view of the strides of capture."""
    while ops.is_view(view):
        base = view.args[0] if view.args else None
        if not isinstance(base, fx.Node) or base.op != "call_function":
            return
        laid_out = _laid_out(base, view)
        if laid_out is not base:
            view.replace_input_with(base, laid_out)
            return
        view = base


def _mutated(program: Program) -> set[fx.Node]:
    names = {w.constant for w in program.signature.writebacks}
    inputs = {w.input for w in program.signature.writebacks}
    holders = [node for i, node in enumerate(program.placeholders) if i in inputs]
    return {*holders, *(n for n in program.graph.find_nodes(op="get_attr") if n.target in names)}
