"""The graph as text: deterministic, renumbered, without addresses, so that ``diff`` of two dumps is the pass between.

    // fxir 1  after fuse-conv-bn-relu  target x86
    graph(%x: f32[1,3,224,224]):
      %0: f32[1,64,112,112] = fxopt.conv2d(%x) {weight=@conv1.weight f32[64,3,7,7], stride=[2,2], activation=relu}
      return %0

Tensor operands stand in parentheses; everything else is in braces by its schema name, defaults left out. A constant
is written ``@name`` with its type where it is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxopt import ops
from fxopt.errors import InputError
from fxopt.program import Program

VERSION = 1
_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def dump(program: Program, title: str) -> str:
    """*program* as fxir text under the heading *title*."""
    names: dict[fx.Node, str] = {}
    count = 0
    for node in program.graph.nodes:
        names[node] = f"@{node.target}" if node.op == "get_attr" else f"%{node.name}"
        if node.op == "call_function":
            names[node], count = f"%{count}", count + 1
    inputs = ", ".join(f"{names[n]}: {describe(n.meta.get('val'))}" for n in program.placeholders)
    lines = [f"// fxir {VERSION}  {title}", f"graph({inputs}):"]
    lines += [f"  {_line(n, names)}" for n in program.graph.nodes if n.op == "call_function"]
    lines.append(f"  return {_value(program.output.args[0], names)}")
    for i, back in enumerate(program.signature.writebacks, start=len(program.signature.outputs)):
        lines.append(f"  // result {i} is written back to {back.constant or f'input {back.input}'}")
    return "\n".join(lines) + "\n"


def prepare(folder: str | os.PathLike[str], engines: Iterable[str]) -> None:
    """Create *folder*, and remove from it what an earlier dump left there: files named as ``write`` names them alone.

    Raises:
        InputError: the folder cannot be made or written.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise InputError(f"dump must be a folder, not {folder!r:.80}")
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        variants = [path, *path.glob("variant-*")]
        for where in [*variants, *(variant / engine for variant in variants for engine in engines)]:
            for file in where.glob("[0-9][0-9]-*.fxir"):
                file.unlink()
    except OSError as error:
        raise InputError(f"dump needs a folder that can be written, and {path} is none: {error}") from error


def write(program: Program, folder: str | os.PathLike[str], index: int, step: str, target: object) -> Path:
    """Write ``NN-step.fxir`` into *folder* (created where missing) and return its path."""
    file = Path(folder) / f"{index:02d}-{step}.fxir"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dump(program, f"after {step}  target {target}"))
    except OSError as error:
        raise InputError(f"dump needs a folder that can be written, and {file.parent} is none: {error}") from error
    return file


def describe(value: Any) -> str:
    """Type of a fake value: ``f32[1,64,s0,56]``, ``(f32[2], i64[2])``, ``sym``."""
    if isinstance(value, torch.Tensor):
        return f"{_SHORT.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{','.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(describe(v) for v in value)})"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return str(value)
    return type(value).__name__.lower()


def _line(node: fx.Node, names: dict[fx.Node, str]) -> str:
    operands, options = _arguments(node)
    written = ", ".join(_value(a, names) for a in operands)
    text = f"{names[node]}: {describe(node.meta.get('val'))} = {_op(node)}({written})"
    extra = [f"{key}={_value(value, names)}" for key, value in options]
    return text + (f" {{{', '.join(extra)}}}" if extra else "")


def _op(node: fx.Node) -> str:
    space = ops.namespace(node)
    if not space:
        return getattr(node.target, "__name__", str(node.target))
    overload = node.target._schema.overload_name  # type: ignore[union-attr]
    name = ops.packet(node) + (f".{overload}" if overload else "")
    return name if space == "aten" else f"{space}.{name}"


def _arguments(node: fx.Node) -> tuple[list[Any], list[tuple[str, Any]]]:
    """(positional operands, named options): what is computed stands in front, what is given behind."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return list(node.args), list(node.kwargs.items())
    operands, options = [], []
    defaults = {a.name: a.default_value for a in node.target._schema.arguments}
    for name, value in ops.arguments(node).items():
        if _is_computed(value):
            operands.append(value)
        elif (
            value is not None and (isinstance(value, fx.Node) or value != defaults[name]) and value not in ("none", [])
        ):
            options.append((name, value))
    return operands, options


def _is_computed(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_is_computed(v) for v in value)
    return isinstance(value, fx.Node) and value.op != "get_attr"


def _value(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return f"{names[value]} {describe(value.meta.get('val'))}" if value.op == "get_attr" else names[value]
    if isinstance(value, (tuple, list)):
        return f"[{','.join(_value(v, names) for v in value)}]"
    return str(value).removeprefix("torch.") if not isinstance(value, float) else f"{value:.9g}"
