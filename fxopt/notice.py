"""What the surroundings say and are told: warnings at the user's own line, the log, the folder of the cache.

``FXOPT_LOG=info`` (or debug, warning, error) writes what fxopt does to stderr; without it the logger ``fxopt`` is the
application's to configure, as any other.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

import torch

from fxopt.errors import InputError

LOG = logging.getLogger("fxopt")
_LEVELS = ("debug", "info", "warning", "error")
_HOME = Path(__file__).parent
# fxopt lies in one folder where it is installed, and in three beside each other in its repository.
_INSIDE = tuple(
    str(path) + os.sep
    for path in (_HOME, _HOME.parent / "passes", _HOME.parent / "backends", Path(torch.__file__).parent)
)
_LIBRARY = str(Path(os.__file__).parent) + os.sep
_BETWEEN = ("<", _LIBRARY + "contextlib.py", _LIBRARY + "functools.py")


def warn(text: str) -> None:
    """Warn of *text* at the line of the user's code that called into fxopt."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*_INSIDE, *_BETWEEN)):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def configure_log() -> None:
    """Follow the environment variable FXOPT_LOG.

    Raises:
        InputError: it names no level.
    """
    level = os.environ.get("FXOPT_LOG", "").lower()
    if not level or LOG.handlers:
        return
    if level not in _LEVELS:
        raise InputError(f"FXOPT_LOG={level!r}: it must be one of {', '.join(_LEVELS)}")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s fxopt %(levelname)s %(message)s", "%H:%M:%S"))
    LOG.addHandler(handler)
    LOG.setLevel(level.upper())


def cache_folder(asked: object) -> Path | None:
    """Where compiled models are kept, for the argument ``cache`` of :func:`fxopt.compile`; None for nowhere.

    Raises:
        InputError: it is neither a yes, a no nor a folder.
    """
    if asked is None:
        text = os.environ.get("FXOPT_CACHE") or "0"
        asked = {"0": False, "1": True}.get(text, text)
    if isinstance(asked, bool):
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(home) / "fxopt" if asked else None
    if not isinstance(asked, (str, os.PathLike)) or not os.fspath(asked):
        raise InputError(f"cache must be True, False or a folder, not {asked!r:.80}")
    return Path(asked).expanduser()
