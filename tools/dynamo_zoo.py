"""Runs ``torch.compile(backend="fxopt")`` on small versions of the models in PyTorch's own lists for Dynamo.

Each is compared with eager on inputs that it was not compiled for, of another batch size: the largest error of any
output, relative to that output's range, is at most 1e-4.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console

from fxopt import dynamo
from tools import RESULTS, dynamo_models, zoo

NAMES = (*dynamo_models.TORCHVISION, *dynamo_models.TIMM, *dynamo_models.TRANSFORMERS)


@dataclass(frozen=True)
class Result:
    """One model.

    Attributes:
        name: in PyTorch's list.
        graphs: how many graphs were compiled, for two batch sizes.
        seconds: of the two first calls.
        error: as in :class:`tools.zoo.Result`; None where there was a failure.
        remark: what failed, or why a graph ran as it is.
    """

    name: str
    graphs: int
    seconds: float
    error: float | None
    remark: str = ""

    @property
    def ok(self) -> bool:
        """Equal to eager, every graph compiled."""
        return self.error is not None and self.error <= zoo.TOLERANCE and not self.remark


def compare(name: str, backend: str = "torch") -> Result:
    """Compile the model *name* and compare it with eager."""
    torch._dynamo.reset()
    model, inputs = dynamo_models.load(name)
    compiled = torch.compile(model, backend="fxopt", options={"backend": backend})
    known, worst = {id(one) for one in dynamo.compiled_models()}, 0.0
    start, seconds = time.perf_counter(), 0.0
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for part in (inputs, {key: torch.cat([x.flip(0), x[:1]]) for key, x in inputs.items()}):
            expected = model(**part)
            start = time.perf_counter()
            try:
                actual = compiled(**part)
                seconds += time.perf_counter() - start
                worst = max(worst, zoo.relative_error(actual, expected))
            except Exception as error:
                line = (str(error).strip().splitlines() or [""])[0]
                return Result(name, 0, seconds, None, f"{type(error).__name__}: {line}")
    graphs = sum(id(one) not in known for one in dynamo.compiled_models())
    plain = [str(one.message).splitlines()[0] for one in caught if "runs as it is" in str(one.message)]
    return Result(name, graphs, seconds, worst, "; ".join(plain))


def row(result: Result) -> tuple[str, ...]:
    """What the table says of *result*."""
    error = "–" if result.error is None else f"{result.error:.1e}"
    return result.name, str(result.graphs), f"{result.seconds:.1f}", error, "ok" if result.ok else result.remark


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and writes the table; the exit status is 1 where a model fails."""
    parser = argparse.ArgumentParser(prog="tools/dynamo_zoo", description=__doc__)
    parser.add_argument("--only", metavar="REGEX", default="", help="models whose whole name matches")
    parser.add_argument("--backend", default="torch", help="the fxopt backend")
    options = parser.parse_args(argv)
    console, results = Console(), list[Result]()
    for name in NAMES:
        if re.fullmatch(options.only or ".*", name):
            results.append(compare(name, options.backend))
            console.print("  ".join(row(results[-1])), highlight=False, soft_wrap=True)
            zoo.free_memory()
    count = f"{sum(r.ok for r in results)} of {len(results)} equal eager."
    heads = ("model", "graphs", "first calls, s", "error / range", "")
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, ("---",) * len(heads), *map(row, results))]
    path = RESULTS / "dynamo-zoo.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "", count, ""]))
    console.print(f"{count} {path}", highlight=False, soft_wrap=True)
    return int(not all(result.ok for result in results))


if __name__ == "__main__":
    sys.exit(main())
