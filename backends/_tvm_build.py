"""An ONNX file compiled to a library and its parameters, and how the two are run and saved."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
from fxopt.backends._tvm_target import Machine
from fxopt.errors import ArtifactError

_ALIGNMENT = 64  # bytes; what the compiled code expects of a tensor's address
_of_thread = threading.local()


def build(file: OnnxFile, machine: Machine) -> Built:
    """Compile *file* for *machine*.

    Raises:
        UnsupportedOp: TVM does not import one of its operators.
    """
    import onnx

    target = tvm.target.Target(machine.llvm)
    module = from_onnx(onnx.load(file.path), file.origins)
    with target:
        module, weights = _tvm_graph.lift_weights(_tvm_graph.optimize(module, machine))
        return Built(
            relax.build(module, target, relax_pipeline=_tvm_graph.lower(), tir_pipeline=_tvm_pipeline.NAME), weights
        )


class Built:
    """A library and its parameters.

    Attributes:
        library: the executable of TVM's virtual machine; its function main takes inputs, then parameters.
        weights: the parameters in order.
    """

    def __init__(self, library: Any, weights: Sequence[Any]) -> None:
        self.library, self.weights = library, list(weights)
        self._idle: list[Any] = []  # virtual machines; append and pop are atomic

    def run(self, inputs: Sequence[torch.Tensor], threads: int) -> list[torch.Tensor]:
        """The outputs, in memory of their own, computed with *threads* threads."""
        _use_threads(threads)
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

        They load without fxopt and torch::

            library = tvm.runtime.load_module("model.so")
            parameters = tvm.runtime.load_param_dict_from_file("model.params")
            main = tvm.relax.VirtualMachine(library, tvm.cpu())["main"]
            y = main(x, *(parameters[str(i)] for i in range(len(parameters))))

        Raises:
            ArtifactError: another suffix, no linker, or the files cannot be written.
        """
        if path.suffix not in (".so", ".tar"):
            raise ArtifactError(f"the tvm backend writes .so and .tar files, not {path.suffix or path.name!r}")
        try:
            self.library.export_library(str(path))
            values = {str(i): weight for i, weight in enumerate(self.weights)}
            tvm.runtime.save_param_dict_to_file(values, str(path.with_suffix(".params")))
        except (OSError, RuntimeError) as error:
            raise ArtifactError(f"cannot write {path}: {error}") from error

    def nbytes(self) -> int:
        """Bytes of the parameters."""
        return sum(np.from_dlpack(weight).nbytes for weight in self.weights)


def _tensor(x: torch.Tensor) -> Any:
    """*x* as a tensor of TVM, without a copy where its address is good enough."""
    if x.data_ptr() % _ALIGNMENT:
        x = x.clone()
    return tvm.runtime.from_dlpack(x)


def _use_threads(threads: int) -> None:
    """Let parallel loops that this thread starts run on *threads* threads."""
    if getattr(_of_thread, "threads", None) != threads:
        tvm.get_global_func("runtime.config_threadpool")(-1, threads)
        _of_thread.threads = threads
