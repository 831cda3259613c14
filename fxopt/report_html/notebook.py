"""The report as a notebook shows it: a few lines of markup without scripts, in the notebook's own colours."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import TYPE_CHECKING

from fxopt.show import bytes_text, ratio_text, si_text, speed_text

if TYPE_CHECKING:
    from fxopt.report import PassRecord, Report

_CELL = "padding:.15em .9em .15em 0;text-align:{};white-space:nowrap;background:none;border:0"
_MOST_REASONS = 20


def summary(report: Report) -> str:
    """*report* as HTML: numbers, passes, and what was left alone behind a fold."""
    lossy = "" if report.exact else " · <em>lossy</em>"
    title = f"<strong>{escape(report.model)}</strong> for {escape(report.target)} on {escape(report.backend)}"
    parts = [f"<p style='margin:.3em 0'>{title}{lossy}</p>", _numbers(report), _passes(report.passes)]
    if report.skips:
        parts.append(_reasons(report.passes, len(report.skips)))
    return f"<div style='font-size:.95em;line-height:1.45'>{''.join(parts)}</div>"


def _numbers(report: Report) -> str:
    rows = [["", "model", "compiled", ""]]
    for name, pair in (("parameters", report.parameters), ("MACs", report.macs)):
        rows.append([name, si_text(pair[0]), si_text(pair[1]), ratio_text(*pair)])
    rows.append(["weights", bytes_text(report.bytes[0]), bytes_text(report.bytes[1]), ratio_text(*report.bytes)])
    eager, ours = report.latency_ms.get("eager"), report.latency_ms.get("fxopt")
    if eager and ours:
        rows.append(["latency", f"{eager:.2f} ms", f"{ours:.2f} ms", speed_text(eager, ours)])
    if report.error is not None:
        rows.append(["error", "", f"{report.error:.1e}", "of the output's range, against eager"])
    return _table(rows, "lrrl")


def _passes(records: list[PassRecord]) -> str:
    rows = [["pass", "edits", "ops", "s", "against before"]]
    for one in records:
        calls = str(one.nodes[1]) if one.nodes[0] == one.nodes[1] else f"{one.nodes[0]} → {one.nodes[1]}"
        cost = "" if one.difference is None else "same" if one.exact else str(one.difference)
        rows.append([one.spec, str(one.edits or "–"), calls, f"{one.seconds:.2f}", cost])
    return _table(rows, "lrrrl")


def _reasons(records: list[PassRecord], count: int) -> str:
    items = []
    for one in records:
        for reason, times in Counter(skip.reason for skip in one.skips).most_common(_MOST_REASONS):
            first = next(skip for skip in one.skips if skip.reason == reason)
            more = f" and {times - 1} more" if times > 1 else ""
            where = f" <small>({escape(first.source)})</small>" if first.source else ""
            items.append(f"<li>{escape(one.name)}: {escape(first.node)}{more}: {escape(reason)}{where}</li>")
    return f"<details><summary>Left alone: {count}</summary><ul style='margin:.3em 0'>{''.join(items)}</ul></details>"


def _table(rows: list[list[str]], aligned: str) -> str:
    side = {"l": "left", "r": "right"}
    styles = [_CELL.format(side[letter]) for letter in aligned]
    lines = []
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        cells = (f"<{tag} style='{style}'>{escape(cell)}</{tag}>" for cell, style in zip(row, styles, strict=True))
        lines.append(f"<tr style='background:none'>{''.join(cells)}</tr>")
    return f"<table style='border-collapse:collapse;margin:.3em 0'>{''.join(lines)}</table>"
