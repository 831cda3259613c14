"""What is around the compiler, measured: imports, torch.compile, artifacts. Each number from a process of its own.

    imports     seconds of `import fxopt` on top of `import torch`, and of `fxopt --help`
    dynamo      cold torch.compile of ResNet-50: fxopt and Inductor, each with an empty cache; microseconds of a call
                over the compiled graph itself, on a tiny model
    artifacts   int8 ResNet-50: MB of the file, seconds to load it and answer once; 1 GB of weights: seconds to load,
                and the peak of memory over the weights

Writes bench-results/product.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fxopt
from tools import RESULTS, ROOT, models
from tools.bench_compile import rss_mib

ROUNDS = 5


def imports() -> dict[str, float]:
    """Medians of processes."""
    code = (
        "import time, torch; t = time.perf_counter(); import fxopt; fxopt.__version__; print(time.perf_counter() - t)"
    )
    alone = [float(_run([sys.executable, "-c", code])) for _ in range(ROUNDS)]
    helps = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        _run([str(Path(sys.executable).with_name("fxopt")), "--help"])
        helps.append(time.perf_counter() - start)
    return {"import fxopt, s": statistics.median(alone), "fxopt --help, s": statistics.median(helps)}


def cold(backend: str) -> dict[str, float]:
    """Seconds from torch.compile to the first answer, in this process."""
    model, inputs = models.load("resnet50")
    torch.compile(nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))  # what Dynamo imports is not of the backend
    with torch.no_grad():
        start = time.perf_counter()
        torch.compile(model, backend=backend)(*inputs)
        return {"seconds": time.perf_counter() - start}


def overhead() -> dict[str, float]:
    """Microseconds of a call of a tiny model by torch.compile, above those of its compiled graph."""
    from fxopt import dynamo

    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval(), torch.randn(1, 8)
    compiled = torch.compile(model, backend="fxopt")
    with torch.no_grad():
        compiled(x)
        variant = dynamo.compiled_models()[-1]._fixed
        assert variant is not None
        whole, graph = _microseconds(functools.partial(compiled, x)), _microseconds(lambda: variant.executable([x]))
    return {"call, µs": whole, "graph, µs": graph, "overhead, µs": whole - graph}


def _microseconds(call: Callable[[], object], calls: int = 5000) -> float:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def load(path: str) -> dict[str, float]:
    """Seconds to load an artifact and answer once, and the peak of memory in it."""
    example = torch.load(Path(path).with_suffix(".pt"))
    fxopt.load(Path(path).with_name("tiny.fxopt"))  # what loading imports is not of the file
    before = rss_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = time.perf_counter()
    model = fxopt.load(path)
    loaded = time.perf_counter() - start
    model(*example)
    return {"load, s": loaded, "first answer, s": time.perf_counter() - start, "peak, MiB": rss_mib("VmHWM") - before}


def artifacts(backends: tuple[str, ...] = ("torch", "onnx", "openvino")) -> dict[str, dict[str, float]]:
    """Files of int8 ResNet-50 on each backend, and of a gigabyte of weights."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        fxopt.compile(nn.Linear(2, 2), example_inputs=(torch.ones(1, 2),), backend="torch").save(f"{folder}/tiny.fxopt")
        model, inputs = models.load("resnet50")
        data = [tuple(torch.randn_like(x) for x in inputs) for _ in range(8)]
        cases: list[tuple[str, nn.Module, Any, dict[str, Any]]] = [
            (f"int8 ResNet-50, {name}", model, inputs,
             {"backend": name, "passes": "insert-fake-quant", "calibration": data}) for name in backends
        ]  # fmt: skip
        layers = [layer for _ in range(16) for layer in (nn.Linear(4096, 4096), nn.GELU())]
        cases.append(
            ("1 GB of weights, torch", nn.Sequential(*layers).eval(), (torch.randn(1, 4096),), {"backend": "torch"})
        )
        for label, one, example, arguments in cases:
            path = Path(folder) / "m.fxopt"
            fxopt.compile(one, example_inputs=example, **arguments).save(path)
            torch.save(list(example), path.with_suffix(".pt"))
            found[label] = {"MB": path.stat().st_size / 1e6, **_child("load", str(path))}
    return found


def _child(what: str, argument: str = "") -> dict[str, float]:
    """What this module prints for *what* in a new process with caches of its own."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "XDG_CACHE_HOME": cache}
        text = _run([sys.executable, "-W", "ignore", "-m", "tools.product", f"--{what}", argument], environment)
    found: dict[str, float] = json.loads(text.splitlines()[-1])
    return found


def _run(command: list[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    return done.stdout


def _measure(what: str) -> dict[str, dict[str, float]]:
    if what == "imports":
        return {"imports": imports()}
    if what == "artifacts":
        return artifacts()
    ours, theirs = _child("cold", "fxopt")["seconds"], _child("cold", "inductor")["seconds"]
    both = {"fxopt, s": ours, "Inductor, s": theirs, "ratio": ours / theirs}
    return {"cold torch.compile of ResNet-50": both, "call of a tiny model": _child("overhead")}


def main() -> None:
    """Print the table, and write it down; or measure one thing in this process."""
    parser = argparse.ArgumentParser(prog="tools/product", description=__doc__)
    parser.add_argument("what", nargs="*", default=["imports", "dynamo", "artifacts"])
    for one in ("cold", "overhead", "load"):
        parser.add_argument(f"--{one}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name, measure in (("cold", cold), ("load", load)):
        if getattr(arguments, name):
            print(json.dumps(measure(getattr(arguments, name))))
            return
    if arguments.overhead is not None:
        print(json.dumps(overhead()))
        return
    table = Table("", "", "")
    for what in arguments.what:
        for label, row in _measure(what).items():
            for name, value in row.items():
                table.add_row(label, name, f"{value:.3g}")
                label = ""
    console = Console(record=True, width=100)
    console.print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "product.md").write_text(f"```\n{console.export_text()}```\n")


if __name__ == "__main__":
    main()
