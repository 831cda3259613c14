"""The tvm backend for GPUs on a machine without one: its host code runs, and numpy executes its PTX."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import tvm
import tvm_ffi
from torch.utils.dlpack import from_dlpack
from tvm import relax

from fxopt.backend import Backend, Executable
from fxopt.backends import _tvm_cuda, _tvm_ptx
from fxopt.backends._onnx_executable import FileExecutable
from fxopt.backends._onnx_export import export
from fxopt.backends._onnx_file import OnnxFile
from fxopt.backends.tvm import _explained
from fxopt.program import Program
from fxopt.target import Target, resolve_target
from tests.backends import ptx

_WINDOW = 1 << 26  # bytes from an address on that a kernel may use; how large its buffer is the host code does not say
_one_at_a_time = threading.Lock()
_set_device = "__tvm_set_device"


def source(library: Any) -> str:
    """The PTX in a *library*; "" where it computes nothing."""
    found = [library.mod]
    for module in found:
        found.extend(module.imports)
    return "".join(str(module.inspect_source("ptx")) for module in found if module.kind == "cuda")


class EmulatedExecutable(FileExecutable):
    """What ``_tvm_cuda.build`` makes, on numpy.

    Attributes:
        ptx: its kernels.
    """

    engine: ClassVar[str] = "the emulated GPU"

    def __init__(self, file: OnnxFile, target: Target) -> None:
        super().__init__(file, target, runs_here=True)
        tags: dict[str, list[str]] = {}
        plain = _tvm_ptx.threads

        def noting(function: Any) -> list[int]:
            name = _tvm_ptx.PREFIX + str(function.attrs["global_symbol"])
            tags[name] = [str(tag) for tag in function.attrs["tirx.kernel_launch_params"]]
            return plain(function)

        _tvm_ptx.threads = noting
        try:  # without the checks that tensors are on a GPU
            with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
                self.built = _tvm_cuda.build(file, target)
        finally:
            _tvm_ptx.threads = plain
        self.ptx = source(self.built.library)
        self._kernels = {name: (kernel, tags[name]) for name, kernel in ptx.kernels(self.ptx).items()}
        for module in self.built.library.mod.imports:
            module.clear_imports()  # then host code looks for kernels among all functions that are registered

    def _run(self, feed: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        with _one_at_a_time, self._registered():
            main = relax.VirtualMachine(self.built.library, tvm.cpu())["main"]
            result = main(*(tvm.runtime.from_dlpack(x.clone()) for x in feed.values()), *self.built.weights)
            results = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
            return [from_dlpack(y).clone() for y in results]

    @contextlib.contextmanager
    def _registered(self) -> Iterator[None]:
        before = tvm.get_global_func(_set_device)
        tvm_ffi.register_global_func(_set_device, lambda *_: None, override=True)
        for name, (kernel, tags) in self._kernels.items():
            tvm_ffi.register_global_func(name, _launcher(kernel, tags), override=True)
        try:
            yield
        finally:
            tvm_ffi.register_global_func(_set_device, before, override=True)


def _launcher(kernel: ptx.Kernel, tags: Sequence[str]) -> Any:
    def launch(*given: Any) -> None:
        count = len(kernel.parameters)
        arguments = [_memory(value) if isinstance(value, ctypes.c_void_p) else value for value in given[:count]]
        sizes = dict(zip(tags, given[count:], strict=True))
        grid, block = ([int(sizes.get(f"{kind}Idx.{axis}", 1)) for axis in "xyz"] for kind in ("block", "thread"))
        ptx.launch(kernel, arguments, grid, block)

    return launch


def _memory(pointer: ctypes.c_void_p) -> np.ndarray[Any, Any]:
    address = pointer.value or 0
    return np.ctypeslib.as_array((ctypes.c_uint8 * _WINDOW).from_address(address))


@dataclasses.dataclass(frozen=True)
class EmulatedBackend(Backend):
    """The tvm backend for a GPU, for the conformance suite.

    Attributes:
        arch: which GPU.
    """

    name: ClassVar[str] = "tvm-ptx"
    arch: str = "sm_80"

    def lower(self, program: Program, target: Target, inputs: Sequence[Any]) -> Executable:
        """The program as host code and PTX."""
        file = export(program)
        with _explained(file):
            return EmulatedExecutable(file, resolve_target(self.arch))
