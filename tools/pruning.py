"""Channel pruning beside Torch-Pruning: how long the groups take, what is left, how fast it is, what it costs.

    groups     seconds to find the groups of a captured model, and to prune it; MACs counted by PyTorch as well
    latency    the dense and the pruned model in turn, on the torch backend
    accuracy   networks trained on handwritten digits, pruned to half of their MACs by Taylor importance and fine-tuned,
               each side with the same budget, steps and seeds; then int8 on top

Writes bench-results/pruning.md.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fxopt
from fxopt.passes.prune_channels import find_groups
from tools import RESULTS, digits, models
from tools.timing import medians

ARCHITECTURES = ("resnet18", "resnet50", "densenet121", "mobilenet_v3_large", "convnext_tiny", "vit_b_16")
HALF = "prune-channels{ratio=0.5,multiple=1}"
TUNING = 300  # steps of 64 images after pruning
BATCHES = 8  # for importance, of 64 images


def counted_macs(model: Callable[..., Any], *inputs: torch.Tensor) -> int:
    """Multiply-accumulates of convs, linears and attention by PyTorch's own counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return int(counter.get_total_flops()) // 2


def seconds(work: Callable[[], Any], runs: int = 3) -> float:
    """The median time of *work*."""
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def their_groups(model: nn.Module, x: torch.Tensor) -> list[Any]:
    """Torch-Pruning's dependency graph, and all groups of it."""
    import torch_pruning

    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x)
    return list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))


def groups(names: list[str]) -> Table:
    """A row for each architecture."""
    table = Table("", "Torch-Pruning, s", "fxopt, s", "ratio", "prune, s", "MACs", "by PyTorch", "parameters")
    for name in names:
        model, inputs = models.load(name)
        prepared = fxopt.prepare(model, inputs, passes="", verify=False)
        ours = seconds(functools.partial(find_groups, prepared.program))
        peer = seconds(functools.partial(their_groups, model, inputs[0]), 1)
        compiled = fxopt.compile(model, example_inputs=inputs, passes=HALF, backend="torch", verify=False)
        record = next(one for one in compiled.report.passes if one.name == "prune-channels")
        pruned = fxopt.prepare(model, inputs, passes=HALF, verify=False).eval()
        macs = f"{compiled.report.macs[0] / 1e9:.2f} → {compiled.report.macs[1] / 1e9:.3f} G"
        check = f"{counted_macs(pruned, *inputs) / 1e9:.3f} G"
        size = f"{compiled.report.parameters[0] / 1e6:.2f} → {compiled.report.parameters[1] / 1e6:.2f} M"
        table.add_row(
            name, f"{peer:.2f}", f"{ours:.3f}", f"{peer / ours:.0f} ×", f"{record.seconds:.2f}", macs, check, size
        )
    return table


def latency(names: list[str]) -> Table:
    """Dense and pruned in turn."""
    table = Table("", "dense, ms", "pruned, ms", "ratio")
    for name in names:
        model, inputs = models.load(name)
        both = {
            label: fxopt.compile(model, example_inputs=inputs, passes=passes, backend="torch")
            for label, passes in (("dense", None), ("pruned", "prune-channels{ratio=0.5}"))
        }
        found = medians({label: functools.partial(compiled, *inputs) for label, compiled in both.items()})
        dense, pruned = found["dense"], found["pruned"]
        table.add_row(name, f"{dense:.2f}", f"{pruned:.2f}", f"{pruned / dense:.2f}")
    return table


def batches(data: digits.Digits, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Labelled training images for importance and calibration."""
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))[: BATCHES * 64]
    return [(data.images[part], data.labels[part]) for part in order.split(64)]


def top1(model: Callable[..., torch.Tensor], data: digits.Digits) -> float:
    """Share of the held-out images in the right class."""
    with torch.no_grad():
        answers = torch.cat([model(part).argmax(1) for part in data.held_images.split(20)])
    return float((answers == data.held_labels).float().mean())


def ours_pruned(model: nn.Module, data: digits.Digits, seed: int) -> fxopt.PreparedModel:
    """Half of the MACs, by Taylor importance."""
    return fxopt.prepare(
        model,
        (data.images[:64],),
        dynamic_shapes=({0: "batch"},),
        passes="prune-channels{macs=0.5,multiple=1,criterion=taylor}",
        calibration=batches(data, seed),
        loss=F.cross_entropy,
    )


def theirs_pruned(model: nn.Module, data: digits.Digits, seed: int) -> nn.Module:
    """The same by Torch-Pruning; the ratio that gives half of the MACs is found by bisection."""
    import torch_pruning

    x = data.images[:1]
    whole = counted_macs(model, x)

    def at(ratio: float) -> nn.Module:
        own = copy.deepcopy(model).eval()
        ignored = [m for m in own.modules() if isinstance(m, nn.Linear) and m.out_features == 10]
        importance = torch_pruning.importance.GroupTaylorImportance()
        pruner = torch_pruning.pruner.BasePruner(own, x, importance, pruning_ratio=ratio, ignored_layers=ignored)
        for images, labels in batches(data, seed):
            F.cross_entropy(own(images), labels).backward()
        pruner.step()
        own.zero_grad()
        return own

    low, high = 0.0, 0.9
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (low, middle) if counted_macs(at(middle), x) <= 0.5 * whole else (middle, high)
    return at(high)


def accuracy(names: list[str], seeds: int) -> Table:
    """A row for each network: top-1 as the mean of the seeds."""
    table = Table("", "dense", "Torch-Pruning", "fxopt", "fxopt, then int8", "MACs, both")
    data = digits.load()
    for name in names:
        found: dict[str, list[float]] = {"dense": [], "theirs": [], "ours": [], "int8": []}
        shares: list[str] = []
        for seed in range(seeds):
            dense = digits.trained(name, data, seed)
            found["dense"].append(top1(dense, data))
            whole = counted_macs(dense, data.images[:1])
            pruned: list[nn.Module] = []
            for key, build in (("theirs", theirs_pruned), ("ours", ours_pruned)):
                try:
                    small = build(dense, data, seed)
                except Exception as error:  # a peer may not take the model; the table says so
                    Console().print(f"{name}, {key}: {type(error).__name__}: {error}")
                    continue
                torch.manual_seed(seed)
                digits.fit(small.train(), data, steps=TUNING, rate=1e-3, batch=64)
                found[key].append(top1(small.eval(), data))
                shares.append(f"{counted_macs(small, data.images[:1]) / whole:.2f}")
                pruned.append(small)
            ours = pruned[-1]
            assert isinstance(ours, fxopt.PreparedModel)
            images = [(part,) for part in data.images[:256].split(20)]
            int8 = ours.compile(
                example_inputs=(data.images[:20],), passes="insert-fake-quant", calibration=images, backend="torch"
            )
            found["int8"].append(top1(int8, data))
        cells = [f"{statistics.mean(values):.2%}" if values else "failed" for values in found.values()]
        table.add_row(name, *cells, ", ".join(shares[:2]))
    return table


def tables(arguments: argparse.Namespace) -> Iterator[Table]:
    """What was asked for."""
    if "groups" in arguments.what:
        yield groups(arguments.models)
    if "latency" in arguments.what:
        yield latency(arguments.models[:2])
    if "accuracy" in arguments.what:
        yield accuracy(list(digits.MODELS), arguments.seeds)


def main() -> None:
    """Print the tables, and write them down."""
    parser = argparse.ArgumentParser(prog="tools/pruning", description=__doc__)
    parser.add_argument("what", nargs="*", default=["groups", "latency", "accuracy"])
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(ARCHITECTURES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    console = Console(record=True, width=120)
    for table in tables(arguments):
        console.print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "pruning.md").write_text(f"```\n{console.export_text()}```\n")


if __name__ == "__main__":
    main()
