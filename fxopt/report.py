"""What the compiler did and what it brought: numbers first, then the passes, then what was left alone and why.

``print(compiled.report)`` draws it with rich; plain text comes out where there is no terminal.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fxopt.show import as_text

if TYPE_CHECKING:
    from fxopt.passbase import Pass
    from fxopt.program import Program
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
        packed_bytes: weight bytes where those with N:M sparsity are packed, as ``save('m.fxopt')`` does.
        latency_ms: median latency on the example inputs, "eager" and "fxopt"; empty where nothing can run here.
        candidates: for ``backend="auto"``, what each backend measured in ms, or why it was not taken.
        seconds: time spent by stage ("capture", "passes", "lower", "measure").
        error: largest error of the compiled model against eager, relative to the range; None if not compared.
        engine_exact: False where the engine was told to compute in a lower precision than the graph.
        notes: remarks of the backend.
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
            table.add_row(title, _si(pair[0]), _si(pair[1]), _ratio(*pair))
        table.add_row("weights", _bytes(self.bytes[0]), _bytes(self.bytes[1]), _ratio(*self.bytes))
        if 0 < self.packed_bytes < self.bytes[1]:
            packed = (self.bytes[0], self.packed_bytes)
            table.add_row("weights, zeros packed", _bytes(packed[0]), _bytes(packed[1]), _ratio(*packed))
        if {"eager", "fxopt"} <= self.latency_ms.keys():
            a, b = self.latency_ms["eager"], self.latency_ms["fxopt"]
            table.add_row("latency", f"{a:.2f} ms", Text(f"{b:.2f} ms", "bold"), Text(_speed(a, b), "bold"))
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
        parts: list[RenderableType] = [Text(f"{p.name}: {note}") for p in self.passes for note in p.notes]
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


def _si(value: float) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value:.0f}"


def _bytes(value: float) -> str:
    return f"{value / 2**20:.2f} MiB" if value >= 2**20 else f"{value / 2**10:.1f} KiB"


def _speed(before: float, after: float) -> str:
    return f"{before / after:.2f} × faster" if before >= after else f"{after / before:.2f} × slower"


def _ratio(before: float, after: float) -> str:
    if not before or not after or before == after:
        return ""
    return f"{before / after:.2f} × smaller" if before > after else f"{after / before:.2f} × larger"
