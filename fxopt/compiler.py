"""One model, one target, one call: capture → passes → lowering → measurement. The public ``compile``."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxopt import cost, ops, registry, spec, verify
from fxopt.backend import Backend
from fxopt.calibration import Calibration
from fxopt.capture import Captured, capture
from fxopt.compiled import CompiledModel, Variant
from fxopt.errors import BackendUnavailable, FxoptError, InputError, UnsupportedOp, VerifyError
from fxopt.measure import latency_ms
from fxopt.passbase import Pass, PassContext
from fxopt.pipeline import Pipeline, full_pipeline
from fxopt.program import Program
from fxopt.progress import Stages
from fxopt.report import Report
from fxopt.target import Target, resolve_target

# Share of integer outputs (an argmax, a mask) in which an engine may differ from the graph: near-ties fall either way.
_MISMATCHED = 0.01


def _engine_tolerance(exact: bool) -> float:
    """How far an engine may be from the graph that it was given, relative to the range of an output.

    Engines round otherwise than eager, and in low precision two correct engines differ by that precision.
    """
    return verify.TOLERANCE[torch.float32] if exact else verify.TOLERANCE[torch.bfloat16]


def compile(  # noqa: A001 - the name that torch users look for
    model: nn.Module | ExportedProgram,
    *,
    target: str | Target = "x86",
    example_inputs: Sequence[Any] | torch.Tensor | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    passes: str | Pass | Sequence[str | Pass] | None = None,
    calibration: Iterable[Any] | None = None,
    backend: str | Backend = "auto",
    backend_options: Mapping[str, Any] | None = None,
    verify: bool = True,
    dump: str | os.PathLike[str] | None = None,
) -> CompiledModel:
    """Compile a trained model for inference on *target*.

    Args:
        model: nn.Module, ExportedProgram or fx.GraphModule. Never modified; a training-mode module is compiled as in
            eval mode. Weights are taken as they are now: compile again after changing them.
        target: "x86", "arm", "cuda" or a :class:`Target`.
        example_inputs: positional example inputs, a tuple (or one tensor). With neither these nor *example_kwargs*,
            the model is captured at its first call.
        example_kwargs: keyword example inputs.
        dynamic_shapes: sizes to keep open, as ``torch.export.export`` takes them: ``{"x": {0: "batch"}}``.
        passes: None for the exact pipeline; a spec string such as ``"cast-precision{dtype=bf16}"``, or a sequence of
            names and Pass objects, to add to it.
        calibration: iterable of input tuples, for passes that look at data.
        backend: "auto" measures the installed ones and takes the fastest; or a name, or a Backend object.
        backend_options: options of the named backend, e.g. ``{"threads": 2}``.
        verify: check graph and outputs after each pass, and the lowered model in the end.
        dump: folder for one ``.fxir`` file per pass; the variable FXOPT_DUMP sets it too.

    Returns:
        A :class:`CompiledModel`, called like the model.

    Raises:
        InputError: an argument is not what it must be. SpecError: an unknown target, pass, option or backend.
        CaptureError: the model cannot be captured; the message shows the source line.
        PassError, PreconditionError, VerifyError: a pass failed; nothing was changed.
        UnsupportedOp, BackendUnavailable: the named backend cannot run this model, or is not installed.
    """
    plan = _Plan.check(model, target, passes, calibration, backend, backend_options, verify, dump, dynamic_shapes)
    inputs = _as_args(example_inputs)
    if inputs is None and example_kwargs is None and not isinstance(model, ExportedProgram):
        return CompiledModel(plan.target, build=plan.build)
    return CompiledModel(plan.target, variant=plan.build(inputs or (), dict(example_kwargs or {})))


def _as_args(example_inputs: Any) -> tuple[Any, ...] | None:
    if example_inputs is None:
        return None
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,)
    if not isinstance(example_inputs, (tuple, list)):
        raise InputError(
            f"example_inputs must be a tuple of positional inputs, not {type(example_inputs).__name__}; "
            "keyword inputs go into example_kwargs"
        )
    return tuple(example_inputs)


def _usable(x: Any) -> Any:
    """An example input as an ordinary tensor: one made under inference_mode cannot be traced."""
    return x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The checked arguments of one ``compile``; ``build`` carries them out for given inputs."""

    model: nn.Module | ExportedProgram
    target: Target
    passes: list[Pass]
    calibration: Iterable[Any] | None
    backend: str | Backend
    verify: bool
    dump: str | os.PathLike[str] | None
    dynamic_shapes: Any

    @staticmethod
    def check(
        model: Any,
        target: Any,
        passes: Any,
        calibration: Any,
        backend: Any,
        options: Any,
        verify: bool,
        dump: Any,
        shapes: Any,
    ) -> _Plan:
        """Everything that can be found wrong before the model is looked at is found here."""
        if not isinstance(model, (nn.Module, ExportedProgram)):
            raise InputError(f"model must be an nn.Module, ExportedProgram or GraphModule, not {type(model).__name__}")
        if isinstance(model, ExportedProgram) and shapes is not None:
            raise InputError("an ExportedProgram has its dynamic sizes already: give dynamic_shapes to torch.export")
        where = resolve_target(target)
        listed = [] if passes is None else spec.resolve(passes, registry.find_pass)
        pipeline = full_pipeline(listed, registry.find_pass)
        if isinstance(backend, Backend) or backend == "auto":
            if options:
                raise InputError("backend_options go with a backend name; with 'auto' or an object there is none")
            engine = backend
        elif isinstance(backend, str):
            engine = registry.find_backend(backend).with_options(dict(options or {}))
            engine.require()
        else:
            raise InputError(f"backend must be a name or a Backend object, not {type(backend).__name__}")
        folder = dump or os.environ.get("FXOPT_DUMP") or None
        if isinstance(calibration, Iterator):  # a lazy compile may capture, and calibrate, more than once
            calibration = list(calibration)
        return _Plan(model, where, pipeline, calibration, engine, verify, folder, shapes)

    def build(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
        """Capture, rewrite, lower and measure for these example inputs."""
        stages = Stages()
        # Random ops of the model are run here too: the user's random stream is not for that.
        args, kwargs = pytree.tree_map(_usable, (args, kwargs))
        title = f"compiling {type(self.model).__name__}"
        with torch.inference_mode(False), stages.shown(title), torch.random.fork_rng(devices=[]):
            with stages.stage("capture"):
                captured = capture(self.model, args, kwargs, self.dynamic_shapes)
            with stages.stage("passes"):
                program, report = self._rewrite(captured, stages)
            report.seconds = stages.seconds
            lower = _Lowering(self, captured, program, report, stages)
            del program  # weights live on in the lowering alone, where an engine may consume them
            return lower.best() if self.backend == "auto" else lower.named()

    def _rewrite(self, captured: Captured, stages: Stages) -> tuple[Program, Report]:
        data = None if self.calibration is None else Calibration(self.calibration, captured.program.signature)
        ctx = PassContext(self.target, captured.inputs, data)
        pipeline = Pipeline(ctx, captured.reference, self.verify, self.dump, stages.say)
        before = captured.program
        program, records = pipeline.run(before, self.passes)
        name = type(self.model).__name__
        report = Report(name, self.target.name, passes=records)
        report.parameters = (before.numel(), program.numel())
        report.macs = (cost.macs(before), cost.macs(program))
        report.bytes = (before.nbytes(), program.nbytes())
        return program, report


@dataclasses.dataclass
class _Lowering:
    """From the rewritten program to something that runs, and the choice between engines."""

    plan: _Plan
    captured: Captured
    program: Program
    report: Report
    stages: Stages
    expected: list[Any] | None = None

    def named(self) -> Variant:
        """The variant on the one backend that the user chose."""
        assert isinstance(self.plan.backend, Backend)
        variant = self._lower(self.plan.backend, self.program)
        if self.plan.target.runs_here:
            with self.stages.stage("measure"):
                self.report.latency_ms["fxopt"] = self._latency(variant)
        return self._finish(variant)

    def best(self) -> Variant:
        """The variant on the fastest backend that is installed and takes this program."""
        best: Variant | None = None
        for name in self.plan.target.backends:
            try:
                cls = registry.find_backend(name)
                cls.require()
                variant = self._lower(cls(), self.program.copy())  # each engine consumes its own
            except (BackendUnavailable, UnsupportedOp) as error:
                self.report.candidates[name] = str(error)
                continue
            except Exception as error:  # noqa: BLE001 - one broken engine must not keep the others from being tried
                self.report.candidates[name] = f"failed, {type(error).__name__}: {error}"
                warnings.warn(f"fxopt: backend {name} is left out, it failed: {error}", stacklevel=4)
                continue
            if not self.plan.target.runs_here:
                return self._finish(variant)
            with self.stages.stage("measure"):
                latency = self._latency(variant)
            self.report.candidates[name] = latency
            if best is None or latency < self.report.latency_ms["fxopt"]:
                best, self.report.latency_ms["fxopt"] = variant, latency
        if best is None:
            reasons = "; ".join(f"{k}: {v}" for k, v in self.report.candidates.items())
            raise BackendUnavailable(f"no backend of target {self.plan.target} takes this model: {reasons}")
        return self._finish(best)

    def _lower(self, backend: Backend, program: Program) -> Variant:
        """*program* on *backend*. Its constants go to the engine, its graph stays readable."""
        if self.expected is None and self.plan.verify and self.plan.target.runs_here:
            self.expected = verify.run(program, self.captured.inputs)
        with self.stages.stage("lower"):
            self.stages.say(f"lowering to {backend.name}")
            owned = Program(program.copy().graph, program.constants, program.signature)
            executable = backend.lower(owned, self.plan.target, self.captured.inputs)
        names = {str(node.target) for node in program.graph.find_nodes(op="get_attr")}
        program.constants = {name: value for name, value in program.constants.items() if name in names}
        variant = Variant(program, executable, backend.name, self.report)
        if self.expected is not None and not self._random:
            self._check(variant)
        return variant

    @property
    def _random(self) -> bool:
        """Whether the model draws random numbers: then no two runs can be compared."""
        return any(ops.is_random(node) for node in self.program.graph.nodes)

    def _check(self, variant: Variant) -> None:
        """The lowered program answers like the graph it was made from."""
        assert self.expected is not None
        with self.stages.stage("measure"):
            outputs = variant.executable(self.captured.inputs)
        difference = verify.compare(self.expected, outputs)
        if difference.error <= _engine_tolerance(self.report.exact) and difference.mismatched <= _MISMATCHED:
            return
        truth = verify.run_double(variant.whole_program(), self.captured.inputs)
        if not verify.is_rounding(truth, self.expected, outputs):
            raise VerifyError(f"backend {variant.backend} does not compute what the graph does: {difference}")

    def _latency(self, variant: Variant) -> float:
        inputs = self.captured.inputs
        return latency_ms(lambda: variant.executable(inputs))

    def _finish(self, variant: Variant) -> Variant:
        self.report.backend = variant.backend
        if not self.plan.target.runs_here:
            return variant
        with self.stages.stage("measure"):
            outputs = variant.executable(self.captured.inputs)[: len(self.captured.reference)]
            if not self._random:
                self.report.error = verify.compare(self.captured.reference, outputs).error
            self.report.latency_ms["eager"] = self._eager_latency()
        return variant

    def _eager_latency(self) -> float:
        # A model may write to its inputs, and these are the user's.
        own = [x.clone() if isinstance(x, torch.Tensor) else x for x in self.captured.inputs]
        args, kwargs = pytree.tree_unflatten(own, self.captured.program.signature.in_spec)
        model = self.captured.model

        def call() -> None:
            with torch.no_grad():
                model(*args, **kwargs)

        return latency_ms(call, budget_s=0.2, warmup=0, calls=5)


__all__ = ["CompiledModel", "FxoptError", "compile"]
