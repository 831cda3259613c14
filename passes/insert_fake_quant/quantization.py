"""One run of insert-fake-quant: decide, calibrate, choose by latency, check, repair, insert, report.

Decisions are kept by node name, so that they hold for the copies of the graph on which they are tried.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxopt import ops, quantized, registry
from fxopt.errors import VerifyError
from fxopt.notice import warn
from fxopt.passbase import PassContext
from fxopt.passes.insert_fake_quant import calibrate, embeddings, insert, pictures, quality, weights
from fxopt.passes.insert_fake_quant.insert import Range
from fxopt.passes.insert_fake_quant.latency import choose_by_latency
from fxopt.passes.insert_fake_quant.placement import Placement, place, returned
from fxopt.passes.insert_fake_quant.scheme import Scheme, choose
from fxopt.program import Program, source_line
from fxopt.rewriter import Rewriter

if TYPE_CHECKING:
    from fxopt.passes.insert_fake_quant import InsertFakeQuant

_UNITS = ("conv", "conv_transpose", "linear")
_LARGEST_BIAS = 2**31 - 1
_WORST = 5  # layers named in a warning


class Quantization:
    """One run of the pass. Decisions are kept by node name, so that they hold for copies of the graph too."""

    def __init__(self, options: InsertFakeQuant, rewriter: Rewriter, ctx: PassContext) -> None:
        self.options = options
        self.rewriter = rewriter
        self.ctx = ctx
        self.scheme: Scheme = choose(options.scheme, ctx.target, ctx.engine)
        self.modes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.ranges: dict[str, Range] = {}
        self.matched = set[str]()  # overrides that fit something
        self.halves = set[str]()  # layers that are to run in the scheme's half precision
        self.tables: list[str] = []  # embeddings whose table becomes int8

    def run(self) -> None:
        """Decide, calibrate, check and perhaps repair, insert, report."""
        if self.options.activations == "static":
            insert.split_units(self.rewriter, self.scheme)
        self.decide()
        exact = self.rewriter.program.copy()
        if "static" in self.modes.values():
            self.observe(exact)
            self._leave_silent(exact)
            self._leave_drowned(exact)
        if self.options.objective == "latency" and self.modes:
            choose_by_latency(self, exact)
        given = self.ctx.calibration is not None  # without, the example inputs have to do
        kept = calibrate.kept_back(self.ctx.batches(self.options)) if given else [self.ctx.inputs]
        found = self._check(exact, kept) if kept and (self.modes or self.tables) else []
        if self.options.on_loss == "repair":
            while found and self._lost(found) and self._put_back(exact, kept):
                found = self._check(exact, kept)
        self._insert(self.rewriter)
        self._report(exact, kept, found)

    def decide(self) -> None:
        """The mode of each conv and linear, or the reason why it stays in float."""
        units = [n for n in self.rewriter.nodes() if ops.kind(n) in _UNITS]
        ends = {units[0], units[-1]} if units and not self.options.first_last else set()
        for unit in units:
            if quantized.is_dequantize(ops.arguments(unit)["weight"]):
                continue
            mode = self._mode(unit)
            if mode == "dynamic" and not self.scheme.dynamic:
                self.rewriter.note(f"scheme {self.scheme.name}: the engine quantizes activations by itself")
                mode = "none"
            reason = self._refusal(unit, mode)
            if unit in ends:
                reason = "the first and the last layer stay in float, as asked"
            if reason is None:
                self.modes[unit.name] = mode
            else:
                self.reasons[unit.name] = reason
        for node in [n for n in self.rewriter.nodes() if ops.kind(n) == "embedding" and not _is_integer(n)]:
            as_asked = "stays in float, as asked" if self._mode(node) == "float" else None
            reason = as_asked or embeddings.refusal(self.rewriter, node, self.scheme.weight)
            if reason is None:
                self.tables.append(node.name)
            else:
                self.reasons[node.name] = reason
        for node in self.rewriter.nodes():
            if weights.is_by_hand(self.rewriter, node):
                self.reasons[node.name] = "its weight is no linear's or conv's: engines have no int8 kernel for it"
        self._say_what_is_off(already=any(quantized.is_dequantize(ops.arguments(unit)["weight"]) for unit in units))

    def _say_what_is_off(self, *, already: bool) -> None:
        """Warn of overrides that fit nothing, and where nothing at all is quantized."""
        for text in self.options.overrides:
            if text not in self.matched:
                self._warn(f"insert-fake-quant: overrides: {text!r} fits no conv, linear or embedding")
        if already and not self.reasons and not self.modes and not self.tables:
            self._warn("insert-fake-quant: nothing is quantized; the graph has been already, in training or by a pass")
        if self.reasons and not self.modes and not self.tables:
            [(reason, count)] = Counter(self.reasons.values()).most_common(1)
            self._warn(f"insert-fake-quant: nothing is quantized; {count} of {len(self.reasons)} layers: {reason}")

    def _warn(self, text: str) -> None:
        self.rewriter.note(text)
        warn(text)

    def _mode(self, unit: fx.Node) -> str:
        """What the user wants for *unit*."""
        mode, weight = self.options.activations, weights.name(unit)
        names = (unit.name, weight, quality.module_path(weight), ops.kind(unit))
        for text in self.options.overrides:
            pattern, _, other = text.rpartition("=")
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                mode = other  # type: ignore[assignment]
                self.matched.add(text)
        return mode

    def _refusal(self, unit: fx.Node, mode: str) -> str | None:
        what = ops.kind(unit)
        tensor = self.rewriter.tensor(ops.arguments(unit)["weight"])
        if mode == "float":
            return "stays in float, as asked"
        if tensor is None:
            return "its weight is computed, not a constant"
        if tensor.dim() < 2:
            return "its weight is a vector: one output, which no int8 kernel gives"
        if unit.meta["val"].dtype is not torch.float32 or tensor.dtype is not torch.float32:
            return f"computes in {unit.meta['val'].dtype}; only float32 is quantized"
        if what not in self.scheme.units:
            return self.scheme.declined.get(what, f"scheme {self.scheme.name} has no int8 {what}")
        if mode != "static" and what != "linear":
            return f"activations={mode} is for linears"
        if mode == "none" and self.options.weights == "int4" and self._group(tensor) < 2:
            even = "even " if self.scheme.group_multiple == 2 else ""
            return f"no {even}group of up to {self.options.group_size} divides its {tensor.shape[1]} inputs"
        return self.ctx.declines_int8(unit) if mode == "static" else None

    def _group(self, weight: torch.Tensor) -> int:
        return insert.group_of(weight, self.options.group_size, self.scheme.group_multiple)

    def _leave_silent(self, exact: Program) -> None:
        """Leave in float what reads nothing but zeros in the calibration data: they say nothing of other data."""
        placement = self.place(exact)
        groups = self._groups(placement)
        for unit in placement.units:
            reads = [value for value in placement.reads.get(unit, ()) if value in placement.quantized]
            if any(groups[placement.quantized[value]] == Range(0.0, 0.0) for value in reads):
                del self.modes[unit.name]
                self.reasons[unit.name] = "what it reads is zero in all of the calibration data"

    def _leave_drowned(self, exact: Program) -> None:
        """Leave in float, where biases are integers, what has one too large for 32 bits in steps of its products."""
        placement = self.place(exact)
        groups = self._groups(placement)
        constants = Rewriter(exact)
        for unit in placement.units if self.scheme.integer_bias else ():
            a = ops.arguments(unit)
            weight, bias = constants.tensor(a["weight"]), constants.tensor(a.get("bias"))
            given = groups.get(placement.quantized.get(unit.all_input_nodes[0]))  # type: ignore[arg-type]
            if weight is None or bias is None or given is None:
                continue
            step = self.scheme.activation.parameters(given.low, given.high)[0].double()
            steps = step * weight.detach().abs().flatten(1).amax(1).double() / self.scheme.weight.qmax
            if bool((bias.detach().double().abs() > steps * _LARGEST_BIAS)[steps > 0].any()):
                del self.modes[unit.name]
                self.reasons[unit.name] = "its bias is beyond 32 bits in steps of its products: they hardly matter"

    def place(self, program: Program) -> Placement:
        """Where integers go in *program*, which is the graph under edit or a copy of it."""

        def refuse(node: fx.Node) -> str | None:
            return None if self.modes.get(node.name) == "static" else "float"

        return place(program.graph, self.scheme, refuse)

    def observe(self, exact: Program) -> None:
        """Ranges of all values that decide a group and have none yet."""
        missing = {node.name for node in self.place(exact).sources()} - self.ranges.keys()
        if missing:
            batches = self.ctx.batches(self.options)
            calibrator = self.options.calibrator
            self.ranges |= calibrate.observe(exact, batches, missing, calibrator, self.scheme.activation)

    def _groups(self, placement: Placement) -> dict[fx.Node, Range]:
        """The range of each group of values, by its representative."""
        groups: dict[fx.Node, Range] = {}
        for source in placement.sources():
            group, one = placement.quantized[source], self.ranges[source.name]
            groups[group] = groups[group].union(one) if group in groups else one
        return groups

    def _insert(self, rewriter: Rewriter) -> None:
        placement = self.place(rewriter.program)
        groups = self._groups(placement)
        units = {n: self.modes[n.name] for n in rewriter.nodes() if n.name in self.modes}
        for unit, mode in units.items():
            if mode == "none" and self.options.weights == "int4":
                tensor = rewriter.tensor(ops.arguments(unit)["weight"])
                assert tensor is not None
                insert.grouped_weight(rewriter, unit, self._group(tensor))
            else:
                insert.weight(rewriter, unit, self.scheme.weight, per_channel=self.scheme.per_channel)
        insert.activations(rewriter, placement, self.scheme.activation, groups)
        insert.dynamic(rewriter, [u for u, mode in units.items() if mode == "dynamic"], self.scheme.activation)
        for node in [n for n in rewriter.nodes() if n.name in self.tables]:
            embeddings.insert(rewriter, node, self.scheme.weight)
        if self.halves:
            rest = [n.name for n in rewriter.nodes() if ops.kind(n) in _UNITS and n.name not in self.halves]
            cast = registry.find_pass("cast-precision")(dtype=self.scheme.half, keep=tuple(rest))  # type: ignore[call-arg]
            cast.run(rewriter, self.ctx)

    def trial(self, exact: Program) -> Program:
        """A copy of *exact* with the layers quantized that ``modes`` names."""
        program = exact.copy()
        self._insert(Rewriter(program))
        program.remove_dead()
        return program

    def _check(self, exact: Program, kept: list[Sequence[Any]]) -> list[quality.OutputQuality]:
        return quality.outputs(exact, self.trial(exact), kept)

    def _lost(self, found: Sequence[quality.OutputQuality]) -> list[quality.OutputQuality]:
        return [one for one in found if not one.cosine >= self.options.cosine]

    def _noise(self, exact: Program, kept: list[Sequence[Any]]) -> Mapping[str, quality.Noise]:
        return quality.layers(exact, self.trial(exact), list(self.modes), kept[0]) if kept and self.modes else {}

    def _put_back(self, exact: Program, kept: list[Sequence[Any]]) -> bool:
        """Return the layers to float that harm the outputs most; False where none is left to return."""
        without: dict[str, float] = {}
        modes, tables = dict(self.modes), list(self.tables)
        for name in (*modes, *tables):
            self.modes = {other: mode for other, mode in modes.items() if other != name}
            self.tables = [other for other in tables if other != name]
            self.observe(exact)
            without[name] = min(one.cosine for one in self._check(exact, kept[:1]))
        worst = sorted(without, key=without.__getitem__, reverse=True)[: max(1, len(without) // 10)]
        self.modes = {name: mode for name, mode in modes.items() if name not in worst}
        self.tables = [name for name in tables if name not in worst]
        for name in worst:
            self.reasons[name] = f"put back: without it quantized the outputs have cosine {without[name]:.4f}"
        return bool(worst)

    def _report(self, exact: Program, kept: list[Sequence[Any]], found: list[quality.OutputQuality]) -> None:
        nodes = {node.name: node for node in exact.graph.nodes}
        noise = self._noise(exact, kept)
        placement = self.place(exact)
        groups = self._groups(placement)
        ranges = {node.name: groups[group] for node, group in placement.quantized.items()}
        for output, value in returned(exact, placement, self.scheme).items():
            self.rewriter.note(quality.clipped(output, ranges[value.name].low, ranges[value.name].high))
        shown = pictures.collect(exact, list(self.modes), ranges, kept[0]) if kept and self.modes else {}
        layers = []
        modes = self.modes | dict.fromkeys(self.tables, "none")
        for name in [n for n in nodes if n in modes or n in self.reasons]:
            node, snr = nodes[name], noise.get(name)
            float_mode = self.scheme.half if name in self.halves else "float"
            mode, reason = modes.get(name, float_mode), self.reasons.get(name, "")
            label = {"none": "weight-only"}.get(mode, mode)
            given = ranges.get(node.all_input_nodes[0].name) if mode == "static" else None
            seen = shown[name].input if given and name in shown else None
            low, high = (given.low, given.high) if given else (None, None)
            clipped, decibels = seen.clipped if seen else None, snr.snr_db if snr else None
            what = (ops.kind(node), weights.name(node), label)
            numbers = (decibels, low, high, clipped)
            layers.append(quality.LayerQuality(name, *what, *numbers, reason, source_line(node)))
            if reason:
                self.rewriter.skip(node, reason)
        self.rewriter.details["quantization"] = quality.Quality(self.scheme.name, tuple(found), tuple(layers), shown)
        lost = self._lost(found)
        if lost:
            self._complain(lost, [layer for layer in layers if layer.snr_db is not None])

    def _complain(self, lost: list[quality.OutputQuality], layers: list[quality.LayerQuality]) -> None:
        worst = sorted(layers, key=lambda layer: layer.snr_db or 0.0)[:_WORST]
        outliers = "" if self.options.smooth else "smooth=true (outlier channels), "
        names = ", ".join(f"{layer.path} ({layer.snr_db:.1f} dB)" for layer in worst)
        names = names or "none of them, but tables of embeddings"
        text = (
            f"insert-fake-quant lost more than cosine {self.options.cosine} allows: {'; '.join(map(str, lost))}. "
            f"Worst layers: {names}. Try {outliers}calibrator=mse, the passes bias-correction or ada-round after it, "
            "overrides=['<layer>=float'], on_loss=repair, or quantization-aware training with fxopt.prepare"
        )
        if self.options.on_loss == "raise":
            raise VerifyError(text)
        self._warn(text)


def _is_integer(node: fx.Node) -> bool:
    return not node.meta["val"].is_floating_point()
