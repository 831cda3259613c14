"""What compiling costs: seconds by stage, growth with the number of nodes, and peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxopt
from tools import ROOT, models
from tools.zoo import free_memory

CHAINS = (500, 2000, 8000)


class Chain(nn.Module):
    """A chain of *nodes* calls, half of them small linears and half activations that fuse into them."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(nodes // 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f32[N,8] → f32[N,8]."""
        for linear in self.linears:
            x = torch.relu(linear(x))
        return x


def _seconds(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """Seconds of one compile on the torch backend, by stage, and the "total" on the clock."""
    start = time.perf_counter()
    report = fxopt.compile(model.eval(), example_inputs=inputs, backend="torch").report
    return {**report.seconds, "total": time.perf_counter() - start}


def compile_time() -> tuple[str, object]:
    """Markdown and data: compile seconds of two large models, and of chains of growing length."""
    _seconds(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (torch.randn(1, 3, 8, 8),))  # imports are not compile time
    results: dict[str, dict[str, float]] = {}
    for name in ("resnet50", "densenet121"):
        results[name] = _seconds(*models.load(name))
        free_memory()
    for nodes in CHAINS:
        results[f"chain of {nodes} nodes"] = _seconds(Chain(nodes), (torch.randn(1, 8),))
        free_memory()
    stages = list(dict.fromkeys(stage for seconds in results.values() for stage in seconds))
    lines = [["seconds", *stages, "passes, µs a node"], ["---"] + ["---:"] * (len(stages) + 1)]
    for name, seconds in results.items():
        nodes = next((n for n in CHAINS if f" {n} " in name), 0)
        each = f"{seconds.get('passes', 0.0) / nodes * 1e6:.0f}" if nodes else "–"
        lines.append([name, *(f"{seconds.get(stage, 0.0):.2f}" for stage in stages), each])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n", results


def memory() -> tuple[str, object]:
    """Markdown and data: peak memory of compiling a model of 1 GB, for each backend in a process of its own."""
    results: dict[str, dict[str, float]] = {}
    for backend in ("torch", "onnx"):
        command = [sys.executable, "-m", "tools.bench_compile", backend]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        results[backend] = json.loads(done.stdout.splitlines()[-1])
    lines = ["| backend | weights, MiB | peak of compile, MiB | peak / weights |", "| --- | ---: | ---: | ---: |"]
    for backend, r in results.items():
        lines.append(f"| {backend} | {r['weights']:.0f} | {r['peak']:.0f} | {r['peak'] / r['weights']:.2f} |")
    return "\n".join(lines) + "\n", results


def rss_mib(field: str) -> float:
    """``VmRSS`` or ``VmHWM`` (the peak) of this process in MiB; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _peak_of_compile(backend: str) -> dict[str, float]:
    """MiB of the weights, and of the peak above what the process held before the model was made, weights included."""
    _warm: Any = fxopt.compile(nn.Linear(4, 4).eval(), example_inputs=(torch.randn(1, 4),), backend=backend)
    before = rss_mib("VmRSS")
    layers = [layer for _ in range(16) for layer in (nn.Linear(4096, 4096), nn.GELU())]
    model = nn.Sequential(*layers).eval()
    weights = sum(p.nbytes for p in model.parameters()) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    compiled = fxopt.compile(model, example_inputs=(torch.randn(1, 4096),), backend=backend)
    compiled(torch.randn(1, 4096))
    return {"weights": weights, "peak": rss_mib("VmHWM") - before}


if __name__ == "__main__":
    print(json.dumps(_peak_of_compile(sys.argv[1])))
