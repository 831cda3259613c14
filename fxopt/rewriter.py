"""The only way a pass edits a graph. It counts edits, infers metadata, and keeps reasons for what was left alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fxopt import ops
from fxopt.errors import PassError
from fxopt.program import ORIGIN, Program, source_line

_INHERITED = ("stack_trace", "nn_module_stack", "from_node", ORIGIN)


@dataclasses.dataclass(frozen=True)
class Skip:
    """A candidate that a pass left alone.

    Attributes:
        node: its name in the graph.
        reason: why, in the words of the user.
        source: ``file:line`` of the user's code, or "".
    """

    node: str
    reason: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}" + (f" ({self.source})" if self.source else "")


class Rewriter:
    """Edits one program for one pass.

    Attributes:
        program: the program under edit.
        edits: how many edits were made.
        skips: candidates left alone, with reasons.
        notes: remarks for the report that belong to no node.
        details: what else the pass has to report, by topic.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.edits = 0
        self.skips: list[Skip] = []
        self.notes: list[str] = []
        self.details: dict[str, Any] = {}
        self._mode = fake_mode(program)
        self._skipped: set[tuple[str, str]] = set()
        self._first_call: fx.Node | None = None
        self._mutable = {back.constant for back in program.signature.writebacks}

    def nodes(self) -> list[fx.Node]:
        """The nodes in order, as they are now; edits during the walk do not disturb it."""
        return list(self.program.graph.nodes)

    def skip(self, node: fx.Node, reason: str) -> None:
        """Record that *node* was left alone, and why."""
        if (node.name, reason) not in self._skipped:
            self._skipped.add((node.name, reason))
            self.skips.append(Skip(node.name, reason, source_line(node)))

    def note(self, text: str) -> None:
        """Leave a remark for the report."""
        if text not in self.notes:
            self.notes.append(text)

    def tensor(self, node: object) -> torch.Tensor | None:
        """The constant tensor that a get_attr *node* stands for, or None for anything else.

        A buffer that the model mutates is no constant, and a sparse tensor none that a pass could compute with.
        """
        if not isinstance(node, fx.Node) or node.op != "get_attr" or str(node.target) in self._mutable:
            return None
        value = self.program.constants[str(node.target)]
        return value if isinstance(value, torch.Tensor) and value.layout == torch.strided else None

    def constant(self, hint: str, value: torch.Tensor) -> fx.Node:
        """A get_attr node for a new constant named after *hint*, standing before all computation."""
        base = re.sub(r"[^\w.]+", "_", hint).strip("._") or "constant"
        name, n = base, 1
        while name in self.program.constants:
            name, n = f"{base}_{n}", n + 1
        self.program.constants[name] = value.detach()
        with self.program.graph.inserting_before(self.first_call()):
            node = self.program.graph.get_attr(name)
        node.meta["val"] = self._mode.from_tensor(value.detach(), static_shapes=True)
        self.edits += 1
        return node

    def first_call(self) -> fx.Node:
        """The first node after all inputs and constants."""
        if self._first_call is None or self._first_call._erased:
            nodes: Iterable[fx.Node] = self.program.graph.nodes
            self._first_call = next(node for node in nodes if node.op not in ("placeholder", "get_attr"))
        return self._first_call

    def call(
        self,
        target: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        before: fx.Node,
        origin: fx.Node | None = None,
    ) -> fx.Node:
        """A new call before *before*. It says it came from *origin* (default *before*).

        Raises:
            PassError: the call does not fit its arguments.
        """
        graph = self.program.graph
        with graph.inserting_before(before):
            node = graph.call_function(target, tuple(args), dict(kwargs or {}))
        if before is self._first_call:
            self._first_call = node
        source = origin or before
        node.meta = {key: source.meta[key] for key in _INHERITED if key in source.meta}
        try:
            node.meta["val"] = infer(node, self._mode)
        except Exception as error:
            graph.erase_node(node)
            raise PassError(f"cannot call {target} in place of {source.name}: {error}") from error
        self.edits += 1
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every user of *old* read *new* instead, and erase what nobody needs any more."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.edits += 1
        self.erase(old)

    def rewire(self, user: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Let *user* read *new* where it read *old*. Its value must not change in shape or dtype."""
        user.replace_input_with(old, new)
        self.edits += 1
        self.erase(old)

    def resize(self, constants: Mapping[str, torch.Tensor], arguments: Mapping[fx.Node, Mapping[str, Any]]) -> None:
        """Give constants other shapes and calls other arguments, all at once; what depends on them is inferred anew.

        Raises:
            PassError: a call does not fit its arguments any more.
        """
        self.program.constants.update(constants)
        for node, changed in arguments.items():
            for name, value in changed.items():
                ops.set_argument(node, name, value)
        self.edits += len(constants) + len(arguments)
        affected = set(arguments)
        for node in self.program.graph.nodes:
            if node.op == "get_attr" and str(node.target) in constants:
                value = self.program.constants[str(node.target)]
                node.meta["val"] = self._mode.from_tensor(value.detach(), static_shapes=True)
                affected.add(node)
            elif (
                node.op == "call_function"
                and "val" in node.meta
                and not affected.isdisjoint({node, *node.all_input_nodes})
            ):
                before = layout(node.meta["val"])
                try:
                    node.meta["val"] = infer(node, self._mode)
                except Exception as error:
                    raise PassError(f"{node.name} does not fit the new sizes: {error}") from error
                if layout(node.meta["val"]) != before:
                    affected.add(node)

    def erase(self, node: fx.Node) -> None:
        """Erase *node* if nobody uses it, then its inputs likewise. Inputs of the model and constants stay."""
        pending = [node]
        while pending:
            dead = pending.pop()
            if dead.users or dead.op != "call_function" or dead._erased:
                continue
            pending.extend(dead.all_input_nodes)
            self.program.graph.erase_node(dead)
            self.edits += 1


def fake_mode(program: Program) -> FakeTensorMode:
    """The FakeTensorMode that the program's metadata lives in."""
    values = [n.meta["val"] for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    mode = detect_fake_mode(values)
    return mode if mode is not None else FakeTensorMode(allow_non_fake_inputs=True)


def infer(node: fx.Node, mode: FakeTensorMode) -> Any:
    """The fake value of a call on its arguments' fake values."""
    args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: n.meta["val"])
    assert callable(node.target)
    with mode, enable_python_dispatcher(), torch.no_grad():  # kernels of composite ops may refuse dynamic sizes
        return node.target(*args, **kwargs)


def layout(value: Any) -> list[str]:
    """Sizes and strides of the tensors in a fake value, and the numbers in it."""
    leaves = pytree.tree_leaves(value)
    return [f"{list(v.shape)} {v.stride()}" if isinstance(v, torch.Tensor) else str(v) for v in leaves]
