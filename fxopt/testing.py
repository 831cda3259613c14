"""Checks for people who write passes: run one on a model, and have everything verified that can be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxopt import dump, registry, spec, verify
from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.passbase import Pass, PassContext
from fxopt.pipeline import Pipeline
from fxopt.program import Program
from fxopt.report import PassRecord
from fxopt.target import Target, resolve_target


@dataclasses.dataclass(frozen=True)
class Checked:
    """What :func:`check_pass` found.

    Attributes:
        program: the program after the last pass.
        record: of the last pass.
        text: fxir of the program.
        difference: outputs against eager.
    """

    program: Program
    record: PassRecord
    text: str
    difference: verify.Difference

    def ops(self) -> list[str]:
        """Op names in graph order, ``fxopt.conv2d`` style."""
        calls = (n for n in self.program.graph.nodes if n.op == "call_function")
        return [str(n.target).rpartition(".")[0] if "." in str(n.target) else str(n.target) for n in calls]

    def reasons(self) -> str:
        """All reasons of the last pass, a line each."""
        return "\n".join(str(skip) for skip in self.record.skips)


def _finder(one: Pass) -> Callable[[str], type[Pass]]:
    """What finds passes by name, *one* among them though it may have no entry point yet."""
    return lambda name: type(one) if name == one.name else registry.find_pass(name)


def check_pass(
    one: Pass | str,
    model: nn.Module,
    inputs: Sequence[Any],
    *,
    kwargs: Mapping[str, Any] | None = None,
    before: str | Sequence[str | Pass] = "canonicalize",
    target: str | Target = "x86",
    dynamic_shapes: Any = None,
    calibration: Any = None,
) -> Checked:
    """Capture *model*, run the passes *before* and then *one*, all verified; then check what every pass owes.

    A second run of the pass must change nothing, the spec string must give the pass back, and the user's model must
    be as it was.

    Raises:
        AssertionError: one of these does not hold. FxoptError: as the pipeline raises it.
    """
    [last] = spec.resolve(one, registry.find_pass)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    captured = capture(model, tuple(inputs), kwargs, dynamic_shapes)
    data = None if calibration is None else Calibration(calibration, captured.program.signature)
    ctx = PassContext(resolve_target(target), captured.inputs, data)
    pipeline = Pipeline(ctx, captured.reference)
    first = [p for p in spec.resolve(before, registry.find_pass) if p.name != last.name]
    program, records = pipeline.run(captured.program, [*first, last])
    _, again = Pipeline(ctx, verify.run(program, captured.inputs)[: len(captured.reference)]).run(program, [last])
    assert again[0].edits == 0, f"a second run of {last.name} changed the graph again ({again[0].edits} edits)"
    assert spec.resolve(spec.format([last]), _finder(last)) == [last], "the spec string does not give the pass back"
    assert modes == [m.training for m in model.modules()], "the pass changed the mode of the user's model"
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]) or value.isnan().any(), f"the pass changed {name} of the user's model"
    difference = verify.compare(captured.reference, verify.run(program, captured.inputs)[: len(captured.reference)])
    return Checked(program, records[-1], dump.dump(program, f"after {last.name}  target {ctx.target}"), difference)
