"""Quantize and dequantize pairs, placed as the target's engine computes. Lossy.

    relu(conv(x, @w))   →   dequantize(quantize(relu(conv(dequantize(quantize(x)), dequantize(quantize(@w))))))

Four steps, a module each: the ``scheme`` says what the engine computes in int8; the ``placement`` finds the values
that become integers; ``calibrate`` runs the float graph over the calibration data and finds their ranges; ``insert``
edits the graph; ``quantization`` is the one run of them all. Then ``quality`` compares with float on samples that were
kept back, and where too much was lost the user is warned, or gets an error, or the worst layers go back to float
(``on_loss``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from fxopt.errors import PreconditionError, SpecError
from fxopt.passbase import Pass, PassContext
from fxopt.passes.insert_fake_quant import qat, sensitivity
from fxopt.passes.insert_fake_quant.quality import Quality
from fxopt.passes.insert_fake_quant.quantization import Quantization
from fxopt.passes.insert_fake_quant.scheme import named
from fxopt.rewriter import Rewriter
from fxopt.sweep import Sensitivity

_MODES = ("static", "dynamic", "none", "float")


@dataclasses.dataclass(frozen=True)
class InsertFakeQuant(Pass):
    """Quantize convs and linears, and what lies between them.

    Attributes:
        scheme: "auto" for that of the engine compiled for, or the name of one in ``scheme.SCHEMES``.
        activations: "static" (ranges from calibration data), "dynamic" (ranges at each call; linears only), or "none"
            (weight-only; linears only).
        weights: "int8", or "int4" in groups of *group_size* along the inputs (needs ``activations=none``).
        group_size: weights that share one scale, for int4.
        calibrator: how ranges are found: "minmax", "moving-average", "percentile", "mse" or "entropy".
        overrides: "pattern=mode" for ops whose name, whose module's path or whose weight's name fits the shell pattern;
            the last that fits wins. A mode is static, dynamic, none (weight-only) or float. Example:
            ``['classifier*=float']``.
        objective: "coverage" to quantize whatever can be, or "latency" to leave in float, or put in bf16 where the
            machine has it, what makes the model slower on the engine, as measured on the example inputs.
        first_last: quantize the first and the last conv or linear too.
        smooth: run smooth-quant before, which evens out the channels of what linears read.
        on_loss: "warn", "raise", or "repair" (the worst layers go back to float) when an output falls below *cosine*.
        cosine: smallest cosine similarity of each output to float, on samples kept back from calibration.
        qat: round in a graph that is trained next, for ``fxopt.prepare``.
        learnable_step: train the scales as well (LSQ). With an optimizer whose steps do not scale with the gradient,
            such as Adam, give ``PreparedModel.step_sizes()`` a learning rate far below the scales.
        range_steps: training steps in which the ranges of activations follow the data.
    """

    name: ClassVar[str] = "insert-fake-quant"
    exact: ClassVar[bool] = False
    runs_after: ClassVar[tuple[str, ...]] = (
        "canonicalize",
        "fold-constants",
        "common-subexpressions",
        "fuse-conv-bn-relu",
        "merge-linears",
    )
    engine_specific: ClassVar[bool] = True
    scheme: str = "auto"
    activations: Literal["static", "dynamic", "none"] = "static"
    weights: Literal["int8", "int4"] = "int8"
    group_size: int = 128
    calibrator: Literal["minmax", "moving-average", "percentile", "mse", "entropy"] = "minmax"
    overrides: tuple[str, ...] = ()
    objective: Literal["coverage", "latency"] = "coverage"
    first_last: bool = True
    smooth: bool = True
    on_loss: Literal["warn", "raise", "repair"] = "warn"
    cosine: float = 0.99
    qat: bool = False
    learnable_step: bool = False
    range_steps: int = 1000

    def __post_init__(self) -> None:
        for text in self.overrides:
            _, found, mode = text.rpartition("=")
            if not found or mode not in _MODES:
                raise SpecError(f"overrides: {text!r} must read pattern=mode, with a mode of {', '.join(_MODES)}")
        if self.scheme != "auto":
            named(self.scheme)
        self.require_at_least(2, "group_size")
        self.require_at_least(0, "range_steps")
        if not -1 <= self.cosine <= 1:
            raise SpecError(f"cosine must be a similarity, from -1 to 1, not {self.cosine}")
        if self.weights == "int4" and self.activations != "none":
            raise SpecError("weights=int4 is weight-only: add activations=none")
        modes = {self.activations, *(text.rpartition("=")[2] for text in self.overrides)}
        if self.qat and not modes <= {"static", "float"}:
            raise SpecError("qat=true trains static ranges: activations, and overrides, must be static or float")
        if self.learnable_step and not self.qat:
            raise SpecError("learnable_step=true is learned in training: add qat=true")

    def companions(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Outlier channels are evened out before; in the end weights become integers."""
        if self.qat:
            return (), ()
        before = ("smooth-quant",) if self.activations == "static" and self.smooth else ()
        return before, ("freeze-quantized-weights",)

    def untrainable(self) -> str | None:
        """Integers have no gradients; rounding with a straight-through estimator has."""
        return None if self.qat else "it leaves integers: write insert-fake-quant{qat=true}"

    def sensitivity(self, rewriter: Rewriter, ctx: PassContext) -> Sensitivity:
        """What :func:`fxopt.sensitivity` tells, on a graph that is ready for this pass."""
        return sensitivity.measure(self, rewriter, ctx)

    @classmethod
    def recall(cls, told: Mapping[str, Any]) -> dict[str, Any]:  # noqa: D102 - as in Pass
        return {"quantization": Quality.from_plain(told["quantization"])} if "quantization" in told else {}

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """Place, calibrate, insert, check.

        Raises:
            PreconditionError: static activations, and no calibration data; or ``qat`` outside ``fxopt.prepare``.
            InputError: a value is not finite on the calibration data.
            VerifyError: ``on_loss=raise``, and an output lost too much.
        """
        if not self.qat:
            Quantization(self, rewriter, ctx).run()
        elif ctx.training:
            qat.insert(self, rewriter, ctx)
        else:
            raise PreconditionError(
                "qat=true is trained before it is compiled: prepared = fxopt.prepare(model, inputs, passes=...), train "
                "it, then prepared.compile()"
            )
