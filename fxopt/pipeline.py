"""The ordered list of passes for a target, and the loop that runs it: check, rewrite, verify, keep or undo.

``full_pipeline`` is the compiler at a glance. What the user lists is completed with the exact passes that every
target wants: the graph is cleaned before anything else looks at it, and fusion waits until the weights are final.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxopt import dump as fxir
from fxopt import locate, ops, verify
from fxopt.errors import FxoptError, InputError, PassError, PreconditionError, VerifyError
from fxopt.notice import LOG
from fxopt.passbase import Pass, PassContext
from fxopt.program import Program
from fxopt.report import PassRecord
from fxopt.rewriter import Rewriter

# Before everything: one spelling for each thing, so that later passes have one pattern to match.
FIRST = (
    "canonicalize",  # functional names, no dropout, no no-ops, no redundant views and casts
    "common-subexpressions",  # what is computed twice is computed once
    "recognize-activations",  # gelu and its kin, where the model spells them out in arithmetic
    "fold-constants",  # what depends on constants alone is computed now
)
# After pruning and factorisation (they change weights), before quantization and casts (they freeze them).
LAST = (
    "fuse-conv-bn-relu",  # conv/linear swallow batch_norm, activation and residual add
    "merge-linears",  # linears over one input (q/k/v) become one
)


def full_pipeline(listed: Sequence[Pass], find: Callable[[str], type[Pass]]) -> list[Pass]:
    """*listed* completed with what it brings along, and with the exact passes of FIRST and LAST; none of them twice.

    Raises:
        PreconditionError: *listed* is in an order that cannot work; the message says why.
    """
    check_order(listed)
    listed = with_companions(listed, find)
    check_order(listed)
    named = {p.name for p in listed}
    leading = {p.name: p for p in itertools.takewhile(lambda p: p.name in FIRST, listed)}  # they take their own places
    rest = listed[len(leading) :]
    passes = [leading.get(name) or find(name)() for name in FIRST if name in leading or name not in named] + rest
    for name in reversed(LAST):  # a pass that wants the last of them before it gets all of them before it
        if name not in named:
            missing = find(name)()
            passes.insert(_place(missing, passes), missing)
    check_order(passes)
    return passes


def with_companions(listed: Sequence[Pass], find: Callable[[str], type[Pass]]) -> list[Pass]:
    """*listed* with what each of them brings along, none of them twice."""
    named, passes, final = {p.name for p in listed}, list[Pass](), list[Pass]()
    for one in listed:
        before, after = one.companions()
        for names, place in ((before, passes), (after, final)):
            place.extend(find(name)() for name in names if name not in named)
            named.update(names)
        passes.append(one)
    return passes + final


def _place(missing: Pass, passes: Sequence[Pass]) -> int:
    """Index of the first pass that wants *missing* before it, or the end."""
    wanting = (i for i, p in enumerate(passes) if missing.name in p.runs_after or p.name in missing.runs_before)
    return next(wanting, len(passes))


def check_order(passes: Sequence[Pass]) -> None:
    """Raises PreconditionError if a pass stands before one that it must come after."""
    for i, early in enumerate(passes):
        for late in passes[i + 1 :]:
            if late.name in early.runs_after or early.name in late.runs_before:
                order = " → ".join(p.name for p in passes)
                without = f", or leave {early.name} out: it runs by itself" if early.name in (*FIRST, *LAST) else ""
                raise PreconditionError(
                    f"{early.name} cannot run before {late.name}: {_why(early, late)}. List {late.name} before "
                    f"{early.name}{without}. Given order: {order}"
                )


def _why(early: Pass, late: Pass) -> str:
    rule = f"{early.name} declares runs_after {late.name}"
    return rule if late.name in early.runs_after else f"{late.name} declares runs_before {early.name}"


@dataclasses.dataclass(frozen=True)
class State:
    """A program on its way through the pipeline.

    Attributes:
        program: as it is now.
        reference: flat outputs that the next exact pass is compared with.
        records: what each pass did so far.
    """

    program: Program
    reference: list[Any]
    records: list[PassRecord]


@dataclasses.dataclass
class Pipeline:
    """Runs passes over a program.

    Attributes:
        ctx: what passes may look at.
        reference: flat eager outputs on ``ctx.inputs``; exact passes are compared with it until a lossy one ran.
        check: verify after each pass.
        folder: where to write a dump after each pass, or None.
        progress: called with each pass before it runs.
    """

    ctx: PassContext
    reference: Sequence[Any]
    check: bool = True
    folder: str | os.PathLike[str] | None = None
    progress: Callable[[str], None] = lambda name: None

    def run(self, program: Program, passes: Sequence[Pass]) -> tuple[Program, list[PassRecord]]:
        """The rewritten program and what each pass did. *program* itself is left as it is.

        Raises:
            PassError: a pass failed. The message names the pass and those before it, ``error.dump`` holds the graph
                that was kept. InputError: calibration data do not fit.
        """
        state = self.advance(self.start(program), passes)
        return state.program, state.records

    def start(self, program: Program) -> State:
        """*program* as captured, checked against the model.

        Raises:
            VerifyError: it does not compute what the model does.
        """
        self._dump(program, 0, "capture")
        return State(program, self._check_capture(program), [])

    def advance(self, state: State, passes: Sequence[Pass]) -> State:
        """*state* after *passes*; it is left as it is itself, so that it can be gone on from in another way.

        Raises:
            PassError: as for :meth:`run`.
        """
        program, reference, records = state.program, state.reference, list(state.records)
        for index, one in enumerate(passes, start=len(records) + 1):
            self.progress(one.name)
            try:
                program, record, reference = self._step(one, program, reference)
            except InputError:  # the user's calibration data; it says which batch, and no pass is to blame
                raise
            except FxoptError as error:
                raise self._failed(one, error, records, program) from error
            except Exception as error:
                wrapped = PassError(f"{type(error).__name__}: {error}")
                raise self._failed(one, wrapped, records, program) from error
            records.append(record)
            self._dump(program, index, one.name)
        return State(program, reference, records)

    def _check_capture(self, program: Program) -> list[Any]:
        """The outputs that passes are held to, writebacks included: the graph as captured answers like the model."""
        answered = verify.run(program, self.ctx.inputs)
        if any(ops.is_random(n) for n in program.graph.nodes):
            return answered  # another draw than the model's own; passes keep the order of random ops
        difference = verify.compare(self.reference, answered[: len(self.reference)])
        if self.check and not difference.within:
            name = program.signature.outputs[difference.where].name
            raise VerifyError(
                f"the captured graph does not compute what the model does: output {name!r}, {difference}. Usual "
                "causes: Python state or randomness in the model, or another path in eval than under tracing (for "
                "nn.MultiheadAttention: torch.backends.mha.set_fastpath_enabled(False))"
            )
        return [*self.reference, *answered[len(self.reference) :]]

    def _step(self, one: Pass, before: Program, reference: list[Any]) -> tuple[Program, PassRecord, list[Any]]:
        """Run one pass on a copy; what it leaves is returned only when it holds."""
        start = time.perf_counter()
        after = before.copy()
        rewriter = Rewriter(after)
        one.run(rewriter, self.ctx)
        after.remove_dead()
        difference = None
        if self.check and rewriter.edits:
            verify.check_graph(after)
        if one.exact and self.check and rewriter.edits:
            difference = self._check_exact(before, after, reference)
        elif not one.exact and rewriter.edits:
            outputs = verify.run(after, self.ctx.inputs)
            before_outputs = reference
            difference, reference = verify.compare(reference, outputs), outputs
            if _types(before_outputs) != _types(outputs):
                raise VerifyError("an output changed its shape or dtype, which no pass may do")
        record = PassRecord.of(one, rewriter, before, after, time.perf_counter() - start, difference)
        for skip in record.skips:
            LOG.debug("%s left alone %s", one.name, skip)
        LOG.info("%s: %d edits, %d left alone, %.2f s", one.name, record.edits, len(record.skips), record.seconds)
        return (after if rewriter.edits else before), record, reference

    def _check_exact(self, before: Program, after: Program, reference: Sequence[Any]) -> verify.Difference:
        try:
            return verify.check_exact(before, after, self.ctx.inputs, reference)
        except VerifyError as error:
            place = locate.first_change(before, after, self.ctx.inputs)
            raise VerifyError(f"{error}; values part first at {place}" if place else str(error)) from error

    def _failed(self, one: Pass, error: FxoptError, records: Sequence[PassRecord], kept: Program) -> FxoptError:
        ran = ", ".join(r.name for r in records) or "none"
        kind = type(error) if isinstance(error, PassError) else PassError
        failed = kind(f"pass {one.name}: {error}\nPasses before it: {ran}. The graph from before it was kept.")
        failed.dump = fxir.dump(kept, f"before {one.name}  target {self.ctx.target}")
        return failed

    def _dump(self, program: Program, index: int, step: str) -> None:
        if self.folder is not None:
            fxir.write(program, self.folder, index, step, self.ctx.target)


def _types(outputs: Sequence[Any]) -> list[object]:
    return [(x.shape, x.dtype) if isinstance(x, torch.Tensor) else type(x) for x in outputs]
