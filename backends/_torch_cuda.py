"""Programs on an NVIDIA GPU: tensors moved there and back, and calls recorded once to be replayed.

A model that was captured on the CPU is called with CPU tensors and answers with them; between, all is on the GPU. One
that was captured on the GPU stays there.

A small batch takes longer to launch than to compute. A CUDA graph launches all kernels of a call at once; it is kept
where the example inputs are done faster with it, and needs sizes that are the same in each call.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxopt import measure
from fxopt.errors import UnsupportedOp
from fxopt.program import Program
from fxopt.target import Target

Run = Callable[[Sequence[Any]], list[Any]]
Record = Callable[[Callable[[], list[Any]]], tuple[Callable[[], None], list[Any]]]

_WARM_UP = 3  # calls before a recording: libraries choose kernels and allocate in the first ones
_GAIN = 0.97  # a graph is kept below this share of the time without


def device_of(program: Program) -> str:
    """Type of the device that the tensors of *program* were captured on."""
    leaves = [leaf.device for leaf in program.signature.inputs if leaf.is_tensor]
    found = [*leaves, *(value.device.type for value in program.tensors().values())]
    return next((device for device in found if device != "cpu"), "cpu")


def destination(program: Program, target: Target) -> torch.device | None:
    """The GPU that *program* has to be moved to; None where it stays where it is."""
    wanted = target.name == "cuda" and target.runs_here and device_of(program) == "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if wanted else None


def moved(program: Program, device: torch.device) -> Program:
    """*program* with its tensors on *device*, those that it makes itself included. The given one keeps its own."""
    result = program.copy()
    for name, value in program.constants.items():
        if isinstance(value, torch.Tensor):
            result.constants[name] = value.to(device)
        elif isinstance(value, fx.GraphModule):  # a branch or a loop
            result.constants[name] = own = copy.deepcopy(value).to(device)
            for part in own.modules():
                if isinstance(part, fx.GraphModule):
                    _retarget(part.graph, device)
                    part.recompile()
    _retarget(result.graph, device)
    return result


def _retarget(graph: fx.Graph, device: torch.device) -> None:
    """Let what makes tensors make them on *device*."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.args = tuple(device if isinstance(a, torch.device) else a for a in node.args)
            node.kwargs = {key: device if isinstance(a, torch.device) else a for key, a in node.kwargs.items()}


def there_and_back(run: Run, device: torch.device) -> Run:
    """*run*, which works on *device*, for tensors of the CPU."""

    def call(inputs: Sequence[Any]) -> list[Any]:
        given = [x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs]
        return [y.cpu() if isinstance(y, torch.Tensor) else y for y in run(given)]

    return call


def record(call: Callable[[], list[Any]]) -> tuple[Callable[[], None], list[Any]]:
    """A CUDA graph of *call*: what replays it, and its outputs, which each replay overwrites.

    Raises:
        RuntimeError: something in it cannot be recorded, such as a size that depends on values.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph.replay, outputs


class Replayed:
    """*run* for inputs of one size, recorded for *inputs* and replayed; callers take turns."""

    def __init__(self, run: Run, inputs: Sequence[Any], record: Record = record) -> None:
        """Raises RuntimeError where it cannot be recorded."""
        self._inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
        self._lock = threading.Lock()
        self._replay, self._outputs = record(lambda: run(self._inputs))

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Flat outputs in memory of their own."""
        with self._lock:
            for mine, given in zip(self._inputs, inputs, strict=True):
                if isinstance(mine, torch.Tensor):
                    mine.copy_(given)
            self._replay()
            return [y.clone() if isinstance(y, torch.Tensor) else y for y in self._outputs]


def replayed(
    run: Run,
    program: Program,
    inputs: Sequence[Any],
    wanted: bool | None,
    *,
    record: Record = record,
    wait: Callable[[], None] = torch.cuda.synchronize,
) -> tuple[Run, list[str]]:
    """*run* as a CUDA graph, or as it is, and remarks.

    Args:
        run: the program on the GPU.
        program: what it computes.
        inputs: example inputs on the GPU.
        wanted: True for a graph, False for none, None for what is faster.
        record: makes a graph.
        wait: returns when the GPU is done.

    Raises:
        UnsupportedOp: a graph is wanted, and cannot be made.
    """
    if wanted is False:
        return run, []
    if program.signature.dynamic:
        if wanted:
            raise UnsupportedOp("cuda_graphs: a CUDA graph replays calls of one size, and this model has dynamic ones")
        return run, []
    try:
        graph = Replayed(run, inputs, record)
    except RuntimeError as error:
        if wanted:
            raise UnsupportedOp(f"cuda_graphs: this model cannot be recorded: {error}") from error
        return run, [f"no CUDA graph: {str(error).splitlines()[0]}"]

    def timed(call: Run) -> Callable[[], None]:
        def one() -> None:
            call(inputs)
            wait()

        return one

    if wanted or measure.race(timed(run), timed(graph)) < _GAIN:
        return graph, ["all kernels of a call are launched at once, as a CUDA graph"]
    return run, []
