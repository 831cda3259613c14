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
