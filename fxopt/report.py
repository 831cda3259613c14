"""What the compiler did and what it brought: numbers first, then the passes, then what was left alone and why.

``print(compiled.report)`` draws it with rich; plain text comes out where there is no terminal.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fxopt.layers import Layer
from fxopt.profiling import Profile
from fxopt.recording import Snapshot
from fxopt.show import as_text, bytes_text, ratio_text, si_text, speed_text

if TYPE_CHECKING:
    from fxopt.passbase import Pass
    from fxopt.program import Program
    from fxopt.report_html import Run
    from fxopt.rewriter import Rewriter, Skip
    from fxopt.verify import Difference


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Attributes:
        name: of the pass; ``spec`` with its options.
        exact: whether the pass promises the same answers.
        edits: number of graph edits; 0 means that nothing was to be done.
        skips: candidates left alone, with reasons; ``notes`` are remarks beyond a node.
        nodes: number of calls (before, after).
        bytes: weights (before, after).
        seconds: time for the pass and its verification.
        difference: outputs against those before the pass (against eager for exact ones); None if not compared.
        details: what else the pass reports, by topic.
        graph: as the pass left it; None where it changed nothing.
    """

    name: str
    spec: str
    exact: bool
    edits: int
    skips: tuple[Skip, ...]
    notes: tuple[str, ...]
    nodes: tuple[int, int]
    bytes: tuple[int, int]
    seconds: float
    difference: Difference | None
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    graph: Snapshot | None = dataclasses.field(default=None, repr=False)

    @staticmethod
    def of(
        one: Pass, rewriter: Rewriter, before: Program, after: Program, seconds: float, difference: Difference | None
    ) -> PassRecord:
        """The record of a finished pass."""
        from fxopt import spec

        calls = (_calls(before), _calls(after))
        sizes = (before.nbytes(), after.nbytes())
        skips, notes = tuple(rewriter.skips), tuple(rewriter.notes)
        return PassRecord(
            one.name,
            spec.format([one]),
            one.exact,
            rewriter.edits,
            skips,
            notes,
            calls,
            sizes,
            seconds,
            difference,
            rewriter.details,
            Snapshot.of(after, f"after {one.name}") if rewriter.edits else None,
        )


def _calls(program: Program) -> int:
    return sum(1 for n in program.graph.nodes if n.op == "call_function")


@dataclasses.dataclass
class Report:
    """Everything a compile can say about itself.

    Attributes:
        model: class name of the model.
        target: name of the target; ``backend`` the one that was taken.
        passes: what each pass did, in order.
        parameters: floating-point weight elements (captured, final).
        macs: multiply-accumulates of one run on the example inputs (captured, final).
        bytes: weight bytes (captured, final).
        packed_bytes: weight bytes as ``save('m.fxopt')`` packs them: N:M sparsity, and two numbers of four bits a byte.
        latency_ms: median latency on the example inputs, "eager" and "fxopt"; empty where nothing can run here.
        candidates: for ``backend="auto"``, what each backend measured in ms, or why it was not taken.
        seconds: time spent by stage ("capture", "passes", "lower", "measure").
        error: largest error of the compiled model against eager, relative to the range; None if not compared.
        engine_exact: False where the engine was told to compute in a lower precision than the graph.
        notes: remarks of the backend; ``prepared``: those of the passes that ran in ``fxopt.prepare``.
        waterfall: milliseconds from eager through every pass, where :func:`fxopt.waterfall` measured them.
        captured: the graph before all passes.
        layers: each conv, linear and product of the final graph in numbers.
        profile: what ``CompiledModel.profile`` measured last, or None.
    """

    model: str
    target: str
    backend: str = ""
    passes: list[PassRecord] = dataclasses.field(default_factory=list)
    parameters: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    bytes: tuple[int, int] = (0, 0)
    packed_bytes: int = 0
    latency_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    candidates: dict[str, float | str] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    error: float | None = None
    engine_exact: bool = True
    notes: Sequence[str] = ()
    prepared: Sequence[str] = ()
    waterfall: Mapping[str, float] = dataclasses.field(default_factory=dict)
    captured: Snapshot | None = dataclasses.field(default=None, repr=False)
    layers: tuple[Layer, ...] = dataclasses.field(default=(), repr=False)
    profile: Profile | None = dataclasses.field(default=None, repr=False)

    @property
    def exact(self) -> bool:
        """Whether every pass that changed something, and the engine, promise the same answers."""
        return self.engine_exact and all(p.exact for p in self.passes if p.edits)

    @property
    def quantization(self) -> Any:
        """Outputs and layers against float (``Quality`` of insert-fake-quant); None where nothing was quantized."""
        return next((p.details["quantization"] for p in self.passes if "quantization" in p.details), None)

    @property
    def skips(self) -> list[Skip]:
        """Everything that was left alone, by all passes, with reasons."""
        return [skip for p in self.passes for skip in p.skips]

    def to_html(self, path: str | os.PathLike[str], *, runs: Iterable[Report | Run] = ()) -> Path:
        """Write the report as one page that any browser opens from disk; see :mod:`fxopt.report_html`.

        Args:
            path: of the file.
            runs: other compiles to compare this one with, by size, speed and accuracy.

        Raises:
            InputError: *path* is no path, or the file cannot be written.
        """
        from fxopt import report_html

        return report_html.write(self, path, runs)

    def _repr_html_(self) -> str:
        from fxopt import report_html

        return report_html.summary(self)

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> RenderableType:
        head = Text.assemble(
            (self.model, "bold"),
            f" for {self.target} on {self.backend}, ",
            ("exact", "green") if self.exact else ("lossy", "yellow"),
        )
        parts: list[RenderableType] = [head, self._numbers(), self._passes()]
        if self.candidates:
            parts.append(self._candidates())
        parts += self._remarks()
        times = ", ".join(f"{stage} {s:.2f}" for stage, s in self.seconds.items())
        parts.append(Text(f"Compiled in {sum(self.seconds.values()):.2f} s ({times})", style="dim"))
        return Group(*parts)

    def _numbers(self) -> Table:
        table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
        for title in ("", "model", "compiled", ""):
            table.add_column(title, justify="left" if not title else "right")
        for title, pair in (("parameters", self.parameters), ("MACs", self.macs)):
            table.add_row(title, si_text(pair[0]), si_text(pair[1]), ratio_text(*pair))
        table.add_row("weights", bytes_text(self.bytes[0]), bytes_text(self.bytes[1]), ratio_text(*self.bytes))
        if 0 < self.packed_bytes < self.bytes[1]:
            packed = (self.bytes[0], self.packed_bytes)
            table.add_row("weights, packed", bytes_text(packed[0]), bytes_text(packed[1]), ratio_text(*packed))
        if {"eager", "fxopt"} <= self.latency_ms.keys():
            a, b = self.latency_ms["eager"], self.latency_ms["fxopt"]
            table.add_row("latency", f"{a:.2f} ms", Text(f"{b:.2f} ms", "bold"), Text(speed_text(a, b), "bold"))
        if self.error is not None:
            table.add_row("error", "", f"{self.error:.1e}", "of the output's range, against eager")
        return table

    def _passes(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title, justify in (
            ("pass", "left"),
            ("edits", "right"),
            ("ops", "right"),
            ("s", "right"),
            ("against before", "left"),
        ):
            table.add_column(title, justify=justify)  # type: ignore[arg-type]
        for p in self.passes:
            calls = str(p.nodes[1]) if p.nodes[0] == p.nodes[1] else f"{p.nodes[0]} → {p.nodes[1]}"
            style = "" if p.exact else "yellow"
            cost = "" if p.difference is None else str(p.difference) if not p.exact else "same"
            table.add_row(Text(p.spec, style), str(p.edits or "–"), calls, f"{p.seconds:.2f}", Text(cost, style))
        return table

    def _candidates(self) -> Text:
        measured = {k: v for k, v in self.candidates.items() if isinstance(v, float)}
        words = [f"{k} {v:.2f} ms" for k, v in sorted(measured.items(), key=lambda item: item[1])]
        words += [f"{k}: {v}" for k, v in self.candidates.items() if not isinstance(v, float)]
        return Text("Measured: " + "; ".join(words))

    def _remarks(self) -> Sequence[RenderableType]:
        parts: list[RenderableType] = [Text(f"before training, {note}") for note in self.prepared]
        parts += [Text(f"{p.name}: {note}") for p in self.passes for note in p.notes]
        parts += [Text(f"{self.backend}: {note}") for note in self.notes]
        if not self.skips:
            return parts
        parts.append(Text("Left alone", style="bold"))
        for p in self.passes:
            reasons = Counter(s.reason for s in p.skips)
            for reason, count in reasons.most_common(8):
                first = next(s for s in p.skips if s.reason == reason)
                more = f" and {count - 1} more" if count > 1 else ""
                where = f" ({first.source})" if first.source else ""
                parts.append(Text(f"  {p.name}: {first.node}{more}: {reason}{where}", style="dim"))
            if len(reasons) > 8:
                parts.append(Text(f"  {p.name}: {len(reasons) - 8} more reasons in report.skips", style="dim"))
        return parts
