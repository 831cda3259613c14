"""Size limits of the library: files of at most 300 lines, functions of at most 50."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator

from tools import ROOT

FOLDERS = ("fxopt", "passes", "backends")
FILE_LINES = 300
FUNCTION_LINES = 50


def oversized(source: str) -> Iterator[tuple[int, str]]:
    """Line and complaint for everything in *source* that is over a limit."""
    lines = len(source.splitlines())
    if lines > FILE_LINES:
        yield 1, f"{lines} lines, the limit of a file is {FILE_LINES}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                yield node.lineno, f"{node.name} has {length} lines, the limit of a function is {FUNCTION_LINES}"


def main() -> int:
    """Prints everything over a limit; the exit status is 1 where there is something."""
    failed = False
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for line, complaint in oversized(path.read_text()):
                print(f"{path.relative_to(ROOT)}:{line}: {complaint}")
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
