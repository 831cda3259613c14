"""The public ``sensitivity``: which layers of a model quantization harms most, before deciding what to quantize.

print(fxopt.sensitivity(model, (x,), calibration))          a table, the most sensitive layer first
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxopt import registry, spec
from fxopt.backend import Backend
from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.compiler import as_args, check_kwargs, usable
from fxopt.errors import InputError
from fxopt.passbase import Pass, PassContext
from fxopt.pipeline import Pipeline, full_pipeline
from fxopt.progress import Stages
from fxopt.rewriter import Rewriter
from fxopt.show import as_text
from fxopt.target import Target, resolve_target

_QUANTIZE = "insert-fake-quant"


@dataclasses.dataclass(frozen=True)
class LayerSensitivity:
    """The outputs of the model when one layer alone is quantized.

    Attributes:
        name: of the node; ``weight`` that of its weight in the user's model; ``kind``: "conv", "linear"...
        cosine: similarity of the worst output to float; ``snr_db``: its signal-to-noise ratio in decibels.
        source: ``file:line`` of the user's code.
    """

    name: str
    weight: str
    kind: str
    cosine: float
    snr_db: float
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """The layers of a model, the one that is harmed most by quantization first.

    Attributes:
        layers: those that can be quantized.
        declined: why others cannot, by node name.
    """

    layers: tuple[LayerSensitivity, ...]
    declined: dict[str, str]

    def overrides(self, count: int) -> tuple[str, ...]:
        """What to give to insert-fake-quant as ``overrides`` to leave the *count* most sensitive layers in float."""
        return tuple(f"{layer.name}=float" for layer in self.layers[:count])

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("layer", "kind", "weight", "SNR", "cosine", "source"):
            table.add_column(title, justify="right" if title in ("SNR", "cosine") else "left", overflow="fold")
        for one in self.layers:
            numbers = f"{one.snr_db:.1f} dB", f"{one.cosine:.6f}"
            table.add_row(one.name, one.kind, one.weight, *numbers, one.source)
        return table


def sensitivity(
    model: nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | torch.Tensor,
    calibration: Iterable[Any],
    *,
    target: str | Target = "x86",
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    passes: str | Pass | Sequence[str | Pass] = _QUANTIZE,
    backend: str | Backend | None = None,
) -> Sensitivity:
    """Quantize one conv or linear at a time, and compare the outputs with float.

    Args:
        model: nn.Module, ExportedProgram or fx.GraphModule. Never modified.
        example_inputs: positional example inputs, a tuple (or one tensor).
        calibration: iterable of input tuples. Ranges come from most of its batches, the comparison from the second
            and each eighth after it (up to four).
        target: "x86", "arm", "cuda", another of :func:`fxopt.targets`, or a :class:`Target`.
        example_kwargs: keyword example inputs.
        dynamic_shapes: as ``torch.export.export`` takes them.
        passes: as for ``fxopt.compile``; the options of insert-fake-quant say how layers are quantized, and what stands
            before it is done before.
        backend: the engine that quantization is placed for, by default the first of the target.

    Returns:
        A table: ``.layers`` sorted by signal-to-noise ratio, the worst first; ``.overrides(n)`` for insert-fake-quant.
        A layer is named as in ``report.quantization``.

    Raises:
        InputError: an argument is not what it must be, or *passes* has no insert-fake-quant.
        CaptureError: the model cannot be captured. PassError: a pass before insert-fake-quant failed.
    """
    where = resolve_target(target)
    pipeline = full_pipeline(spec.resolve(passes, registry.find_pass), registry.find_pass)
    cut = next((i for i, one in enumerate(pipeline) if one.name == _QUANTIZE), None)
    if cut is None:
        raise InputError(f"sensitivity looks at what {_QUANTIZE} would do: passes must contain it")
    check_kwargs(example_kwargs)
    args, kwargs = pytree.tree_map(usable, (as_args(example_inputs) or (), dict(example_kwargs or {})))
    stages = Stages()
    with torch.inference_mode(False), stages.shown("sensitivity"), torch.random.fork_rng(devices=[]):
        captured = capture(model, args, kwargs, dynamic_shapes)
        engine = backend.name if isinstance(backend, Backend) else backend or where.backends[0]
        data = Calibration(calibration, captured.program.signature)
        ctx = PassContext(where, captured.inputs, data, engine=engine)
        program, _ = Pipeline(ctx, captured.reference, progress=stages.say).run(captured.program, pipeline[:cut])
        found: Sensitivity = pipeline[cut].sensitivity(Rewriter(program.copy()), ctx)  # type: ignore[attr-defined]
        return found


__all__ = ["LayerSensitivity", "Sensitivity", "sensitivity"]
