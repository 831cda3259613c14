"""A graph as the source of one straight-line Python function.

    %relu = aten.relu(%conv)          relu = aten_relu(conv)  # float32[1, 64, 56, 56]  model.py:12
    %out  = aten.add(%relu, %x)   →   del conv
                                      out = aten_add_Tensor(relu, x)
                                      del relu

Calling the ops from generated code costs a microsecond each, against ten for walking the graph, and ``del`` after the
last use returns every intermediate result to the allocator while it is still in the cache.
"""

from __future__ import annotations

import builtins
import dataclasses
import keyword
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.execute import last_users
from fxopt.profiling import Operator
from fxopt.program import ORIGIN, Program, source_line


@dataclasses.dataclass(frozen=True)
class Code:
    """A generated function.

    Attributes:
        run: takes the flat inputs, returns the list of flat outputs.
        source: its text.
        nodes: name and source line of the node behind each line of the text (an empty name: no node), and the name of
            the node of the program before lowering that it computes.
    """

    run: Callable[[Sequence[Any]], list[Any]]
    source: str
    nodes: tuple[tuple[str, str, str], ...]

    def located(self, error: Exception) -> Exception | None:
        """*error* again, of the same type, saying which node of the program raised it; None if it was no node."""
        trace, line = error.__traceback__, 0
        while trace is not None:
            line = trace.tb_lineno if trace.tb_frame.f_code is self.run.__code__ else line
            trace = trace.tb_next
        name, where, _ = self.nodes[line] if line < len(self.nodes) else ("", "", "")
        if not name:
            return None
        message = f"{name}{f' ({where})' if where else ''} failed: {error}"
        kind = type(error)
        return kind(message) if kind in _REBUILDABLE else RuntimeError(message)

    def timed(self) -> tuple[Callable[[Sequence[Any], Callable[[], None]], list[Any]], list[Operator]]:
        """The function with a second argument, which it calls at its start and after each operator; and these."""
        lines, operators = list[str](), list[Operator]()
        for number, line in enumerate(self.source.splitlines(), start=1):
            name, where, origin = self.nodes[number]
            following = self.nodes[number + 1][0] if number + 1 < len(self.nodes) else ""
            lines.append(line.replace("(inputs)", "(inputs, mark)") if line.startswith("def ") else line)
            found = _CALL.match(line)
            if found:
                operators.append(Operator(name, found.group(1) or "getitem", origin, where))
            if following != name and not line.lstrip().startswith("return "):
                lines.append("    mark()")
        names = dict(self.run.__globals__)
        exec(compile("\n".join(lines) + "\n", "<fxopt program, timed>", "exec", dont_inherit=True), names)
        return names["run"], operators


_CALL = re.compile(r"    \w+ = (?:(\w+)\(|\w+\[)")
_REBUILDABLE = {RuntimeError, IndexError, ValueError, TypeError, NotImplementedError, ZeroDivisionError}


def generate(program: Program) -> Code:
    """The function that computes *program*; the tensors of ``program.constants`` are its globals."""
    writer = _Writer(program)
    for node in program.graph.nodes:
        writer.write(node)
    source = "\n".join(writer.lines) + "\n"
    code = compile(source, "<fxopt program>", "exec", dont_inherit=True)
    exec(code, writer.names)
    return Code(writer.names["run"], source, tuple(writer.nodes))


class _Writer:
    """Writes one node after the other.

    Attributes:
        lines: the text so far; ``nodes`` runs parallel to it, shifted by one since lines count from 1.
        names: the globals of the function.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.lines: list[str] = []
        self.nodes: list[tuple[str, str, str]] = [("", "", "")]
        self.names: dict[str, Any] = {"torch": torch}
        self._taken = {"inputs", "run", *self.names}
        self._locals = {node: self._unique(node.name) for node in program.graph.nodes}
        self._bound: dict[int, str] = {}
        self._dying = last_users(program.graph)
        self._begin()

    def write(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self.names[self._locals[node]] = self.program.constants[str(node.target)]
        elif node.op == "output":
            self._line(f"    return [{', '.join(self._text(value) for value in node.args[0])}]", node)  # type: ignore[union-attr]
        elif node.op == "call_function":
            self._line(f"    {self._locals[node]} = {self._call(node)}{_comment(node)}", node)
            dead = [self._locals[n] for n in [*self._dying[node], node] if n.op == "call_function"]
            dead = [name for name in dead if name != self._locals[node] or not node.users]
            if dead:
                self._line(f"    del {', '.join(dead)}", node)
        elif node.op != "placeholder":
            raise AssertionError(f"a program has no {node.op} nodes")

    def _begin(self) -> None:
        self._line("def run(inputs):")
        holders = [self._locals[node] for node in self.program.placeholders]
        if holders:
            self._line(f"    ({', '.join(holders)},) = inputs")

    def _line(self, text: str, node: fx.Node | None = None) -> None:
        self.lines.append(text)
        known = ("", "", "") if node is None else (node.name, source_line(node), str(node.meta.get(ORIGIN, "")))
        self.nodes.append(known)

    def _call(self, node: fx.Node) -> str:
        if node.target is operator.getitem:
            return f"{self._text(node.args[0])}[{self._text(node.args[1])}]"
        args = [self._text(value) for value in node.args]
        args += [f"{name}={self._text(value)}" for name, value in node.kwargs.items()]
        return f"{self._function(node.target)}({', '.join(args)})"

    def _function(self, target: Any) -> str:
        if isinstance(target, torch._ops.OpOverload):
            overload = "" if target._overloadname == "default" else f"_{target._overloadname}"
            hint = f"{target.namespace}_{target._opname}{overload}"
            # The builtin behind an overload: one Python frame less for each call.
            return self._bind(getattr(target, "_op", target), hint)
        return self._bind(target, getattr(target, "__name__", "function"))

    def _bind(self, value: Any, hint: str) -> str:
        """The global name of *value*, which text cannot express."""
        if id(value) not in self._bound:
            name = self._bound[id(value)] = self._unique(hint)
            self.names[name] = value
        return self._bound[id(value)]

    def _unique(self, hint: str) -> str:
        base = name = _identifier(hint)
        suffix = 1
        while name in self._taken:
            name, suffix = f"{base}_{suffix}", suffix + 1
        self._taken.add(name)
        return name

    def _text(self, value: Any) -> str:
        """An expression for an argument. Lists become tuples: a tuple of numbers is a constant of the code object."""
        if isinstance(value, fx.Node):
            return self._locals[value]
        if isinstance(value, (list, tuple)):
            items = [self._text(item) for item in value]
            return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
        if isinstance(value, slice):
            return f"slice({self._text(value.start)}, {self._text(value.stop)}, {self._text(value.step)})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key!r}: {self._text(item)}" for key, item in value.items()) + "}"
        if value is None or value is Ellipsis or type(value) in (bool, int, str):
            return "..." if value is Ellipsis else repr(value)
        if type(value) is float and math.isfinite(value):
            return repr(value)
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return str(value)
        return self._bind(value, type(value).__name__)


def _identifier(name: str) -> str:
    word = "".join(c if c.isalnum() else "_" for c in name)
    word = f"_{word}" if not word or word[0].isdigit() else word
    return f"{word}_" if keyword.iskeyword(word) or hasattr(builtins, word) else word


def _comment(node: fx.Node) -> str:
    value = node.meta.get("val")
    parts = []
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(str(size) for size in value.shape)
        parts.append(f"{str(value.dtype).removeprefix('torch.')}[{sizes}]")
    if where := source_line(node):
        parts.append(where.rpartition("/")[2])
    return f"  # {'  '.join(parts)}" if parts else ""
