"""One model, one target, one call: capture → passes → lowering → measurement. The public ``compile``."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxopt import dump as fxir
from fxopt import registry, spec
from fxopt.backend import Backend
from fxopt.calibration import Calibration
from fxopt.capture import Captured, capture
from fxopt.compiled import CompiledModel, Variant
from fxopt.errors import FxoptError, InputError
from fxopt.lowering import Lowering, Rewritten
from fxopt.notice import LOG, cache_folder, configure_log
from fxopt.passbase import Pass, PassContext
from fxopt.pipeline import Pipeline, full_pipeline
from fxopt.progress import Stages
from fxopt.target import Target, resolve_target

if TYPE_CHECKING:
    from fxopt.cache import Entry

# Bytes of weights from which peak memory matters more than the 0.2 s that returning freed memory takes.
_LARGE = 2**28


def compile(  # noqa: A001 - the name that torch users look for
    model: nn.Module | ExportedProgram,
    *,
    target: str | Target = "x86",
    example_inputs: Sequence[Any] | torch.Tensor | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    passes: str | Pass | Sequence[str | Pass] | None = None,
    calibration: Iterable[Any] | None = None,
    loss: Callable[..., Any] | None = None,
    backend: str | Backend = "auto",
    backend_options: Mapping[str, Any] | None = None,
    verify: bool = True,
    dump: str | os.PathLike[str] | None = None,
    cache: bool | str | os.PathLike[str] | None = None,
) -> CompiledModel:
    """Compile a trained model for inference on *target*.

    Args:
        model: nn.Module, ExportedProgram or fx.GraphModule. Never modified; in eval mode, with its weights of now.
        target: "x86", "cortex-a76 -mattr=+i8mm", or another of :func:`fxopt.targets`; or a :class:`Target`.
        example_inputs: positional ones, a tuple or tensor. Without any example the model is captured at its first call.
        example_kwargs: keyword example inputs.
        dynamic_shapes: sizes to keep open, as ``torch.export.export`` takes them: ``{"x": {0: "batch"}}``.
        passes: what to add to the exact passes: a spec such as ``"cast-precision{dtype=bf16}"``, names, Pass objects.
        calibration: iterable of input tuples, for passes that look at data.
        loss: for passes that look at gradients: a function of the model's outputs and of what a calibration batch has
            beyond the inputs: ``torch.nn.functional.cross_entropy`` for (image, label) batches.
        backend: "auto" measures the installed ones and takes the fastest; or a name, or a Backend object.
        backend_options: options of the named backend, e.g. ``{"threads": 2}``.
        verify: check graph and outputs after each pass, and the lowered model in the end.
        dump: folder for one ``.fxir`` file per pass, replacing earlier ones; the variable FXOPT_DUMP sets it too. For
            models captured at their first call it has folders ``variant-1`` and so on.
        cache: True, or a folder, keeps the result for the next such compile; FXOPT_CACHE too. Not with *dump*, *loss*.

    Returns:
        A :class:`CompiledModel`, called like the model.

    Raises:
        InputError: an argument is not what it must be. SpecError: an unknown target, pass, option or backend.
        CaptureError: the model cannot be captured, with the line. PassError, PreconditionError, VerifyError: a pass
            failed. UnsupportedOp, BackendUnavailable: the backend cannot run this model, or is not installed.
    """
    plan = Plan.check(model, target, passes, calibration, loss, backend, backend_options, verify, dump, dynamic_shapes)
    plan = dataclasses.replace(plan, cache=cache_folder(cache))
    inputs = as_args(example_inputs)
    check_kwargs(example_kwargs)
    if inputs is None and example_kwargs is None and not isinstance(model, ExportedProgram):
        return CompiledModel(plan.target, build=plan.build_variant)
    return CompiledModel(plan.target, variant=plan.build(inputs or (), dict(example_kwargs or {})))


def _parts(model: object) -> list[nn.Module]:
    """*model*, or what it wraps, as DistributedDataParallel does."""
    return [model, *model.children()] if isinstance(model, nn.Module) else []


def as_args(example_inputs: Any) -> tuple[Any, ...] | None:
    """The user's *example_inputs* as a tuple.

    Raises:
        InputError: they are none.
    """
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


def check_kwargs(example_kwargs: Any) -> None:
    """Raises InputError where the user's *example_kwargs* are no keyword inputs."""
    fits = isinstance(example_kwargs, Mapping) and all(isinstance(name, str) for name in example_kwargs)
    if example_kwargs is not None and not fits:
        raise InputError(f"example_kwargs must map argument names to inputs, not {example_kwargs!r:.80}")


def check_loss(loss: object) -> None:
    """Raises InputError where the user's *loss* cannot be called."""
    if loss is not None and not callable(loss):
        raise InputError(f"loss must be a function of the outputs and of what a batch holds besides, not {loss!r:.80}")


def _return_freed_memory(weights: int) -> None:
    """Give what the passes freed back to the system, for a large model: glibc keeps folded-away weights otherwise."""
    if weights >= _LARGE:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def usable(x: Any) -> Any:
    """An example input as an ordinary tensor: one made under inference_mode cannot be traced."""
    return x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x


@dataclasses.dataclass(frozen=True)
class Plan:
    """The checked arguments of one ``compile``; ``build`` carries them out for given inputs.

    Attributes:
        captured: what to build, where it has been captured already.
        cache: folder of compiled models, where there is to be one.
        timed: whether to measure the latency of the model and of what comes out, where nothing is chosen by it.
    """

    model: nn.Module | ExportedProgram
    target: Target
    passes: list[Pass]
    calibration: Iterable[Any] | None
    loss: Callable[..., Any] | None
    backend: str | Backend
    verify: bool
    dump: str | os.PathLike[str] | None
    dynamic_shapes: Any
    captured: Captured | None = None
    cache: Path | None = None
    timed: bool = True

    @staticmethod
    def check(
        model: Any,
        target: Any = "x86",
        passes: Any = None,
        calibration: Any = None,
        loss: Any = None,
        backend: Any = "auto",
        options: Any = None,
        verify: bool = True,
        dump: Any = None,
        shapes: Any = None,
    ) -> Plan:
        """Everything that can be found wrong before the model is looked at is found here."""
        configure_log()
        if not isinstance(model, (nn.Module, ExportedProgram)):
            raise InputError(f"model must be an nn.Module, ExportedProgram or GraphModule, not {type(model).__name__}")
        if any(getattr(part, "compiles_itself", False) is True for part in _parts(model)):
            raise InputError("this model comes from fxopt.prepare, and compiles itself: call its compile()")
        if isinstance(model, ExportedProgram) and shapes is not None:
            raise InputError("an ExportedProgram has its dynamic sizes already: give dynamic_shapes to torch.export")
        if options is not None and not isinstance(options, Mapping):
            raise InputError(f"backend_options must map option names to values, not {options!r:.80}")
        if not isinstance(verify, bool):
            raise InputError(f"verify must be True or False, not {verify!r:.80}")
        check_loss(loss)
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
        if folder is not None:
            fxir.prepare(folder, where.backends)
        if isinstance(calibration, Iterator):  # a lazy compile may capture, and calibrate, more than once
            calibration = list(calibration)
        return Plan(model, where, pipeline, calibration, loss, engine, verify, folder, shapes)

    def build(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
        """Capture, rewrite, lower and measure for these example inputs."""
        stages = Stages()
        # Random ops of the model are run here too: the user's random stream is not for that.
        args, kwargs = pytree.tree_map(usable, (args, kwargs))
        title = f"compiling {type(self.model).__name__}"
        with torch.inference_mode(False), stages.shown(title), torch.random.fork_rng(devices=[]):
            with stages.stage("capture"):
                captured = self.captured or capture(self.model, args, kwargs, self.dynamic_shapes)
            LOG.info("captured %s: %d nodes", type(self.model).__name__, len(captured.program.graph.nodes))
            kept = None if self.cache is None else self._kept(captured)
            if kept is not None and (found := kept.get(stages)) is not None:
                return found
            with stages.stage("passes"):
                rewritten = self._rewrite(captured, stages)
            lower = Lowering(self, captured, rewritten, stages)
            _return_freed_memory(captured.program.nbytes())
            del rewritten  # weights live on in the lowering alone, where an engine may consume them
            variant = lower.best() if self.backend == "auto" else lower.named()
            if kept is not None:
                kept.put(variant)
            return variant

    def _kept(self, captured: Captured) -> Entry | None:
        """The place of this compile in the cache, where what it depends on can be told."""
        from fxopt.cache import Cache, Entry, key_of

        if self.dump is not None or self.loss is not None:
            return None
        assert self.cache is not None
        key = key_of(captured, self.passes, self.target, self.backend, self.verify, self.calibration)
        return None if key is None else Entry(Cache.at(self.cache), key, self.target)

    def build_variant(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
        """As :meth:`build`, for one of several calls that differ: each has a dump folder of its own."""
        if self.dump is None:
            return self.build(args, kwargs)
        taken = len(list(Path(self.dump).glob("variant-*/00-capture.fxir")))
        return dataclasses.replace(self, dump=Path(self.dump) / f"variant-{taken + 1}").build(args, kwargs)

    def _rewrite(self, captured: Captured, stages: Stages) -> Rewritten:
        """What the passes do that suits every engine; the rest is left to the lowering to each."""
        data = None if self.calibration is None else Calibration(self.calibration, captured.program.signature)
        ctx = PassContext(self.target, captured.inputs, data, loss=self.loss)
        pipeline = Pipeline(ctx, captured.reference, self.verify, self.dump, stages.say)
        specific = (i for i, one in enumerate(self.passes) if one.engine_specific)
        cut = next(specific, len(self.passes))
        state = pipeline.advance(pipeline.start(captured.program), self.passes[:cut])
        return Rewritten(pipeline, state, self.passes[cut:])


__all__ = ["CompiledModel", "FxoptError", "compile"]
