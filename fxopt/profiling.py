"""Where the time of a call goes, node by node: ``compiled.profile(inputs)``.

Only engines that run one operator after the other can tell; fxopt's own torch backend is one. Reading the clock takes
some 0.1 µs for each operator, which the times include.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fxopt.errors import ArtifactError
from fxopt.show import as_text

_SHOWN = 20
_WARMUP = 2


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator that the engine runs.

    Attributes:
        name: of the engine's own node; ``op``: the kernel that it calls.
        node: the node of ``compiled.graph`` that it computes, or a part of; "" where the engine added it by itself.
        source: ``file:line`` of the user's code, or "".
    """

    name: str
    op: str
    node: str
    source: str


@dataclasses.dataclass(frozen=True)
class Timed:
    """An operator and its time.

    Attributes:
        operator: what ran.
        ms: median milliseconds over all runs.
        start_us, us: when it began and how long it took in the typical run, the one whose whole time is the median.
    """

    operator: Operator
    ms: float
    start_us: float
    us: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """Time by operator; prints as the slowest ones.

    Attributes:
        operators: in the order in which they run.
        total_ms: median milliseconds of a whole run.
        runs: how many were measured.
    """

    operators: tuple[Timed, ...]
    total_ms: float
    runs: int

    def by_node(self) -> dict[str, float]:
        """Milliseconds by node of ``compiled.graph``; what the engine added by itself is under ""."""
        result: dict[str, float] = {}
        for one in self.operators:
            result[one.operator.node] = result.get(one.operator.node, 0.0) + one.ms
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the typical run as a Chrome trace, for chrome://tracing, Perfetto or speedscope.

        Raises:
            ArtifactError: the file cannot be written.
        """
        events: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "fxopt"}}]
        for one in self.operators:
            known = {"node": one.operator.node, "source": one.operator.source, "median_ms": round(one.ms, 6)}
            place = {"ph": "X", "pid": 1, "tid": 1, "ts": round(one.start_us, 3), "dur": round(one.us, 3)}
            events.append({"name": one.operator.name, "cat": one.operator.op, **place, "args": known})
        try:
            Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        except OSError as error:
            raise ArtifactError(f"cannot write the trace to {os.fspath(path)!r}: {error}") from error

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("node", "kernel", "ms", "share", "source"):
            table.add_column(title, justify="right" if title in ("ms", "share") else "left", overflow="fold")
        whole = sum(one.ms for one in self.operators) or 1.0
        slowest = sorted(self.operators, key=lambda one: one.ms, reverse=True)
        for one in slowest[:_SHOWN]:
            what = one.operator
            numbers = f"{one.ms:.3f}", f"{one.ms / whole:.1%}"
            where = re.split(r"[/\\]", what.source)[-1]
            table.add_row(Text(what.node or what.name), Text(what.op), *numbers, Text(where))
        left = len(slowest) - _SHOWN
        rest = [Text(f"and {left} more, {sum(one.ms for one in slowest[_SHOWN:]):.3f} ms")] if left > 0 else []
        return Group(Text(f"{self.total_ms:.3f} ms a run, median of {self.runs}"), table, *rest)


def measure(
    run: Callable[[Callable[[], None]], object], operators: Sequence[Operator], *, runs: int, budget_s: float = 3.0
) -> Profile:
    """Time *run*, which calls what it is given once at its start and once after each of *operators*.

    Args:
        run: one whole run.
        operators: in order.
        runs: how many to measure, at most; at least 3, unless ``runs`` is less.
        budget_s: seconds after which no further run starts.
    """
    clock = time.perf_counter_ns
    for _ in range(_WARMUP):
        run(lambda: None)
    marks: list[list[int]] = []
    begin = time.perf_counter()
    while len(marks) < runs and (len(marks) < 3 or time.perf_counter() - begin < budget_s):
        times: list[int] = []
        run(lambda times=times: times.append(clock()))  # type: ignore[misc]
        marks.append(times)
    totals = [one[-1] - one[0] for one in marks]
    typical = marks[totals.index(statistics.median_low(totals))]
    timed = []
    for i, operator in enumerate(operators):
        ms = statistics.median(one[i + 1] - one[i] for one in marks) / 1e6
        timed.append(Timed(operator, ms, (typical[i] - typical[0]) / 1e3, (typical[i + 1] - typical[i]) / 1e3))
    return Profile(tuple(timed), statistics.median(totals) / 1e6, len(marks))
