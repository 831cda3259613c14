"""Constant weights in the layout that the kernels read, and how an expression of stages finds them there.

    float    [K, N]         →   blocks of columns, each [K][columns]
    bytes    [outer, run, N] →   blocks of columns, each [outer·⌈run/4⌉][columns][4], for dot products of four bytes

The last block is as narrow as it is, rounded up to vectors. All blocks follow each other in one flat array.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.ir import GenericConst

from fxopt.backends._tvm_tiles import Tile

GROUP = 4  # bytes that one lane of a dot product takes at once


def constant(expr: Any) -> np.ndarray[Any, Any] | None:
    """The value of a constant of the graph; None for anything else."""
    held = isinstance(expr, GenericConst) and isinstance(expr.value, tvm.runtime.Tensor)
    return array(expr.value) if held else None


def array(tensor: Any) -> np.ndarray[Any, Any]:
    """*tensor* of TVM as an array, without a copy where numpy knows its dtype."""
    try:
        return np.from_dlpack(tensor)
    except (BufferError, RuntimeError, TypeError):  # bfloat16
        copied: np.ndarray[Any, Any] = tensor.numpy()
        return copied


def number(value: int) -> Any:
    """*value* as an int64 expression."""
    return tirx.IntImm("int64", value)


def pack(weights: np.ndarray[Any, Any], tile: Tile) -> np.ndarray[Any, Any]:
    """*weights* [K, N] as blocks of columns, each of K rows: [block][K][columns], flat; the last block is narrower."""
    depth, columns = weights.shape
    whole = columns // tile.columns * tile.columns
    parts = [weights[:, :whole].reshape(depth, -1, tile.columns).transpose(1, 0, 2).reshape(-1)]
    if whole < columns:
        width = -(-(columns - whole) // tile.lanes) * tile.lanes
        last = np.zeros((depth, width), weights.dtype)
        last[:, : columns - whole] = weights[:, whole:]
        parts.append(last.reshape(-1))
    return np.ascontiguousarray(np.concatenate(parts))


def packed_at(tile: Tile, columns: int, depth: int, group: int = 1) -> Callable[[Any, Any], Any]:
    """Where element (k, n) of packed weights of *depth* rows lies, as an expression; rows in groups of *group*."""
    whole = columns // tile.columns
    narrow = -(-(columns % tile.columns) // tile.lanes) * tile.lanes

    def at(k: Any, n: Any) -> Any:
        block = tirx.FloorDiv(n, number(tile.columns))
        if not narrow:
            width: Any = number(tile.columns)
        elif whole == 0:
            width = number(narrow)
        else:
            width = tirx.Select(tirx.LT(block, number(whole)), number(tile.columns), number(narrow))
        column = tirx.FloorMod(n, number(tile.columns))
        if group == 1:
            return block * (tile.columns * depth) + k * width + column
        row = tirx.FloorDiv(k, number(group)) * width + column
        return block * (tile.columns * depth) + row * group + tirx.FloorMod(k, number(group))

    return at


def pack_bytes(weights: np.ndarray[Any, Any], tile: Tile) -> np.ndarray[Any, Any]:
    """*weights* s8[outer, run, N] as blocks of columns: [block][outer·⌈run/4⌉][columns][4], flat."""
    outer, run, columns = weights.shape
    filled = np.zeros((outer, -(-run // GROUP) * GROUP, columns), weights.dtype)
    filled[:, :run] = weights
    depth = filled.shape[0] * filled.shape[1] // GROUP
    grouped = filled.reshape(depth, GROUP, columns).transpose(0, 2, 1)  # [K/4, N, 4]
    parts = []
    for start in range(0, columns, tile.columns):
        part = grouped[:, start : start + tile.columns]
        width = -(-part.shape[1] // tile.lanes) * tile.lanes
        block = np.zeros((depth, width, GROUP), weights.dtype)
        block[:, : part.shape[1]] = part
        parts.append(block.reshape(-1))
    return np.concatenate(parts)


def annotation(tile: Tile, *, flat: bool, packed: bool = True, lanewise: bool = False, dot: str = "") -> dict[str, Any]:
    """How a stage is to be computed by the kernel, as an annotation of its block.

    Args:
        tile: sizes.
        flat: all indices but the last are rows, one after the other in memory.
        packed: the right operand lies packed.
        lanewise: the left operand depends on the column as well.
        dot: what multiplies bytes, as in ``Machine.dot``; "" for numbers one by one.
    """
    how = {**dataclasses.asdict(tile), "flat": int(flat), "packed": int(packed), "lanewise": int(lanewise), "dot": dot}
    return {"fxopt.kernel": how}
