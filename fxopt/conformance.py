"""What a backend owes: many small graphs, each of which it must compute rightly, or decline with a reason.

    print(fxopt.conformance.run("mybackend"))

A backend conforms when each graph either gives what it should, at every call, or is refused at compile time with an
:class:`~fxopt.UnsupportedOp` that says why. Other numbers, another exception, an input that is changed, an earlier
result that a later call overwrites: each of these is a failure. What an operator makes of NaN is the engine's own
affair: in some engines a maximum or a relu drops it.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from torch.utils import _pytree as pytree

from fxopt import compiler, registry, verify
from fxopt.backend import Backend
from fxopt.compiled import CompiledModel
from fxopt.conformance_cases import OPS, Case
from fxopt.conformance_programs import PROGRAMS
from fxopt.errors import BackendUnavailable, InputError, UnsupportedOp, near_miss
from fxopt.progress import Stages
from fxopt.show import as_text
from fxopt.target import Target, resolve_target

Verdict = Literal["passed", "declined", "failed"]
_VERDICTS: tuple[Verdict, ...] = ("passed", "declined", "failed")

_BATCHES = 3  # for calibration

# Where passes were lossy, an engine may differ from the graph by a step of a low precision here and there.
_LOW_PRECISION = 2e-2
_DISCRETE = 0.01


def cases() -> tuple[Case, ...]:
    """All graphs."""
    return OPS + PROGRAMS


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One graph on one backend.

    Attributes:
        case: name of the graph; ``backend`` that of the backend.
        verdict: "passed", "declined" (with an UnsupportedOp) or "failed".
        reason: why, unless it passed.
    """

    case: str
    backend: str
    verdict: Verdict
    reason: str = ""


class Conformance(Sequence[Outcome]):
    """Outcomes, and a table of them where they are printed."""

    def __init__(self, outcomes: Iterable[Outcome]) -> None:
        self._outcomes = tuple(outcomes)

    def __getitem__(self, index: int | slice) -> Any:
        return Conformance(self._outcomes[index]) if isinstance(index, slice) else self._outcomes[index]

    def __len__(self) -> int:
        return len(self._outcomes)

    def __iter__(self) -> Iterator[Outcome]:
        return iter(self._outcomes)

    @property
    def failures(self) -> list[Outcome]:
        """What is wrong; a backend without any conforms."""
        return [one for one in self._outcomes if one.verdict == "failed"]

    @property
    def backends(self) -> list[str]:
        """Names of the backends."""
        return list(dict.fromkeys(one.backend for one in self._outcomes))

    def tally(self, backend: str) -> dict[Verdict, int]:
        """How many graphs *backend* passed, declined and failed."""
        found = Counter(one.verdict for one in self._outcomes if one.backend == backend)
        return {verdict: found[verdict] for verdict in _VERDICTS}

    def __repr__(self) -> str:
        return as_text(self)

    def __rich__(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("backend", "graph", "", "reason"):
            table.add_column(title)
        for one in self._outcomes:
            if one.verdict != "passed":
                style = "red" if one.verdict == "failed" else ""
                table.add_row(one.backend, one.case, one.verdict, one.reason, style=style)
        tallies = {backend: self.tally(backend) for backend in self.backends}
        lines = [f"{name}: {', '.join(f'{n} {v}' for v, n in tally.items())}" for name, tally in tallies.items()]
        return Group(table, *lines) if table.rows else Group(*lines)


def run(
    backend: str | Backend | Sequence[str | Backend],
    *,
    target: str | Target = "x86",
    only: str | Sequence[str] | None = None,
) -> Conformance:
    """Try *backend*, or several, on every graph. It takes a second or less for each.

    Args:
        backend: a name that is registered, or a Backend object; or a sequence of them.
        target: a machine that can run here.
        only: names of graphs, or one, where not all are wanted; a topic such as "conv" stands for all of it.

    Raises:
        SpecError: no such backend or target. InputError: no such graph.
        BackendUnavailable: the engine is not installed, or the target cannot run here.
    """
    machine = resolve_target(target)
    if not machine.runs_here:
        raise BackendUnavailable(f"graphs have to be run, and target {machine} cannot run here")
    engines = []
    for one in [backend] if isinstance(backend, (str, Backend)) else backend:
        engine = registry.find_backend(one)() if isinstance(one, str) else one
        engine.require()
        engines.append(engine)
    chosen = _chosen(only)
    stages = Stages()
    outcomes = []
    with stages.shown("conformance"):
        for engine in engines:
            for case in chosen:
                stages.say(f"{engine.name}, {case.name}")
                outcomes.append(_outcome(case, engine, machine))
    return Conformance(outcomes)


def _chosen(only: str | Sequence[str] | None) -> list[Case]:
    if only is None:
        return list(cases())
    wanted = [only] if isinstance(only, str) else list(only)
    found = {text: [one for one in cases() if text in (one.name, one.name.partition(": ")[0])] for text in wanted}
    for text, those in found.items():
        if not those:
            raise InputError(f"there is no graph {text!r}.{near_miss(text, [one.name for one in cases()])}")
    return [one for those in found.values() for one in those]


def _outcome(case: Case, engine: Backend, target: Target) -> Outcome:
    name = engine.name
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of lossy passes: that they are lossy is what is asked for
            problem = _problem(case, engine, target)
    except UnsupportedOp as error:
        reason = " ".join(str(error).split())
        return Outcome(case.name, name, "declined" if reason else "failed", reason or "UnsupportedOp without a reason")
    except Exception as error:  # noqa: BLE001 - whatever a backend raises is its outcome
        return Outcome(case.name, name, "failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
    return Outcome(case.name, name, "failed" if problem else "passed", problem)


def _problem(case: Case, engine: Backend, target: Target) -> str:
    """What is wrong with *case* on *engine*; "" for nothing.

    Raises:
        Exception: whatever the compiler or the engine raises.
    """
    torch.manual_seed(0)
    model = case.make().eval()
    calls = [_seeded(case, size, seed) for seed, size in enumerate(case.sizes)]
    data = [_seeded(case, case.sizes[0], seed) for seed in range(_BATCHES)] if case.calibrate else None
    compiled = compiler.compile(
        copy.deepcopy(model),
        target=target,
        example_inputs=copy.deepcopy(calls[0]),
        dynamic_shapes=case.dynamic_shapes,
        passes=case.passes,
        calibration=data,
        backend=engine,
        verify=False,  # what is verified there is judged here
    )
    return _wrong_calls(compiled, model, calls, rounds=case.rounds)


def _seeded(case: Case, size: int, seed: int) -> tuple[Any, ...]:
    torch.manual_seed(seed)
    return case.inputs(size)


def _wrong_calls(compiled: CompiledModel, model: torch.nn.Module, calls: list[tuple[Any, ...]], *, rounds: bool) -> str:
    """What is wrong with one of *calls*, made one after another; "" for nothing."""
    earlier: list[tuple[Any, Any]] = []
    for number, inputs in enumerate(calls, start=1):
        mine, theirs, untouched = copy.deepcopy(inputs), copy.deepcopy(inputs), copy.deepcopy(inputs)
        try:
            actual = compiled(*mine)
        except UnsupportedOp as error:
            return f"call {number}: declined when called, not when compiled: {error}"
        with torch.no_grad():
            expected = model(*theirs) if compiled.report.exact else _graph_results(compiled, theirs)
        problem = _differs(expected, actual, exact=compiled.report.exact and not rounds)
        if not problem and (change := _differs(theirs if compiled.report.exact else untouched, mine, exact=True)):
            problem = f"its inputs are not left as the model leaves them: {change}"
        if problem:
            return f"call {number}: {problem}"
        earlier.append((actual, copy.deepcopy(actual)))
    changed = [_differs(kept, given, exact=True) for given, kept in earlier]
    return f"a later call overwrites the results of call 1: {changed[0]}" if any(changed) else ""


def _graph_results(compiled: CompiledModel, inputs: tuple[Any, ...]) -> Any:
    """What the graph that the engine was given computes, node by node."""
    variant = compiled._current("graph")
    signature = variant.program.signature
    outputs = verify.run(variant.whole_program(), signature.bind(inputs, {}))
    return signature.unflatten(outputs[: len(signature.outputs)])


def _differs(expected: Any, actual: Any, *, exact: bool) -> str:
    """How *actual* differs from *expected*, beyond rounding; "" for not at all."""
    (a, wanted), (b, given) = pytree.tree_flatten(expected), pytree.tree_flatten(actual)
    if wanted != given:
        return f"its structure is {given}, not {wanted}"
    for x, y in zip(a, b, strict=True):
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            if (x.shape, x.dtype) != (y.shape, y.dtype):
                return f"a result is {y.dtype} {list(y.shape)}, not {x.dtype} {list(x.shape)}"
            if y.requires_grad:
                return "a result requires grad"
    difference = verify.compare(a, b)
    close = difference.error <= _LOW_PRECISION and difference.mismatched <= _DISCRETE
    return "" if difference.within or (not exact and close) else f"output {difference.where}: {difference}"
