"""What the page shows, as JSON: numbers, passes, graphs (still compressed), layers, reasons."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxopt.layers import Spread
    from fxopt.profiling import Profile
    from fxopt.report import PassRecord, Report
    from fxopt.report_html import Run


def of_report(report: Report) -> dict[str, Any]:
    """Everything that the page shows of one compile.

    Raises:
        ArtifactError: a recorded graph is damaged.
    """
    snapshots = [] if report.captured is None else [_snapshot("captured", -1, report.captured)]
    for i, record in enumerate(report.passes):
        if record.graph is not None and snapshots:
            snapshots.append(_snapshot(record.name, i, record.graph))
    return {
        "report": _numbers(report),
        "passes": [_pass(record) for record in report.passes],
        "snapshots": snapshots,
        "layers": [_layer(layer) for layer in report.layers],
        "outputs": _outputs(report),
        "profile": None if report.profile is None else _profile(report.profile),
    }


def of_runs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One point for each of *runs*."""
    points = []
    for run in runs:
        report = run.report
        lossy = ", ".join(record.name for record in report.passes if not record.exact and record.edits)
        packed = 0 < report.packed_bytes < report.bytes[1]
        points.append(
            {
                "label": run.label or f"{report.backend} {lossy or 'exact'}".strip(),
                "model": report.model,
                "backend": report.backend,
                "bytes": report.packed_bytes if packed else report.bytes[1],
                "original": report.bytes[0],
                "macs": report.macs[1],
                "latency": number(report.latency_ms.get("fxopt")),
                "accuracy": number(run.accuracy),
                "error": number(report.error),
                "cosine": _cosine(report),
            }
        )
    return points


def number(value: Any) -> float | int | None:
    """*value* where it is a finite number; JSON has no other."""
    usable = isinstance(value, (int, float)) and math.isfinite(value)
    return value if usable else None


def _numbers(report: Report) -> dict[str, Any]:
    from fxopt import __version__

    measured = {name: value for name, value in report.candidates.items() if number(value) is not None}
    return {
        "version": __version__,
        "model": report.model,
        "target": report.target,
        "backend": report.backend,
        "exact": report.exact,
        "parameters": list(report.parameters),
        "macs": list(report.macs),
        "bytes": list(report.bytes),
        "packed": report.packed_bytes,
        "latency": {name: value for name, value in report.latency_ms.items() if number(value) is not None},
        "measured": measured,
        "waterfall": [[str(name), ms] for name, ms in report.waterfall.items() if number(ms) is not None],
        "declined": {name: str(value) for name, value in report.candidates.items() if name not in measured},
        "seconds": {name: number(value) for name, value in report.seconds.items()},
        "error": number(report.error),
        "notes": [str(note) for note in report.notes],
    }


def _pass(record: PassRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "spec": record.spec,
        "exact": record.exact,
        "edits": record.edits,
        "nodes": list(record.nodes),
        "bytes": list(record.bytes),
        "seconds": number(record.seconds),
        "difference": None if record.difference is None else str(record.difference),
        "notes": [str(note) for note in record.notes],
        "skips": [[skip.node, skip.reason, skip.source] for skip in record.skips],
    }


def _snapshot(step: str, index: int, graph: Any) -> dict[str, Any]:
    graph.open()  # damaged ones are found here, and not in the browser
    return {"step": step, "pass": index, "data": graph.to_text()}


def _layer(layer: Any) -> dict[str, Any]:
    entry = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    entry["weights"], entry["inputs"] = _spread(layer.weights), _spread(layer.inputs)
    for name in ("zeros", "snr_db"):
        entry[name] = number(entry[name])
    return entry


def _spread(spread: Spread | None) -> dict[str, Any] | None:
    if spread is None or number(spread.low) is None or number(spread.high) is None:
        return None
    ends = spread.range
    known = ends is not None and all(number(end) is not None for end in ends)
    return {"low": spread.low, "high": spread.high, "counts": spread.counts, "range": ends if known else None}


def _outputs(report: Report) -> list[dict[str, Any]]:
    quality = report.quantization
    if quality is None:
        return []
    return [
        {"name": one.name, "cosine": number(one.cosine), "snr_db": number(one.snr_db), "top1": number(one.top1)}
        for one in quality.outputs
    ]


def _cosine(report: Report) -> float | None:
    found = [one["cosine"] for one in _outputs(report) if one["cosine"] is not None]
    return min(found) if found else None


def _profile(profile: Profile) -> dict[str, Any]:
    by_node = profile.by_node()
    return {
        "total": profile.total_ms,
        "runs": profile.runs,
        "nodes": {name: ms for name, ms in by_node.items() if name},
        "engine": by_node.get("", 0.0),
    }
