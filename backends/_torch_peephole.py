"""Small exact rewrites for what ATen's CPU kernels do well.

layer_norm(x.to(fp32)).to(bf16)       →   layer_norm(x)      the kernel computes in fp32 inside, one pass, not three
attention(q, k, v, mask=all true)     →   attention(q, k, v)
adaptive_avg_pool2d(conv(...), 1)     →   avg_pool2d(conv(...), [H, W])     4 µs in channels_last instead of 8
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from fxopt import ops
from fxopt.backends._torch_memory import same_sizes
from fxopt.backends._torch_onednn import is_channels_last
from fxopt.program import Program

aten = torch.ops.aten

# Kernels that take bf16 and fp16 input, with fp32 weights where they have any, and compute in fp32 inside.
_WIDE_INSIDE = {aten.layer_norm.default, aten.group_norm.default, aten.softmax.int}
_LOW = (torch.bfloat16, torch.float16)
_MOST_PIXELS = 1024  # of a pooling window: above it, avg_pool2d is the slower one


def rewrite(program: Program) -> None:
    """Apply every rule once to every node of *program*."""
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _WIDE_INSIDE:
            _drop_casts(node)
        elif node.target is aten.scaled_dot_product_attention.default:
            _drop_mask(program, node)
        elif node.target is aten.adaptive_avg_pool2d.default:
            _pool_all(node)
    program.remove_dead()


def _drop_casts(node: fx.Node) -> None:
    """Take the low-precision input itself, where the result goes nowhere but back into that precision."""
    up = node.args[0]
    if not isinstance(up, fx.Node) or not _is_cast(up) or ops.arguments(node).get("dtype") is not None:
        return
    source = up.args[0]
    assert isinstance(source, fx.Node)
    dtype = source.meta["val"].dtype
    if dtype not in _LOW or not source.meta["val"].is_cpu or node.meta["val"].dtype != torch.float32:
        return
    path = list(_until_casts(node, dtype))
    if None in path:
        return
    node.replace_input_with(up, source)
    for step in path:
        assert step is not None
        if _is_cast(step):
            step.replace_all_uses_with(step.args[0])  # type: ignore[arg-type]
        else:
            step.meta["val"] = step.meta["val"].to(dtype)


def _until_casts(node: fx.Node, dtype: torch.dtype) -> Iterator[fx.Node | None]:
    """*node*, the views of it, and the casts to *dtype* that read them; None for any other use."""
    yield node
    for user in node.users:
        if _is_cast(user) and user.meta["val"].dtype == dtype:
            yield user
        elif ops.kind(user) in ("shape", "permute") and ops.packet(user) != "view_as":
            yield from _until_casts(user, dtype)
        else:
            yield None


def _is_cast(node: fx.Node) -> bool:
    """Whether *node* changes the dtype of its one input and nothing else."""
    plain = node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"}
    return plain or (node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs)


def _drop_mask(program: Program, node: fx.Node) -> None:
    """Masks that hide nothing come from models that build one for padding; they keep the kernel off its fast path."""
    query, mask = node.args[0], ops.arguments(node)["attn_mask"]
    if not isinstance(mask, fx.Node) or mask.op != "get_attr" or not _is_fixed(program, mask):
        return
    value = program.constants[str(mask.target)]
    assert isinstance(query, fx.Node)
    broadcasts = not same_sizes(query.meta["val"][..., 0], node.meta["val"][..., 0])
    if value.dtype == torch.bool and value.numel() and not broadcasts and bool(value.all()):
        node.replace_input_with(mask, None)  # type: ignore[arg-type]


def _is_fixed(program: Program, node: fx.Node) -> bool:
    return all(back.constant != node.target for back in program.signature.writebacks)


def _pool_all(node: fx.Node) -> None:
    x, size = node.args
    if not isinstance(x, fx.Node) or not is_channels_last(x) or tuple(size) != (1, 1):  # type: ignore[arg-type]
        return
    height, width = x.meta["val"].shape[-2:]
    if isinstance(height, int) and isinstance(width, int) and 0 < height * width <= _MOST_PIXELS:
        node.target, node.args = aten.avg_pool2d.default, (x, (height, width))
