"""What every engine that runs an exported ONNX file does around its own call."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from fxopt.backend import Executable, Payload
from fxopt.backends._onnx_file import OnnxFile
from fxopt.errors import BackendUnavailable, FxoptError
from fxopt.target import Target


class FileExecutable(Executable):
    """An exported file, and the engine that runs it where the target is this machine.

    Class attributes:
        engine: its name, for error messages.
    """

    engine: ClassVar[str]

    @property
    def product(self) -> str:
        """The file that it saves, for error messages."""
        return "model.onnx"

    def __init__(self, file: OnnxFile, target: Target, *, runs_here: bool, obstacle: str = "") -> None:
        """For a machine that this one is not, or where something is missing, the file is all there is."""
        self.obstacle = obstacle
        self._file = file
        self._target = target
        self._runs_here = runs_here

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Flat outputs for flat inputs.

        Raises:
            BackendUnavailable: compiled for a machine that this one is not.
            InputError: an input holds an integer that the engine would compute something else from.
            FxoptError: the engine failed; the message names the user's op where it is known.
        """
        if not self._runs_here:
            why = self._target.obstacle or self.obstacle or "this backend drives it on the CPU"
            raise BackendUnavailable(
                f"this model was compiled for target '{self._target}', which {self.engine} cannot run here, since "
                f"{why}: save it with .save({self.product!r}) and run that file there"
            )
        feed = self._file.interface.feed(inputs)
        try:
            results = self._run(feed)
        except Exception as error:
            raise FxoptError(f"{self.engine} failed: {self._file.explain(error)}") from error
        return self._file.interface.collect(results)

    @abc.abstractmethod
    def _run(self, feed: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The graph's outputs in order, in memory of their own, for its inputs by name."""

    def save(self, path: Path) -> None:
        """Write the .onnx file that the engine was given; above 2 GB the weights go to ``path.data`` beside it.

        Raises:
            ArtifactError: another suffix, or the file cannot be written.
        """
        self._file.save(path)

    def payload(self) -> Payload:
        """The file as the engine reads it, and how to call it."""
        return self._file.payload()

    def constant(self, name: str) -> torch.Tensor:
        """The weight *name*, read from the file.

        Raises:
            KeyError: the file holds no such weight.
        """
        return self._file.constant(name)

    def nbytes(self) -> int:
        """Bytes of the file."""
        return self._file.nbytes()


def runs_here(target: Target) -> bool:
    """Whether the engines, which run on the CPU, can run a model for *target* on this machine."""
    return target.runs_here and target.name != "cuda"
