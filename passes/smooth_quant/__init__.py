"""Outlier channels move from activations, where one scale serves all, into weights, where each row has its own. Exact.

    linear(layer_norm(x, γ, β), W)   →   linear(layer_norm(x, γ/s, β/s), W·s)        s = max|x|^α / max|W|^(1−α)
    linear(gate · up(x, V), W)       →   linear(gate · up(x, V/s), W·s)              wherever 1/s can go (``absorb``)
    linear(x, W)                     →   linear(x · (1/s), W·s)                      where it cannot

s has one entry for each input channel, the maxima are over calibration data and over all weights that read the value
(Xiao et al., SmoothQuant, ICML 2023, equation 4). Convolutions are smoothed alike, if 1/s can go somewhere.

α is the one for which the error costs least, and s = 1 unless it then costs clearly less. The power of the error in a
row of outputs is estimated from what each channel does in one half of the data, and by how much the other half exceeds
that, since maxima that are all evened out are all exceeded now and then:

    Σ_oj (W_oj·s_j)² · (Δx²/12 + clipped_j²/rows)  +  Σ_o Δw_o²/12 · Σ_j E[x_j²]/s_j²
    Δx = range(x/s) / 255        Δw_o = max_j |W_oj·s_j| / 127        Δ²/12: power of rounding to steps of Δ
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt import ops
from fxopt.errors import InputError, PreconditionError, SpecError
from fxopt.execute import evaluate
from fxopt.passbase import Pass, PassContext
from fxopt.passes.smooth_quant import absorb, noise
from fxopt.passes.smooth_quant.absorb import Sink
from fxopt.passes.smooth_quant.noise import Profile, Weight
from fxopt.program import source_line
from fxopt.rewriter import Rewriter

aten = torch.ops.aten
_FEWEST_ROWS = 16  # of a value, before anything is made of its extremes
_ENOUGH_SAMPLES = 256  # to know which channels stand out; ranges are taken from all data, later
_ALPHAS = [step / 10 for step in range(11)]
_COST_DB = 8.0  # by how much more a multiplication of its own must lower the noise
_STAY_INTEGER = ("shape", "permute", "select", "getitem", "copy", "cat", "pool", "reduce", "activation", "add", "mul")
_SMOOTHED = re.compile(r"_smoothed(_\d+)?$")  # of a weight's name: it is not smoothed again


@dataclasses.dataclass(frozen=True)
class SmoothQuant(Pass):
    """Even out the input channels of linears and convs before they are quantized.

    Attributes:
        alpha: how much of the difficulty goes to the weights, from 0 (none) to 1 (all); None for what costs least.
        gain: decibels by which the noise of rounding must fall for anything to be done.
    """

    name: ClassVar[str] = "smooth-quant"
    runs_after: ClassVar[tuple[str, ...]] = ("canonicalize", "fold-constants", "fuse-conv-bn-relu", "merge-linears")
    runs_before: ClassVar[tuple[str, ...]] = ("insert-fake-quant", "cast-precision")
    alpha: float | None = None
    gain: float = 1.0

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise SpecError(f"smooth-quant: alpha must be from 0 to 1, not {self.alpha}")
        self.require_at_least(0, "gain")

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """One run over the calibration data, then one edit for each value with outlier channels.

        Raises:
            PreconditionError: there is no calibration data.
        """
        found = _readers(rewriter)
        if not found:
            return
        if ctx.calibration is None:
            raise PreconditionError(
                "static int8, and smooth-quant before it, look at data: pass calibration=, an iterable of input tuples "
                "(a DataLoader works), or quantize without data by insert-fake-quant{activations=dynamic} or none"
            )
        profiles = _profiles(rewriter, ctx.batches(self), found)
        few = [seen.rows for seen in profiles.values() if seen.rows < _FEWEST_ROWS]
        if few:
            rewriter.note(
                f"{len(few)} values have only {min(few)} to {max(few)} rows in the calibration data: too few to tell "
                "which channels stand out"
            )
        images = _images(rewriter)
        for value, readers in reversed(found.items()):  # what one changes is the weight of those before it
            seen = profiles[value]
            if seen.rows < _FEWEST_ROWS:
                continue
            weights = [_weight(rewriter, node) for node in readers.nodes]
            scale, gain = self._scale(seen, weights)
            if gain < self.gain:
                continue
            sinks = absorb.sinks(rewriter, value, set(readers.nodes), readers.axis)
            if sinks is None and value in images:
                continue  # what convolutions give stays integer: a multiplication would cost more than it saves
            free = sinks is not None and not _shares(readers)
            if free or gain >= self.gain + _COST_DB:
                _smooth(rewriter, value, readers, scale, sinks)

    def _scale(self, seen: Profile, weights: list[Weight]) -> tuple[torch.Tensor, float]:
        """The factors s, f64[C], and by how many decibels they lower the noise."""
        plain = noise.power(seen, weights, None)
        noises = {a: noise.power(seen, weights, a) for a in (_ALPHAS if self.alpha is None else [self.alpha])}
        best = min(noises, key=noises.__getitem__)
        gain = 10 * math.log10(plain / noises[best]) if plain > 0 < noises[best] else 0.0
        return noise.factors(torch.stack(seen.extents).amax(0), weights, best), gain


def _smooth(
    rewriter: Rewriter, value: fx.Node, readers: _Readers, scale: torch.Tensor, sinks: list[Sink] | None
) -> None:
    smoothed: dict[fx.Node, fx.Node] = {}  # of a weight that several read
    for node in readers.nodes:
        weight = ops.arguments(node)["weight"]
        if weight not in smoothed:
            held = rewriter.tensor(weight)
            assert held is not None
            wider = (held.double() * _over_columns(node, held, scale)).to(held.dtype)
            smoothed[weight] = rewriter.constant(f"{weight.target}_smoothed", wider)
        rewriter.rewire(node, weight, smoothed[weight])
    if sinks is not None:
        for sink in sinks:
            absorb.scale(rewriter, sink, 1 / scale)
        return
    divisor = (1 / scale).to(value.meta["val"].dtype).reshape(-1, *[1] * (-1 - readers.axis))
    factor = rewriter.constant(f"{value.name}_smoothing", divisor)
    before = value.next if value.op == "call_function" else rewriter.first_call()
    even = rewriter.call(aten.mul.Tensor, (value, factor), before=before, origin=value)
    for node in readers.nodes:
        rewriter.rewire(node, value, even)


def _shares(readers: _Readers) -> bool:
    """Whether something else needs one of the weights as it is, such as an embedding: the file would hold it twice."""
    weights = {ops.arguments(node)["weight"] for node in readers.nodes}
    return any(set(weight.users) - set(readers.nodes) for weight in weights)


@dataclasses.dataclass
class _Readers:
    """The linears and convs with constant weights that read one value.

    Attributes:
        axis: of the value's channels, counted from the end.
        nodes: in graph order.
    """

    axis: int
    nodes: list[fx.Node]


def _readers(rewriter: Rewriter) -> dict[fx.Node, _Readers]:
    """For each float32 value, what reads it; without values whose readers disagree about the channel axis."""
    readers: dict[fx.Node, _Readers] = {}
    mixed: set[fx.Node] = set()
    for node in rewriter.nodes():
        kind = ops.kind(node)
        if kind not in ("linear", "conv") or node.meta["val"].dtype is not torch.float32:
            continue
        x, weight = node.all_input_nodes[0], rewriter.tensor(ops.arguments(node)["weight"])
        if weight is None or weight.dim() < 2 or x.op == "get_attr" or list(node.args).count(x) > 1:
            continue
        if _SMOOTHED.search(str(ops.arguments(node)["weight"].target)):
            continue
        axis = -1 if kind == "linear" else 1 - weight.dim()
        known = readers.setdefault(x, _Readers(axis, []))
        known.nodes.append(node)
        if known.axis != axis:
            mixed.add(x)
    return {x: known for x, known in readers.items() if x not in mixed}


def _weight(rewriter: Rewriter, reader: fx.Node) -> Weight:
    held = rewriter.tensor(ops.arguments(reader)["weight"])
    assert held is not None
    return Weight.of(held, _groups(reader))


def _over_columns(reader: fx.Node, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """*scale*, one factor for each input channel, in a shape that broadcasts to the weight."""
    groups = _groups(reader)
    rows = scale.reshape(groups, -1).repeat_interleave(len(weight) // groups, 0)
    return rows.reshape(len(weight), weight.shape[1], *[1] * (weight.dim() - 2))


def _groups(reader: fx.Node) -> int:
    return int(ops.arguments(reader).get("groups", 1))


def _profiles(
    rewriter: Rewriter, batches: Iterable[Sequence[Any]], found: dict[fx.Node, _Readers]
) -> dict[fx.Node, Profile]:
    """What each channel of the values does, in all batches or enough of them.

    Raises:
        InputError: a value is NaN or infinite.
    """
    profiles = {value: Profile(value.meta["val"].shape[readers.axis]) for value, readers in found.items()}

    def look(node: fx.Node, value: Any) -> None:
        if node in profiles and value.numel():
            profiles[node].add(value.detach(), found[node].axis)
            if not profiles[node].is_finite:
                what = "an input" if node.op == "placeholder" else f"{node.name} ({source_line(node)})"
                raise InputError(f"calibration: {what} is not finite")

    samples = 0
    for batch in batches:
        evaluate(rewriter.program, batch, observe=look)
        samples += next((len(x) for x in batch if isinstance(x, torch.Tensor) and x.dim()), 1)
        if samples >= _ENOUGH_SAMPLES:
            break
    return profiles


def _images(rewriter: Rewriter) -> set[fx.Node]:
    """Values that come from convolutions by nothing but what engines compute in integers."""
    images: set[fx.Node] = set()
    for node in rewriter.nodes():
        sources = [n for n in node.all_input_nodes if n.op != "get_attr"]
        stays = ops.kind(node) in _STAY_INTEGER and bool(sources) and all(n in images for n in sources)
        if ops.kind(node) == "conv" or stays:
            images.add(node)
    return images
