"""Compiles models for ARM here and runs them on an emulated ARM processor, beside what they should give.

    tools/arm                     small networks for handwritten digits, in fp32 and int8, on every engine
    tools/arm resnet18 bert ...   models of tools/models.py with random weights
    tools/arm --setup             the emulated machine alone; tools/arm_sysroot.py says what it is

An fp32 model passes where no output differs by more than 1e-4 of its range from eager here; an int8 model where the
largest output of each row is the same as in the quantized graph here. Instructions are those in the file, and with
--count those that a call executes; how long they take on a processor is another question.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils import _pytree as pytree

import fxopt
from fxopt import verify
from tools import arm_count, digits, models
from tools.arm_sysroot import Machine, machine
from tools.calibration import Inputs, samples

TOLERANCE = 1e-4
NETWORKS = ("residual", "mobilenet", "vit")

GUEST = Path(__file__).with_name("arm_guest.py")
_SHOWN = ("fmla", "sdot", "udot", "smmla", "ummla", "usdot")


@dataclass(frozen=True)
class Result:
    """One model, compiled for ARM and run there.

    Attributes:
        error: largest difference of an output from this host's, relative to its range.
        top1: share of rows whose largest output is the same.
        instructions: how often each instruction is in the library; empty for ONNX files.
        executed: how often each is executed in one call, where that was asked for.
    """

    error: float
    top1: float
    instructions: Counter[str] = field(default_factory=Counter)
    executed: Counter[str] = field(default_factory=Counter)


def compiled_and_run(
    emulated: Machine,
    model: nn.Module,
    inputs: Inputs,
    *,
    target: str = "arm",
    backend: str = "onnx",
    passes: str | None = None,
    calibration: Sequence[Inputs] | None = None,
    cpu: str = "max",
    count: bool = False,
) -> Result:
    """Compile *model* for *target*, run it on the emulated *cpu*, and compare with the graph that was compiled.

    With *count* the instructions of a library that one call executes are counted, too.

    Raises:
        FxoptError: it does not compile. RuntimeError: it does not run there.
    """
    compiled = fxopt.compile(
        model, target=target, example_inputs=inputs, passes=passes, calibration=calibration, backend=backend
    )
    signature = compiled._current("graph").program.signature
    flat = [x for x in signature.bind(inputs, {}) if isinstance(x, torch.Tensor)]
    with torch.no_grad():
        wanted = pytree.tree_leaves(model(*inputs)) if compiled.report.exact else list(compiled.graph(*flat))
    with tempfile.TemporaryDirectory(prefix="fxopt-arm-") as folder:
        file = save(compiled, emulated, Path(folder))
        given = run(emulated, file, [x.numpy() for x in flat], cpu=cpu)
        library = file.suffix == ".so"
        counted = instructions(emulated, file) if library else Counter[str]()
        executed = (
            arm_count.executed(emulated, _script(file), file.name, cpu=cpu) if library and count else Counter[str]()
        )
    tensors = [x for x in wanted if isinstance(x, torch.Tensor)]
    outputs = [torch.from_numpy(y) for y in given]
    error = verify.compare(tensors, outputs).error
    return Result(error, top1(tensors[0], outputs[0]), counted, executed)


def save(compiled: fxopt.CompiledModel, emulated: Machine, folder: Path) -> Path:
    """The file that runs there: model.onnx, or model.so, linked by the cross compiler, and its parameters beside it."""
    if compiled.backend != "tvm":
        compiled.save(folder / "model.onnx")
        return folder / "model.onnx"
    compiled.save(folder / "model.tar")
    subprocess.run(["tar", "-xf", "model.tar"], cwd=folder, check=True)
    objects = sorted(str(file) for file in folder.glob("*.o"))
    command = [emulated.tool("gcc"), "-shared", "-fPIC", "-o", str(folder / "model.so"), *objects]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "model.so"


def run(emulated: Machine, file: Path, inputs: Sequence[Any], *, cpu: str = "max") -> list[Any]:
    """The outputs of the saved model *file* for flat *inputs*, as numpy arrays.

    Raises:
        RuntimeError: it fails there.
    """
    numpy.savez(file.parent / "inputs.npz", **{str(i): x for i, x in enumerate(inputs)})
    done = emulated.python(_script(file), cpu=cpu)
    if done.returncode:
        raise RuntimeError(f"{file.name} does not run on {cpu}: {done.stderr.strip()[-1500:] or done.returncode}")
    results = numpy.load(file.parent / "outputs.npz")
    return [results[str(i)] for i in range(len(results))]


def _script(file: Path) -> list[str]:
    """What runs the saved model *file* there, with the inputs beside it."""
    return [str(path) for path in (GUEST, file, file.parent / "inputs.npz", file.parent / "outputs.npz")]


def instructions(emulated: Machine, library: Path) -> Counter[str]:
    """How often each instruction stands in *library*."""
    lines = (line.split("\t") for line in emulated.disassembly(library).splitlines())
    return Counter(parts[1].strip() for parts in lines if len(parts) > 1)


def top1(wanted: torch.Tensor, given: torch.Tensor) -> float:
    """The share of rows whose largest value is at the same place."""
    return float((wanted.flatten(0, -2).argmax(-1) == given.flatten(0, -2).argmax(-1)).float().mean())


def subject(name: str) -> tuple[nn.Module, Inputs, list[Inputs]]:
    """A model by name, what to run it on, and what to calibrate it with."""
    if name in NETWORKS:
        data = digits.load()
        batches: list[Inputs] = [(data.images[i : i + 32],) for i in range(0, 256, 32)]
        return digits.trained(name, data, 0, steps=150), (data.held_images[:32],), batches
    model, inputs = models.load(name, small=True)
    return model, samples(inputs, 1, seed=1)[0], samples(inputs, 8)


def main(argv: Sequence[str] | None = None) -> None:
    """Sets up, compiles, runs, and prints a table."""
    parser = argparse.ArgumentParser(
        prog="tools/arm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help=f"default: {', '.join(NETWORKS)}")
    parser.add_argument("--setup", action="store_true", help="set the machine up, and nothing else")
    parser.add_argument("--target", default="cortex-a76")
    parser.add_argument("--cpu", default="max", help="what QEMU emulates: max, cortex-a76, cortex-a72, neoverse-n1...")
    parser.add_argument("--backends", default="onnx,tvm")
    parser.add_argument("--count", action="store_true", help="count the instructions of one call, for one row of input")
    options = parser.parse_args(argv)
    emulated = machine()
    if options.setup:
        print(f"ready: {emulated.root}")
        return
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    title = f"{options.target}, on an emulated {options.cpu}"
    table = Table("model", "engine", "", "error / range", "top-1 equal", "instructions", title=title)
    failed = 0
    for name in options.models or NETWORKS:
        for backend in options.backends.split(","):
            for int8 in (False, True):
                cells, good = _row(emulated, name, backend, options, int8=int8)
                table.add_row(name, backend, "int8" if int8 else "fp32", *cells, style="" if good else "red")
                failed += not good
    Console().print(table)
    sys.exit(1 if failed else 0)


def _row(
    emulated: Machine, name: str, backend: str, options: argparse.Namespace, *, int8: bool
) -> tuple[list[str], bool]:
    """The last columns for one model, and whether it passes."""
    model, inputs, batches = subject(name)
    if options.count:
        inputs, batches = tuple(x[:1] for x in inputs), [tuple(x[:1] for x in batch) for batch in batches]
    how = {"target": options.target, "backend": backend, "cpu": options.cpu, "count": options.count}
    try:
        if int8:
            one = compiled_and_run(emulated, model, inputs, passes="insert-fake-quant", calibration=batches, **how)
        else:
            one = compiled_and_run(emulated, model, inputs, **how)
    except (fxopt.FxoptError, RuntimeError) as error:
        return ["", "", str(error)[:200]], False
    source = one.executed or one.instructions
    shown = ", ".join(f"{source[i]:,} {i}" for i in _SHOWN if source[i])
    shown += f" of {source.total():,}" if source else ""
    return [f"{one.error:.1e}", f"{one.top1:.1%}", shown], one.top1 == 1 if int8 else one.error <= TOLERANCE


if __name__ == "__main__":
    main()
