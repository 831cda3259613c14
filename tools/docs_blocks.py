"""The code in the documentation: found, run page by page, and compared with the output that the page shows.

```python               is run; the blocks of a page share their names and an empty folder
```python title="a.py"  is written to the file a.py in that folder, as is any block with a title
```console              holds commands after ``$``, and perhaps what they print; those of fxopt are run
```text, ```fxir        right after a python block: what it prints; ``...`` stands for anything
<!-- setup … -->        Python that is run and that no reader sees
# exit status 1         after a command that is meant to fail
"""

from __future__ import annotations

import contextlib
import dataclasses
import doctest
import io
import os
import re
import shlex
import sys
import traceback
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_BLOCK = re.compile(
    r"^```(?P<info>[^`\n]*)\n(?P<code>.*?)^```$|^<!-- setup\n(?P<setup>.*?)^-->$", re.DOTALL | re.MULTILINE
)
_TITLE = re.compile(r'title="([^"]+)"')
_OUTPUT = ("text", "fxir")
# Digits that another machine may round otherwise; three are shown.
_LONG = re.compile(r"(\d\.0*[1-9]\d{2})\d{3,}")
_STATUS = re.compile(r"# exit status (\d+)")
# What pages may tell readers to type and no test runs: it installs something, or is a tool with tests of its own.
_NOT_RUN = ("pip", "git", "cd", "python", "source")
_COLUMNS = "100"
_MODULE = "fxopt_documentation_page"
_FILE = "example.py"  # what reasons and errors of fxopt name, with the line within the block


@dataclasses.dataclass
class Block:
    """One fenced block, or a hidden one.

    Attributes:
        kind: its language; "setup" for a hidden one.
        title: of the file that it is.
        code: its text.
        line: of the first line of *code*, from 1.
        span: where *code* stands in the page.
        shown: for Python, the block after it that shows what it prints.
    """

    kind: str
    title: str
    code: str
    line: int
    span: tuple[int, int]
    shown: Block | None = None


def blocks(text: str) -> list[Block]:
    """The blocks of a page, in order; outputs stand in the blocks that print them."""
    found, end = list[Block](), 0
    for match in _BLOCK.finditer(text):
        group = "setup" if match["setup"] is not None else "code"
        info = "setup" if group == "setup" else match["info"]
        title = _TITLE.search(info)
        line = text.count("\n", 0, match.start(group)) + 1
        kind = info.split()[0] if info.split() else ""
        one = Block(kind, title[1] if title else "", match[group], line, match.span(group))
        last = found[-1] if found else None
        if kind in _OUTPUT and last is not None and last.kind == "python" and not text[end : match.start()].strip():
            last.shown = one
        else:
            found.append(one)
        end = match.end()
    return found


def runs(page: Path) -> bool:
    """Whether *page* has anything to run."""
    return any(one.kind in ("python", "console", "sh", "setup") for one in blocks(page.read_text()))


def run(page: Path, *, write: bool = False) -> list[str]:
    """Run *page* from top to bottom; gives what is wrong, a text each.

    Args:
        page: a Markdown file.
        write: put what Python blocks print into the page, where it shows something else.
    """
    text = page.read_text()
    problems, changes = list[str](), list[tuple[tuple[int, int], str]]()
    with TemporaryDirectory(prefix="fxopt-docs-") as folder, _place(Path(folder)) as names:
        for one in blocks(text):
            where = f"{page.name}:{one.line}"
            if one.title:
                (Path(folder) / one.title).write_text(one.code)
            elif one.kind in ("python", "setup"):
                printed, problem = _python(one, names)
                if problem:
                    problems.append(f"{where}: {problem}")
                    break  # what follows stands on it
                if one.shown is not None and not _agree(one.shown.code, printed):
                    if write:
                        changes.append((one.shown.span, _LONG.sub(r"\1...", printed)))
                    else:
                        problems.append(f"{where} prints\n{printed}\nand shows\n{one.shown.code}")
            elif one.kind in ("console", "sh"):
                problems += [f"{where}: {problem}" for problem in _console(one)]
    for (start, stop), printed in reversed(changes):
        text = text[:start] + printed + text[stop:]
    if changes:
        page.write_text(text)
    return problems


@contextlib.contextmanager
def _place(folder: Path) -> Iterator[dict[str, Any]]:
    """An empty folder to be in and a module to run in; leaves the process as it was."""
    import torch

    from fxopt.notice import LOG

    before, path, threads = Path.cwd(), list(sys.path), torch.get_num_threads()
    environment, handlers, level = dict(os.environ), list(LOG.handlers), LOG.level
    for name in [name for name in os.environ if name.startswith("FXOPT_")]:
        del os.environ[name]
    os.environ["COLUMNS"] = _COLUMNS
    module = types.ModuleType(_MODULE)
    sys.modules[_MODULE] = module
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the models are small
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield vars(module)
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = path
        torch.set_num_threads(threads)
        LOG.handlers[:] = handlers
        LOG.setLevel(level)
        for name, one in list(sys.modules.items()):
            if name == _MODULE or str(getattr(one, "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]


def _python(one: Block, names: dict[str, Any]) -> tuple[str, str]:
    """(what the block prints, what is wrong)."""
    printed = io.StringIO()
    try:
        code = compile(one.code, _FILE, "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, names)
    except Exception as error:
        inside = [frame.lineno or 0 for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _FILE]
        where = f", line {one.line + inside[-1] - 1} of the page" if inside else ""
        return printed.getvalue(), f"{type(error).__name__}: {error}{where}"
    return _trimmed(printed.getvalue()), ""


def _trimmed(text: str) -> str:
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    return "\n".join(lines) + "\n"


def _agree(shown: str, printed: str) -> bool:
    return doctest.OutputChecker().check_output(_trimmed(shown), _trimmed(printed), doctest.ELLIPSIS)


def commands(one: Block) -> list[tuple[str, str]]:
    """(command, what is shown under it) of a console block; of a sh block every line is a command."""
    found = list[tuple[str, str]]()
    for line in one.code.replace("\\\n", " ").splitlines():
        if one.kind == "sh" or line.startswith("$ "):
            found.append((line.removeprefix("$ "), ""))
        elif found:
            found[-1] = (found[-1][0], found[-1][1] + line + "\n")
    return [(command, shown) for command, shown in found if command.strip()]


def _console(one: Block) -> Iterator[str]:
    """What is wrong with the commands of a block."""
    for command, shown in commands(one):
        words = shlex.split(command, comments=True)
        given = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
        words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
        if words and words[0] == "fxopt":
            wanted = _STATUS.search(command)
            status, printed = _fxopt(words[1:], given)
            if status != (int(wanted[1]) if wanted else 0):
                yield f"{command!r} exits with {status}:\n{printed}"
            elif shown and not _agree(shown, printed):
                yield f"{command!r} prints\n{printed}\nand shows\n{shown}"
        elif words and words[0] not in _NOT_RUN and not words[0].startswith("tools/"):
            yield f"{command!r} is no command of fxopt, and nothing else is run"


def _fxopt(arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """(exit status, output) of the command fxopt."""
    from unittest import mock

    from typer.testing import CliRunner

    from fxopt.cli import app

    # A reader has a shell, a test may have none.
    with mock.patch("shellingham.detect_shell", return_value=("bash", "/bin/bash")):
        done = CliRunner().invoke(app, arguments, env=environment)
    problem = "" if done.exception is None or isinstance(done.exception, SystemExit) else repr(done.exception)
    return done.exit_code, done.output + problem
