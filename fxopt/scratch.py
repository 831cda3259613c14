"""A folder for the files of a compiled model, which goes when the last of its users does."""

from __future__ import annotations

import shutil
import tempfile
import weakref


class Scratch(tempfile.TemporaryDirectory[str]):
    """As a TemporaryDirectory, but going away unasked is what it is for, and no warning."""

    def __init__(self) -> None:
        super().__init__(prefix="fxopt-")
        self._finalizer.detach()  # type: ignore[has-type]
        self._finalizer = weakref.finalize(self, shutil.rmtree, self.name, ignore_errors=True)
