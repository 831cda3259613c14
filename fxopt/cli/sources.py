"""Where commands get models, inputs and data from."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

import fxopt
from fxopt.artifact import load_report
from fxopt.errors import ArtifactError, InputError, near_miss
from fxopt.report import Report

_DTYPES = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64,
    "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool,
}  # fmt: skip
_INPUT = re.compile(r"(?:(?P<name>[A-Za-z_]\w*):)?(?P<dtype>[a-z]+\d*)\[(?P<shape>[^\]]*)\](?:<(?P<below>\d+))?")


@dataclasses.dataclass
class Source:
    """A model that is not compiled yet, and its example inputs.

    Attributes:
        inputs: positional example inputs; None where nothing was said of them.
        kwargs: keyword example inputs.
        shapes: names of open sizes, as ``dynamic_shapes`` takes them; None where all are fixed.
    """

    model: nn.Module | ExportedProgram
    inputs: tuple[Any, ...] | None = None
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    shapes: Any = None


def found(name: str, what: str) -> Any:
    """The object ``module:name``; modules in the current folder are found too.

    Raises:
        InputError: there is none, or its module fails on import.
    """
    module, colon, path = name.partition(":")
    if not colon or not module or not path:
        raise InputError(f"{what} must be module:name, a .pt2 file or a .fxopt file, not {name!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        place: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{what} {name!r}: there is no module {error.name!r} here or among the installed ones"
        ) from error
    except Exception as error:
        raise InputError(f"{what} {name!r}: importing {module} failed: {type(error).__name__}: {error}") from error
    for part in path.split("."):
        if not hasattr(place, part):
            known = [one for one in vars(place) if not one.startswith("_")] if hasattr(place, "__dict__") else []
            raise InputError(f"{what} {name!r}: there is no {part!r}.{near_miss(part, known)}")
        place = getattr(place, part)
    return place


def model(name: str, inputs: Sequence[str] = ()) -> Source:
    """The model *name*, with example *inputs* such as ``x:f32[batch=8,3,224,224]`` or ``i64[1,128]<30000``.

    Raises:
        InputError: there is no such model, or an input is not spelled so.
    """
    if name.endswith(".fxopt"):
        raise InputError(
            f"MODEL {name!r} is compiled already: name what it was made from, module:factory or a .pt2 file"
        )
    if name.endswith(".pt2"):
        source = Source(_exported(Path(name)))
    else:
        made = found(name, "MODEL")
        if not isinstance(made, nn.Module) and callable(made):
            made = _called(made, f"MODEL {name!r}")
        source = _source(name, made)
    if inputs:
        _take(source, inputs)
    return source


def _called(factory: Any, what: str) -> Any:
    try:
        return factory()
    except Exception as error:
        raise InputError(f"{what}: calling it failed: {type(error).__name__}: {error}") from error


def _exported(path: Path) -> ExportedProgram:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        return torch.export.load(path)
    except Exception as error:
        raise InputError(f"{path} is no file of torch.export.save: {error}") from error


def _source(name: str, made: Any) -> Source:
    given = None
    if isinstance(made, tuple) and len(made) == 2:
        made, given = made
    if not isinstance(made, (nn.Module, ExportedProgram)):
        raise InputError(f"MODEL {name!r} gives a {type(made).__name__}, not a model or (model, example_inputs)")
    if isinstance(given, dict):
        return Source(made, (), given)
    if isinstance(given, torch.Tensor):
        given = (given,)
    if not isinstance(given, (tuple, list, type(None))):
        raise InputError(f"MODEL {name!r} gives a {type(given).__name__} as example inputs, not a tuple or a mapping")
    return Source(made, None if given is None else tuple(given))


def _take(source: Source, texts: Sequence[str]) -> None:
    """Random example inputs as *texts* say, in place of those that the model came with."""
    positional, named, places = list[Any](), dict[str, Any](), list[dict[int, str]]()
    named_places = dict[str, dict[int, str]]()
    for text in texts:
        name, tensor, sizes = example(text)
        if name is None:
            positional.append(tensor)
            places.append(sizes)
        else:
            named[name], named_places[name] = tensor, sizes
    if positional and named:
        raise InputError("--input: name all inputs (x:f32[1,3]) or none of them")
    source.inputs, source.kwargs = tuple(positional), named
    if any(places):
        source.shapes = tuple(sizes or None for sizes in places)
    elif any(named_places.values()):
        source.shapes = {name: sizes or None for name, sizes in named_places.items()}


def example(text: str) -> tuple[str | None, torch.Tensor, dict[int, str]]:
    """Name, random values and open sizes of an input spelled ``x:f32[batch=8,3]``.

    Raises:
        InputError: it is spelled otherwise.
    """
    match = _INPUT.fullmatch(text.strip())
    if match is None or match["dtype"] not in _DTYPES:
        raise InputError(
            f"--input {text!r}: write it like x:f32[batch=8,3,224,224] or i64[1,128]<30000, with one of "
            f"{', '.join(_DTYPES)}"
        )
    shape, sizes = list[int](), dict[int, str]()
    for axis, part in enumerate(filter(None, match["shape"].replace(" ", "").split(","))):
        name, equals, number = part.rpartition("=")
        if not number.isdigit() or (equals and not name.isidentifier()):
            raise InputError(f"--input {text!r}: {part!r} is no size, such as 8 or batch=8")
        shape.append(int(number))
        if equals:
            sizes[axis] = name
    dtype, random = _DTYPES[match["dtype"]], torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return match["name"], torch.randn(shape, generator=random).to(dtype), sizes
    below = int(match["below"] or (2 if dtype is torch.bool else 100))
    return match["name"], torch.randint(0, below, shape, generator=random).to(dtype), sizes


def data(name: str) -> Iterable[Any]:
    """Batches from ``module:name``: an iterable, or a function that gives one.

    Raises:
        InputError: it is neither.
    """
    made = found(name, "data")
    if callable(made) and not isinstance(made, Iterable):
        made = _called(made, f"data {name!r}")
    if not isinstance(made, Iterable):
        raise InputError(f"data {name!r} gives a {type(made).__name__}, not an iterable of input tuples")
    return made


def artifact(path: str, *, allow_code: bool = False) -> fxopt.CompiledModel:
    """The compiled model in the file *path*."""
    if not path.endswith(".fxopt"):
        raise InputError(f"{path!r} is no .fxopt file: make one by fxopt compile MODEL -o m.fxopt")
    return fxopt.load(path, allow_code=allow_code)


def report(path: str) -> Report:
    """The report in the file *path*."""
    if not path.endswith(".fxopt"):
        raise InputError(f"{path!r} is no .fxopt file: make one by fxopt compile MODEL -o m.fxopt")
    return load_report(path)


def read(path: Path) -> list[Any] | dict[str, Any]:
    """Tensors of a .npy, .npz, .safetensors or .pt file: in order, or by name.

    Raises:
        InputError: it is none of these, or cannot be read.
    """
    import numpy as np
    from safetensors.torch import load_file

    try:
        if path.suffix == ".npy":
            return [torch.from_numpy(np.load(path, allow_pickle=False))]
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {name: torch.from_numpy(archive[name]) for name in archive.files}
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if path.suffix in (".pt", ".pth"):
            loaded = torch.load(path, weights_only=True)
            return (
                loaded if isinstance(loaded, dict) else [loaded] if isinstance(loaded, torch.Tensor) else list(loaded)
            )
    except Exception as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    raise InputError(f"{path} is no .npy, .npz, .safetensors or .pt file")


def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write named *tensors* as .npz, .safetensors or .pt.

    Raises:
        InputError: another suffix. ArtifactError: it cannot be written.
    """
    import numpy as np
    from safetensors.torch import save_file

    dense = {name: x.detach().contiguous() for name, x in tensors.items()}
    try:
        if path.suffix == ".npz":
            arrays: dict[str, Any] = {
                name: (x.float() if x.dtype is torch.bfloat16 else x).numpy() for name, x in dense.items()
            }
            np.savez(path, **arrays)
        elif path.suffix == ".safetensors":
            save_file({name: x.clone() for name, x in dense.items()}, path)
        elif path.suffix in (".pt", ".pth"):
            torch.save(dense, path)
        else:
            raise InputError(f"--output {str(path)!r}: outputs are written as .npz, .safetensors or .pt")
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error}") from error
