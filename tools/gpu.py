"""Speed on this machine's NVIDIA GPU: networks beside eager and torch.compile, and linears with 2:4 weights.

Models and inputs are on the GPU, and a call counts until the GPU is done. Writes bench-results/gpu.md and gpu.json:
latency of ResNet-50, ViT-B/16 and BERT-base for batches of 1 and 64, and of the linears of ViT-L/16 and BERT-large in
bf16, dense and with 2:4 weights, and in int8, which takes and gives float32.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import logging
import platform
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import nn

import fxopt
from tools import RESULTS, models
from tools.bench import Row, table
from tools.contestants import BF16, QUANTIZED, Call, Subject, difference, one_line, time_limit
from tools.timing import medians
from tools.zoo import free_memory

NETWORKS = ("resnet50", "vit_b_16", "bert-base")
BATCHES = (1, 64)
FP16 = "cast-precision{dtype=fp16}"
INT8 = f"{QUANTIZED},{BF16}"
LINEARS = {"qkv": (1024, 3072), "projection": (1024, 1024), "MLP, in": (1024, 4096), "MLP, out": (4096, 1024)}
"""Inputs and outputs of the linears that ViT-L/16 and BERT-large both have."""
ROWS = {"ViT-L/16": 197, "BERT-large": 128}
"""Tokens of an image, and of a text."""

Make = Callable[[Subject], Call]


def _eager(subject: Subject, *, dtype: torch.dtype = torch.float32, compiled: bool = False) -> Call:
    model: Callable[..., Any] = subject.model
    if compiled:
        model = torch.compile(subject.model, mode="max-autotune")

    def call() -> Any:
        with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
            return model(*subject.inputs)

    return call


def _fxopt(subject: Subject, *, backend: str, passes: str | None = None, **options: Any) -> Call:
    model = fxopt.compile(
        subject.model,
        target="cuda",
        example_inputs=subject.inputs,
        passes=passes,
        calibration=[tuple(x.cuda() for x in one) for one in subject.calibration]
        if QUANTIZED in (passes or "")
        else None,
        backend=backend,
        backend_options=options or None,
    )
    return lambda: model(*subject.inputs)


def _in_bf16(subject: Subject, *, passes: str | None = None) -> Call:
    """A model that is in bf16 itself, for inputs that are: nothing is converted in a call."""
    own = copy.deepcopy(subject.model).to(torch.bfloat16)
    inputs = tuple(x.to(torch.bfloat16) for x in subject.inputs)
    return _fxopt(Subject(own, inputs, subject.threads, subject.folder), backend="torch", passes=passes)


CONTESTANTS: dict[str, Make] = {
    "eager": _eager,
    "eager bf16 autocast": functools.partial(_eager, dtype=torch.bfloat16),
    "max-autotune": functools.partial(_eager, compiled=True),
    "max-autotune bf16 autocast": functools.partial(_eager, dtype=torch.bfloat16, compiled=True),
    "fxopt torch": functools.partial(_fxopt, backend="torch"),
    "fxopt torch bf16": functools.partial(_fxopt, backend="torch", passes=BF16),
    "fxopt torch bf16, no CUDA graph": functools.partial(_fxopt, backend="torch", passes=BF16, cuda_graphs=False),
    "fxopt torch bf16, CUDA graph": functools.partial(_fxopt, backend="torch", passes=BF16, cuda_graphs=True),
    "fxopt torch int8": functools.partial(_fxopt, backend="torch", passes=INT8),
    "fxopt onnx": functools.partial(_fxopt, backend="onnx"),
    "fxopt onnx fp16, TensorRT": functools.partial(_fxopt, backend="onnx", passes=FP16, provider="tensorrt"),
    "fxopt onnx int8, TensorRT": functools.partial(_fxopt, backend="onnx", passes=QUANTIZED, provider="tensorrt"),
    "fxopt tvm": functools.partial(_fxopt, backend="tvm"),
    "fxopt tvm fp16": functools.partial(_fxopt, backend="tvm", passes=FP16),
}
PEERS = ("max-autotune", "max-autotune bf16 autocast")
OF_LINEARS: dict[str, Make] = {
    "dense bf16": _in_bf16,
    "2:4 bf16": functools.partial(_in_bf16, passes="sparsify-2-4"),
    "int8": functools.partial(_fxopt, backend="torch", passes=QUANTIZED),
}


def batched(inputs: Sequence[torch.Tensor], batch: int) -> tuple[torch.Tensor, ...]:
    """*inputs* of batch 1, as often as *batch* says."""
    return tuple(x.repeat(batch, *[1] * (x.dim() - 1)) for x in inputs)


def measure(
    label: str, model: nn.Module, inputs: tuple[torch.Tensor, ...], contestants: Mapping[str, Make], limit_s: float
) -> Row:
    """All *contestants* built for one model on the GPU, then timed in rounds."""
    row, standing = Row(label), dict[str, Call]()
    subject = Subject(model.cuda(), tuple(x.cuda() for x in inputs), torch.get_num_threads(), Path())
    expected = _eager(subject)()
    for name, make in contestants.items():
        print(f"{label}: building {name}", file=sys.stderr)
        try:
            with time_limit(limit_s):
                call = make(subject)
                row.error[name] = difference(call(), expected)
            standing[name] = functools.partial(_finished, call)
        except Exception as error:
            row.failures[name] = one_line(error)
    row.ms = medians(standing)
    return row


def _finished(call: Call) -> Any:
    result = call()
    torch.cuda.synchronize()
    return result


def networks(names: Sequence[str], batches: Sequence[int], limit_s: float) -> list[Row]:
    """A row for each network and batch."""
    rows = []
    for name in names:
        for batch in batches:
            model, inputs = models.load(name)
            rows.append(measure(f"{name}, {batch}", model, batched(inputs, batch), CONTESTANTS, limit_s))
            free_memory()
            torch.cuda.empty_cache()
    return rows


def linears(batches: Sequence[int], limit_s: float) -> list[Row]:
    """A row for each linear of ViT-L/16 and BERT-large and each batch; their inputs are rounded up to 8 rows."""
    rows = []
    for network, tokens in ROWS.items():
        for part, (inputs, outputs) in LINEARS.items():
            for batch in batches:
                count = -(-tokens * batch // 8) * 8
                torch.manual_seed(0)
                linear, x = nn.Linear(inputs, outputs).eval(), torch.randn(count, inputs)
                label = f"{network} {part}, {count}×{inputs}→{outputs}"
                rows.append(measure(label, linear, (x,), OF_LINEARS, limit_s))
    return rows


def networks_table(rows: Sequence[Row]) -> str:
    """Markdown: latency, that over torch.compile's, errors, failures."""
    plain = {name: name for name in CONTESTANTS}
    own = {name: name for name in CONTESTANTS if name.startswith("fxopt")}
    parts = [
        "## Latency, ms",
        table(rows, plain, lambda row, name: row.ms.get(name), "{:.2f}"),
        f"## Latency over the faster of {' and '.join(PEERS)}",
        table(rows, own, _ratio, "{:.2f}", mean=True),
        "## Largest error / range of eager",
        table(rows, plain, lambda row, name: row.error.get(name), "{:.0e}"),
    ]
    failures = [f"- {row.model}, {name}: {text}" for row in rows for name, text in row.failures.items()]
    return "\n\n".join([*parts, *(["## Failures", "\n".join(failures)] if failures else [])]) + "\n"


def _ratio(row: Row, name: str) -> float | None:
    peers = [row.ms[peer] for peer in PEERS if peer in row.ms]
    return row.ms[name] / min(peers) if peers and name in row.ms else None


def linears_table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each linear, microseconds, and where 2:4 weights win."""
    names = list(OF_LINEARS)
    lines = [["linear", *(f"{name}, µs" for name in names), "2:4 / dense", "2:4 / int8"]]
    lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
    for row in rows:
        cells = [f"{1e3 * row.ms[name]:.1f}" if name in row.ms else "failed" for name in names]
        sparse = row.ms.get("2:4 bf16")
        others = [row.ms.get("dense bf16"), row.ms.get("int8")]
        ratios = [f"{sparse / other:.2f}" if sparse and other else "–" for other in others]
        lines.append([row.model, *cells, *ratios])
    failures = [f"- {row.model}, {name}: {text}" for row in rows for name, text in row.failures.items()]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + (["", *failures] if failures else []))


def machine() -> str:
    """One line that says where and with what the figures were taken."""
    return (
        f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/gpu", description=__doc__)
    parser.add_argument("--models", default=",".join(NETWORKS), help="comma-separated; '' for the linears alone")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="comma-separated")
    parser.add_argument("--no-linears", action="store_true", help="the networks alone")
    parser.add_argument("--build-limit", type=float, default=600.0, help="seconds one contestant may take to build")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; the exit status is 1 where there is no GPU."""
    options = _arguments(argv)
    if not torch.cuda.is_available():
        print("tools/gpu measures on an NVIDIA GPU, and no CUDA device is here", file=sys.stderr)
        return 1
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    batches = [int(batch) for batch in options.batches.split(",")]
    names = [name.strip() for name in options.models.split(",") if name.strip()]
    options.output.mkdir(parents=True, exist_ok=True)
    rows = networks(names, batches, options.build_limit)
    parts, data = [f"{machine()}\n"], {"networks": [vars(row) for row in rows]}
    if rows:
        parts.append(networks_table(rows))
    if not options.no_linears:
        table = linears(batches, options.build_limit)
        parts.append(f"## Linears\n\n{linears_table(table)}\n")
        data["linears"] = [vars(row) for row in table]
    text = "\n".join(parts)
    (options.output / "gpu.md").write_text(text)
    (options.output / "gpu.json").write_text(json.dumps({"machine": machine(), **data}, indent=1))
    Console().print(Markdown(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
