"""The public ``waterfall``: the latency of a model from eager through every pass, on one engine.

    steps = fxopt.waterfall(model, (x,), passes="insert-fake-quant", calibration=batches, backend="torch")
    print(steps)
    compiled.report.waterfall = steps.ms        the report page shows it from then on

``fxopt.compile`` measures the first and the last of these alone: lowering after every pass takes as long as that many
compiles. What stands between two passes that belong together, such as the rounding that insert-fake-quant writes into a
graph before freeze-quantized-weights makes integers of it, is measured as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxopt import registry, spec
from fxopt.backend import Backend
from fxopt.calibration import Calibration
from fxopt.capture import Captured, capture
from fxopt.compiler import as_args, check_kwargs, usable
from fxopt.errors import PreconditionError
from fxopt.lowering import Rewritten
from fxopt.measure import latency_ms
from fxopt.passbase import Pass, PassContext
from fxopt.pipeline import Pipeline, full_pipeline
from fxopt.program import Program
from fxopt.progress import Stages
from fxopt.show import as_text, speed_text
from fxopt.target import Target, resolve_target


@dataclasses.dataclass(frozen=True)
class Waterfall:
    """Latency step by step.

    Attributes:
        backend: name of the engine.
        ms: median milliseconds: "eager", then "captured" (the graph before all passes, on the engine), then after each
            pass that changed something, by its name.
    """

    backend: str
    ms: dict[str, float]

    def __str__(self) -> str:
        return as_text(self.__rich__())

    def __rich__(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("", "ms", "against eager"):
            table.add_column(title, justify="left" if not title else "right")
        for name, ms in self.ms.items():
            table.add_row(Text(name), f"{ms:.3f}", "" if name == "eager" else speed_text(self.ms["eager"], ms))
        return table


def waterfall(
    model: nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | torch.Tensor,
    *,
    target: str | Target = "x86",
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    passes: str | Pass | Sequence[str | Pass] | None = None,
    calibration: Iterable[Any] | None = None,
    loss: Callable[..., Any] | None = None,
    backend: str = "torch",
    backend_options: Mapping[str, Any] | None = None,
) -> Waterfall:
    """Measure the latency of *model* in eager, as captured, and after each pass that changes it.

    Args:
        model: never modified.
        example_inputs: positional example inputs, a tuple (or one tensor), on which everything is measured.
        target: as for :func:`fxopt.compile`; so are the others.
        example_kwargs: keyword inputs.
        dynamic_shapes: sizes to keep open.
        passes: what to add to the exact passes.
        calibration: for passes that look at data.
        loss: for passes that look at gradients.
        backend: the name of the engine that runs every step.
        backend_options: of that engine.

    Returns:
        A :class:`Waterfall`, which prints; give its ``ms`` to ``report.waterfall`` to see it on the page.

    Raises:
        PreconditionError: the target is another machine. As ``fxopt.compile`` besides.
    """
    where = resolve_target(target)
    if not where.runs_here:
        raise PreconditionError(f"target {where} is another machine than this one, on which nothing can be measured")
    engine = registry.find_backend(backend).with_options(dict(backend_options or {}))
    engine.require()
    pipeline = full_pipeline([] if passes is None else spec.resolve(passes, registry.find_pass), registry.find_pass)
    check_kwargs(example_kwargs)
    args, kwargs = pytree.tree_map(usable, (as_args(example_inputs) or (), dict(example_kwargs or {})))
    stages = Stages()
    with torch.inference_mode(False), stages.shown("waterfall"), torch.random.fork_rng(devices=[]):
        captured = capture(model, args, kwargs, dynamic_shapes)
        data = None if calibration is None else Calibration(calibration, captured.program.signature)
        ctx = PassContext(where, captured.inputs, data, loss=loss)
        return _steps(captured, Pipeline(ctx, captured.reference, progress=stages.say), pipeline, engine)


def _steps(captured: Captured, pipeline: Pipeline, passes: Sequence[Pass], engine: Backend) -> Waterfall:
    inputs, target = captured.inputs, pipeline.ctx.target

    def measured(program: Program) -> float:
        own = Program(program.copy().graph, dict(program.constants), program.signature)  # the engine consumes it
        executable = engine.lower(own, target, inputs)
        return latency_ms(lambda: executable(inputs))

    state = pipeline.start(captured.program)
    ms = {"eager": _eager(captured), "captured": measured(state.program)}
    for one in passes:
        state = Rewritten(pipeline, state, [one]).specialize(engine, one_of_many=False)
        if state.records[-1].edits:
            ms[one.name] = measured(state.program)
    return Waterfall(engine.name, ms)


def _eager(captured: Captured) -> float:
    own = [x.clone() if isinstance(x, torch.Tensor) else x for x in captured.inputs]  # a model may write to its inputs
    args, kwargs = pytree.tree_unflatten(own, captured.program.signature.in_spec)

    def call() -> None:
        with torch.no_grad():
            captured.model(*args, **kwargs)

    return latency_ms(call)


__all__ = ["Waterfall", "waterfall"]
