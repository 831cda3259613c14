"""TVM as the engine: the ONNX file compiled to machine code with loops of ours, ahead of time and without tuning.

    program ──export──▶ ONNX file ──import──▶ Relax, channels last ──operators as stages, weights packed──▶
    fused functions ──our loops──▶ LLVM ──▶ library + parameters     .save("model.so") writes both

TVM's own code is two orders of magnitude slower than a library before it is tuned, so none of its schedules are used.
Instead every function that is left after fusion is taken apart into the tensors that it computes (_tvm_stages), and
loops are written for them from a few rules (_tvm_schedule): one register-tiled kernel for convolutions and matrix
products (_tvm_kernels), whose weights are packed when the model is built (_tvm_operators), with everything elementwise
after it in its registers; vectorized reductions and elementwise loops for the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch

from fxopt.backend import Backend, Executable, Payload, check_threads
from fxopt.backends._onnx_executable import FileExecutable, runs_here
from fxopt.backends._onnx_file import OnnxFile
from fxopt.backends._tuning import Tuning
from fxopt.errors import ArtifactError, BackendUnavailable, FxoptError, UnsupportedOp
from fxopt.program import Program
from fxopt.target import Target

LIBRARY = "library.so"  # in an artifact


class TvmExecutable(FileExecutable):
    """A library compiled by TVM, and its parameters. Calls may run side by side, on virtual machines of their own."""

    engine: ClassVar[str] = "TVM"

    def __init__(self, file: OnnxFile, target: Target, built: Any, threads: int | None, remark: str = "") -> None:
        """*built* is a ``_tvm_build.Built``; *remark* tells how it was tuned."""
        super().__init__(file, target, runs_here=runs_here(target))
        self.notes = (f"tuned: {remark}",) if remark else ()
        self._built = built
        self._threads = threads

    @property
    def product(self) -> str:
        """The library, as it can be written here."""
        return str(self._built.product)

    def payload(self) -> Payload:
        """The ONNX file, from which weights are packed again, and the library where it can be linked and run here."""
        from fxopt.backends import _tvm_build

        plain = super().payload()
        tiles = {name: list(dataclasses.astuple(tile)) for name, tile in self._built.tiles.items()}
        plain = dataclasses.replace(plain, facts={**plain.facts, "tiles": tiles})
        if not self._runs_here:
            return plain
        self._linked = tempfile.TemporaryDirectory(prefix="fxopt-")
        library = Path(self._linked.name) / LIBRARY
        try:
            self._built.link(library)
        except ArtifactError:
            return plain
        facts = {**plain.facts, "versions": _tvm_build.versions()}
        return dataclasses.replace(plain, files={**plain.files, LIBRARY: library}, facts=facts, code=True)

    def _run(self, feed: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        results: list[torch.Tensor] = self._built.run(list(feed.values()), self._threads or torch.get_num_threads())
        return results

    def save(self, path: Path) -> None:
        """Write the library, and its parameters beside it: ``model.so`` and ``model.params``.

        The two load with the TVM runtime alone: see ``_tvm_build.Built.save``.

        Raises:
            ArtifactError: another suffix than .so or .tar, no linker for the target, or it cannot be written.
        """
        self._built.save(path)

    def nbytes(self) -> int:
        """Bytes of the parameters, as they are packed."""
        size: int = self._built.nbytes()
        return size


@dataclasses.dataclass(frozen=True)
class TvmBackend(Backend):
    """Compiles the exported ONNX file with TVM.

    Attributes:
        threads: threads for one call; None for as many as torch uses.
        tune: {"trials": 512} or {"seconds": 600} measure for faster kernels; None leaves them to the rules.
        mixed: run the parts of a model that TVM cannot take on PyTorch, and the rest on TVM.
    """

    name: ClassVar[str] = "tvm"
    requires: ClassVar[tuple[str, ...]] = ("tvm", "onnx", "onnxscript")
    install: ClassVar[str] = "'fxopt[tvm]'"
    last_resort: ClassVar[bool] = True
    threads: int | None = None
    tune: Tuning | None = None
    mixed: bool = False

    def __post_init__(self) -> None:
        check_threads(self.threads)
        object.__setattr__(self, "tune", Tuning.of(self.tune))

    def lower(self, program: Program, target: Target, inputs: Sequence[Any]) -> Executable:
        """The program as a library; weights move from the program into an ONNX file and into packed parameters.

        Raises:
            UnsupportedOp: ONNX or TVM cannot express some ops, or the model keeps state; see ``mixed``.
            BackendUnavailable: TVM is not installed.
        """
        self.require()
        from fxopt.backends import _tvm_mixed
        from fxopt.backends._tvm_target import machine

        if target.name == "cuda":
            self._check_for_gpu()
        else:
            machine(target)  # where there is none, no part of the model can be compiled
        return _tvm_mixed.lower(self, program, target)

    def _check_for_gpu(self) -> None:
        for option in ("mixed", "tune"):
            if getattr(self, option):
                raise UnsupportedOp(f"the tvm backend has no option {option!r} for target 'cuda': leave it out")

    def check(self, file: OnnxFile) -> None:
        """That TVM knows the operators of *file*.

        Raises:
            UnsupportedOp: it does not; with the nodes of the program.
        """
        import onnx

        from fxopt.backends._tvm_import import from_onnx

        with _explained(file):
            from_onnx(onnx.load(file.path), file.origins)

    def build(self, file: OnnxFile, target: Target) -> Executable:
        """*file* as a library.

        Raises:
            UnsupportedOp: TVM cannot compile it; with the nodes of the program where it says which.
        """
        from fxopt.backends import _tvm_build
        from fxopt.backends._tvm_target import machine

        if target.name == "cuda":
            return _for_gpu(file, target)
        facts = machine(target)
        with _explained(file):
            tiles, remark = self._tiles(file, target, facts)
            built = _tvm_build.build(file, facts, tiles)
        return TvmExecutable(file, target, built, self.threads, remark)

    def _tiles(self, file: OnnxFile, target: Target, facts: Any) -> tuple[Any, str]:
        """Which tiles kernels get, and a remark for the report.

        Raises:
            BackendUnavailable: they are to be tuned, and there is no device to measure on.
        """
        from fxopt.backends import _tvm_tuning
        from fxopt.backends._tvm_workloads import Tiles

        if self.tune is None:
            return Tiles(), ""
        here = runs_here(target) and not self.tune.tracker
        if not here and not self.tune.tracker and self.tune.trials != 0:
            raise BackendUnavailable(
                f"target '{target}' cannot be tuned on this machine: start a tracker and servers of TVM's RPC, on "
                'devices of its kind, and say tune={"tracker": "host:port", "key": …}'
            )
        threads = self.threads or torch.get_num_threads() if here else self.threads
        return _tvm_tuning.tuned(file, facts, threads, self.tune)

    def restore(self, folder: TemporaryDirectory[str], facts: Mapping[str, Any], target: Target) -> Executable:
        """The model of an artifact: its library where it was made by the same versions, else compiled again.

        Raises:
            ArtifactError: its file is not sound. UnsupportedOp: this TVM cannot compile it.
        """
        from fxopt.backends import _tvm_build
        from fxopt.backends._tvm_target import machine
        from fxopt.backends._tvm_workloads import Tiles

        file, library = OnnxFile.restored(folder, facts), Path(folder.name) / LIBRARY
        if target.name == "cuda":
            return _for_gpu(file, target)
        with _explained(file):
            tiles = Tiles.restored(facts.get("tiles", {}))
            if facts.get("versions") == _tvm_build.versions() and library.is_file() and runs_here(target):
                built = _tvm_build.rebuild(file, machine(target), tiles, library)
            else:
                built = _tvm_build.build(file, machine(target), tiles)
            return TvmExecutable(file, target, built, self.threads)


def _for_gpu(file: OnnxFile, target: Target) -> Executable:
    from fxopt.backends import _tvm_cuda

    with _explained(file):
        return _tvm_cuda.CudaExecutable(file, target, _tvm_cuda.build(file, target))


@contextlib.contextmanager
def _explained(file: OnnxFile) -> Any:
    """TVM's errors as ours, and operators of *file* that it declines by the nodes of the program."""
    try:
        yield
    except UnsupportedOp as error:
        import onnx

        from fxopt.backends._tvm_import import origins_of_all

        graph = onnx.load(file.path, load_external_data=False).graph
        sources = origins_of_all(graph, file.sources)
        nodes = {sources[name]: why for name, why in error.nodes.items() if name in sources}
        raise UnsupportedOp(str(error), nodes) from error.__cause__
    except FxoptError:
        raise
    except Exception as error:
        why = f"TVM cannot compile this model: {file.explain(error)}"
        raise UnsupportedOp(why, file.blamed(str(error), why)) from error
