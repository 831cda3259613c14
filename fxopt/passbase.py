"""The contract of a pass, and what the pipeline hands to it."""

from __future__ import annotations

import abc
import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import fx

from fxopt.errors import InputError, PreconditionError, SpecError
from fxopt.notice import warn
from fxopt.target import Target

if TYPE_CHECKING:
    from fxopt.calibration import Calibration
    from fxopt.program import Program
    from fxopt.rewriter import Rewriter


CLEANING = (
    "canonicalize",
    "common-subexpressions",
    "fold-constants",
)  # passes that lossy ones find their patterns after
# Passes that merge layers, and those that round weights or move scales between them.
MERGING = ("fuse-conv-bn-relu", "merge-linears")
ROUNDING = ("cross-layer-equalization", "smooth-quant", "insert-fake-quant", "cast-precision")
FINISHING = (*MERGING, *ROUNDING)  # what removes parts of a model stands before these


def _declines_nothing(node: fx.Node) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class PassContext:
    """What a pass may look at besides the graph.

    Attributes:
        target: the machine compiled for.
        inputs: flat example inputs, one for each placeholder.
        calibration: the user's calibration data, or None.
        loss: the user's loss: a function of the model's outputs and of what else a calibration batch holds, or None.
        engine: name of the backend that the graph is for; "" as long as that is open.
        latency: milliseconds of a program (which is used up) on that backend and the example inputs; None where the
            target cannot run here.
        build: compiles a program (which is used up) for that backend, and gives a function that runs it once on the
            example inputs; None where the target cannot run here.
        training: the graph is to be trained next: what acts in training only must stay.
        declines_int8: why a conv or linear would be no faster in int8 on that backend, or None.
    """

    target: Target
    inputs: Sequence[Any]
    calibration: Calibration | None = None
    engine: str = ""
    latency: Callable[[Program], float] | None = None
    build: Callable[[Program], Callable[[], object]] | None = None
    training: bool = False
    declines_int8: Callable[[fx.Node], str | None] = _declines_nothing
    loss: Callable[..., Any] | None = None

    def batches(self, who: Pass) -> Iterator[list[Any]]:
        """Flat inputs of each calibration batch.

        Raises:
            PreconditionError: there is no calibration data.
        """
        if self.calibration is None:
            raise PreconditionError(
                f"{who.name} looks at data: pass calibration=, an iterable of input tuples (a DataLoader works)"
            )
        return self.calibration.batches()

    def losses(self, who: Pass) -> Iterator[tuple[list[Any], Callable[[Sequence[Any]], Any]]]:
        """Flat inputs of each calibration batch, and the loss on it as a function of the flat outputs.

        Raises:
            PreconditionError: there is no calibration data, or no loss. InputError, of the function: the loss fails.
        """
        self.batches(who)
        if self.loss is None or self.calibration is None:
            raise PreconditionError(
                f"{who.name} looks at a loss: pass loss=, called with the model's outputs and whatever a calibration "
                "batch has beyond the inputs, such as torch.nn.functional.cross_entropy for (image, label) batches"
            )
        for leaves, rest in self.calibration.labelled():
            yield leaves, functools.partial(self._loss_of, rest)

    def require_measuring(self, who: str, instead: str) -> None:
        """That ``latency`` or ``build`` is there, which *who* needs; *instead* says what to write without them.

        Raises:
            PreconditionError: neither is.
        """
        if self.latency is None and self.build is None:
            reason = f"target {self.target} cannot run here: compile on such a machine"
            if self.target.runs_here:
                reason = "no engine is chosen yet in fxopt.prepare: let fxopt.compile run this pass"
            raise PreconditionError(f"{who} is measured, and {reason}, or {instead}")

    def _loss_of(self, rest: Sequence[Any], outputs: Sequence[Any]) -> Any:
        assert self.loss is not None
        assert self.calibration is not None
        signature = self.calibration.signature
        given = signature.unflatten(list(outputs)[: len(signature.outputs)])
        try:
            return self.loss(given, *rest)
        except Exception as error:
            raise InputError(
                f"loss failed with {type(error).__name__}: {error}. It is called with the outputs of the model and "
                f"with what else a calibration batch holds, here {len(rest)} values"
            ) from error


@dataclasses.dataclass(frozen=True)
class Pass(abc.ABC):
    """One graph rewrite. Subclasses are frozen dataclasses; their fields are the options of the spec string.

    Class attributes:
        name: the name in spec strings, reports and dump files.
        exact: the rewritten graph computes the same, within floating-point tolerance.
        runs_after: passes that, where they are in the pipeline too, must stand before this one.
        runs_before: passes that must stand after this one.
        engine_specific: what the pass does depends on ``ctx.engine``; it, and what follows it, runs once for each.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    runs_after: ClassVar[tuple[str, ...]] = ()
    runs_before: ClassVar[tuple[str, ...]] = ()
    engine_specific: ClassVar[bool] = False

    def require_at_least(self, least: int, *names: str) -> None:
        """For ``__post_init__``.

        Raises:
            SpecError: one of the options *names* is below *least*.
        """
        for name in names:
            if getattr(self, name) < least:
                raise SpecError(f"{self.name}: {name} must be at least {least}, not {getattr(self, name)}")

    def require_share(self, *names: str) -> None:
        """For ``__post_init__``.

        Raises:
            SpecError: one of the options *names* is no number from 0 to below 1.
        """
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
                raise SpecError(f"{self.name}: {name} must be at least 0 and below 1, not {value!r}")

    def warn_of_unused(
        self, rewriter: Rewriter, patterns: Sequence[str], names: Collection[str], what: str = "parameter"
    ) -> None:
        """Say of each of the shell *patterns* that it fits none of *names*, where it does not."""
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                text = f"{self.name}: {pattern!r} fits no {what}, such as {min(names, default='')!r}"
                rewriter.note(text)
                warn(text)

    def companions(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of passes that run, unless the user lists them: right before this one, and after all listed ones."""
        return (), ()

    def untrainable(self) -> str | None:
        """Why ``fxopt.prepare`` cannot take this pass, since what it leaves cannot be trained; None where it can."""
        return None

    @classmethod
    def recall(cls, told: Mapping[str, Any]) -> dict[str, Any]:
        """What ``rewriter.details`` held, from its ``to_plain()`` in an artifact; topics without one are not there."""
        return {}

    @abc.abstractmethod
    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """Rewrite the graph, through *rewriter* only; leave a reason for each candidate left alone.

        Raises:
            PreconditionError: something that the pass needs is missing.
        """
