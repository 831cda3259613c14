"""What commands print: text for people, or one JSON object with ``--json``; errors in one line; exit statuses."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console, RenderableType
from rich.markup import escape

from fxopt.errors import FxoptError, InputError, SpecError

NO, WRONG = 1, 2

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Arguments = ParamSpec("Arguments")


def emit(data: dict[str, Any], text: RenderableType, *, as_json: bool, wrap: bool = True) -> None:
    """Print *data* as JSON, or *text*; without *wrap* its lines stay whole, however narrow the terminal is."""
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2, default=str) + "\n")
    else:
        Console(soft_wrap=not wrap).print(text)
    sys.stdout.flush()  # what cannot be written is told here


def guarded(command: Callable[Arguments, int | None]) -> Callable[Arguments, None]:
    """*command*, whose result is the exit status; errors and fxopt's warnings in one line each, on stderr.

    ``FXOPT_LOG=debug`` shows where an error comes from that fxopt does not raise on purpose.
    """

    @functools.wraps(command)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        as_json = bool(kwargs.get("as_json"))
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _show
            try:
                status = command(*args, **kwargs)
            except FxoptError as error:
                wrong = isinstance(error, (SpecError, InputError))
                _fail(error, as_json=as_json)
                raise typer.Exit(WRONG if wrong else NO) from error
            except (typer.Exit, BrokenPipeError):  # the latter is whoever reads us being done
                raise
            except Exception as error:
                logging.getLogger("fxopt").debug("the command failed", exc_info=True)
                _fail(error, as_json=as_json)
                raise typer.Exit(NO) from error
        if status:
            raise typer.Exit(status)

    return run


def _fail(error: Exception, *, as_json: bool) -> None:
    found = {"error": {"kind": type(error).__name__, "message": str(error)}}
    with contextlib.suppress(OSError):  # where nothing can be written any more
        if as_json:
            sys.stdout.write(json.dumps(found, indent=2) + "\n")
            sys.stdout.flush()
        else:
            Console(stderr=True, soft_wrap=True).print(f"[bold red]{type(error).__name__}:[/] {escape(str(error))}")


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: object = None,
) -> None:
    """Only what fxopt says: the warnings of the libraries below are not for the user of a command."""
    if category is UserWarning and ("fxopt" in str(message) or ": " in str(message)[:40]):
        Console(stderr=True, soft_wrap=True).print(f"[yellow]warning:[/] {escape(str(message))}")
