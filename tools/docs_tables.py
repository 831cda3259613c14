"""The tables of the documentation that say what the code says: options of passes and backends, passes, targets.

    <!-- options prune-channels -->  …  <!-- end -->         likewise ``backend onnx``, ``passes``,
                                                             ``targets`` and ``schemes``

``tools/docs --write`` writes what stands between the two, and a test checks it.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from fxopt import registry, target_list
from fxopt.passes.insert_fake_quant.scheme import SCHEMES

_TABLE = re.compile(
    r"^<!-- (?P<what>options|backend|passes|targets|schemes)(?: (?P<name>[\w-]+))? -->\n(?P<body>.*?)^<!-- end -->$",
    re.DOTALL | re.MULTILINE,
)


def updated(page: Path) -> str:
    """The text of *page* with every table as the code has it."""
    makers: dict[str, Callable[[str], str]] = {
        "options": options,
        "backend": backend,
        "passes": lambda _: passes(),
        "targets": lambda _: targets(),
        "schemes": lambda _: schemes(),
    }

    def table(match: re.Match[str]) -> str:
        head = match[0].splitlines()[0]
        return f"{head}\n{makers[match['what']](match['name'] or '')}<!-- end -->"

    return _TABLE.sub(table, page.read_text())


def options(name: str) -> str:
    """The options of the pass *name*, what must stand before and after it, and whether it is exact."""
    found = registry.find_pass(name)
    order = [
        f"{word} {', '.join(f'`{one}`' for one in others)}"
        for word, others in (("after", found.runs_after), ("before", found.runs_before))
        if others
    ]
    exact = "Exact: outputs stay equal within floating-point tolerance." if found.exact else "Lossy."
    stands = f" Where they are in the pipeline too, it stands {', and '.join(order)}." if order else ""
    return f"{_options(found)}\n{exact}{stands}\n"


def backend(name: str) -> str:
    """The options of the backend *name*."""
    return _options(registry.find_backend(name))


def _options(found: Any) -> str:
    fields = [field for field in dataclasses.fields(found) if field.init]
    if not fields:
        return "It has no options.\n"
    hints, texts = typing.get_type_hints(found), attributes(found.__doc__ or "")
    rows = [
        (f"`{field.name}`", _values(hints[field.name]), _default(field), _text(field.name, texts)) for field in fields
    ]
    return _table(("option", "values", "default", "what it does"), rows)


def attributes(docstring: str) -> dict[str, str]:
    """What the section "Attributes" of *docstring* says of each name, on one line."""
    _, _, section = inspect.cleandoc(docstring).partition("Attributes:\n")
    found = dict[str, str]()
    name = ""
    for line in section.splitlines():
        if head := re.match(r"    (\w+): (.*)", line):
            name, found[head[1]] = head[1], head[2]
        elif name and line.strip():
            found[name] += " " + line.strip()
        else:
            name = ""
    return found


def _text(name: str, texts: dict[str, str]) -> str:
    if name in texts:
        return _plain(texts[name])
    other = next((one for one, text in texts.items() if f"``{name}``" in text), None)
    return f"see `{other}`" if other else ""


def _plain(text: str) -> str:
    """A docstring's words as Markdown: its code and names as code."""
    text = re.sub(r":\w+:`", "`", text).replace("``", "`")
    return re.sub(r"(?<![\w*])\*(\w[\w-]*)\*(?![\w*])", r"`\1`", text)


def _values(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{_word(part)}`" for part in parts)
    if origin in (types.UnionType, typing.Union):
        return ", ".join(_values(part) for part in parts if part is not type(None))
    if origin is tuple:
        return "list"
    words = {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}
    return words.get(hint, "from Python")


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return f"`{_word(value)}`" if value not in (None, ()) else ""


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def passes() -> str:
    """Every pass, with its first sentence and its page."""
    rows = []
    for name in registry.available("fxopt.passes"):
        found = registry.find_pass(name)
        if found.__module__.startswith("fxopt."):
            summary = _plain(inspect.cleandoc(found.__doc__ or "").splitlines()[0].partition(". ")[0].rstrip("."))
            rows.append((f"[`{name}`]({name}.md)", summary, "yes" if found.exact else "no"))
    return _table(("pass", "what it does", "exact"), rows)


def targets() -> str:
    """Every machine that has a name of its own."""
    rows = []
    for one in target_list.targets():
        if one.cpu and str(one) == one.cpu:
            features = " ".join(sorted(one.features))
            low = [name for name in ("bfloat16", "float16") if getattr(torch, name) in one.native_dtypes]
            int8 = "7 bits" if one.narrow_int8 else "8 bits"
            fast = "fast" if one.fast_2_4 else ""
            rows.append((f"`{one}`", one.name, features, " ".join(low), int8, fast, " ".join(one.backends)))
    return _table(("target", "kind", "features", "low precision", "int8 weights", "2:4", "engines, in order"), rows)


def schemes() -> str:
    """What each engine computes in int8."""
    rows = []
    for one in SCHEMES.values():
        activation = f"{str(one.activation.dtype).removeprefix('torch.')}{', symmetric' * one.activation.symmetric}"
        between = ", ".join(sorted(one.elementwise)) or "nothing"
        residual = "in the conv" if one.residual == "fused" else "a kernel of its own"
        rows.append((f"`{one.name}`", activation, ", ".join(sorted(one.units)), between, residual))
    return _table(("scheme", "activations", "in int8", "and between them", "residual add"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in lines)
