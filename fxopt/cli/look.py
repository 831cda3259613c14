"""``fxopt dump``, ``diff``, ``report``, ``targets``, ``passes`` and ``backends``."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

import fxopt
from fxopt import dump as fxir
from fxopt import registry
from fxopt.artifact.container import Container
from fxopt.artifact.reports import encode_report
from fxopt.cache import Cache
from fxopt.cli import build, sources
from fxopt.cli.output import NO, emit
from fxopt.errors import ArtifactError, InputError
from fxopt.notice import cache_folder


def dump(
    name: str, inputs: Sequence[str], target: str | None, passes: str | None, *, allow_code: bool, as_json: bool
) -> int | None:
    """The final graph as text."""
    build.refuse_for_artifacts(name, input=inputs, target=target, passes=passes)
    if name.endswith(".fxopt"):
        model = sources.artifact(name, allow_code=allow_code)
    else:
        model = build.compiled(name, build.Wish.of(None, inputs, target, "torch", passes, None, None))
    text = fxir.dump(model._current("dump").program, f"final  target {model.target}")
    emit({"fxir": text}, Text(text.rstrip()), as_json=as_json, wrap=False)
    return None


def diff(first: str, second: str, *, allow_code: bool, as_json: bool) -> int | None:
    """Lines that differ, and weights."""
    (a, weights_a), (b, weights_b) = _text(first, allow_code), _text(second, allow_code)
    lines = list(difflib.unified_diff(a.splitlines(), b.splitlines(), first, second, lineterm="", n=2))
    weights = [
        name for name in sorted(weights_a.keys() & weights_b.keys()) if not _equal(weights_a[name], weights_b[name])
    ]
    styles = {"+": "green", "-": "red", "@": "cyan"}
    parts: list[Any] = [Text(line, styles.get(line[:1], "")) for line in lines]
    parts += [Text(f"@{name} has other numbers", "yellow") for name in weights]
    found = {"same": not (lines or weights), "lines": lines, "weights": weights}
    emit(found, Group(*parts), as_json=as_json, wrap=False)
    return NO if lines or weights else None


def _text(name: str, allow_code: bool) -> tuple[str, dict[str, torch.Tensor]]:
    if name.endswith(".fxopt"):
        model = sources.artifact(name, allow_code=allow_code)
        program = model._current("diff").whole_program()
        return fxir.dump(program, f"final  target {model.target}"), program.tensors()
    try:
        return Path(name).read_text(), {}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name} is neither a .fxopt nor a readable .fxir file: {error}") from error


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def report(path: str, output: Path | None, *, as_json: bool) -> int | None:
    """The report as text, JSON or a page."""
    found = sources.report(path)
    if output is None:
        emit(encode_report(found), found, as_json=as_json)
        return None
    if output.suffix not in (".html", ".htm"):
        raise InputError(f"--output {str(output)!r}: the report is written as .html")
    found.to_html(output)
    emit({"output": str(output)}, Text(f"Written to {output}", "green"), as_json=as_json)
    return None


def targets(*, as_json: bool) -> None:
    """Every target that has a name."""
    found = fxopt.targets()
    rows = [
        {"name": str(one), "arch": one.arch, "features": sorted(one.features), "backends": list(one.backends),
         "channel_multiple": one.channel_multiple, "fast_2_4": one.fast_2_4, "runs_here": one.runs_here}
        for one in found
    ]  # fmt: skip
    emit({"targets": rows}, found, as_json=as_json)


def passes(*, as_json: bool) -> None:
    """Every pass, with its options."""
    rows, table = [], Table(box=None, header_style="dim", pad_edge=False)
    for title in ("pass", "exact", "options"):
        table.add_column(title, overflow="fold")
    for name in registry.available("fxopt.passes"):
        cls = registry.find_pass(name)
        options = {field.name: _default(field) for field in dataclasses.fields(cls) if field.init}
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        rows.append({"name": name, "exact": cls.exact, "summary": summary, "options": options})
        words = ", ".join(f"{key}={value}" for key, value in options.items())
        table.add_row(
            Text(name, "bold"),
            "yes" if cls.exact else Text("no", "yellow"),
            Text.assemble(summary, (f"\n{words}", "dim")),
        )
    emit({"passes": rows}, table, as_json=as_json)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def backends(*, as_json: bool) -> None:
    """Every backend, and what is missing for it."""
    rows, table = [], Table(box=None, header_style="dim", pad_edge=False)
    for title in ("backend", "installed", "options"):
        table.add_column(title)
    for name in registry.available("fxopt.backends"):
        cls = registry.find_backend(name)
        missing = [module for module in cls.requires if importlib.util.find_spec(module) is None]
        options = {field.name: _default(field) for field in dataclasses.fields(cls)}
        rows.append({"name": name, "installed": not missing, "install": cls.install, "options": options})
        state = Text("yes", "green") if not missing else Text(f"no: pip install {cls.install}", "red")
        table.add_row(Text(name, "bold"), state, ", ".join(f"{key}={value}" for key, value in options.items()))
    emit({"backends": rows}, table, as_json=as_json)


def cache(folder: Path | None, *, clear: bool, as_json: bool) -> None:
    """What the cache holds, the latest used first; or nothing any more."""
    kept = Cache.at(folder or cache_folder(True) or Path())
    if clear:
        count = kept.clear()
        emit({"folder": str(kept.folder), "removed": count}, f"{count} files removed", as_json=as_json)
        return
    rows, table = [], Table(box=None, header_style="dim", pad_edge=False)
    for title in ("model", "backend", "target", "MB", "used"):
        table.add_column(title, justify="right" if title == "MB" else "left")
    for path in reversed(kept.files()):
        if not path.is_file():  # somebody else has just made room
            continue
        status, row = path.stat(), {"model": f"damaged: {path.name[:8]}", "backend": "", "target": ""}
        with contextlib.suppress(ArtifactError, KeyError, TypeError):
            about = Container(path)
            model = about.json("report.json")["model"]
            row = {"model": model, "backend": about.manifest["backend"], "target": about.manifest["target"]["name"]}
        used = datetime.datetime.fromtimestamp(status.st_mtime).isoformat(" ", "minutes")
        rows.append({**row, "bytes": status.st_size, "used": used, "file": path.name})
        table.add_row(*row.values(), f"{status.st_size / 1e6:.1f}", used)
    total = Text(f"{len(rows)} models, {kept.nbytes() / 1e6:.1f} MB of {kept.most / 1e6:.0f} in {kept.folder}", "dim")
    emit({"folder": str(kept.folder), "most": kept.most, "models": rows}, Group(table, total), as_json=as_json)
