"""A report as JSON and back: numbers, reasons, the graph after each pass, the layers with their histograms.

What passes tell of beyond that (plans, groups) is not in the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fxopt.artifact.values import decode, encode
from fxopt.errors import ArtifactError
from fxopt.layers import decode_layers, encode_layers
from fxopt.recording import Snapshot
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
    return entry | {
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
    return entry


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
    return PassRecord(**values, skips=skips, difference=found, graph=Snapshot.from_text(entry.get("graph")))
