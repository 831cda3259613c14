"""From the rewritten program to something that runs: lower, compare with the graph, measure, choose between engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from fxopt import cost, layers, locate, ops, registry, sparse_packing, verify
from fxopt.backend import Backend, Executable
from fxopt.capture import Captured
from fxopt.compiled import Variant
from fxopt.errors import BackendUnavailable, PreconditionError, UnsupportedOp, VerifyError
from fxopt.layers import Layer
from fxopt.measure import latency_ms
from fxopt.notice import LOG, warn
from fxopt.passbase import Pass
from fxopt.pipeline import Pipeline, State
from fxopt.program import Program
from fxopt.progress import Stages
from fxopt.recording import Snapshot
from fxopt.report import Report
from fxopt.target import Target

if TYPE_CHECKING:
    from fxopt.compiler import Plan

# Share of integer outputs (an argmax, a mask) in which an engine may differ from the graph: near-ties fall either way.
_MISMATCHED = 0.01

# How many times farther from the user's model than its graph an engine may be, where passes were lossy.
_STRAY = 2.0


def _engine_tolerance(exact: bool) -> float:
    """How far an engine may be from the graph that it was given, relative to the range of an output.

    Engines round otherwise than eager, and in low precision two correct engines differ by that precision.
    """
    return verify.TOLERANCE[torch.float32] if exact else verify.TOLERANCE[torch.bfloat16]


@dataclasses.dataclass
class Rewritten:
    """A program after the passes that suit every engine, and the passes that are left, which ask for the engine."""

    pipeline: Pipeline
    state: State
    left: Sequence[Pass]

    def specialize(self, engine: Backend, *, one_of_many: bool) -> State:
        """The program with all passes for *engine*; where there are several, each has a dump folder of its own."""
        if not self.left:
            return self.state
        folder = self.pipeline.folder
        if folder is not None and one_of_many:
            folder = Path(folder) / engine.name
        ctx = self.pipeline.ctx

        def build(program: Program) -> Callable[[], object]:
            executable = engine.lower(program, ctx.target, ctx.inputs)
            return lambda: executable(ctx.inputs)

        def latency(program: Program) -> float:
            return latency_ms(build(program), budget_s=0.5, calls=30)

        ctx = dataclasses.replace(
            ctx,
            engine=engine.name,
            latency=latency if ctx.target.runs_here else None,
            build=build if ctx.target.runs_here else None,
            declines_int8=engine.declines_int8,
        )
        return dataclasses.replace(self.pipeline, ctx=ctx, folder=folder).advance(self.state, self.left)


@dataclasses.dataclass
class Lowering:
    """From the rewritten program to something that runs, and the choice between engines."""

    plan: Plan
    captured: Captured
    rewritten: Rewritten
    stages: Stages
    expected: list[Any] | None = None
    candidates: dict[str, float | str] = dataclasses.field(default_factory=dict)
    latency_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    captured_graph: Snapshot | None = None
    layers: tuple[Layer, ...] | None = None

    def named(self) -> Variant:
        """The variant on the one backend that the user chose."""
        assert isinstance(self.plan.backend, Backend)
        variant = self._lower(self.plan.backend, self._state(self.plan.backend))
        if self.plan.target.runs_here and self.plan.timed and not variant.executable.obstacle:
            with self.stages.stage("measure"):
                self.latency_ms["fxopt"] = self._latency(variant)
        return self._finish(variant)

    def best(self) -> Variant:
        """The variant on the fastest backend that is installed and takes this program."""
        best: Variant | None = None
        failed = dict[str, Exception]()
        for name in self.plan.target.backends:
            try:
                cls = registry.find_backend(name)
                if best is not None and cls.last_resort:
                    continue
                cls.require()
                state = self._state(cls())  # each engine consumes a program of its own
                variant = self._lower(cls(), dataclasses.replace(state, program=state.program.copy()))
                if variant.executable.obstacle:
                    raise BackendUnavailable(variant.executable.obstacle)
            except (BackendUnavailable, UnsupportedOp) as error:
                self.candidates[name] = str(error)
                continue
            except Exception as error:  # noqa: BLE001 - one broken engine must not keep the others from being tried
                self.candidates[name] = f"failed, {type(error).__name__}: {error}"
                failed[name] = error
                continue
            if not self.plan.target.runs_here:
                best = variant
                break
            with self.stages.stage("measure"):
                latency = self._latency(variant)
            self.candidates[name] = latency
            LOG.info("%s: %.3f ms", name, latency)
            if best is None or latency < self.latency_ms["fxopt"]:
                best, self.latency_ms["fxopt"] = variant, latency
        if best is None and failed and all(isinstance(error, PreconditionError) for error in failed.values()):
            raise next(iter(failed.values()))  # what a pass asks for, the others would ask for as well
        for name, reason in failed.items():
            warn(f"fxopt: backend {name} is left out, it failed: {reason}")
        if best is None:
            reasons = "; ".join(f"{k}: {v}" for k, v in self.candidates.items())
            raise BackendUnavailable(f"no backend of target {self.plan.target} takes this model: {reasons}")
        return self._finish(best)

    def _state(self, engine: Backend) -> State:
        with self.stages.stage("passes"):
            return self.rewritten.specialize(engine, one_of_many=self.plan.backend == "auto")

    def _lower(self, backend: Backend, state: State) -> Variant:
        """The program of *state* on *backend*. Its constants go to the engine, its graph stays readable."""
        program, report = state.program, self._report(state, backend)
        if self.rewritten.left:
            self.expected = None  # each engine has a graph of its own
        if self.expected is None and self.plan.verify and self.plan.target.runs_here:
            self.expected = verify.run(program, self.captured.inputs)
        with self.stages.stage("lower"):
            self.stages.say(f"lowering to {backend.name}")
            executable = hand_over(program, backend, self.plan.target, self.captured.inputs)
        report.notes = executable.notes
        LOG.info("lowered to %s", backend.name)
        options = dataclasses.asdict(backend)
        variant = Variant(program, executable, backend.name, report, options)
        if self.expected is not None and not self._random and not executable.obstacle:
            self._check(variant)
        return variant

    def _report(self, state: State, backend: Backend) -> Report:
        before, after = self.captured.program, state.program
        if self.captured_graph is None:
            self.captured_graph = Snapshot.of(before, "as captured")
        if self.layers is None or self.rewritten.left:
            self.layers = layers.collect(after, state.records)
        return Report(
            type(self.plan.model).__name__,
            str(self.plan.target),
            backend.name,
            state.records,
            (before.numel(), after.numel()),
            (cost.macs(before), cost.macs(after)),
            (before.nbytes(), after.nbytes()),
            after.nbytes() - sparse_packing.saving(after.tensors()),
            self.latency_ms,
            self.candidates,
            self.stages.seconds,
            engine_exact=backend.exact,
            captured=self.captured_graph,
            layers=self.layers,
        )

    @property
    def _random(self) -> bool:
        """Whether the model draws random numbers: then no two runs can be compared."""
        return any(ops.is_random(node) for node in self.captured.program.graph.nodes)

    def _check(self, variant: Variant) -> None:
        """The lowered program answers like the graph it was made from."""
        assert self.expected is not None
        with self.stages.stage("measure"):
            outputs = variant.executable(self.captured.inputs)
        difference = verify.compare(self.expected, outputs)
        if difference.error <= _engine_tolerance(variant.report.exact) and difference.mismatched <= _MISMATCHED:
            return
        if not variant.report.exact and self._as_near_as_the_graph(outputs):
            return
        try:
            truth = verify.run_double(variant.whole_program(), self.captured.inputs)
            rounding = verify.is_rounding(truth, self.expected, outputs)
        except RuntimeError:  # integers of a quantized graph, or a kernel without float64: nothing explains it
            rounding = False
        if not rounding:
            raise VerifyError(
                f"backend {variant.backend} does not compute what the graph does: {difference}{self._where(variant)}"
            )

    def _where(self, variant: Variant) -> str:
        """The end of a sentence: the node at which the engine's values part from the graph's."""
        asked = self.plan.backend
        engine = asked if isinstance(asked, Backend) else registry.find_backend(variant.backend)()
        tolerance = _engine_tolerance(variant.report.exact)

        def lower(program: Program) -> Executable:
            return engine.lower(program, self.plan.target, self.captured.inputs)

        place = locate.first_stray(variant.whole_program(), lower, self.captured.inputs, tolerance)
        return f"; values part first at {place}" if place else ""

    def _as_near_as_the_graph(self, outputs: Sequence[Any]) -> bool:
        """Whether an engine that rounds otherwise strays no farther from the user's model than a lossy graph does.

        One integer more or less in an early layer changes many in the last: two right answers may lie far apart.
        """
        assert self.expected is not None
        reference = self.captured.reference
        graph = verify.compare(reference, self.expected[: len(reference)])
        engine = verify.compare(reference, outputs[: len(reference)])
        near = engine.error <= _STRAY * graph.error and 1 - engine.cosine <= _STRAY * (1 - graph.cosine)
        return near and engine.mismatched <= max(_MISMATCHED, _STRAY * graph.mismatched)

    def _latency(self, variant: Variant) -> float:
        inputs = self.captured.inputs
        return latency_ms(lambda: variant.executable(inputs))

    def _finish(self, variant: Variant) -> Variant:
        if not self.plan.target.runs_here or variant.executable.obstacle:
            return variant
        with self.stages.stage("measure"):
            outputs = variant.executable(self.captured.inputs)[: len(self.captured.reference)]
            if not self._random:
                variant.report.error = verify.compare(self.captured.reference, outputs).error
            if self.plan.timed:
                self.latency_ms["eager"] = self._eager_latency()
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


def hand_over(program: Program, backend: Backend, target: Target, inputs: Sequence[Any]) -> Executable:
    """*program* on *backend*: weights go to the engine, the graph and what it needs to be readable stay."""
    owned = Program(program.copy().graph, program.constants, program.signature)
    small = _besides_weights(program)
    executable = backend.lower(owned, target, inputs)
    read = {str(node.target): node.meta.get("val") for node in program.graph.find_nodes(op="get_attr")}
    left = {name: _as_read(value, read.get(name)) for name, value in program.constants.items()}
    left = {name: value for name, value in left.items() if _is_of(value, read.get(name))}
    program.constants = {name: value for name, value in {**small, **left}.items() if name in read}
    return executable


def _as_read(value: Any, fake: Any) -> Any:
    """*value* in the dtype that the graph says: an engine may have widened its own."""
    both = isinstance(fake, torch.Tensor) and isinstance(value, torch.Tensor)
    widened = both and value.is_floating_point() and value.dtype != fake.dtype
    return value.to(fake.dtype) if widened else value


def _is_of(value: Any, fake: Any) -> bool:
    """Whether *value* is still what the graph says: an engine may have given it another form."""
    return not isinstance(fake, torch.Tensor) or (value.dtype == fake.dtype and value.shape == fake.shape)


def _besides_weights(program: Program) -> dict[str, Any]:
    """Biases, scales, zero points, branches: engines put them into kernels, and the readable graph needs them too."""
    nodes = program.graph.find_nodes(op="get_attr")
    scales = {
        n for n in nodes for user in n.users if ops.namespace(user) == "quantized_decomposed" and n in user.args[1:]
    }
    found = {str(n.target): program.constants[str(n.target)] for n in nodes}
    return {
        str(n.target): value
        for n in nodes
        if not isinstance(value := found[str(n.target)], torch.Tensor) or value.dim() <= 1 or n in scales
    }
