"""What quantization cost: outputs on kept-back samples against float, and each layer on its own."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import fx

from fxopt.errors import InputError
from fxopt.execute import evaluate
from fxopt.passes.insert_fake_quant.pictures import LayerHistogram, plot
from fxopt.program import Program
from fxopt.show import as_text

_WEIGHT = re.compile(r"\.(folded_)?weight(_\w+)?$")  # of a module; passes name their weights after it


@dataclasses.dataclass(frozen=True)
class OutputQuality:
    """One output of the model, quantized against float, on samples that calibration has not seen.

    Attributes:
        name: of the output.
        cosine: similarity over all samples.
        snr_db: signal-to-noise ratio in decibels, 10·log10(Σ x² / Σ (x − x̂)²).
        top1: share of samples with the same largest class; None where the output is no (batch, classes) matrix.
    """

    name: str
    cosine: float
    snr_db: float
    top1: float | None

    def __str__(self) -> str:
        text = f"{self.name}: cosine {self.cosine:.4f}, SNR {self.snr_db:.1f} dB"
        return text + (f", top-1 equal on {self.top1:.1%}" if self.top1 is not None else "")


@dataclasses.dataclass(frozen=True)
class LayerQuality:
    """One conv or linear, computed from float inputs with its input, weight and result quantized.

    Attributes:
        name: of the node; ``kind``: "conv", "linear"...
        weight: name of its weight, as it is in the user's model or after passes before.
        mode: "static", "dynamic", "weight-only", "float" or "bf16".
        snr_db: signal-to-noise ratio of its result in decibels; None where it stays in float.
        low, high: range of its quantized input.
        clipped: share of the elements of its input outside that range, on a batch kept back from calibration.
        reason: why it stays in float, or "".
        source: ``file:line`` of the user's code.
    """

    name: str
    kind: str
    weight: str
    mode: str
    snr_db: float | None = None
    low: float | None = None
    high: float | None = None
    clipped: float | None = None
    reason: str = ""
    source: str = ""

    @property
    def path(self) -> str:
        """Where it is in the user's model; the node's name where that is not known."""
        return module_path(self.weight) or self.name


def _number(x: Any) -> Any:
    return None if x is None else float(x)


@dataclasses.dataclass(frozen=True)
class Quality:
    """What quantization did and cost.

    Attributes:
        scheme: name of the scheme.
        outputs: each floating output against float; empty without calibration data.
        layers: each conv and linear, quantized or not.
        histograms: of the weight and the input of each quantized layer, by its name; empty without calibration data.
    """

    scheme: str
    outputs: tuple[OutputQuality, ...]
    layers: tuple[LayerQuality, ...]
    histograms: Mapping[str, LayerHistogram] = dataclasses.field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """As dicts, tuples and numbers, without the histograms."""
        outputs, layers = (tuple(map(dataclasses.astuple, some)) for some in (self.outputs, self.layers))
        return {"scheme": self.scheme, "outputs": outputs, "layers": layers}

    @staticmethod
    def from_plain(entry: Mapping[str, Any]) -> Quality:
        """What :meth:`to_plain` gave."""
        outputs = tuple(OutputQuality(str(name), *map(_number, rest)) for name, *rest in entry["outputs"])
        layers = []
        fields = [field.name for field in dataclasses.fields(LayerQuality)]
        for one in entry["layers"]:
            told: dict[str, Any] = dict(zip(fields, one, strict=True))
            numbers = ("snr_db", "low", "high", "clipped")
            told = {name: _number(x) if name in numbers else str(x) for name, x in told.items()}
            layers.append(LayerQuality(**told))
        return Quality(str(entry["scheme"]), outputs, tuple(layers))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the histograms; see :func:`pictures.plot`."""
        plot(list(self.histograms.values()), path)

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> Group:
        done = [layer for layer in self.layers if layer.mode not in ("float", "bf16")]
        title = f"scheme {self.scheme}: {len(done)} of {len(self.layers)} layers quantized"
        reasons = list(dict.fromkeys(layer.reason for layer in self.layers if layer.reason))
        notes = [Text(f"[{i}] {reason}") for i, reason in enumerate(reasons, start=1)]
        return Group(Text(title), *(Text(f"  {one}") for one in self.outputs), self._table(reasons), *notes)

    def _table(self, reasons: Sequence[str]) -> Table:
        """A row for each layer, with the number of its reason among *reasons*."""
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("layer", "kind", "mode", "SNR", "input from", "to", "clipped"):
            right = heading not in ("layer", "kind", "mode")
            table.add_column(heading, justify="right" if right else "left", overflow="fold")
        for layer in self.layers:
            mode = layer.mode + (f" [{reasons.index(layer.reason) + 1}]" if layer.reason else "")
            snr = "" if layer.snr_db is None else f"{layer.snr_db:.1f} dB"
            ends = ("" if end is None else f"{end:.3g}" for end in (layer.low, layer.high))
            clipped = "" if layer.clipped is None else f"{layer.clipped:.2%}"
            table.add_row(Text(layer.path), layer.kind, Text(mode), snr, *ends, clipped)
        return table


def module_path(weight: str) -> str:
    """The module whose weight is called *weight*: ``layer1.0.conv1`` for ``layer1.0.conv1.folded_weight``."""
    return _WEIGHT.sub("", weight) if _WEIGHT.search(weight) else weight


class Noise:
    """Running sums of a signal and of its error."""

    def __init__(self) -> None:
        self.signal = self.error = self.other = self.product = 0.0

    def add(self, exact: torch.Tensor, noisy: torch.Tensor) -> None:
        """Count one pair of tensors of the same shape."""
        x, y = exact.detach().double().flatten(), noisy.detach().double().flatten()
        self.signal += float(x @ x)
        self.other += float(y @ y)
        self.product += float(x @ y)
        self.error += float((x - y).square().sum())

    @property
    def snr_db(self) -> float:
        """10·log10(signal / error); infinite without error."""
        if self.error == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.error) if self.signal > 0 else -math.inf

    @property
    def cosine(self) -> float:
        """Cosine similarity over everything counted; 1 where both are zero."""
        norm = math.sqrt(self.signal * self.other)
        return self.product / norm if norm > 0 else float(self.error == 0)


def clipped(output: str, low: float, high: float) -> str:
    """The remark that the engine gives *output* as integers, which end where the values in calibration did."""
    return (
        f"output {output!r} is clipped to what calibration saw, {low:.4g} to {high:.4g}: the int8 kernel of its last "
        "layer gives integers (overrides=['<layer>=float'] leaves that layer in float)"
    )


def outputs(exact: Program, noisy: Program, batches: Sequence[Sequence[Any]]) -> list[OutputQuality]:
    """The :class:`OutputQuality` of each floating output of the model; what is NaN in *exact* does not count.

    Raises:
        InputError: an output of *exact* is nothing but NaN, so that there is nothing to compare.
    """
    leaves = exact.signature.outputs
    sums = [Noise() for _ in leaves]
    same, rows = [0] * len(leaves), [0] * len(leaves)
    seen, void = [False] * len(leaves), [True] * len(leaves)
    for batch in batches:
        pairs = zip(evaluate(exact, batch), evaluate(noisy, batch), strict=True)
        for i, (x, y) in zip(range(len(leaves)), pairs, strict=False):
            if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                continue
            seen[i] = True
            number, finite = ~x.isnan(), x.isfinite()
            void[i] = void[i] and x.numel() > 0 and not bool(number.any())
            sums[i].add(x.where(finite, 0), y.where(finite, 0))
            if x.dim() == 2 and x.shape[1] > 1:
                same[i] += int((x.argmax(1) == y.argmax(1))[number.all(1)].sum())
                rows[i] += int(number.all(1).sum())
    for i, leaf in enumerate(leaves):
        if seen[i] and void[i]:
            raise InputError(f"calibration: output {leaf.name!r} of the model is NaN on all the data kept back")
    return [
        OutputQuality(leaf.name, noise.cosine, noise.snr_db, same[i] / rows[i] if rows[i] else None)
        for i, (leaf, noise) in enumerate(zip(leaves, sums, strict=True))
        if seen[i]
    ]


def layers(exact: Program, noisy: Program, names: Sequence[str], batch: Sequence[Any]) -> Mapping[str, Noise]:
    """The noise that each op in *names* adds by itself: *noisy*'s form of it, fed with the float values of *exact*.

    Both graphs call the op by the same name; what *noisy* has between a float value and the op (quantize, dequantize)
    is computed from the float value.
    """
    known = {node.name for node in exact.graph.nodes}
    wanted = {node.name: node for node in noisy.graph.nodes if node.name in set(names)}
    roots = {name: _roots(node, known) for name, node in wanted.items()}
    uses = Counter(root for needed in roots.values() for root in needed)
    result: dict[str, Noise] = {}
    values: dict[str, Any] = {}

    def look(node: fx.Node, value: Any) -> None:
        if node.name in uses:
            values[node.name] = value
        if node.name in wanted:
            result.setdefault(node.name, Noise()).add(value, _replay(wanted[node.name], values, noisy))
            for root in roots[node.name]:
                uses[root] -= 1
                if not uses[root]:
                    values.pop(root, None)

    evaluate(exact, batch, observe=look)
    return result


def _roots(node: fx.Node, known: set[str]) -> set[str]:
    """The nearest values in *known* that *node* is computed from."""
    pending, roots = list(node.all_input_nodes), set[str]()
    while pending:
        one = pending.pop()
        if one.name in known:
            roots.add(one.name)
        else:
            pending.extend(one.all_input_nodes)
    return roots


def _replay(node: fx.Node, values: Mapping[str, Any], noisy: Program) -> torch.Tensor:
    """The value of *node*, computed from values that are known by name."""

    def value_of(one: fx.Node) -> Any:
        if one.name in values:
            return values[one.name]
        if one.op == "get_attr":
            return noisy.constants[str(one.target)]
        return compute(one)

    def compute(one: fx.Node) -> Any:
        args = fx.node.map_arg(one.args, value_of)
        kwargs = fx.node.map_arg(one.kwargs, value_of)
        assert callable(one.target)
        return one.target(*args, **kwargs)

    result: torch.Tensor = compute(node)
    return result
