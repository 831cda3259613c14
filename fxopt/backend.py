"""The contract of a backend: take a rewritten program, give back something that runs it."""

from __future__ import annotations

import abc
import dataclasses
import importlib.util
import tempfile
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.errors import ArtifactError, BackendUnavailable, PreconditionError, SpecError, near_miss
from fxopt.program import Program
from fxopt.target import Target

if typing.TYPE_CHECKING:
    from fxopt.profiling import Profile


@dataclasses.dataclass(frozen=True)
class Payload:
    """What an engine needs to run a lowered program again, on another day.

    Attributes:
        files: paths by name (lower case, digits, ``_`` and one suffix).
        facts: what else it must know: numbers, strings, lists, dicts, dtypes.
        code: whether a file holds machine code: then it is loaded only where the reader asks for it.
    """

    files: Mapping[str, Path]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    code: bool = False


class Executable(abc.ABC):
    """A lowered program.

    Calls are thread-safe. Inputs are checked against the signature by the caller. Under ``torch.no_grad`` or not,
    results carry no gradient.

    Attributes:
        notes: remarks for the report, such as which kernels compute what.
        obstacle: what is missing to run it, on a machine of the target's kind; "" where nothing is.
    """

    notes: tuple[str, ...] = ()
    obstacle: str = ""

    @abc.abstractmethod
    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Flat outputs, writebacks included, for flat inputs (one value for each placeholder)."""

    def save(self, path: Path) -> None:
        """Write the engine's own file format.

        Raises:
            ArtifactError: the backend has none for this kind of file.
        """
        raise ArtifactError(
            f"this backend cannot write {path.suffix or path.name!r} files: .fxopt is for every backend, and "
            "backend='onnx' writes .onnx"
        )

    def payload(self) -> Payload | None:
        """What ``Backend.restore`` makes this executable from; None where the program is to be lowered again."""
        return None

    def constant(self, name: str) -> torch.Tensor:
        """The tensor behind a constant that ``lower`` took out of the program, in its plain layout.

        For a constant that the model mutates (a writeback), the very tensor that the next call will read.

        Raises:
            KeyError: the executable holds no such constant.
        """
        raise KeyError(name)

    def profile(self, inputs: Sequence[Any], runs: int) -> Profile:
        """Time by operator, the median of at most *runs* runs.

        Raises:
            PreconditionError: this engine does not tell what takes how long.
        """
        raise PreconditionError(
            "this engine runs the whole graph at once and cannot time its nodes: compile with backend='torch', without "
            "inductor, to profile node by node"
        )

    def nbytes(self) -> int | None:
        """Bytes of the weights that the engine keeps, or None where it does not say."""
        return None


def check_threads(threads: object) -> None:
    """That *threads* is a number of threads, or None.

    Raises:
        SpecError: it is not.
    """
    if threads is not None and (type(threads) is not int or threads < 1):
        raise SpecError(f"threads must be a whole number of at least 1, or None, not {threads!r}")


@dataclasses.dataclass(frozen=True)
class Backend(abc.ABC):
    """One engine. Subclasses are frozen dataclasses; their fields are the ``backend_options``.

    Class attributes:
        name: what the user writes as ``backend=``.
        requires: top-level modules of the engine; where one is not importable the backend is unavailable.
        install: what to pip-install for them.
        last_resort: takes long to compile, so ``backend="auto"`` tries it only where no engine before it takes a model.
    """

    name: ClassVar[str]
    last_resort: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ()
    install: ClassVar[str] = ""

    @property
    def exact(self) -> bool:
        """Whether the engine computes what the program says, within floating-point tolerance of its dtypes."""
        return True

    def declines_int8(self, node: fx.Node) -> str | None:
        """Why *node*, a conv or linear of floats, would be no faster in int8 on this engine; None where it may be."""
        return None

    @classmethod
    def require(cls) -> None:
        """Check that the engine is installed.

        Raises:
            BackendUnavailable: it is not; the message says what to install.
        """
        missing = [m for m in cls.requires if importlib.util.find_spec(m) is None]
        if missing:
            raise BackendUnavailable(
                f"backend {cls.name!r} needs {', '.join(missing)}, which is not installed: pip install {cls.install}"
            )

    @abc.abstractmethod
    def lower(self, program: Program, target: Target, inputs: Sequence[Any]) -> Executable:
        """Compile *program* (owned by the backend from here on: it may consume its constants).

        Args:
            program: the graph after all passes; a copy nobody else uses.
            target: the machine to compile for.
            inputs: flat example inputs.

        Raises:
            UnsupportedOp: the engine cannot express some op; each is named with its source line.
            BackendUnavailable: the engine is not installed.
        """

    def restore(self, folder: tempfile.TemporaryDirectory[str], facts: Mapping[str, Any], target: Target) -> Executable:
        """The executable whose ``payload`` had these *facts*, and files that now lie in *folder*, for it to keep.

        The files may come from anyone: nothing in them may be run, or read from another place, without a check.

        Raises:
            ArtifactError: they are none of this backend's.
        """
        folder.cleanup()
        raise ArtifactError(f"backend {self.name!r} has no files of its own in an artifact")

    @classmethod
    def with_options(cls, options: dict[str, Any]) -> Backend:
        """An instance with *options* set.

        Raises:
            SpecError: the backend has no such option, or it takes no such value.
        """
        from fxopt import spec

        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls)}
        for name in options:
            if name not in known:
                raise SpecError(f"backend {cls.name!r} has no option {name!r}.{near_miss(name, known)}")
        made = cls(**options)  # says by itself what it wants, where it does
        for name in options:
            spec.fit(getattr(made, name), hints[name], f"backend {cls.name!r}, option {name!r}")
        return made
