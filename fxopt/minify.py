"""``fxopt.minify``: the smallest part of a model that still fails to compile, as a script to send to someone.

    model, inputs, passes   ──cut from the end, halves replaced by their values──▶   folder/repro.py, folder/tensors.pt

PyTorch's own minifier proposes the parts. One counts as failing where it fails as the whole does: the same kind of
error from the same pass or engine.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import fx, nn

from fxopt import ops
from fxopt.backend import Backend
from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.compiler import as_args
from fxopt.compiler import compile as compile_model
from fxopt.errors import BackendUnavailable, FxoptError, InputError, SpecError
from fxopt.passbase import Pass
from fxopt.program import Program
from fxopt.spec import format as format_spec
from fxopt.target import Target

_BATCHES = 4  # of calibration data, for one trial


def minify(
    model: nn.Module,
    example_inputs: Any,
    passes: str | Sequence[str | Pass] | None = None,
    *,
    target: str | Target = "x86",
    backend: str | Backend = "torch",
    calibration: Iterable[Any] | None = None,
    folder: str | os.PathLike[str] = "fxopt-repro",
) -> Path:
    """Shrink a model that ``fxopt.compile`` fails on.

    Args:
        model: as for :func:`fxopt.compile`; so are the others. It has to be one that can be captured.
        example_inputs: positional inputs.
        passes: for which it fails.
        target: for which it fails.
        backend: on which it fails.
        calibration: the first batches serve as shapes; the parts are calibrated on values like their inputs.
        folder: for ``repro.py`` and the tensors that it reads.

    Returns:
        Path of the script.

    Raises:
        InputError: the model compiles, cannot be captured, or fails for what is no part of its graph.
        SpecError: passes or backend are not known.
    """
    arguments = as_args(example_inputs) or ()
    captured = capture(model, arguments, None, None)
    _drop_checks(captured.program)
    whole = captured.program.to_module()
    inputs = [x for x in captured.inputs if isinstance(x, torch.Tensor)]
    if len(inputs) != len(captured.inputs):
        raise InputError("minify takes models whose inputs are tensors alone")
    trial = _Trial(passes, target, backend, calibration, captured.program.signature)
    error = trial(whole, inputs) or _nothing_to_shrink(trial(model, arguments))
    if isinstance(error, (SpecError, BackendUnavailable)):  # no part of the model is to blame
        raise error
    from torch._functorch.fx_minifier import minifier

    def fails(part: fx.GraphModule, values: Sequence[torch.Tensor]) -> bool:
        found = trial(part, values)
        return found is not None and _signature(found) == _signature(error)

    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        small, values = minifier(whole, inputs, fails, dump_state=lambda graph, values: None, skip_sanity=True)
    return _write(Path(folder), small, list(values), trial, trial(small, values) or error)


def _nothing_to_shrink(error: FxoptError | None) -> NoReturn:
    """Say why the graph has no part that fails; *error* is that of the model as it is."""
    if error is not None:
        raise InputError(
            f"the model fails for what is around its graph, which no smaller graph shows: {error}"
        ) from error
    raise InputError("the model compiles with these passes on this backend: there is nothing to shrink")


def _drop_checks(program: Program) -> None:
    """Take out the checks of dtypes that torch.export puts in, as canonicalize does."""
    for node in list(program.graph.nodes):
        if node.op == "call_function" and ops.packet(node) == "_assert_tensor_metadata":
            program.graph.erase_node(node)
    program.remove_dead()


class _Trial:
    """One attempt to compile a part; calling it gives the error, or None."""

    def __init__(
        self, passes: Any, target: Any, backend: Any, calibration: Iterable[Any] | None, signature: Any
    ) -> None:
        self.passes, self.target, self.backend = passes, target, backend
        self.calibrated = calibration is not None
        if calibration is not None:
            next(iter(Calibration(calibration, signature).batches()), None)  # what is wrong with it is said now

    def __call__(self, part: nn.Module, values: Sequence[Any]) -> FxoptError | None:
        data = [tuple(values)] * _BATCHES if self.calibrated else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                compile_model(
                    part, example_inputs=tuple(values), passes=self.passes, target=self.target,
                    backend=self.backend, calibration=data,
                )  # fmt: skip
            except FxoptError as error:
                return error
            except Exception:  # noqa: BLE001 - another failure than the one that is looked for
                return None
        return None


def _signature(error: FxoptError) -> tuple[str, str]:
    """What makes two errors the same: their kind, and the pass or the first words."""
    named = re.match(r"pass [\w-]+", str(error))
    return type(error).__name__, named[0] if named else re.sub(r"\W.*", "", str(error))


def _write(folder: Path, small: fx.GraphModule, values: list[torch.Tensor], trial: _Trial, error: FxoptError) -> Path:
    """The script, and a file with its tensors beside it."""
    weights = {str(node.target): _attribute(small, str(node.target)) for node in small.graph.find_nodes(op="get_attr")}
    names = {name: f"w{i}" for i, name in enumerate(weights)}
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in small.graph.nodes:
        if node.op == "get_attr":
            copies[node] = graph.get_attr(names[str(node.target)])
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    code = fx.GraphModule({names[name]: value for name, value in weights.items()}, graph).code.strip()
    registered = "".join(f'self.register_buffer("{names[name]}", tensors["{names[name]}"])\n' for name in weights)
    passes = trial.passes if trial.passes is None or isinstance(trial.passes, str) else _spec(trial.passes)
    arguments = (
        f"passes={passes!r}, target={str(trial.target)!r}, backend={getattr(trial.backend, 'name', trial.backend)!r}"
    )
    text = _SCRIPT.format(
        error=textwrap.indent(str(error).splitlines()[0], "# "),
        registered=textwrap.indent(registered or "pass\n", " " * 8),
        forward=textwrap.indent(code, " " * 4),
        inputs=", ".join(f'tensors["x{i}"]' for i in range(len(values))) + ("," if len(values) == 1 else ""),
        calibration=f", calibration=[inputs] * {_BATCHES}" if trial.calibrated else "",
        arguments=arguments,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {names[name]: value.detach() for name, value in weights.items()}
        torch.save(tensors | {f"x{i}": x.detach() for i, x in enumerate(values)}, folder / "tensors.pt")
        (folder / "repro.py").write_text(text)
    except OSError as problem:
        raise InputError(f"cannot write into {folder}: {problem}") from problem
    return folder / "repro.py"


def _attribute(module: Any, target: str) -> Any:
    for part in target.split("."):
        module = getattr(module, part)
    return module


def _spec(passes: Sequence[Any]) -> str:
    return ",".join(one if isinstance(one, str) else format_spec([one]) for one in passes)


_SCRIPT = """{error}
from pathlib import Path

import torch
from torch import device, inf, nan  # noqa: F401 - the names that a graph writes constants with

import fxopt

tensors = torch.load(Path(__file__).with_name("tensors.pt"), weights_only=True)


class Part(torch.nn.Module):
    def __init__(self):
        super().__init__()
{registered}
{forward}


inputs = ({inputs})
fxopt.compile(Part(), example_inputs=inputs, {arguments}{calibration})
"""
