"""Compiles a table of third-party models and compares each with eager.

Every torchvision classification builder and small configurations of seven transformers models, random weights.
A model passes where the largest error of any output, relative to that output's range, is at most 1e-4. Some models
amplify rounding with random weights; one that misses passes where it is as near to the model in float64 as eager is,
and the table gives both distances. With --int8
the models are quantized, and the table says how close they stay to float and to each other (tools/zoo_int8.py).
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils import _pytree as pytree

import fxopt
from tools import RESULTS, models

TOLERANCE = 1e-4

FAST = (
    "resnet18",
    "mobilenet_v2",
    "shufflenet_v2_x0_5",
    "efficientnet_b0",
    "squeezenet1_1",
    *models.transformers_names(),
)
"""What the fast test suite compiles, on small images."""

FAMILIES = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v3_large",
    "regnet_y_400mf",
    "resnext50_32x4d",
    "swin_t",
    "swin_v2_t",
    "vgg11_bn",
    "vit_b_32",
    "wide_resnet50_2",
)
"""One builder of each further torchvision family, for the whole test suite."""


@dataclass(frozen=True)
class Result:
    """One model on one backend.

    Attributes:
        model: its name in :mod:`tools.models`.
        backend: the fxopt backend.
        seconds: what compiling took, verification included.
        error: largest error of any output relative to that output's range; None where there was a failure.
        failure: what went wrong, or "".
        exact: how far eager is from the model in float64, and how far the result is, where it is over the tolerance.
    """

    model: str
    backend: str
    seconds: float
    error: float | None
    failure: str = ""
    exact: tuple[float, float] | None = None

    @property
    def ok(self) -> bool:
        """Compiled, and equal to eager, or as near to float64 as eager is."""
        if self.error is None or self.exact is None:
            return self.error is not None and self.error <= TOLERANCE
        eager, own = self.exact
        return own <= 2 * eager

    @property
    def verdict(self) -> str:
        """The last column of the table."""
        if self.exact is None:
            return "ok" if self.ok else self.failure or "differs"
        eager, own = self.exact
        return f"{'ok' if self.ok else 'differs'}: {own:.1e} from float64, eager {eager:.1e}"


def relative_error(actual: object, expected: object) -> float:
    """Largest difference of any tensor, relative to the range of the expected one; structures must be equal.

    Raises:
        ValueError: the two differ in structure, shape or dtype, or *actual* is not finite.
    """
    got, got_structure = pytree.tree_flatten(actual)
    wanted, structure = pytree.tree_flatten(expected)
    if got_structure != structure:
        raise ValueError(f"the output has the structure {got_structure}, eager's is {structure}")
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if not isinstance(b, torch.Tensor):
            if a != b:
                raise ValueError(f"the output holds {a!r}, eager's {b!r}")
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ValueError(f"an output is {a.dtype}{list(a.shape)}, eager's {b.dtype}{list(b.shape)}")
        if not torch.isfinite(a).all():
            raise ValueError("an output is not finite")
        span = float(b.double().max() - b.double().min()) or float(b.double().abs().max()) or 1.0
        worst = max(worst, float((a.double() - b.double()).abs().max()) / span)
    return worst


def compare(name: str, backend: str, *, small: bool = False) -> Result:
    """Compiles the model *name* for *backend* and compares it with eager on inputs it has not seen.

    Args:
        name: see :func:`tools.models.load`.
        backend: an fxopt backend.
        small: take 96-pixel images where the model allows it.
    """
    model, example = models.load(name, small=small)
    inputs = tuple(torch.roll(x, 1, dims=-1) for x in example)
    with torch.inference_mode():
        expected = model(*inputs)
    start = time.perf_counter()
    try:
        compiled = fxopt.compile(model, example_inputs=example, backend=backend)
        seconds = time.perf_counter() - start
        actual = compiled(*inputs)
        error = relative_error(actual, expected)
        exact = None if error <= TOLERANCE else _from_float64(model, inputs, expected, actual)
        return Result(name, backend, seconds, error, exact=exact)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return Result(name, backend, time.perf_counter() - start, None, f"{type(error).__name__}: {lines[0]}")


def _from_float64(model: nn.Module, inputs: Sequence[Any], *outputs: object) -> tuple[float, float]:
    """The relative errors of two outputs, eager's first, from what *model* gives in float64."""
    wide = copy.deepcopy(model).double()
    with torch.inference_mode():
        exact = wide(*(x.double() if x.is_floating_point() else x for x in inputs))
    eager, own = (relative_error(pytree.tree_map_only(torch.Tensor, torch.Tensor.double, y), exact) for y in outputs)
    return eager, own


def free_memory() -> None:
    """Gives the last model's memory back to the system, so that a long table does not pile up."""
    gc.collect()
    torch._dynamo.reset()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The table's text, one row for each result."""
    return [
        (
            result.model,
            result.backend,
            f"{result.seconds:.1f}",
            "–" if result.error is None else f"{result.error:.1e}",
            result.verdict,
        )
        for result in results
    ]


HEADINGS = ("model", "backend", "compile, s", "error / range", "")


def markdown(results: Sequence[Result]) -> str:
    """The table as markdown, with a line that counts."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *rows(results)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{table}\n\n{sum(r.ok for r in results)} of {len(results)} equal eager.\n"


def run(names: Sequence[str], backends: Sequence[str], *, small: bool, console: Console) -> list[Result]:
    """One result for each model and backend, printed as they come."""
    results = []
    for name in names:
        for backend in backends:
            result = compare(name, backend, small=small)
            (row,) = rows([result])
            console.print(f"{row[0]:24} {row[1]:9} {row[2]:>6} s  {row[3]:>8}  {row[4]}", highlight=False)
            results.append(result)
            free_memory()
    return results


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/zoo", description=__doc__)
    parser.add_argument("--only", metavar="REGEX", default="", help="models whose whole name matches")
    parser.add_argument("--backend", action="append", help="may be repeated; default: torch and onnx")
    parser.add_argument("--fast", action="store_true", help="the fast test suite's models only")
    parser.add_argument("--small", action="store_true", help="96-pixel images where the model allows it")
    parser.add_argument("--int8", action="store_true", help="quantize; report cosines instead of errors")
    parser.add_argument(
        "--output", type=Path, help="where the table goes; default: bench-results/zoo.md or zoo-int8.md"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and writes the table; the exit status is 1 where a model fails."""
    options = _arguments(argv)
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore", category=FutureWarning)
    names: list[str] = list(FAST) if options.fast else [*models.transformers_names(), *models.torchvision_names()]
    if options.only:
        names = [name for name in names if re.fullmatch(options.only, name)]
    console = Console()
    options.output = options.output or RESULTS / ("zoo-int8.md" if options.int8 else "zoo.md")
    if options.int8:
        from tools import zoo_int8

        return zoo_int8.main(names, options.backend or ("torch", "onnx"), options.output, console, small=options.small)
    results = run(names, options.backend or ("torch", "onnx"), small=options.small, console=console)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(markdown(results))
    failed = [result for result in results if not result.ok]
    if failed:
        console.print(_table(failed))
    console.print(f"{len(results) - len(failed)} of {len(results)} equal eager; {options.output}", highlight=False)
    return int(bool(failed))


def _table(results: Sequence[Result]) -> Table:
    table = Table(title="failed")
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold")
    for row in rows(results):
        table.add_row(*row)
    return table


if __name__ == "__main__":
    sys.exit(main())
