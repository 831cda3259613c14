"""What a choice of ranks does to the whole model, of linears or convs: outputs on data kept back, and milliseconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from fxopt import fastest, registry
from fxopt.errors import PreconditionError, SpecError
from fxopt.passbase import Pass, PassContext
from fxopt.passes.insert_fake_quant import calibrate, quality
from fxopt.program import Program
from fxopt.rewriter import Rewriter

_LATER = ("fuse-conv-bn-relu", "merge-linears")  # change the latency of what is measured
_GAIN = 0.015  # a smaller one is noise
Rank = TypeVar("Rank")


@dataclasses.dataclass
class Trials(Generic[Rank]):
    """Carries out choices of ranks on copies.

    Attributes:
        who: the pass that asks.
        program: dense.
        carry: carries out ranks, by name of the weight, through a rewriter.
    """

    who: Pass
    ctx: PassContext
    program: Program
    carry: Callable[[Rewriter, Mapping[str, Rank]], None]

    def factorised(self, ranks: Mapping[str, Rank]) -> Program:
        """A copy with *ranks*."""
        trial = self.program.copy()
        self.carry(Rewriter(trial), ranks)
        trial.remove_dead()
        return trial

    def latency(self, ranks: Mapping[str, Rank]) -> float:
        """Milliseconds with *ranks*, and with what later passes make faster.

        Raises:
            PreconditionError: nothing can be measured.
        """
        trial = self._finished(ranks)
        assert self.ctx.latency is not None
        return self.ctx.latency(trial)

    def _finished(self, ranks: Mapping[str, Rank]) -> Program:
        what = "objective=latency" if getattr(self.who, "latency_ms", None) is None else "latency_ms"
        self.ctx.require_measuring(what, "give ratio, params or macs alone")
        trial = self.factorised(ranks)
        for name in _LATER:
            registry.find_pass(name)().run(Rewriter(trial), self.ctx)
            trial.remove_dead()
        return trial

    def outputs(self, thin: Program) -> list[quality.OutputQuality]:
        """The outputs of *thin* against the dense model, on calibration data that is kept back.

        Raises:
            PreconditionError: there is no calibration data.
        """
        return quality.outputs(self.program, thin, calibrate.kept_back(self.ctx.batches(self.who)))

    def cosine(self, ranks: Mapping[str, Rank]) -> float:
        """The smallest cosine similarity of an output."""
        return min((one.cosine for one in self.outputs(self.factorised(ranks))), default=1.0)

    def top1(self, ranks: Mapping[str, Rank]) -> float:
        """The smallest share of samples in an output whose largest class is the same.

        Raises:
            PreconditionError: no output is a (samples, classes) matrix.
        """
        shares = [one.top1 for one in self.outputs(self.factorised(ranks)) if one.top1 is not None]
        if not shares:
            raise PreconditionError(f"{self.who.name}: top1 needs an output of shape (samples, classes): give cosine")
        return min(shares)

    def faster(self, rewriter: Rewriter, ranks: Mapping[str, Rank]) -> dict[str, Rank]:
        """Those of *ranks* with which the model is fastest; a reason is left at the others."""

        def built(plan: fastest.Plan) -> fastest.Call:
            trial = self._finished({name: rank for name, rank in ranks.items() if plan[name] == "factors"})
            assert self.ctx.build is not None
            return self.ctx.build(trial)

        plan = fastest.choose(list(ranks), ("factors", "whole"), built)
        dense = [name for name, variant in plan.items() if variant == "whole"]
        for name in dense:
            for user in next(n for n in rewriter.nodes() if n.op == "get_attr" and str(n.target) == name).users:
                rewriter.skip(user, "the model is faster with the layer whole, as measured")
        return {name: rank for name, rank in ranks.items() if name not in dense}

    def note(self, rewriter: Rewriter, ranks: Mapping[str, Rank], *, measure: bool) -> None:
        """Remark what *ranks*, carried out in *rewriter*, do to the outputs, where there is data, and to latency."""
        if self.ctx.calibration is not None:
            for one in self.outputs(rewriter.program):
                rewriter.note(f"{one}, on data kept back, before any fine-tuning")
        if not measure:
            rewriter.note("no latency was measured here (objective=latency does)")
            return
        times = [(self.latency({}), self.latency(ranks)) for _ in range(3)]
        dense, small = (min(pair) for pair in zip(*times, strict=True))
        gain = "" if small < dense * (1 - _GAIN) else ": no gain on this target"
        rewriter.note(f"measured on {self.ctx.engine}: {dense:.3f} → {small:.3f} ms{gain}")


def one_rule(who: Pass, names: Sequence[str]) -> str | None:
    """Which of the options *names* is given; None for none.

    Raises:
        SpecError: more than one is.
    """
    given = [name for name in names if getattr(who, name) is not None]
    if len(given) > 1:
        raise SpecError(f"{who.name}: give one of {', '.join(given)}")
    return given[0] if given else None
