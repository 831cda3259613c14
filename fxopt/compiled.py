"""The compiled model as the user holds it: called like the model, with its report, its graph and its files."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt import structures
from fxopt.backend import Executable
from fxopt.errors import ArtifactError, FxoptError, InputError
from fxopt.memory import layout
from fxopt.notice import warn
from fxopt.profiling import Profile
from fxopt.program import Program
from fxopt.report import Report
from fxopt.target import Target

Build = Callable[[tuple[Any, ...], dict[str, Any]], "Variant"]
_MOST_VARIANTS = 8


@dataclasses.dataclass
class Variant:
    """The result of one compile: for given input structure, shapes and dtypes.

    Attributes:
        program: the final program; its graph is whole, constants that the engine packed live in ``executable``.
        executable: what runs it.
        backend: name of the backend.
        report: what was done.
        options: those of the backend.
    """

    program: Program
    executable: Executable
    backend: str
    report: Report
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Bind, run, write back what the model mutates, and rebuild the user's structure."""
        signature = self.program.signature
        inputs = signature.bind(args, kwargs)
        if torch.is_grad_enabled():
            _refuse_grad(inputs)
        if not signature.writebacks:
            return signature.unflatten(self.executable(inputs))
        with self.lock:  # a model with state answers one caller at a time
            outputs = self.executable(inputs)
            split = len(signature.outputs)
            results = [x.clone() if isinstance(x, torch.Tensor) else x for x in outputs[:split]]
            self._write_back(inputs, outputs[split:])
        return signature.unflatten(results)

    def whole_program(self) -> Program:
        """The final program with all its constants, those that the engine keeps in another form included."""
        program = self.program.copy()
        state = {back.constant for back in program.signature.writebacks}  # what calls have made of it
        for node in program.graph.find_nodes(op="get_attr"):
            name = str(node.target)
            if name not in program.constants or name in state:
                value, fake = self.executable.constant(name), node.meta.get("val")
                widened = isinstance(fake, torch.Tensor) and fake.dtype != value.dtype  # by the engine, for its own use
                program.constants[name] = value.to(fake.dtype) if widened else value
        return program

    def _write_back(self, inputs: list[Any], values: list[Any]) -> None:
        with torch.no_grad():
            for back, value in zip(self.program.signature.writebacks, list(values), strict=True):
                place = inputs[back.input] if back.input is not None else self.executable.constant(str(back.constant))
                place.copy_(value)


def _refuse_grad(inputs: list[Any]) -> None:
    if any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
        raise InputError(
            "an input requires grad, but a compiled model is for inference and keeps no gradients: call it under "
            "torch.no_grad() or with detached inputs, and train the original model, then compile again"
        )


class CompiledModel:
    """A model compiled for a target. Call it like the model it came from.

    Calls are thread-safe and give tensors without gradients. Compiled without example inputs, it is captured at the
    first call; another input structure, shape or dtype then captures anew, with a warning, and the last
    8 variants are kept.
    """

    def __init__(self, target: Target, *, build: Build | None = None, variant: Variant | None = None) -> None:
        """Either *variant* is given, or *build* makes one at the first call."""
        self.target = target
        self._build = build
        self._fixed = variant
        self._lazy: OrderedDict[Hashable, Variant] = OrderedDict()
        self._state: dict[str, torch.Tensor] = {}
        self._lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs, in the model's own structure.

        Raises:
            InputError: the inputs do not fit what was captured, or require grad.
        """
        if self._fixed is not None:
            return self._fixed(args, kwargs)
        variant = self._variant(args, kwargs)
        if not variant.program.signature.writebacks:
            return variant(args, kwargs)
        with self._lock:  # one state for all variants, whichever is called
            self._hand_over_state(variant)
            return variant(args, kwargs)

    def _hand_over_state(self, variant: Variant) -> None:
        """Give *variant* the buffers as the variant called before it left them."""
        for back in variant.program.signature.writebacks:
            if back.constant is None:
                continue
            own = variant.executable.constant(back.constant)
            latest = self._state.get(back.constant, own)
            if latest is not own:
                own.copy_(latest)
            self._state[back.constant] = own

    @property
    def backend(self) -> str:
        """Name of the backend that runs the model."""
        return self._current("backend").backend

    @property
    def report(self) -> Report:
        """What each pass did and skipped, sizes, and measured latency (of the latest variant)."""
        return self._current("report").report

    @property
    def graph(self) -> fx.GraphModule:
        """The final graph as an fx.GraphModule: flat input leaves in, flat tuple of outputs out."""
        variant = self._current("graph")
        return variant.whole_program().to_module()

    def profile(
        self, inputs: Sequence[Any] | torch.Tensor, kwargs: Mapping[str, Any] | None = None, *, runs: int = 30
    ) -> Profile:
        """Time by node, on the torch backend. The report shows it from then on.

        Args:
            inputs: positional inputs, a tuple (or one tensor), as for ``example_inputs``.
            kwargs: keyword inputs.
            runs: how many runs the medians are of, at most; no new one starts after three seconds.

        Returns:
            A :class:`Profile`; it prints, and ``save("trace.json")`` writes a Chrome trace.

        Raises:
            InputError: the inputs do not fit, or *runs* is none. PreconditionError: the backend times no nodes.
        """
        from fxopt.compiler import as_args, check_kwargs

        if type(runs) is not int or runs < 1:
            raise InputError(f"runs must be a whole number of at least 1, not {runs!r:.80}")
        check_kwargs(kwargs)
        args, named = as_args(inputs) or (), dict(kwargs or {})
        variant = self._fixed if self._fixed is not None else self._variant(args, named)
        variant.report.profile = variant.executable.profile(variant.program.signature.bind(args, named), runs)
        return variant.report.profile

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the compiled model in the format that the suffix names.

        ``model.fxopt`` is what :func:`fxopt.load` reads, for any backend; others are the engine's own: ``model.onnx``.

        Raises:
            ArtifactError: the backend cannot write this format, the model holds what no file can, or *path* is no path.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise ArtifactError(f"save() wants the path of a file, such as 'model.fxopt', not {path!r:.80}")
        variant = self._current("save()")
        if Path(path).suffix == ".fxopt":
            from fxopt import artifact

            artifact.save(variant, self.target, Path(path))
        else:
            variant.executable.save(Path(path))

    def _repr_html_(self) -> str | None:
        latest = self._fixed or next(reversed(self._lazy.values()), None)
        return None if latest is None else latest.report._repr_html_()

    def __repr__(self) -> str:
        variant = self._fixed or next(reversed(self._lazy.values()), None)
        if variant is None:
            return f"CompiledModel(target={self.target}, captured at the first call)"
        inputs = variant.program.signature.describe()
        return f"CompiledModel(target={self.target}, backend={variant.backend}, inputs=({inputs}))"

    def _current(self, what: str) -> Variant:
        if self._fixed is not None:
            return self._fixed
        with self._lock:
            if not self._lazy:
                raise FxoptError(
                    f".{what} is not there yet: the model is captured at its first call. Call it once, or give "
                    "example_inputs to fxopt.compile."
                )
            return next(reversed(self._lazy.values()))

    def _variant(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
        """The variant for inputs like these, captured now if there is none."""
        key = _key(args, kwargs)
        with self._lock:
            found = self._lazy.get(key)
            if found is not None:
                self._lazy.move_to_end(key)
                return found
            for known, variant in self._lazy.items():
                if variant.program.signature.accepts(args, kwargs):
                    self._lazy.move_to_end(known)
                    return variant
            if self._lazy:
                warn(
                    f"fxopt: the model is called with new input structure, shapes or dtypes and is captured again "
                    f"({len(self._lazy)} variants so far, the latest {_MOST_VARIANTS} are kept). "
                    "Give example_inputs and dynamic_shapes to fxopt.compile to capture once."
                )
            detached = pytree.tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, (args, kwargs))
            assert self._build is not None
            variant = self._build(*detached)
            self._lazy[key] = variant
            while len(self._lazy) > _MOST_VARIANTS:
                self._lazy.popitem(last=False)
            return variant


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    structures.register((args, kwargs))
    leaves, tree = pytree.tree_flatten((args, kwargs))
    parts = [
        (x.shape, x.dtype, x.device, x.layout is torch.strided and layout(x))
        if isinstance(x, torch.Tensor)
        else structures.fingerprint(x)
        for x in leaves
    ]
    return structures.tree_key(tree), tuple(parts)
