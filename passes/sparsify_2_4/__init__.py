"""Of each *m* neighbours among the inputs of an output only *n* weights stay. Lossy.

    linear(x, @w)   →   linear(x, @w')      w'[o, 4j…4j+3] has two zeros, for all o and j

For convolutions the neighbours are input channels at one position of the kernel (``fxopt.sparsity``). ``permutation``
first puts channels in an order in which more magnitude stays, an exact rewrite; ``criteria`` choose what goes. GPUs
from NVIDIA's Ampere on compute 2:4 linears faster, engines on CPUs compute the zeros: there, only the saved file is
smaller (in ``.fxopt`` files), and the pass says so.

In a graph that is to be trained masks hold the zeros (``fxopt.masks``), or with ``straight_through`` they are chosen
anew in each step. ``PreparedModel.compile`` checks that the pattern is still there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch

from fxopt import masks, progress, sparse_packing, verify
from fxopt.errors import InputError, SpecError
from fxopt.notice import warn
from fxopt.passbase import CLEANING, ROUNDING, Pass, PassContext
from fxopt.passes.insert_fake_quant import calibrate, layerwise, quality
from fxopt.passes.insert_fake_quant.layerwise import Change, Layer
from fxopt.passes.prune_channels.groups import find_groups
from fxopt.passes.sparsify_2_4 import candidates, criteria, means, moments, permutation
from fxopt.passes.sparsify_2_4.candidates import Candidate
from fxopt.program import Program
from fxopt.rewriter import Rewriter
from fxopt.sparsity import N_OF_M, Pattern, matrix

__all__ = ["SparsifyNM"]


@dataclasses.dataclass(frozen=True)
class SparsifyNM(Pass):
    """N:M sparsity of linears and convolutions.

    A second run changes nothing: weights that have the pattern stay as they are.

    Attributes:
        n: how many of the neighbours stay; ``m``: how many neighbours there are.
        method: what chooses; "wanda" and "sparsegpt" look at calibration data and keep the mean of each output channel,
            "sparsegpt" also moves what stays, and wants two rows of data or more for each input of a layer.
        permute: put channels in a better order first.
        keep: shell patterns; weights whose name fits stay as they are.
        damping: for sparsegpt, added to the diagonal of H, as a fraction of its mean.
        block: for sparsegpt, columns after which the rest is brought up to date.
        samples: rows of calibration data that are looked at; fewer where they do not fit in memory.
        straight_through: in training, choose by magnitude anew in each step and let gradients reach all weights.
        decay: for ``straight_through``, how strongly weights that are out are pulled to zero.
    """

    name: ClassVar[str] = "sparsify-2-4"
    exact: ClassVar[bool] = False
    runs_after: ClassVar[tuple[str, ...]] = (
        *CLEANING,
        "prune-blocks",
        "prune-channels",
        "prune-weights",
        "low-rank-linear",
        "low-rank-conv",
    )
    runs_before: ClassVar[tuple[str, ...]] = ROUNDING
    n: int = 2
    m: int = 4
    method: Literal["magnitude", "wanda", "sparsegpt"] = "magnitude"
    permute: bool = True
    keep: tuple[str, ...] = ()
    damping: float = 0.01
    block: int = 128
    samples: int = 512
    straight_through: bool = False
    decay: float = 2e-4

    def __post_init__(self) -> None:
        self.require_at_least(1, "n", "block", "samples")
        if not self.n < self.m <= _MOST:
            raise SpecError(f"sparsify-2-4: m must be above n = {self.n} and at most {_MOST}, not {self.m}")
        if not 0 < self.damping < math.inf:
            raise SpecError(f"sparsify-2-4: damping must be above 0, and finite, not {self.damping}")
        if not 0 <= self.decay < math.inf:
            raise SpecError(f"sparsify-2-4: decay must be at least 0, and finite, not {self.decay}")
        if self.straight_through and self.method != "magnitude":
            raise SpecError("sparsify-2-4: straight_through chooses by magnitude in each step: leave method out")

    @property
    def pattern(self) -> Pattern:
        """The pattern."""
        return Pattern(self.n, self.m)

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """Permute, choose, set to zero, and for training hold there.

        Raises:
            PreconditionError: there is no calibration data, and *method* looks at it.
            InputError: what a layer reads on it is NaN or infinite.
            VerifyError: the model computes something else with its channels in another order.
        """
        found = candidates.find(rewriter, self, self.pattern, self.keep, one_reader=self.method != "magnitude")
        if not found:
            rewriter.note(f"no weight can have {self.pattern}")
        done = [one for one in found if self.pattern.holds(one.value(rewriter))]
        left = [one for one in found if one not in done]
        magnitude = _magnitude(rewriter, left, self.pattern)
        if self.permute and left:
            self._permute(rewriter, ctx, done, left)
        permuted = _magnitude(rewriter, left, self.pattern)
        before = rewriter.program.copy()
        new = self._chosen(rewriter, ctx, left)
        if ctx.training and self.straight_through:
            for one in found:
                _choose_in_training(rewriter, one, self.pattern, self.decay)
        else:
            self._set(rewriter, found, new, hold=ctx.training)
        if ctx.training:
            rewriter.details["patterns"] = {one.name: self.pattern for one in found}
        rewriter.details["sparsity"] = {name: float((value == 0).float().mean()) for name, value in new.items()}
        if new:
            self._say(rewriter, ctx, before, new, (magnitude, permuted))

    def _permute(self, rewriter: Rewriter, ctx: PassContext, done: list[Candidate], left: list[Candidate]) -> None:
        progress.say(f"{self.name}: order of channels")
        before, groups = rewriter.program.copy(), find_groups(rewriter.program)
        weights = {one.name: one.value(rewriter) for one in left}
        orders = permutation.find(groups, weights, [one.name for one in done], self.pattern)
        if orders:
            permutation.carry(rewriter, groups, orders)
            verify.check_exact(before, rewriter.program, ctx.inputs, verify.run(before, ctx.inputs))
        rewriter.details["permuted"] = [group.name for group in groups.all if group.atom in orders]

    def _chosen(self, rewriter: Rewriter, ctx: PassContext, left: list[Candidate]) -> dict[str, torch.Tensor]:
        """The new weights, by name."""
        if self.method == "magnitude" or not left:
            return {one.name: criteria.magnitude(one.value(rewriter), self.pattern) for one in left}
        names = {one.units[0]: one.name for one in left}
        found, means_of = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        rows = dict[str, tuple[int, int]]()
        walk = layerwise.Walk(rewriter.program, layerwise.batches(self, rewriter, ctx, self.samples), names)

        def visit(layer: Layer) -> Change:
            progress.say(f"{self.name}: layer {len(found) + 1} of {len(names)}")
            weight = found[names[layer.node]] = self._by_data(rewriter, layer)
            rows[layer.node.name] = moments.count(layer), matrix(weight).shape[1]
            place = means.place(rewriter, layer.node)
            if place is None:
                return Change(weight)
            constant, sign = place
            new = means.moved(rewriter, constant, sign * layer.shift(weight))
            means_of[str(constant.target)] = new
            walk.noisy[constant] = [new] * len(walk.batches)
            return Change(weight, new if sign > 0 else None)

        walk.run(visit)
        if means_of:
            rewriter.resize(means_of, {})
        if self.method == "sparsegpt":
            self._warn_of_few(rewriter, rows)
        return found

    def _warn_of_few(self, rewriter: Rewriter, rows: Mapping[str, tuple[int, int]]) -> None:
        """Say where SparseGPT had too little to go by: *rows* of data and inputs of each layer."""
        few = {name: (had, inputs) for name, (had, inputs) in rows.items() if had < _ENOUGH * inputs}
        if few:
            worst = min(few, key=lambda name: few[name][0] / few[name][1])
            had, inputs = few[worst]
            text = (
                f"sparsegpt fits noise in {len(few)} of {len(rows)} layers, and may be worse than magnitude there: "
                f"{worst} has {inputs} inputs, and {had} rows of calibration data are all that it reads. From "
                f"{_ENOUGH} rows for each input on it can be trusted: give more data and a higher samples (now "
                f"{self.samples}), or method=wanda"
            )
            rewriter.note(text)
            warn(f"{self.name}: {text}")

    def _by_data(self, rewriter: Rewriter, layer: Layer) -> torch.Tensor:
        if not all(bool(x.isfinite().all()) for x in (*layer.exact, *layer.noisy)):
            raise InputError(f"calibration: what {layer.node.name} reads is not finite")
        if self.method == "sparsegpt":
            weight = criteria.sparsegpt(layer, self.pattern, self.damping, self.block)
            if weight is not None:
                return weight
            rewriter.skip(layer.node, "H cannot be inverted: its weights are chosen as wanda does, and not moved")
        return criteria.wanda(layer, self.pattern)

    def _set(self, rewriter: Rewriter, found: list[Candidate], new: dict[str, torch.Tensor], *, hold: bool) -> None:
        """Give the weights their *new* values; for training, *hold* the zeros with masks."""
        if new:
            rewriter.resize(new, {})
        if hold:
            for one in found:
                kept = self.pattern.kept((one.value(rewriter) != 0).float())
                masks.hold(rewriter, one.weight, one.mask, kept)

    def _say(
        self,
        rewriter: Rewriter,
        ctx: PassContext,
        before: Program,
        new: Mapping[str, torch.Tensor],
        magnitude: tuple[float, float],
    ) -> None:
        raised = f" ({magnitude[0]:.1%} without another order of channels)" if magnitude[1] > magnitude[0] else ""
        rewriter.note(f"{self.pattern} in {len(new)} layers; {magnitude[1]:.1%} of the magnitude can stay{raised}")
        if self.method != "magnitude" and not ctx.training:
            kept = calibrate.kept_back(ctx.batches(self))
            for out in quality.outputs(before, rewriter.program, kept):
                rewriter.note(f"{out.name}: cosine {out.cosine:.5f} to before, SNR {out.snr_db:.1f} dB")
        if self.pattern == Pattern() and ctx.target.fast_2_4:
            rewriter.note("which linears compute faster, and why others do not, is in the remarks of the backend")
            return
        packs = any(map(sparse_packing.smallest, new.values()))
        gain = "What is gained is size, in .fxopt files" if packs else "Nor are they saved in less"
        text = (
            f"no speed-up on this target: no engine for {ctx.target} computes {self.pattern} weights faster than dense "
            f"ones. {gain}"
        )
        rewriter.note(text)
        warn(f"{self.name}: {text}")


_MOST = 256
# Rows for each input from which SparseGPT can be trusted. On rows that it has not seen its error is within a fifth of
# that with many rows then; with as many rows as inputs, or fewer, it is above that of magnitude where the inputs are
# little correlated.
_ENOUGH = 2


def _magnitude(rewriter: Rewriter, found: list[Candidate], pattern: Pattern) -> float:
    """The share of all magnitude that stays, by magnitude."""
    shares = [permutation.kept_magnitude(one.value(rewriter), pattern) for one in found]
    whole = [float(one.value(rewriter).abs().sum(dtype=torch.float64)) for one in found]
    return sum(map(math.prod, zip(shares, whole, strict=True))) / max(sum(whole), 1e-300)


def _choose_in_training(rewriter: Rewriter, one: Candidate, pattern: Pattern, decay: float) -> None:
    """Put the choice itself between a weight and what reads it."""
    first = next(node for node in rewriter.nodes() if node in one.units)
    chosen = rewriter.call(N_OF_M, (one.read, pattern.n, pattern.m, decay), before=first)
    for unit in one.units:
        rewriter.rewire(unit, one.read, chosen)
