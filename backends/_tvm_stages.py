"""A function of TVM's loop language, taken apart into the tensors that it computes.

    for i, k in grid(N, K): with sblock("sum"): v_i, v_k = remap("SR", [i, k]); y[v_i] = y[v_i] + x[v_i, v_k]
        →   Stage(buffer=y, axes=[v_i], reduced=[v_k], value=x[v_i, v_k], combine=Add)

What ``relax.transform.FuseTIR`` and ``tvm.te`` make are such loop nests, one for each tensor, in order, without a
schedule. Ours are then written from the stages, not by rewriting the loops.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import TensorLoad
from tvm.s_tir import SBlockRealize

from fxopt.backends._tvm_loops import Buffer, Expr, static


@dataclasses.dataclass
class Stage:
    """One tensor as a function of its indices.

    Attributes:
        name: of the block.
        buffer: where it is stored, at *indices*.
        indices: functions of *axes*.
        axes: index variables of the result.
        extents: how far each of *axes* goes, from 0.
        reduced: index variables that are summed over, or otherwise combined.
        reduced_extents: how far each of those goes.
        value: one term of the reduction, or the element where nothing is reduced.
        combine: Add, Max or Min of ``tvm.tirx``; None where nothing is reduced.
        init: what the reduction starts from.
        kernel: what ``_tvm_kernels`` annotated it with; empty for anything else.
    """

    name: str
    buffer: Buffer
    indices: Sequence[Expr]
    axes: Sequence[Expr]
    extents: Sequence[Expr]
    reduced: Sequence[Expr]
    reduced_extents: Sequence[Expr]
    value: Expr
    combine: Any = None
    init: Expr = None
    kernel: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether element i of the buffer is stored in iteration i: no scatter, no transposition of the store."""
        return len(self.indices) == len(self.axes) and all(
            i.same_as(a) for i, a in zip(self.indices, self.axes, strict=True)
        )


def stages(function: Any) -> list[Stage] | None:
    """The stages of *function* in order; None where it is not made of such."""
    body = function.body
    if not isinstance(body, SBlockRealize) or body.block.iter_vars:
        return None
    nests = body.block.body
    nests = list(nests) if isinstance(nests, tirx.SeqStmt) else [nests]
    found = [_stage(nest) for nest in nests]
    return None if any(stage is None for stage in found) else [stage for stage in found if stage is not None]


def _stage(nest: Any) -> Stage | None:
    loops = []
    while isinstance(nest, tirx.For):
        loops.append(nest)
        nest = nest.body
    if not isinstance(nest, SBlockRealize):
        return None
    bound = {loop.loop_var: loop.extent for loop in loops}
    made = nest.block
    axes: list[list[Any]] = [[], []]
    extents: list[list[Any]] = [[], []]
    for variable, value in zip(made.iter_vars, nest.iter_values, strict=True):
        if variable.iter_type not in (tirx.IterVar.DataPar, tirx.IterVar.CommReduce):
            return None
        extent = bound.get(value) if isinstance(value, tirx.Var) else tirx.IntImm("int64", 1)
        if extent is None or (not isinstance(value, tirx.Var) and static(value) != 0):
            return None
        kind = int(variable.iter_type == tirx.IterVar.CommReduce)
        axes[kind].append(variable.var)
        extents[kind].append(extent)
    if not isinstance(made.body, tirx.BufferStore) or made.alloc_buffers or made.match_buffers:
        return None
    stored = made.body
    stage = Stage(
        made.name_hint, stored.buffer, list(stored.indices), axes[0], extents[0], axes[1], extents[1], stored.value
    )
    if not stage.indices and not stage.reduced:  # a scalar, to which TVM gives an index of its own
        stage.axes, stage.extents = [], []
    kernel = made.annotations.get("fxopt.kernel")
    stage.kernel = dict(kernel) if kernel is not None else {}
    return _with_reduction(stage, made.init)


def _with_reduction(stage: Stage, init: Any) -> Stage | None:
    if not stage.reduced:
        return stage if init is None else None
    if not isinstance(init, tirx.BufferStore) or not isinstance(stage.value, tirx.Add | tirx.Max | tirx.Min):
        return None
    combined = stage.value
    terms = [combined.a, combined.b]
    own = [t for t in terms if _is_load_of(t, stage.buffer) and _same(t.indices, stage.indices)]
    if len(own) != 1:
        return None
    stage.combine = type(combined)
    stage.value = terms[1] if own[0].same_as(terms[0]) else terms[0]
    stage.init = init.value
    if stage.combine is not tirx.Add and isinstance(stage.init, tirx.FloatImm):  # TVM starts at the largest number
        infinity = float("inf") if stage.combine is tirx.Min else float("-inf")
        stage.init = tirx.FloatImm(str(stage.init.ty.dtype), infinity)
    return stage


def _is_load_of(value: Any, buffer: Buffer) -> bool:
    return isinstance(value, TensorLoad) and bool(value.source.same_as(buffer))


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(
        tvm_ffi.structural_equal(x, y, map_free_vars=False) for x, y in zip(a, b, strict=True)
    )
