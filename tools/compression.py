"""Low rank and sparsity: what they cost in accuracy, what they bring in milliseconds, what the passes themselves take.

    accuracy   networks trained on handwritten digits, compressed by each method and fine-tuned with the same steps and
               seeds; the last columns hold it against the network as it was trained, and as it is when that is tuned
               by the same steps
    latency    transformers with thin FFNs beside the dense ones, in turn, on the torch backend
    cost       seconds and peak memory of low-rank-linear on a model of the size of BERT-base, each in a process of its
               own; seconds and error of the randomised path on a layer of 4096×11008

Writes bench-results/compression-<what>.md.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fxopt
from tools import RESULTS, ROOT, compression_cost, digits, models
from tools.timing import medians

TUNING = 300  # steps of 64 images after compression
BATCHES = 8  # of calibration, of 64 images
SPARSE = "tools._compression_sparse"

Method = Callable[[nn.Module, digits.Digits, int], fxopt.PreparedModel]

# What the FFN keeps of its own multiply-accumulates, and what the whole model keeps of its.
FFNS = {"vit_b_16": ["*self_attention*", "heads*"], "bert-base": ["*attention*", "pooler*"]}
LATENCIES = {"FFN at 50 % of its MACs": "ratio=0.5", "FFN so thin that 50 % of all MACs are left": "macs=0.5"}


def low_rank(passes: str) -> Method:
    """The model prepared by *passes*, with training images as calibration data."""

    def prepare(model: nn.Module, data: digits.Digits, seed: int) -> fxopt.PreparedModel:
        order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))[: BATCHES * 64]
        batches = [(data.images[part],) for part in order.split(64)]
        example, shapes = (data.images[:64],), ({0: "batch"},)
        return fxopt.prepare(model, example, dynamic_shapes=shapes, passes=passes, calibration=batches)

    return prepare


METHODS: dict[str, dict[str, Method]] = {
    "vit": {
        "dense": low_rank(""),
        "low rank, SVD, 50 % of each linear": low_rank("low-rank-linear{ratio=0.5}"),
        "low rank, whitened, 50 % of each linear": low_rank("low-rank-linear{ratio=0.5,method=whitened}"),
        "low rank, whitened, 50 % of all linears": low_rank("low-rank-linear{ratio=0.5,scope=global,method=whitened}"),
        "low rank, whitened, 25 % of each linear": low_rank("low-rank-linear{ratio=0.25,method=whitened}"),
    },
    "residual": {
        "dense": low_rank(""),
        "low rank, Tucker-2, 50 % of each conv": low_rank("low-rank-conv{ratio=0.5}"),
        "low rank, spatial, 50 % of each conv": low_rank("low-rank-conv{ratio=0.5,method=spatial}"),
        "low rank, Tucker-2, ranks by VBMF": low_rank("low-rank-conv{rank=vbmf}"),
    },
}


def sparse() -> ModuleType | None:
    """The module with the rows of the sparse methods, where there is one."""
    return importlib.import_module(SPARSE) if importlib.util.find_spec(SPARSE) else None


def top1(model: Callable[..., torch.Tensor], data: digits.Digits) -> float:
    """Share of the held-out images in the right class."""
    with torch.no_grad():
        answers = torch.cat([model(part).argmax(1) for part in data.held_images.split(64)])
    return float((answers == data.held_labels).float().mean())


def macs(prepared: fxopt.PreparedModel) -> int:
    """Multiply-accumulates of one run on the example inputs."""
    from fxopt import cost

    return cost.macs(prepared.program)


def accuracy(names: list[str], seeds: int, steps: int = TUNING) -> Table:
    """A row for each network and method: top-1 at once and after fine-tuning, as the mean of the seeds."""
    table = Table("", "method", "parameters", "MACs", "at once", "fine-tuned", "points to dense", "to dense, tuned")
    data = digits.load()
    for name in names:
        as_it_was = tuned_dense = 0.0
        for label, prepare in METHODS[name].items():
            sizes, work, once, tuned = list[int](), list[int](), list[float](), list[float]()
            for seed in range(seeds):
                model = prepare(digits.trained(name, data, seed), data, seed)
                sizes.append(sum(p.numel() for p in model.parameters()))
                work.append(macs(model))
                once.append(top1(model.eval(), data))
                torch.manual_seed(seed)
                digits.fit(model.train(), data, steps=steps, rate=1e-3, batch=64)
                tuned.append(top1(model.eval(), data))
            mean = statistics.mean(tuned)
            if label == "dense":
                as_it_was, tuned_dense = statistics.mean(once), mean
                whole, dense_macs = statistics.mean(sizes), statistics.mean(work)
            table.add_row(
                name, label, f"{statistics.mean(sizes) / whole:.2f}", f"{statistics.mean(work) / dense_macs:.2f}",
                f"{statistics.mean(once):.2%}", f"{mean:.2%}", f"{100 * (mean - as_it_was):+.2f}",
                f"{100 * (mean - tuned_dense):+.2f}",
            )  # fmt: skip
    return table


def latency(names: list[str], threads: int) -> Table:
    """Dense and thin models in turn, on the torch backend: milliseconds, and the ratio to dense."""
    torch.set_num_threads(threads)
    table = Table("", "what", "MACs", "parameters", "dense, ms", "low rank, ms", "ratio")
    for name in names:
        model, inputs = models.load(name)
        keep = ",".join(f"'{pattern}'" for pattern in FFNS[name])
        specs = {label: f"low-rank-linear{{{rule},keep=[{keep}]}}" for label, rule in LATENCIES.items()}
        built = {
            label: fxopt.compile(model, example_inputs=inputs, passes=passes, backend="torch")
            for label, passes in {"dense": None, **specs}.items()
        }
        found = medians({label: functools.partial(compiled, *inputs) for label, compiled in built.items()})
        for label in specs:
            report = built[label].report
            table.add_row(
                name, label, f"{report.macs[1] / report.macs[0]:.2f}",
                f"{report.parameters[1] / report.parameters[0]:.2f}",
                f"{found['dense']:.1f}", f"{found[label]:.1f}", f"{found[label] / found['dense']:.2f}",
            )  # fmt: skip
    return table


def cost(threads: int) -> Table:
    """Seconds, peak memory over that of the weights, and error over that of exact truncation."""
    table = Table("", "s", "peak / weights", "error / exact")
    for what in compression_cost.CASES:
        command = [sys.executable, "-m", "tools.compression_cost", what, str(threads)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        cells = (f"{found[key]:.3g}" if key in found else "" for key in ("seconds", "peak", "error"))
        table.add_row(what, *cells)
    return table


def main() -> None:
    """Print the tables, and write them down."""
    parser = argparse.ArgumentParser(prog="tools/compression", description=__doc__)
    parser.add_argument("what", nargs="*", default=["accuracy", "latency", "cost"])
    parser.add_argument("--networks", type=lambda text: text.split(","), default=list(METHODS), help="for accuracy")
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(FFNS), help="for latency")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    RESULTS.mkdir(exist_ok=True)
    tables: dict[str, Callable[[], Table]] = {
        "accuracy": lambda: accuracy(arguments.networks, arguments.seeds),
        "latency": lambda: latency(arguments.models, arguments.threads),
        "cost": lambda: cost(arguments.threads),
    }
    other = sparse()
    for name, methods in other.METHODS.items() if other is not None else ():
        METHODS.setdefault(name, {"dense": low_rank("")}).update(methods)
    for given, known in ((arguments.what, tables), (arguments.networks, METHODS), (arguments.models, FFNS)):
        for name in given:
            if name not in known:
                parser.error(f"no {name!r}; known are {', '.join(known)}")
    for what in arguments.what:
        console = Console(record=True, width=140)
        console.print(tables[what]())
        (RESULTS / f"compression-{what}.md").write_text(f"```\n{console.export_text()}```\n")


if __name__ == "__main__":
    main()
