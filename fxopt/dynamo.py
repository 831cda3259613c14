"""``torch.compile(model, backend="fxopt", options={...})``: graphs from Dynamo, through the same capture as any model.

    Dynamo graph ──weights bound, sizes read from their tensors──▶ capture, passes, lowering ──▶ CompiledModel

Dynamo lifts everything that a graph reads to an input. What an input is here, by its role:

- a **weight** (parameter or buffer of a module) becomes a constant, where the graph does not write to it. A call looks
  whether it is still the same tensor in the same version with the same numbers in a few places, and builds anew where
  it is not. (Writes that have no version, such as those of fused optimizers or through ``weight.data``, show in the
  numbers alone: see :mod:`fxopt.dynamo_weights`.)
- a **size** is read from the tensor that has it; a **number** (an int or float that is open) is taken as it is, and
  another value is another build.
- the rest are **inputs**, and dimensions that Dynamo keeps open stay open.

An output that lies in the memory of an input, a weight or another output does so for the caller too, who may write to
it after a graph break. With gradients the graph runs through AOTAutograd as it is, and says so once. A graph that
cannot be captured or that no engine takes runs as it is, with the reason in a warning.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.compiled import CompiledModel
from fxopt.compiler import Plan
from fxopt.dynamo_alias import Alias, aliases
from fxopt.dynamo_graph import Roles, bind, no_autocast, number, open_dims
from fxopt.dynamo_weights import Kept
from fxopt.errors import BackendUnavailable, CaptureError, InputError, PassError, SpecError, UnsupportedOp, near_miss
from fxopt.notice import cache_folder, warn

_OPTIONS = ("target", "passes", "backend", "backend_options", "calibration", "verify", "dump", "cache")
_SPELLED = {"backend_options": "options"}
_MOST_BUILDS = 8  # of one graph
_recent: list[weakref.ref[CompiledModel]] = []


def backend(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """What Dynamo calls with each graph.

    Args:
        graph: torch functions over placeholders.
        example_inputs: a tensor, number or SymInt for each.
        options: as :func:`fxopt.compile` takes them: target, passes, backend ("torch" where none is named, since Dynamo
            may hand over many small graphs, and nothing is measured then), backend_options, calibration, verify, dump,
            cache.
        mode: none is known.

    Raises:
        SpecError: an unknown option, or a mode. Errors in the options themselves are those of :func:`fxopt.compile`.
    """
    if options is not None and not isinstance(options, Mapping):
        raise SpecError(f"options of backend 'fxopt' are a mapping, such as {{'passes': …}}, not {options!r:.80}")
    given = dict(options or {})
    if mode is not None:
        raise SpecError(f"backend 'fxopt' has no mode {mode!r}: say what you want in options={{'passes': …}}")
    for name in given:
        if name not in _OPTIONS:
            raise SpecError(f"backend 'fxopt' has no option {name!r}.{near_miss(name, _OPTIONS)}")
    wants_grad = any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs)
    if wants_grad and (torch.is_grad_enabled() or _enables_grad(graph)):
        from torch._dynamo.backends.debugging import aot_eager

        _say_once(
            "fxopt: gradients are on and the model's parameters require them, so that its graph runs as it is, with "
            "its gradients. To run it compiled, call it under torch.no_grad() or torch.inference_mode()."
        )
        run: Callable[..., Any] = aot_eager(graph, list(example_inputs))
        return run
    with torch._guards.tracing(None):  # torch.export would add its guards to those of Dynamo's graph
        return Graph(graph, example_inputs, {"backend": "torch", **given})


def compiled_models() -> list[CompiledModel]:
    """The models that were compiled for Dynamo and are still in use, the latest last: for their reports and graphs."""
    return [model for ref in _recent if (model := ref()) is not None]


def _enables_grad(graph: fx.GraphModule) -> bool:
    return any(node.args == (True,) for node in graph.graph.nodes if node.target is torch._C._set_grad_enabled)


@functools.cache
def _say_once(text: str) -> None:
    warn(text)


class Graph:
    """One graph of Dynamo, compiled: called with what Dynamo lifted, in its order.

    Attributes:
        graph: as Dynamo gave it.
        model: the latest :class:`fxopt.CompiledModel` of it; None where it runs as it is.
    """

    def __init__(self, graph: fx.GraphModule, examples: Sequence[Any], options: Mapping[str, Any]) -> None:
        """Compile *graph* for *examples* now."""
        self.graph = graph
        self.model: CompiledModel | None = None
        self._options = {_SPELLED.get(name, name): value for name, value in options.items() if name != "cache"}
        self._cache = cache_folder(options.get("cache"))
        self._lock = threading.RLock()
        self._holders = list(graph.graph.find_nodes(op="placeholder"))
        self._open = [open_dims(node) for node in self._holders]
        self._roles = Roles.of(self._holders, examples)
        self._builds, self._known = 0, dict[tuple[Any, ...], list[CompiledModel]]()
        self._weights: list[Kept] = []
        self._aliases: list[Alias] = aliases(graph.graph)
        self._plain = False
        concrete = [x.node.hint if isinstance(x, torch.SymInt) else x for x in examples]
        self._build(concrete)

    def __call__(self, *args: Any) -> Any:
        """The graph's outputs, a tuple or list as the graph has them."""
        if self._plain:
            return self.graph(*args)
        for weight in self._weights:
            if weight.changed(args):
                return self._anew(args)
        roles = self._roles
        numbers = tuple([number(args[i]) for i in roles.numbers]) if roles.numbers else ()
        inputs = [args[i] for i in roles.inputs]
        for model in self._known.get(numbers, ()):
            try:
                return self._answer(model, inputs, args)
            except InputError:  # it was captured for other sizes
                continue
        with self._lock:
            self._build(args)
            if self.model is not None:
                try:
                    return self._answer(self.model, inputs, args)
                except InputError as error:  # one that no build answers: inputs that share memory, and are written to
                    self._give_up(str(error))
            return self.graph(*args)

    def _answer(self, model: CompiledModel, inputs: Sequence[Any], args: Sequence[Any]) -> Any:
        """The outputs, in the memory that they share with others."""
        outputs = model(*inputs)
        if self._aliases:
            shared = list(outputs)
            for alias in self._aliases:
                shared[alias.output] = alias.of(args, shared)
            return type(outputs)(shared)
        return outputs

    def _anew(self, args: Sequence[Any]) -> Any:
        """Build again: a weight is another one, or was written to."""
        with self._lock:
            self._known.clear()
            self._build(args)
        return self(*args)

    def _build(self, args: Sequence[Any]) -> None:
        """Compile for concrete *args*; where that is not possible the graph runs as it is from now on."""
        self._builds += 1
        if self._builds > _MOST_BUILDS:
            self._give_up(f"its weights, numbers or sizes have changed {_MOST_BUILDS} times")
            return
        try:
            model = self._compiled(args)
        except (CaptureError, UnsupportedOp, BackendUnavailable) as error:
            self._give_up(str(error))
            return
        except PassError as error:
            if self._options.get("passes") is not None:  # they may be wrong for this model
                raise
            self._give_up(str(error))
            return
        self.model = model
        self._known.setdefault(tuple(number(args[i]) for i in self._roles.numbers), []).append(model)
        _recent[:] = [ref for ref in _recent if ref() is not None] + [weakref.ref(model)]

    def _give_up(self, reason: str) -> None:
        self._plain, self.model, self._weights = True, None, []
        self._known.clear()
        where = next((n.meta["stack_trace"] for n in self.graph.graph.nodes if n.meta.get("stack_trace")), "")
        line = re.findall(r'File "([^"]+)", line (\d+)', where)
        at = f" at {line[-1][0]}:{line[-1][1]}" if line else ""
        warn(f"fxopt: a graph{at} runs as it is, not compiled: {reason}")

    def _compiled(self, args: Sequence[Any]) -> CompiledModel:
        """Compiled for *args*; weights that turn out to be written to become inputs."""
        while True:
            module, names = bind(self.graph, self._roles, args)
            inputs = tuple(args[i] for i in self._roles.inputs)
            fresh = not self._known
            shapes = tuple(self._open[i] for i in self._roles.inputs) if fresh else None
            plan = Plan.check(module, **self._options, shapes=shapes if any(shapes or ()) else None)
            plan = dataclasses.replace(plan, timed=False, cache=self._cache)
            try:
                with torch.no_grad(), no_autocast():
                    variant = plan.build(inputs, {})
            except InputError as error:
                if plan.calibration is not None:  # it may be that which is wrong
                    raise
                raise CaptureError(str(error)) from error
            model = CompiledModel(plan.target, variant=variant)
            written = {names[str(back.constant)] for back in _writebacks(model) if back.constant is not None}
            unsafe = written | {i for i in self._roles.weights if args[i].is_inference()}  # those have no version
            if not unsafe:
                self._weights = [Kept.of(i, args[i]) for i in self._roles.weights]
                return model
            weights = tuple(i for i in self._roles.weights if i not in unsafe)
            self._roles = dataclasses.replace(
                self._roles, weights=weights, inputs=tuple(sorted({*self._roles.inputs, *unsafe}))
            )


def _writebacks(model: CompiledModel) -> Sequence[Any]:
    assert model._fixed is not None
    return model._fixed.program.signature.writebacks
