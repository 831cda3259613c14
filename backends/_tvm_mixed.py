"""Models that TVM can run only in part: what it cannot take is found and listed, or in mixed mode run by PyTorch.

    export, import, compile ──fails──▶ nodes that are declined ──cut──▶ parts ──export, import, compile each──▶ …
                                            ▲                                        │
                                            └──────────── more of them ──────────────┘

ONNX and TVM say which nodes they decline. Where TVM fails without saying, the node is found by halving, and all calls
of the same operator with the same dtypes count as declined with it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import fx

from fxopt.backend import Executable
from fxopt.backends._onnx_export import export
from fxopt.backends._onnx_file import OnnxFile
from fxopt.backends._onnx_graph import located
from fxopt.backends._tvm_mixed_executable import MixedExecutable, Step
from fxopt.backends._tvm_parts import Part, part_of, split
from fxopt.backends.torch import TorchBackend
from fxopt.errors import UnsupportedOp
from fxopt.program import Program
from fxopt.target import Target

if TYPE_CHECKING:
    from fxopt.backends._tuning import Tuning
    from fxopt.backends.tvm import TvmBackend


def lower(backend: TvmBackend, program: Program, target: Target) -> Executable:
    """*program* on TVM, or in mixed mode what of it can be, and the rest on PyTorch.

    Raises:
        UnsupportedOp: TVM cannot take it, or in mixed mode no part of it that is worth it; each op is listed.
    """
    whole, file = program.copy(), None
    try:
        file = export(program)
        stored = whole.constants.keys() & file.weights() - program.constants.keys()
        for name in stored:  # not in memory twice
            del whole.constants[name]
        return backend.build(file, target)
    except UnsupportedOp as error:
        first = error
    if file is not None:
        whole.constants |= {name: file.constant(name) for name in stored}
    search = _Search(dataclasses.replace(backend, tune=None), whole, target, backend.tune, dict(first.nodes))
    if not backend.mixed:
        search.settle(build=file is not None and not first.nodes)
        search.refuse(first)
    search.settle(build=True)
    return search.executable(first, program)


@dataclasses.dataclass
class _Search:
    """What of *whole* is declined by TVM, and the rest in parts that it has compiled.

    Attributes:
        backend: compiles the parts, untuned, since not all that is tried stays; ``tune`` is for those that do.
        declined: why, by node name; ``strays`` what has to go with these.
        parts: in order.
        files: what was exported for TVM's parts, by the names of their nodes; ``built`` what was compiled.
    """

    backend: TvmBackend
    whole: Program
    target: Target
    tune: Tuning | None
    declined: dict[str, str]
    strays: dict[str, str] = dataclasses.field(default_factory=dict)
    parts: list[Part] = dataclasses.field(default_factory=list)
    files: dict[frozenset[str], tuple[OnnxFile, Program]] = dataclasses.field(default_factory=dict)
    built: dict[frozenset[str], Executable] = dataclasses.field(default_factory=dict)

    def settle(self, *, build: bool) -> None:
        """Cut and try until nothing more is declined. Without *build*, TVM imports the parts, and compiles none."""
        while True:
            self.parts, self.strays = split(self.whole, self.declined, small=not self.backend.mixed)
            keys = {_key(part) for part in self.parts}
            self.files = {key: one for key, one in self.files.items() if key in keys}
            self.built = {key: one for key, one in self.built.items() if key in keys}
            steps = [self._import, self._build] if build else [self._import]
            if not any(self._declines_more(step) for step in steps):
                return

    def _declines_more(self, step: Callable[[Part], None]) -> bool:
        known = len(self.declined)
        for part in self.parts:
            if part.on_torch:
                continue
            try:
                step(part)
            except UnsupportedOp as error:
                self.declined.update(self._blamed(part, step, error))
        return len(self.declined) > known

    def _import(self, part: Part) -> None:
        if _key(part) not in self.files:
            program = part.program()
            file = export(program)
            self.backend.check(file)
            self.files[_key(part)] = file, program

    def _build(self, part: Part) -> None:
        if _key(part) not in self.built:
            self._import(part)
            self.built[_key(part)] = self.backend.build(self.files[_key(part)][0], self.target)

    def _blamed(self, part: Part, step: Callable[[Part], None], error: UnsupportedOp) -> Mapping[str, str]:
        """The nodes of *part* for which *step* fails with *error*."""
        inside = {node.name for node in part.all_nodes() if node.op == "call_function"}
        if found := {name: why for name, why in error.nodes.items() if name in inside}:
            return found
        names = [node.name for node in part.nodes]

        def fails(end: int) -> bool:
            beginning = part_of(self.whole, names[:end])
            try:
                if beginning is not None:
                    step(beginning)
            except UnsupportedOp:
                return True
            return False

        low, high = 1, len(names)  # the shortest beginning that fails
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fails(middle) else (middle + 1, high)
        like = _like(part.nodes[low - 1])
        return {node.name: str(error) for node in part.nodes if _like(node) == like}

    def refuse(self, error: UnsupportedOp) -> NoReturn:
        """Raise UnsupportedOp with all that is declined, or where that is nothing the reason that *error* gives."""
        mixed = (
            "" if self.target.name == "cuda" else "; backend_options={'mixed': True} leaves what needs it to PyTorch"
        )
        if not self.declined:
            raise UnsupportedOp(f"{error}{mixed}") from error
        listed = "; ".join(self.lines(self.declined))
        raise UnsupportedOp(f"TVM cannot run {listed}: use backend='torch'{mixed}", self.declined) from error

    def lines(self, why: Mapping[str, str]) -> list[str]:
        """The op of each node that *why* names, with its source line and the reason."""
        nodes = [node for node in self.whole.graph.nodes if node.name in why]
        return list(dict.fromkeys(f"{located(node)} ({why[node.name]})" for node in nodes))

    def executable(self, error: UnsupportedOp, program: Program) -> Executable:
        """The parts compiled; *program* keeps what is left of the constants.

        Raises:
            UnsupportedOp: none of them is for TVM.
        """
        if all(part.on_torch for part in self.parts):
            if not self.declined:
                raise UnsupportedOp(f"{error}; and no part of this model is worth TVM") from error
            listed = "; ".join(self.lines(self.declined))
            raise UnsupportedOp(
                f"TVM cannot run {listed}, and no other part of this model is worth it: use backend='torch'",
                self.declined,
            ) from error
        whole, steps, left = self.whole.copy(), list[Step](), dict[str, Any]()
        for part in self.parts:
            lowered = part.program()
            names = frozenset(lowered.constants)
            if part.on_torch:
                engine = TorchBackend().lower(lowered, self.target, [])
            else:
                engine, lowered = self._tuned(part), self.files[_key(part)][1]
            left |= {name: lowered.constants[name] for name in names & lowered.constants.keys()}
            steps.append(Step(engine, part.on_torch, _names(part.reads), _names(part.gives), names))
        executable = MixedExecutable(whole, steps, self.target, self._notes())
        program.constants.clear()
        program.constants.update({**left, **executable.held})
        return executable

    def _tuned(self, part: Part) -> Executable:
        """*part* compiled, tuned with the share of trials and time that its products have among those of all parts.

        Shares of trials are whole numbers that add up to all of them; with none of them the database is used.
        """
        if self.tune is None:
            return self.built[_key(part)]
        ours = [one for one in self.parts if not one.on_torch]
        total = sum(one.products() for one in ours)
        start = sum(one.products() for one in itertools.takewhile(lambda one: one is not part, ours))
        end, trials, seconds = start + part.products(), self.tune.trials, self.tune.seconds
        if trials is not None:
            trials = trials * end // total - trials * start // total
        if seconds is not None:
            seconds *= part.products() / total
        own = dataclasses.replace(self.tune, trials=trials, seconds=seconds)
        return dataclasses.replace(self.backend, tune=own).build(self.files[_key(part)][0], self.target)

    def _notes(self) -> list[str]:
        ours, theirs = ([part for part in self.parts if part.on_torch is torch_runs] for torch_runs in (False, True))
        counts = [sum(len(part.nodes) for part in parts) for parts in (ours, theirs)]
        notes = [f"{counts[0]} ops in {_parts(ours)} on TVM, {counts[1]} in {_parts(theirs)} on PyTorch"]
        there = {**self.strays, **self.declined}
        notes += [f"on PyTorch: {line}" for line in self.lines(there)]
        others = [node for part in theirs for node in part.nodes if node.name not in there]
        if others:
            notes.append(f"on PyTorch: {len(others)} other ops, between these and not worth a part for TVM")
        return notes


def _key(part: Part) -> frozenset[str]:
    return frozenset(node.name for node in part.nodes)


def _parts(parts: Sequence[Part]) -> str:
    return f"{len(parts)} part{'s' * (len(parts) != 1)}"


def _names(nodes: Sequence[fx.Node]) -> tuple[str, ...]:
    return tuple(node.name for node in nodes)


def _like(node: fx.Node) -> tuple[Any, ...]:
    """What nodes have in common that an engine takes or does not: operator and dtypes."""
    values = [one.meta.get("val") for one in (node, *node.all_input_nodes)]
    return node.target, *(value.dtype if isinstance(value, torch.Tensor) else type(value) for value in values)
