"""Which tensors of a function are stored, and how values are computed where they are used.

A fused function is a chain of stages (see _tvm_stages). Reductions, kernels and outputs are *roots*: they are stored.
Everything else is computed where it is read, so that bias, activation and residual cost no memory traffic.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tvm_ffi
from tvm import tirx

from fxopt.backends._tvm_expressions import branches_on, is_vector_code, loads, reads_in_place, rewrite, weight
from fxopt.backends._tvm_loops import Buffer, Expr, Stmt, flat_view, index, load, static, store, unravel
from fxopt.backends._tvm_stages import Stage

HEAVY, LIGHT = 2000, 20
"""Weights of what is cut, and of what is no reason for it: mish has 400, silu of silu as well."""

Hook = Callable[[Sequence[Expr]], Expr]


class Lowering:
    """The stages of one function, and where their results are.

    Attributes:
        stages: in order.
        producer: the stage of each buffer that this function computes.
        outputs: buffers of the caller that stages write.
        binds: whether values that are used twice may be variables of vector loops.
        views: arrays of one dimension over buffers, and the statements that declare them.
        places: for a stored intermediate, the buffer that holds it and how many leading indices it does not have.
    """

    def __init__(self, function: Any, stages: Sequence[Stage]) -> None:
        self.stages = stages
        self.producer = {stage.buffer: stage for stage in stages}
        params = set(function.params)
        self.outputs = [stage.buffer for stage in stages if stage.buffer in params]
        self.places: dict[Buffer, tuple[Buffer, int]] = {}
        self.views: dict[Buffer, tuple[Buffer, Stmt]] = {}
        self._rows: list[tuple[list[Expr], list[Expr], Expr]] = []
        self.binds = all(is_vector_code(s.value) and (s.kernel or reads_in_place(s.value)) for s in stages)
        self._read = {stage.buffer: [b for b, _ in loads(stage.value)] for stage in stages}
        self.reads = Counter(b for read in self._read.values() for b in read)
        self.readers: dict[Buffer, list[Stage]] = {}
        for stage in stages:
            for buffer in dict.fromkeys(self._read[stage.buffer]):
                self.readers.setdefault(buffer, []).append(stage)
        self._reduced = self._read_by_reductions()
        self._stored = {stage.buffer for stage in stages if self._is_root(stage)}
        self._store_what_is_heavy()

    def _store_what_is_heavy(self) -> None:
        """Cut chains of functions, the code of which would grow with each of them by a factor."""
        weights: dict[Buffer, int] = {}

        def of_load(buffer: Buffer) -> int:
            return 1 if self.is_stored(buffer) else weights[buffer]

        for stage in self.stages:
            if weight(stage.value, of_load) > HEAVY:
                self._stored.update(b for b in self._read[stage.buffer] if b in weights and weights[b] > LIGHT)
            weights[stage.buffer] = weight(stage.value, of_load)

    def _is_root(self, stage: Stage) -> bool:
        readers = self.readers.get(stage.buffer, [])
        if stage.buffer in self.outputs or stage.combine is not None or any(r.kernel for r in readers):
            return True
        if len(readers) > 1 and any(reader.combine is not None for reader in readers):
            return True
        # A reduction would decide for each of its terms what to read.
        return stage.buffer in self._reduced and bool(stage.axes) and branches_on(stage.value, stage.axes[-1])

    def _read_by_reductions(self) -> set[Buffer]:
        """What reductions read, directly or not."""
        found: set[Buffer] = set()
        for stage in reversed(self.stages):
            if stage.combine is not None or stage.buffer in found:
                found.update(self._read[stage.buffer])
        return found

    def is_stored(self, buffer: Buffer) -> bool:
        """Whether *buffer* is memory: of the caller, or of a root."""
        return buffer not in self.producer or buffer in self._stored

    def fuse(self, stage: Stage) -> Stage:
        """The root that *stage*, a reduction or kernel, can finish elementwise; then *stage* is not stored."""
        roots = [root for root in self.stages if root is not stage and root.buffer in self._stored]
        found = [root for root in roots if stage.buffer in self.sources(root)]
        if stage.buffer in self.outputs or len(found) != 1:
            return stage
        [last] = found
        if last.combine is not None or not last.is_plain or len(last.axes) != len(stage.axes):
            return stage
        for indices in self.sources(last)[stage.buffer]:
            if not all(_is(i, a) for i, a in zip(indices, last.axes, strict=True)):
                return stage
        if not all(_equal(x, y) for x, y in zip(stage.extents, last.extents, strict=True)):
            return stage
        before = {s.buffer for s in self.stages[: self.stages.index(stage)]}
        if any(b in self.producer and b not in before for b in self.sources(last) if not _is(b, stage.buffer)):
            return stage
        self._stored.discard(stage.buffer)
        return last

    def sources(self, root: Stage) -> dict[Buffer, list[list[Expr]]]:
        """Every stored buffer that *root* reads, directly or not, with the indices of each read, of its axes."""
        found: dict[Buffer, list[list[Expr]]] = {}

        def note(buffer: Buffer, indices: list[Expr]) -> Expr:
            if self.is_stored(buffer):
                found.setdefault(buffer, []).append(indices)
                return tirx.BufferLoad(buffer, indices)
            stage = self.producer[buffer]
            return rewrite(stage.value, dict(zip(stage.axes, indices, strict=True)), note)

        rewrite(root.value, {}, note)
        return found

    def row(self, number: Expr, extents: Sequence[Expr]) -> list[Expr]:
        """Indices of element *number* of a tensor of *extents*.

        Tensors with these leading dimensions are then read and written at *number* itself, without a division.
        """
        indices = unravel(number, extents)
        if len(indices) > 1:
            self._rows.append((indices, list(extents), number))
        return indices

    def _flat(self, buffer: Buffer, indices: Sequence[Expr]) -> tuple[Buffer, Sequence[Expr]] | None:
        """Element *indices* of *buffer* in its view of one dimension, if its leading indices are those of a row."""
        for known, extents, number in reversed(self._rows):
            width = len(indices) - len(known)
            if not 0 <= width <= 1 or not all(_is(i, j) for i, j in zip(indices, known, strict=False)):
                continue
            if not all(_equal(x, y) for x, y in zip(buffer.shape, extents, strict=False)):
                continue
            if buffer not in self.views:
                self.views[buffer] = flat_view(buffer, f"{buffer.name}_flat")
            at = number * index(buffer.shape[-1]) + indices[-1] if width else number
            return self.views[buffer][0], [at]
        return None

    def flat_at(self, buffer: Buffer, indices: Sequence[Expr]) -> tuple[Buffer, Expr]:
        """Element *indices* of *buffer*, which is no intermediate of a row, in its view of one dimension."""
        found = self._flat(buffer, indices)
        if found is not None:
            return found[0], found[1][0]
        if buffer not in self.views:
            self.views[buffer] = flat_view(buffer, f"{buffer.name}_flat")
        number = index(0)
        for extent, i in zip(buffer.shape, indices, strict=True):
            number = number * index(extent) + i
        return self.views[buffer][0], number

    def memory(self, buffer: Buffer, indices: Sequence[Expr]) -> tuple[Buffer, Sequence[Expr]]:
        """Where element *indices* of *buffer* is."""
        flat = self._flat(buffer, indices) if buffer not in self.places else None
        if flat is not None:
            return flat
        place, dropped = self.places.get(buffer, (buffer, 0))
        left = indices[dropped:]
        return place, left or [tirx.IntImm("int64", 0)] * len(place.shape)


class Point:
    """Values at one index; those that are used more than once are bound to a variable.

    Attributes:
        statements: the bindings, to stand before what uses the values.
    """

    def __init__(self, lowering: Lowering, hooks: Mapping[Buffer, Hook] | None = None) -> None:
        self.statements: list[Stmt] = []
        self._lowering = lowering
        self._hooks = hooks or {}
        self._bound: list[tuple[Buffer, list[Expr], Expr]] = []
        self._guarded = 0

    def value(self, expr: Expr, variables: Mapping[Expr, Expr]) -> Expr:
        """*expr* with its index *variables* replaced."""
        return rewrite(expr, variables, self._on_load, self._guard)

    def _on_load(self, buffer: Buffer, indices: list[Expr]) -> Expr:
        if buffer in self._hooks:
            return self._hooks[buffer](indices)
        if self._lowering.is_stored(buffer):
            return load(*self._lowering.memory(buffer, indices))
        stage = self._lowering.producer[buffer]
        variables = dict(zip(stage.axes, indices, strict=True))
        if self._guarded or not self._lowering.binds or self._lowering.reads[buffer] < 2:
            return self.value(stage.value, variables)
        for other, at, bound in self._bound:
            if other.same_as(buffer) and all(_equal(x, y) for x, y in zip(at, indices, strict=True)):
                return bound
        variable = tirx.Var(stage.name, str(buffer.dtype))
        self.statements.append(tirx.Bind(variable, self.value(stage.value, variables)))
        self._bound.append((buffer, indices, variable))
        return variable

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """In a branch nothing is bound: it might read out of bounds where the branch is not taken."""
        self._guarded += 1
        try:
            yield
        finally:
            self._guarded -= 1


def finish(lowering: Lowering, root: Stage, indices: Sequence[Expr], hooks: Mapping[Buffer, Hook]) -> list[Stmt]:
    """Store element *indices* of *root*, with values of *hooks* for the buffers that are in registers."""
    point = Point(lowering, hooks)
    if root.buffer in hooks:
        value = hooks[root.buffer](indices)
    else:
        value = point.value(root.value, dict(zip(root.axes, indices, strict=True)))
    buffer, at = lowering.memory(root.buffer, indices)
    return [*point.statements, store(buffer, value, at)]


def _is(a: Expr, b: Expr) -> bool:
    return bool(a.same_as(b))


def _equal(a: Expr, b: Expr) -> bool:
    if static(a) is not None or static(b) is not None:
        return static(a) == static(b)
    return bool(tvm_ffi.structural_equal(a, b, map_free_vars=False))
