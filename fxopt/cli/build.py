"""``fxopt compile``, ``explain`` and ``bench``."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch.utils import _pytree as pytree

import fxopt
from fxopt import registry, spec
from fxopt.artifact.reports import encode_report
from fxopt.cli import sources
from fxopt.cli.output import NO, emit
from fxopt.cli.recipe import read
from fxopt.cli.use import random_inputs
from fxopt.errors import BackendUnavailable, FxoptError, InputError
from fxopt.measure import latency_ms


@dataclasses.dataclass(frozen=True)
class Wish:
    """How to compile: what the recipe says, and over it the command line."""

    target: str
    backend: str
    options: dict[str, Any]
    passes: Any
    inputs: tuple[str, ...]
    calibration: str | None
    loss: str | None
    verify: bool

    @staticmethod
    def of(
        recipe: Path | None,
        inputs: Sequence[str] | None,
        target: str | None,
        backend: str | None,
        passes: str | None,
        calibration: str | None,
        verify: bool | None,
    ) -> Wish:
        """From the options of a command.

        Raises:
            InputError: the recipe is wrong. SpecError: the passes are.
        """
        said, listed = read(recipe) if recipe is not None else (None, [])
        if passes is not None:
            listed = spec.parse(passes, registry.find_pass)
        return Wish(
            target or (said and said.target) or "x86",
            backend or (said and said.backend) or "auto",
            dict(said.backend_options) if said and backend is None else {},
            listed or None,
            tuple(inputs or (said.input if said else ())),
            calibration or (said.calibration if said else None),
            said.loss if said else None,
            verify if verify is not None else (said.verify if said else True),
        )


def compiled(name: str, wish: Wish, dump: Path | None = None, backend: str | None = None) -> fxopt.CompiledModel:
    """The model *name*, compiled as wished.

    Raises:
        InputError: it has no example inputs, or comes compiled.
    """
    source = sources.model(name, wish.inputs)
    if source.inputs is None and not source.kwargs and isinstance(source.model, torch.nn.Module):
        raise InputError(
            f"MODEL {name!r} comes without example inputs: let it give (model, example_inputs), or write them, such as "
            "--input 'f32[1,3,224,224]'"
        )
    return fxopt.compile(
        source.model,
        target=wish.target,
        example_inputs=source.inputs,
        example_kwargs=source.kwargs or None,
        dynamic_shapes=source.shapes,
        passes=wish.passes,
        calibration=None if wish.calibration is None else sources.data(wish.calibration),
        loss=None if wish.loss is None else sources.found(wish.loss, "loss"),
        backend=backend or wish.backend,
        backend_options=wish.options or None,
        verify=wish.verify,
        dump=dump,
    )


def refuse_for_artifacts(name: str, **given: Any) -> None:
    """Options that have no meaning where *name* is an artifact.

    Raises:
        InputError: one of them is given.
    """
    said = [f"--{option}" for option, value in given.items() if value]
    if name.endswith(".fxopt") and said:
        raise InputError(f"{name} is compiled already, so that {', '.join(said)} would change nothing: leave it out")


def compile_model(name: str, wish: Wish, output: Path | None, dump: Path | None, *, as_json: bool) -> int | None:
    """Compile, report, save; what cannot be written to is told before the work.

    Raises:
        InputError: there is no such folder.
    """
    if output is not None and not output.parent.is_dir():
        raise InputError(f"--output {str(output)!r}: there is no folder {str(output.parent)!r}")
    model = compiled(name, wish, dump)
    data: dict[str, Any] = {"report": encode_report(model.report), "output": None}
    parts: list[Any] = [model.report]
    if output is not None:
        model.save(output)
        data["output"] = {"path": str(output), "bytes": output.stat().st_size}
        parts.append(Text(f"Written to {output}, {output.stat().st_size / 1e6:.2f} MB", style="green"))
    emit(data, Group(*parts), as_json=as_json)
    return None


def explain(name: str, wish: Wish, *, as_json: bool) -> int | None:
    """Passes, what they did, what they left alone."""
    refuse_for_artifacts(name, passes=wish.passes, input=wish.inputs, calibration=wish.calibration)
    report = sources.report(name) if name.endswith(".fxopt") else compiled(name, wish).report
    parts: list[Any] = []
    for record in report.passes:
        done = f"{record.edits} edits, {record.nodes[0]} → {record.nodes[1]} ops" if record.edits else "nothing to do"
        parts.append(Text.assemble((record.spec, "bold" if record.edits else "dim"), f"  {done}"))
        parts += [Text(f"    {note}") for note in record.notes]
        parts += [Text(f"    left alone: {skip}", style="dim") for skip in record.skips]
    passes = encode_report(report)["passes"]
    emit({"target": report.target, "backend": report.backend, "passes": passes}, Group(*parts), as_json=as_json)
    return None


def bench(
    name: str,
    wish: Wish,
    backends: str | None,
    threads: int | None,
    rounds: int,
    *,
    allow_code: bool,
    as_json: bool,
) -> int | None:
    """Latency in turns, as medians of the rounds."""
    if threads is not None:
        torch.set_num_threads(threads)
    refuse_for_artifacts(name, passes=wish.passes, input=wish.inputs, calibration=wish.calibration, backends=backends)
    failed = dict[str, str]()
    calls = dict[str, Callable[[], object]]()
    if name.endswith(".fxopt"):
        model = sources.artifact(name, allow_code=allow_code)
        args, kwargs = pytree.tree_unflatten(random_inputs(model), model._current("inputs").program.signature.in_spec)
        calls[model.backend] = functools.partial(model, *args, **kwargs)
    else:
        calls = _contestants(name, wish, backends, failed)
    times: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(rounds):
        for label, call in calls.items():
            times[label].append(latency_ms(call, budget_s=1.0, calls=50))
    medians = {label: statistics.median(one) for label, one in times.items()}
    table = Table(box=None, header_style="dim", pad_edge=False)
    for title in ("", "ms", "× eager"):
        table.add_column(title, justify="right" if title else "left")
    for label, value in sorted(medians.items(), key=lambda item: item[1]):
        table.add_row(label, f"{value:.3f}", f"{medians['eager'] / value:.2f}" if "eager" in medians else "")
    for label, why in failed.items():
        table.add_row(Text(label, "red"), "", Text(why.splitlines()[0][:100], "red"))
    data = {"threads": torch.get_num_threads(), "rounds": rounds, "median_ms": medians, "failed": failed}
    emit(data, table, as_json=as_json)
    return NO if failed and len(calls) <= 1 else None


def _contestants(
    name: str, wish: Wish, backends: str | None, failed: dict[str, str]
) -> dict[str, Callable[[], object]]:
    """Eager, and the model on each backend; those that cannot take it go into *failed*."""
    source = sources.model(name, wish.inputs)
    plain: Any = source.model if isinstance(source.model, torch.nn.Module) else source.model.module()
    calls: dict[str, Callable[[], object]] = {}
    if isinstance(source.model, torch.nn.Module):
        plain = source.model.eval()
    inputs = source.inputs or ()
    if isinstance(source.model, torch.export.ExportedProgram) and source.inputs is None:
        inputs = (source.model.example_inputs or ((), {}))[0]
    calls["eager"] = torch.no_grad()(functools.partial(plain, *inputs, **source.kwargs))
    asked = [name.strip() for name in backends.split(",")] if backends else registry.available("fxopt.backends")
    for engine in [registry.find_backend(name) for name in asked]:
        backend = engine.name
        try:
            engine.require()
            calls[backend] = functools.partial(compiled(name, wish, backend=backend), *inputs, **source.kwargs)
        except BackendUnavailable as error:
            failed[backend] = f"not installed: {error}"
        except FxoptError as error:
            failed[backend] = str(error)
    return calls
