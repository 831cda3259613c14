"""Tables as text, so that ``print(report)`` shows what rich would."""

from __future__ import annotations

import io
import shutil

from rich.console import Console, RenderableType

_NARROWEST, _USUAL, _WIDEST = 80, 110, 140  # columns


def as_text(renderable: RenderableType) -> str:
    """*renderable* as lines: in color where there is a terminal, and as wide as it."""
    terminal = Console()
    columns = shutil.get_terminal_size((_USUAL, 24)).columns
    width = terminal.width if terminal.is_terminal else max(_NARROWEST, min(columns, _WIDEST))
    buffer = io.StringIO()
    Console(file=buffer, width=width, force_terminal=terminal.is_terminal or None).print(renderable)
    return buffer.getvalue().rstrip()


def si_text(value: float) -> str:
    """*value* with the prefix of its size: ``4.09 G``."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value:.0f}"


def bytes_text(value: float) -> str:
    """*value* bytes: ``24.74 MiB``."""
    return f"{value / 2**20:.2f} MiB" if value >= 2**20 else f"{value / 2**10:.1f} KiB"


def speed_text(before: float, after: float) -> str:
    """How *after* compares with *before*, both times: ``1.45 × faster``."""
    return f"{before / after:.2f} × faster" if before >= after else f"{after / before:.2f} × slower"


def ratio_text(before: float, after: float) -> str:
    """How *after* compares with *before*, both sizes: ``3.95 × smaller``; "" where there is nothing to say."""
    if not before or not after or before == after:
        return ""
    return f"{before / after:.2f} × smaller" if before > after else f"{after / before:.2f} × larger"
