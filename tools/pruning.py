"""Channel pruning beside Torch-Pruning: how long the groups take, what is left, how fast it is, what it costs.

    groups     seconds to find the groups of a captured model, and to prune it; MACs counted by PyTorch as well
    latency    the dense and the pruned model in turn, on the torch backend
    accuracy   networks trained on handwritten digits, pruned to half of their MACs by Taylor importance and fine-tuned,
               each contestant with the same budget, steps and seeds; in rounds; then int8 on top

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
ROUNDS = (60, 60, 180)  # steps after each of three rounds, together as many
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


def ours_pruned(
    model: nn.Module, data: digits.Digits, seed: int, share: float = 0.5, *, scope: str = "global"
) -> fxopt.PreparedModel:
    """*share* of the MACs, by Taylor importance: all groups ranked together, or the same ratio in each."""
    return fxopt.prepare(
        model,
        None if isinstance(model, fxopt.PreparedModel) else (data.images[:64],),
        dynamic_shapes=None if isinstance(model, fxopt.PreparedModel) else ({0: "batch"},),
        passes=f"prune-channels{{macs={share},multiple=1,criterion=taylor,scope={scope}}}",
        calibration=batches(data, seed),
        loss=F.cross_entropy,
    )


def theirs_pruned(model: nn.Module, data: digits.Digits, seed: int, *, together: bool = False) -> nn.Module:
    """The same by Torch-Pruning, or the same ratio in each group; that which gives half is found by bisection."""
    import torch_pruning

    x = data.images[:1]
    whole = counted_macs(model, x)

    def at(ratio: float) -> nn.Module:
        own = copy.deepcopy(model).eval()
        ignored = [m for m in own.modules() if isinstance(m, nn.Linear) and m.out_features == 10]
        importance = torch_pruning.importance.GroupTaylorImportance()
        pruner = torch_pruning.pruner.BasePruner(
            own, x, importance, pruning_ratio=ratio, ignored_layers=ignored, global_pruning=together
        )
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


def tuned(model: nn.Module, data: digits.Digits, seed: int, steps: int = TUNING) -> nn.Module:
    """*model* after *steps* more batches, in eval mode."""
    torch.manual_seed(seed)
    digits.fit(model.train(), data, steps=steps, rate=1e-3, batch=64)
    return model.eval()


def in_rounds(model: nn.Module, data: digits.Digits, seed: int) -> nn.Module:
    """As few MACs with as many steps, in rounds of pruning and training."""
    for steps in ROUNDS:
        model = tuned(ours_pruned(model, data, seed, 0.5 ** (1 / len(ROUNDS))), data, seed, steps)
    return model


CONTESTANTS: dict[str, Callable[[nn.Module, digits.Digits, int], nn.Module]] = {
    "Torch-Pruning": lambda model, data, seed: tuned(theirs_pruned(model, data, seed), data, seed),
    "Torch-Pruning, global": lambda model, data, seed: tuned(
        theirs_pruned(model, data, seed, together=True), data, seed
    ),
    "fxopt": lambda model, data, seed: tuned(ours_pruned(model, data, seed, scope="group"), data, seed),
    "fxopt, global": lambda model, data, seed: tuned(ours_pruned(model, data, seed), data, seed),
    "fxopt, global, rounds": in_rounds,
}


def to_int8(model: nn.Module, data: digits.Digits) -> fxopt.CompiledModel:
    """A model of ours, quantized after training."""
    assert isinstance(model, fxopt.PreparedModel)
    images = [(part,) for part in data.images[:256].split(20)]
    return model.compile(
        example_inputs=(data.images[:20],), passes="insert-fake-quant", calibration=images, backend="torch"
    )


def accuracy(names: list[str], seeds: int) -> Table:
    """A row for each network: top-1 as the mean of the seeds, and the share of the MACs in the first of them."""
    table = Table("", "dense", *CONTESTANTS, "then int8")
    data = digits.load()
    for name in names:
        found: dict[str, list[float]] = {column.header: [] for column in table.columns[1:]}  # type: ignore[misc]
        shares: dict[str, float] = {}
        for seed in range(seeds):
            dense = digits.trained(name, data, seed)
            found["dense"].append(top1(dense, data))
            whole = counted_macs(dense, data.images[:1])
            for label, build in CONTESTANTS.items():
                try:
                    small = build(dense, data, seed)
                except Exception as error:  # a peer may not take the model; the table says so
                    Console().print(f"{name}, {label}: {type(error).__name__}: {error}")
                    continue
                found[label].append(top1(small, data))
                shares.setdefault(label, counted_macs(small, data.images[:1]) / whole)
                if label == "fxopt, global":
                    found["then int8"].append(top1(to_int8(small, data), data))
        cells = [f"{statistics.mean(values):.2%}" if values else "failed" for values in found.values()]
        labels = [f" ({shares[label]:.2f})" if label in shares else "" for label in found]
        table.add_row(name, *(cell + label for cell, label in zip(cells, labels, strict=True)))
        Console().print(name, found)
    return table


def tables(arguments: argparse.Namespace) -> Iterator[Table]:
    """What was asked for."""
    if "groups" in arguments.what:
        yield groups(arguments.models)
    if "latency" in arguments.what:
        yield latency(arguments.models[:2])
    if "accuracy" in arguments.what:
        yield accuracy(arguments.networks, arguments.seeds)


def main() -> None:
    """Print the tables, and write them down."""
    parser = argparse.ArgumentParser(prog="tools/pruning", description=__doc__)
    parser.add_argument("what", nargs="*", default=["groups", "latency", "accuracy"])
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(ARCHITECTURES))
    parser.add_argument("--networks", type=lambda text: text.split(","), default=list(digits.MODELS))
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
