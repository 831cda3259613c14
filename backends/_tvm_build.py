"""An ONNX file compiled to a library and its parameters, and how the two are run and saved."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

# TVM reads these once, when the first thread pool is made. It would pin threads to cores, also those of other
# engines that it shares the process with, and take no more threads than OpenMP was told to use at the start.
os.environ.setdefault("TVM_BIND_THREADS", "0")
os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count() or 1))

import tvm
from tvm import relax

from fxopt.backends import _tvm_graph, _tvm_pipeline
from fxopt.backends._onnx_file import OnnxFile
from fxopt.backends._tvm_import import from_onnx
from fxopt.backends._tvm_packing import array
from fxopt.backends._tvm_target import Machine
from fxopt.backends._tvm_workloads import Tiles
from fxopt.errors import ArtifactError

_ALIGNMENT = 64  # bytes; what the compiled code expects of a tensor's address
ONE_AT_A_TIME = threading.RLock()  # for what uses relax.BlockBuilder: it keeps a stack that all threads share
_of_thread = threading.local()


def build(file: OnnxFile, machine: Machine, tiles: Tiles) -> Built:
    """Compile *file* for *machine*, its kernels of the sizes that *tiles* chooses.

    Raises:
        UnsupportedOp: TVM does not import one of its operators.
    """
    target = tvm.target.Target(machine.llvm)
    with target:
        module, weights = prepare(file, machine, tiles)
        library = relax.build(module, target, relax_pipeline=_tvm_graph.lower(), tir_pipeline=_tvm_pipeline.NAME)
    return Built(library, weights, machine, tiles)


def rebuild(file: OnnxFile, machine: Machine, tiles: Tiles, library: Path) -> Built:
    """What :func:`build` made, from the *library* that was linked of it: nothing is compiled again.

    The weights are packed again; with the same *tiles* and :func:`versions` they come in the same order.
    """
    with tvm.target.Target(machine.llvm):
        _, weights = prepare(file, machine, tiles)
    return Built(tvm.runtime.load_module(str(library)), weights, machine, tiles, library)


def prepare(file: OnnxFile, machine: Machine, tiles: Tiles) -> tuple[Any, list[Any]]:
    """The Relax module of *file* with loops of ours, and its parameters; within the target of *machine*.

    Raises:
        UnsupportedOp: TVM does not import one of its operators.
    """
    import onnx

    with ONE_AT_A_TIME:
        module = from_onnx(onnx.load(file.path), file.origins)
        prepared: tuple[Any, list[Any]] = _tvm_graph.lift_weights(_tvm_graph.optimize(module, machine, tiles))
    return prepared


@functools.cache
def versions() -> str:
    """Of TVM and of the code here: libraries and weights fit each other where it is the same."""
    sources = sorted(Path(__file__).parent.glob("_tvm_*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    return f"{tvm.__version__} {digest[:16]}"


class Built:
    """A library and its parameters.

    Attributes:
        library: the executable of TVM's virtual machine; its function main takes inputs, then parameters.
        weights: the parameters in order.
        machine: what it was compiled for.
        tiles: of its kernels that were tuned, by the names of workloads.
        linked: the file that the library was loaded from.
    """

    def __init__(
        self, library: Any, weights: Sequence[Any], machine: Machine, tiles: Tiles, linked: Path | None = None
    ) -> None:
        self.library, self.weights, self.machine, self.linked = library, list(weights), machine, linked
        self.tiles = tiles.used()
        self._idle: list[Any] = []  # virtual machines; append and pop are atomic

    @property
    def product(self) -> str:
        """The file that can be written here: a shared library where there is a linker for it."""
        if self.linked is not None:
            return f"model{self.linked.suffix}"
        try:
            linker(self.machine)
        except ArtifactError:
            return "model.tar"
        return "model.so"

    def link(self, path: Path) -> None:
        """Write the library to *path*: .so, or .tar with what is to be linked.

        Raises:
            ArtifactError: there is no linker for the target, or it fails.
        """
        if self.linked is not None:
            if path.suffix != self.linked.suffix:
                raise ArtifactError(f"this model was loaded with its code linked, as {self.linked.suffix}: save it so")
            shutil.copyfile(self.linked, path)
            return
        compiler = None if path.suffix == ".tar" else linker(self.machine)
        try:
            if compiler is None:
                self.library.export_library(str(path))
            else:
                without_debug = ["-Wl,-S"]  # TVM writes more of that than code
                create = tvm.support.cc.create_shared
                self.library.export_library(str(path), fcompile=create, cc=compiler, options=without_debug)
        except (OSError, RuntimeError) as error:
            raise ArtifactError(f"cannot link {path}: {str(error).strip().splitlines()[-1]}") from error

    def run(self, inputs: Sequence[torch.Tensor], threads: int) -> list[torch.Tensor]:
        """The outputs, in memory of their own, computed with *threads* threads."""
        use_threads(threads)
        try:
            main = self._idle.pop()
        except IndexError:
            main = relax.VirtualMachine(self.library, tvm.cpu())["main"]
        result = main(*(_tensor(x) for x in inputs), *self.weights)
        self._idle.append(main)
        results = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
        return [from_dlpack(y) for y in results]

    def save(self, path: Path) -> None:
        """Write the library to *path* (.so or .tar) and the parameters beside it.

        They load without fxopt, torch and TVM's compiler (``TVM_USE_RUNTIME_LIB=1`` keeps that out)::

            import tvm
            from tvm.runtime.vm import VirtualMachine

            library = tvm.runtime.load_module("model.so")
            parameters = tvm.runtime.load_param_dict_from_file("model.params")
            main = VirtualMachine(library, tvm.cpu())["main"]
            y = main(tvm.runtime.tensor(x), *(parameters[str(i)] for i in range(len(parameters)))).numpy()

        Raises:
            ArtifactError: another suffix, no linker, or the files cannot be written.
        """
        if path.suffix not in (".so", ".tar"):
            raise ArtifactError(f"the tvm backend writes .so and .tar files, not {path.suffix or path.name!r}")
        values = {str(i): weight for i, weight in enumerate(self.weights)}
        parameters = path.with_suffix(".params")
        try:
            with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as staging:
                self.link(Path(staging) / path.name)
                tvm.runtime.save_param_dict_to_file(values, str(Path(staging) / parameters.name))
                (Path(staging) / parameters.name).replace(parameters)
                (Path(staging) / path.name).replace(path)
        except OSError as error:
            raise ArtifactError(f"cannot write {path}: {error}") from error

    def nbytes(self) -> int:
        """Bytes of the parameters."""
        return sum(array(weight).nbytes for weight in self.weights)


def linker(machine: Machine) -> str:
    """The C++ compiler that links for *machine*.

    Raises:
        ArtifactError: there is none.
    """
    triple = str(machine.llvm["mtriple"])
    own = triple.split("-")[0] == platform.machine()
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"] if own else []
    if "apple" not in triple:
        names += [f"{triple}-g++", f"{triple}-gcc"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        needed = f"one of {', '.join(filter(None, names))}" if any(names) else "a Mac"
        raise ArtifactError(f"a shared library for {triple} needs {needed} to link it: save a .tar")
    return found


def _tensor(x: torch.Tensor) -> Any:
    """*x* as a tensor of TVM, without a copy where its address is good enough."""
    if x.data_ptr() % _ALIGNMENT:
        x = x.clone()
    return tvm.runtime.from_dlpack(x)


def use_threads(threads: int) -> None:
    """Let parallel loops that this thread starts run on *threads* threads."""
    if getattr(_of_thread, "threads", None) != threads:
        tvm.get_global_func("runtime.config_threadpool")(-1, threads)
        _of_thread.threads = threads
