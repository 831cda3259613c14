"""The report as one page that opens from disk: graphs before and after, pass by pass, layers, histograms, reasons.

    compiled.report.to_html("report.html")
    fxopt.report_html.compare([Run(a, "int8", accuracy=0.981), Run(b, "pruned", accuracy=0.979)], "runs.html")

The page is a single file: style, scripts, the layout library (see vendor/vendor.json) and the data are in it. Its
Content-Security-Policy allows these very scripts, by hash, and no connection to anywhere. Whatever comes from the
user's model (names, paths, reasons) is data: JSON that no browser takes for markup, and text when it is shown.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import os
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt.errors import InputError
from fxopt.report_html import data
from fxopt.report_html.notebook import summary

if TYPE_CHECKING:
    from fxopt.report import Report

_SCRIPTS = ("model.js", "view.js", "charts.js", "table.js", "graphs.js", "panels.js", "app.js")
_WORKER = ("vendor/dagre.min.js", "layout.js")
_SLOT = re.compile(r"@@(\w+)@@")


@dataclasses.dataclass(frozen=True)
class Run:
    """One compile among several.

    Attributes:
        report: of it.
        label: what it is called in the picture; "" for what its passes are.
        accuracy: as you measured it on your data, larger is better; None where it was not measured.
    """

    report: Report
    label: str = ""
    accuracy: float | None = None


def write(report: Report, path: str | os.PathLike[str], runs: Iterable[Report | Run] = ()) -> Path:
    """Write *report* as a page to *path* and return it; *runs* are others to compare it with.

    Raises:
        InputError: *path* is no path, *runs* are no reports, or the file cannot be written.
        ArtifactError: the report was loaded from a file, and what that holds of the graphs is damaged.
    """
    others = _runs(runs)
    listed = others if any(run.report is report for run in others) else [Run(report, "this one"), *others]
    content = data.of_report(report)
    content["runs"] = data.of_runs(listed) if others else []
    return _write(path, page(f"{report.model} · fxopt report", content))


def compare(reports: Iterable[Report | Run], path: str | os.PathLike[str]) -> Path:
    """Write a page that compares several compiles by size, speed and accuracy to *path*, and return it.

    Raises:
        InputError: there are none, or they are no reports; *path* is no path, or cannot be written.
    """
    runs = _runs(reports)
    if not runs:
        raise InputError("compare() wants at least one report")
    return _write(path, page("fxopt runs", {"report": None, "runs": data.of_runs(runs)}))


def _runs(given: Iterable[Report | Run]) -> list[Run]:
    from fxopt.report import Report

    if isinstance(given, (str, bytes, Report, Run)) or not isinstance(given, Iterable):
        raise InputError(f"runs must be a list of reports or of report_html.Run, not {type(given).__name__}")
    runs = [Run(one) if isinstance(one, Report) else one for one in given]
    for one in runs:
        if not isinstance(one, Run) or not isinstance(one.report, Report):
            raise InputError(f"runs must be reports or report_html.Run, not {type(one).__name__}")
    return runs


def page(title: str, content: dict[str, Any]) -> str:
    """The whole page around *content*."""
    style, script = _text("style.css"), "\n".join(map(_text, _SCRIPTS))
    licence = _text("vendor/dagre.LICENSE.txt")
    worker = f"/*! dagre\n\n{licence}*/\n" + "\n".join(map(_text, _WORKER))
    for name, text in (("a script", script), ("the worker", worker)):
        if re.search(r"</script|<!--", text, re.IGNORECASE):
            raise AssertionError(f"{name} of the page holds what ends a script")
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "worker-src": "blob:",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    parts = {
        "TITLE": html.escape(title),
        "POLICY": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "STYLE": style,
        "SCRIPT": script,
        "WORKER": worker,
        "DATA": as_script(content),
    }
    return _SLOT.sub(lambda slot: parts[slot.group(1)], _text("page.html"))


def as_script(content: Any) -> str:
    """*content* as JSON that may stand in a script element: nothing in it can end the element, or begin another."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _text(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _write(path: str | os.PathLike[str], text: str) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"a report wants the path of a file, such as 'report.html', not {path!r:.80}")
    file = Path(path)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write the report to {os.fspath(path)!r}: {error}") from error
    return file


__all__ = ["Run", "as_script", "compare", "page", "summary", "write"]
