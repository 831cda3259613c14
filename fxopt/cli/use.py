"""``fxopt run`` and ``verify``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.utils import _pytree as pytree

import fxopt
from fxopt import verify as checks
from fxopt.calibration import Calibration
from fxopt.cli import sources
from fxopt.cli.output import NO, emit
from fxopt.dynamic import output_names
from fxopt.errors import InputError
from fxopt.structures import register


def random_inputs(model: fxopt.CompiledModel) -> list[Any]:
    """Flat input leaves: normal numbers, small integers; open sizes as they were at capture."""
    program, random = model._current("inputs").program, torch.Generator().manual_seed(0)
    leaves = []
    for leaf, node in zip(program.signature.inputs, program.placeholders, strict=True):
        if not leaf.is_tensor:
            leaves.append(leaf.value)
            continue
        shape = [size if isinstance(size, int) else int(size.node.hint) for size in node.meta["val"].shape]
        dtype = leaf.dtype
        assert dtype is not None
        if dtype.is_floating_point or dtype.is_complex:
            leaves.append(torch.randn(shape, generator=random).to(dtype))
        else:
            leaves.append(torch.randint(0, 2, shape, generator=random).to(dtype))
    return leaves


def run(path: str, files: Sequence[Path], output: Path | None, *, allow_code: bool, as_json: bool) -> int | None:
    """One call; shapes and ranges of what came out."""
    model = sources.artifact(path, allow_code=allow_code)
    signature = model._current("inputs").program.signature
    leaves = _leaves(model, files) if files else random_inputs(model)
    args, kwargs = pytree.tree_unflatten(leaves, signature.in_spec)
    flat, tree = pytree.tree_flatten(model(*args, **kwargs))
    named = dict(zip(output_names(tree), flat, strict=True))
    table = Table(box=None, header_style="dim", pad_edge=False)
    for title in ("output", "dtype", "shape", "min", "mean", "max"):
        table.add_column(title)
    rows = {}
    for name, value in named.items():
        rows[name] = _row(value)
        table.add_row(name, *map(str, rows[name].values()))
    if output is not None:
        sources.write({name: x for name, x in named.items() if isinstance(x, torch.Tensor)}, output)
    emit({"outputs": rows, "output": str(output) if output else None}, table, as_json=as_json)
    return None


def _row(value: Any) -> dict[str, Any]:
    if not isinstance(value, torch.Tensor):
        return {"type": type(value).__name__, "shape": "", "min": "", "mean": str(value)[:40], "max": ""}
    row: dict[str, Any] = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if value.numel() == 0 or value.is_complex():
        return row | {"min": "", "mean": "", "max": ""}
    wide = value.double()
    return row | {key: float(f"{float(number):.6g}") for key, number in
                  (("min", wide.min()), ("mean", wide.mean()), ("max", wide.max()))}  # fmt: skip


def _leaves(model: fxopt.CompiledModel, files: Sequence[Path]) -> list[Any]:
    """Input leaves from *files*: by name, or in order.

    Raises:
        InputError: there are too few, too many, or other names.
    """
    leaves = model._current("inputs").program.signature.inputs
    wanted = [leaf.name for leaf in leaves if leaf.is_tensor]
    ordered, named = list[Any](), dict[str, Any]()
    for file in files:
        found = sources.read(file)
        if isinstance(found, dict):
            named |= found
        else:
            ordered += found
    if named and not set(named) & set(wanted) and len(named) == len(wanted):
        ordered, named = [*ordered, *named.values()], {}  # names of another program: by order
    free = [name for name in wanted if name not in named]
    if set(named) - set(wanted) or len(ordered) != len(free):
        given = [*named, *(f"{len(ordered)} without a name" for _ in ordered[:1])]
        raise InputError(f"--inputs hold {', '.join(given) or 'nothing'}; the model takes {', '.join(wanted)}")
    named |= dict(zip(free, ordered, strict=True))
    return [named[leaf.name] if leaf.is_tensor else leaf.value for leaf in leaves]


def _expected(plain: Any, name: str, args: Any, kwargs: Any) -> list[Any]:
    """The outputs of the model *name*.

    Raises:
        InputError: it fails on what the artifact takes.
    """
    try:
        with torch.no_grad():
            outputs = plain(*args, **kwargs)
        register(outputs)
        return pytree.tree_leaves(outputs)
    except Exception as error:
        raise InputError(
            f"MODEL {name!r} fails on inputs of the artifact, which may be of another model: {type(error).__name__}: "
            f"{error}"
        ) from error


def verify(
    path: str, name: str, data: str | None, cosine: float | None, most: int, *, allow_code: bool, as_json: bool
) -> int | None:
    """Compare outputs batch by batch; the worst counts."""
    model, source = sources.artifact(path, allow_code=allow_code), sources.model(name)
    plain: Any = source.model if isinstance(source.model, torch.nn.Module) else source.model.module()
    if isinstance(source.model, torch.nn.Module):
        plain = source.model.eval()
    signature = model._current("inputs").program.signature
    batches = [random_inputs(model)] if data is None else Calibration(sources.data(data), signature).batches()
    worst, count = checks.Difference(), 0
    for count, leaves in enumerate(batches, 1):
        args, kwargs = pytree.tree_unflatten(list(leaves), signature.in_spec)
        expected, given = _expected(plain, name, args, kwargs), pytree.tree_leaves(model(*args, **kwargs))
        if len(expected) != len(given):
            raise InputError(f"MODEL {name!r} has {len(expected)} outputs and the artifact {len(given)}")
        found = checks.compare(expected, given)
        worst = found if (found.error, -found.cosine) > (worst.error, -worst.cosine) else worst
        if count == most:
            break
    exact = model.report.exact and cosine is None
    ok = worst.within if exact else worst.cosine >= (cosine if cosine is not None else 0.99)
    rule = "the tolerance of its dtypes" if exact else f"cosine ≥ {cosine if cosine is not None else 0.99}"
    row = {"error": worst.error, "cosine": worst.cosine, "mismatched": worst.mismatched, "output": worst.where}
    text = f"{'[green]same[/]' if ok else '[red]differs[/]'}: {worst} over {count} batches; asked: {rule}"
    emit({"ok": ok, "batches": count, **row, "rule": rule}, text, as_json=as_json)
    return None if ok else NO
