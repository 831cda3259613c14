"""Embedding tables as int8, one scale for each row: a row becomes floats when it is looked up.

    embedding(@w, ids)   →   float(embedding(q, ids)) · embedding(@scale, ids)        q = quantize(@w) by row

Nothing of it needs a kernel: any engine gathers integers. In a language model it saves what its linears save. A table
that is the weight of a linear as well, as in models that tie them, is stored once.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from fxopt import ops, quantized
from fxopt.passes.insert_fake_quant.grid import Grid
from fxopt.rewriter import Rewriter

aten = torch.ops.aten
_SMALL = 2**13  # elements; it would save less than it adds to the graph
_LEAST_SNR = 36.0  # decibels; rows of a normal distribution have 43, rows with outlier columns less


def refusal(rewriter: Rewriter, node: fx.Node, grid: Grid) -> str | None:
    """Why the table of the embedding *node* stays in float, or None."""
    table = rewriter.tensor(ops.arguments(node)["weight"])
    if table is None:
        return "its table is computed, not a constant"
    if table.dtype is not torch.float32 or node.meta["val"].dtype is not torch.float32:
        return f"its table is {table.dtype}; only float32 is quantized"
    if table.numel() < _SMALL:
        return f"a table of fewer than {_SMALL:,} numbers"
    rows = table.detach().float()
    scale = _scales(rows, grid)[:, None]
    error = ((rows / scale).round() * scale - rows).square().sum()
    snr = 10 * math.log10(float(rows.square().sum()) / max(float(error), 1e-30))
    if not snr >= _LEAST_SNR:
        return f"its rows have outliers: int8 would leave {snr:.0f} dB, fewer than {_LEAST_SNR:.0f}"
    return None


def insert(rewriter: Rewriter, node: fx.Node, grid: Grid) -> None:
    """Look up integers, and the scale of each, in place of the floats of *node*."""
    a = ops.arguments(node)
    weight, indices = a["weight"], a["indices"]
    table = rewriter.tensor(weight)
    assert table is not None
    scales = _scales(table.detach().float(), grid)
    by_row = rewriter.constant(f"{weight.target}_scale", scales)
    zeros = rewriter.constant(f"{weight.target}_zero_point", torch.zeros(len(scales), dtype=torch.int64))
    how = (by_row, zeros, 0, grid.qmin, grid.qmax, grid.dtype)
    q = rewriter.call(quantized.QUANTIZE_CHANNEL, (weight, *how), before=node)
    column = rewriter.constant(f"{weight.target}_scale_column", scales[:, None].contiguous())
    integers = rewriter.call(aten.embedding.default, (q, indices), before=node)
    floats = rewriter.call(aten._to_copy.default, (integers,), {"dtype": torch.float32}, before=node)
    scale = rewriter.call(aten.embedding.default, (column, indices), before=node)
    rewriter.replace(node, rewriter.call(aten.mul.Tensor, (floats, scale), before=node))


def _scales(rows: torch.Tensor, grid: Grid) -> torch.Tensor:
    extent = rows.abs().amax(1)
    return torch.as_tensor(grid.parameters(-extent, extent)[0], dtype=torch.float32)
