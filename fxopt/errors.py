"""The one exception hierarchy: every error fxopt raises on purpose is a :class:`FxoptError`.

A message says what was wrong, where (node, user source line, argument), and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class FxoptError(Exception):
    """Base of every error that fxopt raises on purpose."""


class InputError(FxoptError, ValueError):
    """An argument of a public function, or an input of a compiled model, is not what it must be."""


class SpecError(FxoptError, ValueError):
    """A pass, option, target or backend name is unknown, or a spec string does not parse."""


class CaptureError(FxoptError):
    """The model could not be turned into a graph."""


class PassError(FxoptError):
    """A pass failed. The graph from before the pass was kept.

    Attributes:
        dump: the graph text from before the failing pass, or "" where there is none.
    """

    dump: str = ""


class PreconditionError(PassError):
    """A pass was asked for in a situation it cannot work in (order, missing calibration data...)."""


class VerifyError(PassError):
    """A rewritten graph is malformed, or does not compute what it must."""


class UnsupportedOp(FxoptError):
    """A backend has no translation for some op of the graph.

    Attributes:
        nodes: why, by the name of each node of the graph that the backend cannot take. Empty where the reason is not
            one of single nodes, or the backend does not say.
    """

    def __init__(self, message: str = "", nodes: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.nodes = dict(nodes or {})


class BackendUnavailable(FxoptError):
    """The engine that a backend drives is not installed, or cannot run here."""


class ArtifactError(FxoptError):
    """A file cannot be written or read as a compiled model."""


def near_miss(name: str, known: Iterable[str], shown: Iterable[str] | None = None) -> str:
    """A sentence that helps after an unknown *name*: the closest known one, and all of them, or those of *shown*."""
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known: {', '.join(choices if shown is None else sorted(shown)) or 'none'}."
