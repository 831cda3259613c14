"""The embedded engine: ATen and oneDNN ops called from one generated Python function. No C++ compiler, no Inductor.

    program ──oneDNN calls, weights packed──▶ ──layout settled──▶ ──memory reused──▶ source text ──exec──▶ function

Every step edits the graph, so the generated text (``TorchExecutable.source``) is what runs, line by line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt import ops
from fxopt.backend import Backend, Executable
from fxopt.backends import (
    _torch_cuda,
    _torch_cuda_int8,
    _torch_int8,
    _torch_int8_worth,
    _torch_layout,
    _torch_memory,
    _torch_onednn,
    _torch_peephole,
    _torch_semi_structured,
)
from fxopt.backends._torch_codegen import Code, generate
from fxopt.backends._torch_int8_kernels import PackedLinear
from fxopt.backends._torch_semi_structured import Compressed
from fxopt.backends._torch_snapshot import own
from fxopt.errors import BackendUnavailable, PreconditionError
from fxopt.profiling import Profile, measure
from fxopt.program import ORIGIN, Program
from fxopt.target import Target


class TorchExecutable(Executable):
    """A generated function and the tensors it reads.

    Attributes:
        source: text of the function, for reading and debugging.
    """

    def __init__(
        self,
        code: Code,
        constants: dict[str, Any],
        packed: dict[str, Callable[[], torch.Tensor]],
        target: Target,
        notes: tuple[str, ...] = (),
        run: Callable[[Sequence[Any]], list[Any]] | None = None,
    ) -> None:
        """*packed*: for each constant that is kept in another form, what gets it back; *run*: how *code* is called."""
        self.source = code.source
        self.notes = notes
        self._code = code
        self._run = run or code.run
        self._constants = constants
        self._packed = packed
        self._target = target
        self._obstacle = target.obstacle

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Flat outputs, writebacks included.

        Raises:
            BackendUnavailable: the program was compiled for a machine that this one is not.
        """
        if self._obstacle:
            raise BackendUnavailable(
                f"this model was compiled for target '{self._target}' ({self._target.arch}), which cannot run here, "
                f"since {self._obstacle}: move the saved model to such a machine, or compile for this one."
            )
        device = "cuda" if self._target.name == "cuda" else "cpu"
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._guarded(inputs)
        return self._guarded(inputs)

    def _guarded(self, inputs: Sequence[Any]) -> list[Any]:
        try:
            # Not inference_mode: its results could never take part in autograd outside.
            with torch.no_grad():
                return self._run(inputs)
        except Exception as error:
            located = self._code.located(error)
            if located is None:
                raise
            raise located from error

    def constant(self, name: str) -> torch.Tensor:
        """The tensor behind a constant of the program.

        For one that the model mutates it is the live tensor: what is copied into it, the next call reads. A weight
        that is kept packed is unpacked for the occasion.

        Raises:
            KeyError: the program has no such constant any more.
        """
        if name not in self._constants and name in self._packed:
            return self._packed[name]()
        value = self._constants[name]
        assert isinstance(value, torch.Tensor)
        return value

    def profile(self, inputs: Sequence[Any], runs: int) -> Profile:
        """Time by operator.

        Raises:
            PreconditionError: it runs on a GPU, which works on while the clock is read.
            BackendUnavailable: the program was compiled for a machine that this one is not.
        """
        if self._target.name == "cuda":
            raise PreconditionError("profile() times operators on CPUs; torch.profiler times the kernels of a GPU")
        self(inputs)
        timed, operators = self._code.timed()
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return measure(lambda mark: timed(inputs, mark), operators, runs=runs)

    def nbytes(self) -> int:
        """Bytes of all weights, packed ones as they are packed, shared storage counted once."""
        sizes = {}
        for value in self._constants.values():
            if isinstance(value, torch.Tensor) and value.layout == torch._mkldnn:  # type: ignore[attr-defined]
                sizes[id(value)] = int(torch.ops.mkldnn._nbytes(value))
            elif isinstance(value, torch.Tensor) and value.layout == torch.strided:
                sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            elif isinstance(value, (PackedLinear, Compressed)):
                sizes[id(value)] = value.nbytes
        return sum(sizes.values())


@dataclasses.dataclass(frozen=True)
class TorchBackend(Backend):
    """Runs a program with PyTorch's own kernels.

    Attributes:
        inductor: lower through ``torch.compile`` with freezing instead; needs a C++ compiler and takes much longer.
        cuda_graphs: for target "cuda" with sizes that do not change, launch all kernels of a call at once; None where
            that is faster.
    """

    name: ClassVar[str] = "torch"
    inductor: bool = False
    cuda_graphs: bool | None = None

    def declines_int8(self, node: fx.Node) -> str | None:
        """Why *node* is left in float: what was measured of PyTorch's int8 kernels."""
        return _torch_int8_worth.worth(node)

    def lower(self, program: Program, target: Target, inputs: Sequence[Any]) -> Executable:
        """The program as a generated function; its constants are consumed.

        Raises:
            BackendUnavailable: ``inductor=True`` and there is no C++ compiler.
        """
        if self.inductor:
            from fxopt.backends._torch_inductor import lower_with_inductor

            return lower_with_inductor(program, target, inputs)
        # Tensors made under a caller's inference_mode would be unusable outside it.
        with torch.inference_mode(mode=False), torch.no_grad():
            for node in program.graph.nodes:
                node.meta[ORIGIN] = node.name
            _drop_asserts(program)
            packed, notes = _torch_semi_structured.lower(program, target, _torch_semi_structured.compressor(target))
            if target.name == "cuda":
                originals, remarks = _torch_cuda_int8.lower(program, _torch_cuda.device_of(program))
                packed, notes = {**packed, **originals}, [*notes, *remarks]
            elif target.runs_here and target.arch == "x86_64" and torch.backends.mkldnn.is_available():
                packed = {**packed, **_torch_int8.lower(program), **_torch_onednn.lower(program)}
            _torch_peephole.rewrite(program)
            _torch_layout.settle(program)
            _torch_memory.reuse_memory(program)
            program.remove_dead()
            own(program.constants)
            if target.name == "cuda" and target.runs_here:
                return self._on_gpu(program, target, packed, notes, inputs)
            return TorchExecutable(generate(program), program.constants, packed, target, tuple(notes))

    def _on_gpu(
        self,
        program: Program,
        target: Target,
        packed: dict[str, Callable[[], torch.Tensor]],
        notes: list[str],
        inputs: Sequence[Any],
    ) -> TorchExecutable:
        """The lowered *program* on this machine's GPU."""
        device = _torch_cuda.destination(program, target)
        if device is not None:
            program = _torch_cuda.moved(program, device)
            inputs = [x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs]
        code = generate(program)
        run, remarks = _torch_cuda.replayed(code.run, program, inputs, self.cuda_graphs)
        run = run if device is None else _torch_cuda.there_and_back(run, device)
        return TorchExecutable(code, program.constants, packed, target, (*notes, *remarks), run)


def _drop_asserts(program: Program) -> None:
    """Remove checks of dtype, device and layout that tracing has already made."""
    for node in list(program.graph.nodes):
        if ops.packet(node) == "_assert_tensor_metadata":
            program.graph.erase_node(node)
