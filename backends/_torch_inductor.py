"""The optional way through Inductor: ``torch.compile`` with frozen weights. Needs a C++ compiler, and its patience."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxopt.backend import Executable
from fxopt.backends import _torch_cuda, _torch_layout
from fxopt.backends._torch_snapshot import own
from fxopt.errors import BackendUnavailable
from fxopt.program import Program
from fxopt.target import Target


class InductorExecutable(Executable):
    """A program compiled by Inductor.

    Constants that the model mutates are inputs of what Inductor sees: freezing would fix all others at their value.
    """

    def __init__(self, compiled: Callable[..., Any], constants: dict[str, Any], mutable: Sequence[str]) -> None:
        self._compiled = compiled
        self._constants = constants
        self._mutable = [constants[name] for name in mutable]

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Flat outputs, writebacks included."""
        with torch.no_grad():
            return list(self._compiled(*inputs, *self._mutable))

    def constant(self, name: str) -> torch.Tensor:
        """The tensor behind a constant of the program; the live one for a constant that the model mutates."""
        value = self._constants[name]
        assert isinstance(value, torch.Tensor)
        return value


def lower_with_inductor(program: Program, target: Target, inputs: Sequence[Any]) -> Executable:
    """Compile *program* with Inductor, now, by running it once on *inputs*.

    Raises:
        BackendUnavailable: there is no C++ compiler, or the target is another machine.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if not target.runs_here:
        raise BackendUnavailable(f"Inductor compiles for this machine alone, not for target '{target}'")
    if _torch_cuda.destination(program, target) is not None:
        raise BackendUnavailable(
            f"Inductor compiles a model for where it is, which is not where target '{target}' is: move model and "
            "example inputs to the GPU first"
        )
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise BackendUnavailable(
            "backend_options={'inductor': True} needs a C++ compiler: install g++ or set CXX, or leave the option out"
        ) from error
    _torch_layout.settle(program)
    own(program.constants)
    constants = dict(program.constants)
    mutable = _pass_mutable_in(program)
    module = program.to_module()
    compiled = torch.compile(module, dynamic=program.signature.dynamic or None, options={"freezing": True})
    executable = InductorExecutable(compiled, constants, mutable)
    with torch.inference_mode(mode=False):
        executable(inputs)
    return executable


def _pass_mutable_in(program: Program) -> list[str]:
    """Make inputs of the constants that the model mutates; returns their names, in the order of the inputs."""
    names: list[str] = []
    first = next(n for n in program.graph.nodes if n.op != "placeholder")
    for back in program.signature.writebacks:
        for node in program.graph.find_nodes(op="get_attr", target=back.constant) if back.constant else ():
            with program.graph.inserting_before(first):
                holder = program.graph.placeholder(f"mutable_{len(names)}")
            holder.meta = dict(node.meta)
            node.replace_all_uses_with(holder)
            names.append(str(node.target))
    program.remove_dead()
    return names
