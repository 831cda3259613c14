"""Speed beside the other engines, in one run; or what compiling costs in time and memory.

Writes bench-results/<what>.md and .json, and a plot of the latencies. Figures are medians of milliseconds a call;
ratios hold fxopt against its peer of the same run, below 1 is faster.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown

from tools import RESULTS, bench_compile, models
from tools.contestants import ALL, CONTESTANTS, INT8, PEERS, Built, Subject, build, warm_up
from tools.timing import geometric_mean, medians
from tools.zoo import free_memory

MODELS = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "vit_b_16",
    "bert-base",
)


@dataclass
class Row:
    """One model.

    Attributes:
        model: its name.
        ms: median latency by contestant; one that failed is missing.
        seconds: build time by contestant.
        error: largest difference from eager relative to its range, by contestant.
        failures: the error of each contestant that failed.
    """

    model: str
    ms: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def ratio(self, name: str) -> float | None:
        """Latency of the fxopt contestant *name* over that of its fastest peer; None where one is missing."""
        peers = [self.ms[peer] for peer in PEERS.get(name, ()) if peer in self.ms]
        return self.ms[name] / min(peers) if peers and name in self.ms else None

    def build_ratio(self, name: str) -> float | None:
        """Build time of the fxopt contestant *name* over that of its first peer."""
        peer = next(iter(PEERS.get(name, ())), "")
        return self.seconds[name] / self.seconds[peer] if name in self.seconds and peer in self.seconds else None


def measure(
    model: str, names: Sequence[str], *, threads: int, rounds: int, calls: int, limit_s: float, trials: int
) -> Row:
    """Builds all contestants for one model, then times them in rounds."""
    torch.set_num_threads(threads)
    eager, inputs = models.load(model)
    row = Row(model)
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(eager, inputs, threads, Path(folder), trials)
        built: dict[str, Built] = {}
        for name in names:
            print(f"{model}: building {name}", file=sys.stderr)
            built[name] = build(name, subject, limit_s=limit_s)
        row.failures = {name: b.failure for name, b in built.items() if b.call is None}
        standing = {name: b.call for name, b in built.items() if b.call is not None}
        row.seconds = {name: built[name].seconds for name in standing}
        row.error = {name: built[name].error for name in standing}
        print(f"{model}: timing", file=sys.stderr)
        row.ms = medians(standing, rounds=rounds, calls=calls)
    return row


def latency_table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Markdown: latency of every contestant, ratios with their geometric means, build seconds, errors, failures."""
    own = [name for name in names if name in PEERS]
    labels = {name: f"{name} / {' or '.join(PEERS[name])}" for name in own}
    firsts = {name: f"{name} / {PEERS[name][0]}" for name in own}
    plain = {name: name for name in names}
    parts = ["## Latency, ms", table(rows, plain, lambda row, name: row.ms.get(name), "{:.2f}")]
    if own:
        parts += ["## Latency over that of the fastest peer", table(rows, labels, Row.ratio, "{:.2f}", mean=True)]
        parts += [
            "## Build time over that of the first peer",
            table(rows, firsts, Row.build_ratio, "{:.2f}", mean=True),
        ]
    parts += ["## Build time, s", table(rows, plain, lambda row, name: row.seconds.get(name), "{:.1f}")]
    parts += ["## Largest error / range of eager", table(rows, plain, lambda row, name: row.error.get(name), "{:.0e}")]
    failures = [f"- {row.model}, {name}: {text}" for row in rows for name, text in row.failures.items()]
    if failures:
        parts += ["## Failures", "\n".join(failures)]
    return "\n\n".join(parts) + "\n"


def table(
    rows: Sequence[Row],
    labels: Mapping[str, str],
    value: Callable[[Row, str], float | None],
    form: str,
    *,
    mean: bool = False,
) -> str:
    """A line for each contestant, a column for each model, and for their geometric mean where it is wanted."""
    lines = [["", *(row.model for row in rows), *(["geometric mean"] if mean else [])]]
    lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
    for name, label in labels.items():
        numbers = [value(row, name) for row in rows]
        cells = ["failed" if name in row.failures else "–" for row in rows]
        cells = [cell if n is None else form.format(n) for cell, n in zip(cells, numbers, strict=True)]
        if mean:
            cells.append(f"**{form.format(geometric_mean([n for n in numbers if n is not None]))}**")
        lines.append([label, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(rows: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """A bar for each contestant and model: speed relative to eager."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    others = [name for name in names if name != "eager"]
    figure, axes = pyplot.subplots(figsize=(1.6 + 1.9 * len(rows), 4.5), layout="constrained")
    width = 0.85 / max(1, len(others))
    for index, name in enumerate(others):
        places = [at + (index - len(others) / 2 + 0.5) * width for at in range(len(rows))]
        speeds = [row.ms["eager"] / row.ms[name] if name in row.ms else 0.0 for row in rows]
        axes.bar(places, speeds, width, label=name, hatch="//" if name.startswith("fxopt") else None)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [row.model for row in rows])
    axes.set_ylabel("times as fast as eager")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=130)


def machine(threads: int) -> str:
    """One line that says where and with what the figures were taken."""
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return f"{cpu}, {threads} threads, batch 1, torch {torch.__version__}, Python {platform.python_version()}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated; default: all seven")
    parser.add_argument("--contestants", default="", help="comma-separated, float or int8; default: all of one kind")
    parser.add_argument("--int8", action="store_true", help="the engines in int8, calibrated with random data")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=10, help="timed calls in a block, at least")
    parser.add_argument(
        "--build-limit", type=float, default=300.0, help="seconds that one contestant may take to build"
    )
    parser.add_argument("--trials", type=int, default=128, help="measurements of the contestants that tune")
    parser.add_argument("--compile-time", action="store_true", help="compile seconds by stage, and growth with size")
    parser.add_argument("--memory", action="store_true", help="peak memory of compiling a model of 1 GB")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(argv)


def _latency(options: argparse.Namespace) -> tuple[str, object]:
    names = [name.strip() for name in options.contestants.split(",") if name.strip()]
    names = names or list(INT8 if options.int8 else CONTESTANTS)
    unknown = [name for name in names if name not in ALL]
    if unknown:
        raise SystemExit(f"unknown contestants {', '.join(unknown)}; known: {', '.join(ALL)}")
    if "eager" not in names:
        names.insert(0, "eager")
    warm_up(names, options.threads)
    rows = []
    for model in options.models.split(","):
        limits = {"rounds": options.rounds, "calls": options.calls, "trials": options.trials}
        rows.append(measure(model.strip(), names, threads=options.threads, limit_s=options.build_limit, **limits))
        free_memory()
        plot(rows, names, options.output / f"{_latency_name(options)}.png")
        text, data = latency_table(rows, names), [vars(row) for row in rows]
        _write(_latency_name(options), text, data, options)  # an interrupted run keeps what it measured
    return text, data


def _latency_name(options: argparse.Namespace) -> str:
    return "latency-int8" if options.int8 else "latency"


def _write(what: str, text: str, data: object, options: argparse.Namespace) -> None:
    where = machine(options.threads)
    (options.output / f"{what}.md").write_text(f"{where}\n\n{text}")
    (options.output / f"{what}.json").write_text(json.dumps({"machine": where, "results": data}, indent=1))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and writes one kind of result."""
    options = _arguments(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="fxopt-bench-"))
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    if options.compile_time:
        what, (text, data) = "compile-time", bench_compile.compile_time()
    elif options.memory:
        what, (text, data) = "memory", bench_compile.memory()
    else:
        what, (text, data) = _latency_name(options), _latency(options)
    _write(what, text, data, options)
    Console().print(Markdown(text))
    print(f"{machine(options.threads)}\nwritten to {options.output}/{what}.md")


if __name__ == "__main__":
    main()
