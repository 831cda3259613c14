"""How long kernels take: built alone, and timed side by side, here or on devices behind a tracker of TVM's RPC.

All tiles of one call are timed in rounds, in an order that changes, so that slow moments of the machine meet all of
them; what counts is the lower quartile. Weights come from memory, as they do in a model; the activation is where the
call before left it.
"""

from __future__ import annotations

import dataclasses
import random
import socket
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from fxopt.backends import _tvm_pipeline
from fxopt.backends._tvm_build import ONE_AT_A_TIME, linker, use_threads
from fxopt.backends._tvm_conv import Conv
from fxopt.backends._tvm_graph import scheduled
from fxopt.backends._tvm_operators import linear, products
from fxopt.backends._tvm_target import Machine
from fxopt.backends._tvm_tiles import Tile
from fxopt.backends._tvm_workloads import Tiles, Workload
from fxopt.errors import BackendUnavailable

_ROUNDS = (9, 60)  # at least, at most
_SECONDS = 0.02  # for one tile, within these bounds
_ROWS = 128  # what one of the last two sizes is taken for where only a call tells; others are taken for one
_WEIGHTS_FROM_MEMORY = "cache_flush_cpu_non_first_arg"


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where kernels are timed.

    Attributes:
        machine: that they are compiled for.
        threads: for one call; None for as many as the device has.
        tracker: host and port of a tracker of TVM's RPC; None for this machine.
        key: under which the devices are known to the tracker.
        wait_s: seconds after which a device that does not answer is given up.
    """

    machine: Machine
    threads: int | None
    tracker: tuple[str, int] | None = None
    key: str = ""
    wait_s: int = 60

    def devices(self) -> int:
        """How many can be used side by side.

        Raises:
            BackendUnavailable: the tracker does not answer, or has no device of this key.
        """
        if self.tracker is None:
            return 1
        where = ":".join(map(str, self.tracker))
        try:
            socket.create_connection(self.tracker, timeout=5).close()  # TVM would try for a minute
            summary = tvm.rpc.connect_tracker(*self.tracker).summary()
        except (RuntimeError, OSError) as error:
            raise BackendUnavailable(f"no tracker answers at {where}: start python -m tvm.exec.rpc_tracker") from error
        count: int = sum(one["key"] == f"server:{self.key}" for one in summary["server_info"])
        if not count:
            raise BackendUnavailable(
                f"the tracker at {where} knows no device of the key {self.key!r}: on each, start "
                f"python -m tvm.exec.rpc_server --tracker={where} --key={self.key}"
            )
        return count

    def seconds(self, workload: Workload, tiles: Sequence[Tile]) -> list[float]:
        """Of one call of the kernel of *workload*, for each of *tiles*.

        Raises:
            RuntimeError: a device failed, or did not answer in time.
        """
        functions = {f"kernel_{i}": _kernel(workload, self.machine, tile) for i, tile in enumerate(tiles)}
        target = tvm.target.Target(self.machine.llvm)
        module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in functions.items()})
        library = tvm.compile(module, target=target, tir_pipeline=_tvm_pipeline.NAME)
        if self.tracker is None:
            use_threads(self.threads or 1)
            return _timed(library.mod, tvm.cpu(), list(functions.values()))
        return self._remotely(library, list(functions.values()))

    def _remotely(self, library: Any, functions: Sequence[Any]) -> list[float]:
        assert self.tracker is not None
        with tempfile.TemporaryDirectory(prefix="fxopt-") as folder:
            path = Path(folder) / "kernels.so"
            library.export_library(str(path), fcompile=tvm.support.cc.create_shared, cc=linker(self.machine))
            session = tvm.rpc.connect_tracker(*self.tracker).request(self.key, session_timeout=self.wait_s)
            session.upload(str(path))
            if self.threads is not None:
                session.get_function("runtime.config_threadpool")(-1, self.threads)
            return _timed(session.load_module(path.name), session.cpu(0), functions)


def _kernel(workload: Workload, machine: Machine, tile: Tile) -> Any:
    """The function that computes *workload* with *tile*, and nothing after it."""
    tiles, sizes = Tiles({str(workload): tile}), dict(workload.sizes)
    shape = [tirx.Var(f"n{d}", "int64") if size is None else size for d, size in enumerate(sizes["x"])]
    x = relax.Var("x", relax.TensorType(shape, "uint8" if workload.dtype == "int8" else "float32"))
    with ONE_AT_A_TIME, tvm.target.Target(machine.llvm):
        builder = relax.BlockBuilder()
        if workload.op == "matmul":
            others = [tirx.Var(f"m{d}", "int64") if size is None else size for d, size in enumerate(sizes["y"])]
            y = relax.Var("y", relax.TensorType(others, "float32"))
            with builder.function("main", [x, y]):
                builder.emit_func_output(builder.emit(products(builder, x, y, machine, tiles)))
        else:
            weights = np.ones([size or 0 for size in sizes["weights"]], workload.dtype)
            with builder.function("main", [x]):
                builder.emit_func_output(builder.emit(_layer(builder, workload, x, weights, machine, tiles)))
        module = scheduled(builder.get(), machine)
    [function] = [f for f in module.functions.values() if isinstance(f, tirx.PrimFunc)]
    return function


def _layer(builder: Any, workload: Workload, x: Any, weights: Any, machine: Machine, tiles: Tiles) -> Any:
    if workload.op == "linear":
        return linear(builder, x, weights, machine, tiles)
    strides, padding, dilation, (groups,) = ([size or 0 for size in sizes] for _, sizes in workload.sizes[2:])
    return Conv(x, weights, strides, padding, dilation, groups, machine, tiles).emit(builder)


def _timed(library: Any, device: Any, functions: Sequence[Any]) -> list[float]:
    """Seconds of a call of each of *functions* in *library* on *device*, in turns."""
    options = {"number": 1, "repeat": 1, "min_repeat_ms": 0, "f_preproc": _WEIGHTS_FROM_MEMORY}
    kernels = [library.time_evaluator(f"kernel_{i}", device, **options) for i in range(len(functions))]
    arguments = [[_filled(p, device) for p in function.params] for function in functions]
    found: list[list[float]] = [[] for _ in functions]
    order, chance = list(range(len(functions))), random.Random(0)
    fastest = min(kernels[i](*arguments[i]).mean for i in order)  # and all are warm
    for _ in range(min(max(int(_SECONDS / fastest), *_ROUNDS), max(_ROUNDS))):
        for i in order:
            found[i].append(kernels[i](*arguments[i]).mean)
        chance.shuffle(order)
    return [statistics.quantiles(seconds, n=4)[0] for seconds in found]


def _filled(parameter: Any, device: Any) -> Any:
    """A tensor of ones for *parameter*, a buffer."""
    inner = len(parameter.shape) - 2
    sizes = [
        int(s) if isinstance(s, tirx.IntImm) else _ROWS if d >= inner else 1 for d, s in enumerate(parameter.shape)
    ]
    return tvm.runtime.tensor(np.ones(sizes, str(parameter.dtype)), device)
