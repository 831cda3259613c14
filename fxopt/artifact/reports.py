"""A report as JSON and back: numbers, reasons, the graph after each pass, the layers with their histograms.

What passes tell of beyond that is in the file where it has a ``to_plain`` (quantization); plans and groups are not.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from fxopt.artifact.values import decode, encode
from fxopt.errors import ArtifactError, SpecError
from fxopt.layers import decode_layers, encode_layers
from fxopt.profiling import Operator, Profile, Timed
from fxopt.recording import Snapshot
from fxopt.registry import find_pass
from fxopt.report import PassRecord, Report
from fxopt.rewriter import Skip
from fxopt.verify import Difference

_OWN_FORM = ("passes", "notes", "prepared", "captured", "layers", "profile")
_RECORD = [
    field.name
    for field in dataclasses.fields(PassRecord)
    if field.name not in ("skips", "difference", "details", "graph")
]
_REPORT = [field.name for field in dataclasses.fields(Report) if field.name not in _OWN_FORM]


def encode_report(report: Report) -> dict[str, Any]:
    """Numbers, passes and reasons of *report*."""
    entry = {name: encode(getattr(report, name)) for name in _REPORT}
    profile = report.profile
    return entry | {
        "profile": None if profile is None else [encode(list(row)) for row in _rows(profile)],
        "notes": list(report.notes),
        "prepared": list(report.prepared),
        "passes": [_encode_record(record) for record in report.passes],
        "captured": None if report.captured is None else report.captured.to_text(),
        "layers": encode_layers(report.layers),
    }


def _encode_record(record: PassRecord) -> dict[str, Any]:
    entry = {name: encode(getattr(record, name)) for name in _RECORD}
    entry["skips"] = [dataclasses.astuple(skip) for skip in record.skips]
    difference = record.difference
    entry["difference"] = None if difference is None else [encode(x) for x in dataclasses.astuple(difference)]
    entry["graph"] = None if record.graph is None else record.graph.to_text()
    entry["details"] = {
        topic: encode(found.to_plain()) for topic, found in record.details.items() if hasattr(found, "to_plain")
    }
    return entry


def _rows(profile: Profile) -> list[tuple[Any, ...]]:
    """The whole in the first row, then one for each operator."""
    timed = [(*dataclasses.astuple(one.operator), one.ms, one.start_us, one.us) for one in profile.operators]
    return [(profile.total_ms, profile.runs), *timed]


def _decode_profile(rows: Any) -> Profile | None:
    if rows is None:
        return None
    (total, runs), *timed = (decode(row) for row in rows)
    operators = [Timed(Operator(*map(str, row[:4])), *map(float, row[4:])) for row in timed]
    return Profile(tuple(operators), float(total), int(runs))


def decode_report(entry: Mapping[str, Any]) -> Report:
    """The report that :func:`encode_report` wrote.

    Raises:
        ArtifactError: it wrote no such thing.
    """
    report = Report(**{name: decode(entry[name]) for name in _REPORT if name in entry or name != "waterfall"})
    report.notes = [str(note) for note in entry["notes"]]
    report.prepared = [str(note) for note in entry.get("prepared", ())]
    report.passes = [_decode_record(record) for record in entry["passes"]]
    report.captured = Snapshot.from_text(entry.get("captured"))
    report.layers = decode_layers(entry.get("layers"))
    report.profile = _decode_profile(entry.get("profile"))
    try:
        str(report)
    except Exception as error:
        raise ArtifactError(f"its report has other values than a report: {error}") from error
    return report


def _decode_record(entry: Mapping[str, Any]) -> PassRecord:
    values = {name: decode(entry[name]) for name in _RECORD}
    skips = tuple(Skip(*map(str, skip)) for skip in entry["skips"])
    difference = entry["difference"]
    found = None if difference is None else Difference(*(decode(value) for value in difference))
    graph, details = Snapshot.from_text(entry.get("graph")), dict[str, Any]()
    with contextlib.suppress(SpecError):  # a pass that is not installed here
        if entry.get("details"):
            told = {str(topic): decode(value) for topic, value in entry["details"].items()}
            details = find_pass(str(values["name"])).recall(told)
    return PassRecord(**values, skips=skips, difference=found, graph=graph, details=details)
