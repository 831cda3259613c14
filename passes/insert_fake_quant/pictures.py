"""Histograms of what is quantized, and a picture of them: a row for each layer, its weight beside what it reads."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxopt import ops
from fxopt.errors import ArtifactError, PreconditionError
from fxopt.execute import evaluate
from fxopt.passes.insert_fake_quant.histogram import sample_stride
from fxopt.passes.insert_fake_quant.insert import Range
from fxopt.program import Program

_BINS = 128
_MOST_LAYERS = 200  # rows of a picture


@dataclasses.dataclass(frozen=True)
class Counts:
    """How often values of a tensor fall into bins of equal width.

    Attributes:
        low: smallest value; ``high``: largest.
        counts: of each bin from low to high. A large tensor is sampled at a fixed stride.
        range: what the integers stand for; None where each channel has a range of its own, or at each call.
        clipped: share of the values that are outside of it; None without a range.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    range: tuple[float, float] | None = None
    clipped: float | None = None

    @staticmethod
    def of(x: torch.Tensor, given: Range | None = None) -> Counts:
        """Counts of the finite values of *x*."""
        flat = x.detach().flatten()[:: sample_stride(x.shape)].float().cpu()
        flat = flat[flat.isfinite()]
        low, high = (float(end) for end in torch.aminmax(flat)) if len(flat) else (0.0, 0.0)
        counts = torch.histc(flat, _BINS, low, high) if high > low else torch.tensor([float(len(flat))])
        bins = tuple(int(n) for n in counts.tolist())
        if given is None:
            return Counts(low, high, bins)
        outside = ((flat < given.low) | (flat > given.high)).float().mean() if len(flat) else 0.0
        return Counts(low, high, bins, (given.low, given.high), float(outside))


@dataclasses.dataclass(frozen=True)
class LayerHistogram:
    """One conv or linear.

    Attributes:
        name: of the node.
        weight: float, before it is rounded.
        input: float, on one batch that calibration has not seen; None where that is not known.
    """

    name: str
    weight: Counts
    input: Counts | None


def collect(
    exact: Program, names: Sequence[str], ranges: Mapping[str, Range], batch: Sequence[Any]
) -> dict[str, LayerHistogram]:
    """Histograms for the layers *names* of the float graph *exact*; *ranges* are of values, by node name."""
    units = {node.name: node for node in exact.graph.nodes if node.name in set(names)}
    wanted = {unit.all_input_nodes[0] for unit in units.values()}
    inputs: dict[fx.Node, Counts] = {}

    def look(node: fx.Node, value: Any) -> None:
        if node in wanted and isinstance(value, torch.Tensor) and value.numel():
            inputs[node] = Counts.of(value, ranges.get(node.name))

    evaluate(exact, batch, observe=look)
    found = {}
    for name, unit in units.items():
        weight = exact.constants[str(ops.arguments(unit)["weight"].target)]
        found[name] = LayerHistogram(name, Counts.of(weight), inputs.get(unit.all_input_nodes[0]))
    return found


def plot(layers: Sequence[LayerHistogram], path: str | os.PathLike[str]) -> None:
    """Write the histograms of *layers* to *path*; its suffix says the format (png, svg, pdf).

    Counts are on a logarithmic scale. Red lines are the ends of the range that integers stand for.

    Raises:
        PreconditionError: matplotlib is not installed, or there is nothing to show. ArtifactError: an unknown format,
            or *path* cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PreconditionError("plot needs matplotlib: pip install 'fxopt[plot]'") from error
    if not layers:
        raise PreconditionError("there are no histograms: compile with calibration data, and quantize some layer")
    shown = list(layers)[:_MOST_LAYERS]
    figure = Figure(figsize=(10, 1.8 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(shown), 2, squeeze=False)
    for row, layer in zip(axes, shown, strict=True):
        _draw(row[0], layer.weight, f"{layer.name}: weight")
        if layer.input is None:
            row[1].set_axis_off()
        else:
            _draw(row[1], layer.input, f"{layer.name}: input")
    try:
        figure.savefig(path, dpi=80)
    except (ValueError, OSError) as error:
        raise ArtifactError(f"cannot write {os.fspath(path)!r}: {error}") from error


def _draw(axes: Any, counts: Counts, title: str) -> None:
    width = (counts.high - counts.low) / len(counts.counts) or 1.0
    left = [counts.low + i * width for i in range(len(counts.counts))]
    axes.bar(left, counts.counts, width, align="edge", log=any(counts.counts))
    for end in counts.range or ():
        axes.axvline(end, color="red", linewidth=1)
    axes.set_title(title, fontsize=8)
    axes.tick_params(labelsize=7)
