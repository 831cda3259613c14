"""The public ``prepare``: a model rewritten for a target that can still be trained, and compiled after that.

    model ──capture──▶ graph ──passes that leave it trainable──▶ PreparedModel ──your training loop──▶ compile()

Quantization-aware training is the default. ``passes=""``, or passes that prune or factorize, give a model to fine-tune.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxopt import masks, registry, rounds, spec
from fxopt.backend import Backend
from fxopt.calibration import Calibration
from fxopt.capture import Captured, capture
from fxopt.compiler import as_args, check_kwargs, check_loss, usable
from fxopt.errors import InputError, PreconditionError
from fxopt.frozen import Frozen
from fxopt.passbase import Pass, PassContext
from fxopt.pipeline import Pipeline, check_order, with_companions
from fxopt.prepared import PreparedModel
from fxopt.program import Program
from fxopt.target import Target, resolve_target

# What passes count on, as far as training allows: nothing is folded, and what acts in training only stays.
_FIRST = ("canonicalize", "recognize-activations")


def prepare(
    model: nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | torch.Tensor | None = None,
    *,
    target: str | Target = "x86",
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    passes: str | Pass | Sequence[str | Pass] = "insert-fake-quant{qat=true}",
    calibration: Iterable[Any] | None = None,
    loss: Callable[..., Any] | None = None,
    backend: str | Backend | None = None,
    verify: bool = True,
) -> PreparedModel:
    """Rewrite a model into one that trains in an ordinary PyTorch loop, for quantization-aware training by default.

    The graph is captured in eval mode. Dropout, batch norm and the dropout of ``nn.MultiheadAttention`` follow
    ``train()`` and ``eval()``; what the model's Python code does in training alone (stochastic depth) is not in it.

    Args:
        model: nn.Module, ExportedProgram, fx.GraphModule, or a PreparedModel, whose inputs are known, for another
            round of passes. Never modified; parameters are copied.
        example_inputs: positional example inputs, a tuple (or one tensor).
        target: as for :func:`fxopt.compile`.
        example_kwargs: keyword example inputs.
        dynamic_shapes: sizes to keep open: ``{"x": {0: "batch"}}`` to train with other batch sizes.
        passes: spec string or passes whose result can be trained; "" for none.
        calibration: iterable of input tuples, where ranges of activations start; else with the first training batches.
        loss: for passes that look at gradients, as for :func:`fxopt.compile`.
        backend: the engine that quantization is placed for, by default the first of the target. Engines differ in what
            they fuse ("onnx" wants the result of each convolution in integers). Any can run it, that one best.
        verify: check graph and outputs after each pass.

    Returns:
        A :class:`PreparedModel`, in training mode.

    Raises:
        InputError: an argument is not what it must be. SpecError: an unknown target, pass, option or backend.
        CaptureError: the model cannot be captured. PreconditionError: a pass leaves nothing that can be trained.
    """
    where, listed = resolve_target(target), _trainable(spec.resolve(passes, registry.find_pass))
    check_loss(loss)
    args, kwargs = _examples(model, example_inputs, example_kwargs)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        if isinstance(model, PreparedModel):
            captured, name = model.captured(), model.name
        else:
            captured, name = capture(model, args, kwargs, dynamic_shapes), type(model).__name__
        data = None if calibration is None else Calibration(calibration, captured.program.signature)
        ctx = PassContext(where, captured.inputs, data, engine=_engine(backend, where), training=True, loss=loss)
        return _rewritten(captured, ctx, listed, verify, name)


def _examples(model: object, example_inputs: Any, example_kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    inputs = as_args(example_inputs)
    check_kwargs(example_kwargs)
    if inputs is None and example_kwargs is None and not isinstance(model, (ExportedProgram, PreparedModel)):
        raise InputError("fxopt.prepare captures the model at once: give example_inputs")
    args, kwargs = pytree.tree_map(usable, (inputs or (), dict(example_kwargs or {})))
    return args, kwargs


def _rewritten(captured: Captured, ctx: PassContext, listed: list[Pass], verify: bool, name: str) -> PreparedModel:
    masks.uncover(captured.program, captured.model)
    program, records = Pipeline(ctx, captured.reference, verify).run(captured.program, listed)
    modules: dict[str, nn.Module] = {}
    for record in records:
        modules |= record.details.get("fake_quant", {})
    skips = [skip for record in records for skip in record.skips]
    earlier = captured.model.masked if isinstance(captured.model, PreparedModel) else masks.NOTHING
    masked = next((record.details["masks"] for record in records if "masks" in record.details), earlier)
    patterns = dict(earlier.patterns)
    for record in records:
        patterns |= record.details.get("patterns", {})
    masked = dataclasses.replace(masked, patterns=patterns).of(program.constants)
    if earlier.patterns:
        rounds.check(program, masked.patterns, [one.name for one in listed if not one.exact])
    notes = captured.model._frozen.notes if isinstance(captured.model, PreparedModel) else ()
    notes += tuple(f"{record.name}: {note}" for record in records for note in record.notes)
    frozen = Frozen(program, name, ctx.target, captured.inputs, skips, masked, notes)
    prepared = PreparedModel(frozen, dict(_tensors(program, captured)), modules, captured.model)
    if isinstance(captured.model, PreparedModel):
        prepared.inherit(captured.model)
    return prepared


def _engine(backend: str | Backend | None, target: Target) -> str:
    if backend is None:
        return target.backends[0]
    if isinstance(backend, Backend):
        return backend.name
    if not isinstance(backend, str):
        raise InputError(f"backend must be a name or a Backend object, not {type(backend).__name__}")
    return registry.find_backend(backend).name


def _trainable(listed: Sequence[Pass]) -> list[Pass]:
    """The pipeline before training.

    Raises:
        PreconditionError: a pass leaves what cannot be trained, or the order cannot work.
    """
    check_order(listed)
    named = {one.name for one in listed}
    first = [registry.find_pass(name)() for name in _FIRST if name not in named]
    passes = first + with_companions(listed, registry.find_pass)
    for one in passes:
        reason = one.untrainable()
        if reason is not None:
            raise PreconditionError(f"fxopt.prepare cannot take {one.name}: {reason}")
    check_order(passes)
    return passes


def _tensors(program: Program, captured: Captured) -> Iterator[tuple[str, torch.Tensor]]:
    """An own copy of each constant: a Parameter where training is to change it.

    Those are the parameters of the model, and what passes made in place of them: new weights and biases of ops.
    """
    own = dict(captured.model.named_parameters(remove_duplicate=False))
    for node in program.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        value = program.constants[name]
        if not isinstance(value, torch.Tensor):
            continue
        new = name not in captured.program.constants
        copied = value.detach().clone(memory_format=_format(value))
        if name in own:
            yield name, nn.Parameter(copied, requires_grad=own[name].requires_grad)
        elif new and value.is_floating_point() and masks.is_weight(node):
            yield name, nn.Parameter(copied)
        else:
            yield name, copied


def _format(value: torch.Tensor) -> torch.memory_format:
    """Weights lie as the model has them; a transposed view becomes a matrix of its own."""
    return torch.contiguous_format if value.dim() == 2 else torch.preserve_format


__all__ = ["PreparedModel", "prepare"]
