"""Parts of a program on two engines, run one after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxopt.backend import Executable
from fxopt.backends._torch_snapshot import own
from fxopt.errors import ArtifactError, BackendUnavailable
from fxopt.program import Program
from fxopt.target import Target


@dataclasses.dataclass(frozen=True)
class Step:
    """One part.

    Attributes:
        engine: what runs it.
        on_torch: whether that is PyTorch.
        reads: names of the values that it takes.
        gives: names of its results.
        holds: names of the constants that it reads.
    """

    engine: Executable
    on_torch: bool
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    holds: frozenset[str]


class MixedExecutable(Executable):
    """Runs the parts in order, and lets go of each value after the last part that reads it.

    Attributes:
        steps: the parts.
        held: the model's state, and constants that are results.
    """

    def __init__(self, program: Program, steps: Sequence[Step], target: Target, notes: Sequence[str]) -> None:
        """*program* is the whole, with its constants; *notes* tell which part runs where."""
        self.steps = tuple(steps)
        self.notes = (*notes, *(note for step in steps for note in step.engine.notes))
        self._target = target
        self._inputs = [node.name for node in program.placeholders]
        self._results: list[Any] = list(program.output.args[0])  # type: ignore[arg-type]
        backs = program.signature.writebacks
        self._written = [back.input for back in backs if back.input is not None]
        self._state = {back.constant for back in backs if back.constant is not None}
        results = program.output.all_input_nodes
        kept = [n for n in program.graph.find_nodes(op="get_attr") if n in results or n.target in self._state]
        self._nodes = {node.name: str(node.target) for node in kept}
        self.held = {name: program.constants[name] for name in sorted({*self._state, *self._nodes.values()})}
        own(self.held)
        self._dying = self._last_uses({node.name for node in results})

    def _last_uses(self, results: set[str]) -> list[list[str]]:
        """For each step the values that nothing needs after it."""
        seen, dying = set(results), list[list[str]]()
        for step in reversed(self.steps):
            fresh = [name for name in dict.fromkeys((*step.reads, *step.gives)) if name not in seen]
            seen.update(fresh)
            dying.append(fresh)
        return dying[::-1]

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Flat outputs, writebacks included.

        Raises:
            BackendUnavailable: it was compiled for a machine that this one is not.
        """
        if self._target.obstacle:
            raise BackendUnavailable(
                f"this model was compiled for target '{self._target}', which cannot run here, since "
                f"{self._target.obstacle}: save it as .fxopt, and load it there"
            )
        values: dict[str, Any] = {name: self.held[constant] for name, constant in self._nodes.items()}
        values |= zip(self._inputs, inputs, strict=True)
        for step, dead in zip(self.steps, self._dying, strict=True):
            values |= zip(step.gives, step.engine([values[name] for name in step.reads]), strict=True)
            for name in dead:
                del values[name]
        outputs = [values[result.name] if isinstance(result, fx.Node) else result for result in self._results]
        return self._apart(outputs, inputs)

    def _apart(self, outputs: list[Any], inputs: Sequence[Any]) -> list[Any]:
        """*outputs*, copied where what is written back after the call would change them."""
        written = [*(self.held[name] for name in self._state), *(inputs[i] for i in self._written)]
        memory = {tensor.untyped_storage().data_ptr() for tensor in written}
        return [y.clone() if isinstance(y, torch.Tensor) and _memory(y) in memory else y for y in outputs]

    def save(self, path: Path) -> None:
        """There is no file that holds both.

        Raises:
            ArtifactError: always.
        """
        count = sum(step.on_torch for step in self.steps)
        raise ArtifactError(
            f"a model in mixed mode is no {path.suffix or 'single'} file, since PyTorch runs {count} of its "
            f"{len(self.steps)} parts: save it as .fxopt, which is compiled again where it is loaded"
        )

    def constant(self, name: str) -> torch.Tensor:
        """The tensor behind a constant; of one that the model mutates, what the next call reads.

        Raises:
            KeyError: no part has such a constant.
        """
        if name in self.held:
            held: torch.Tensor = self.held[name]
            return held
        for step in self.steps:
            if name in step.holds:
                return step.engine.constant(name)
        raise KeyError(name)

    def nbytes(self) -> int:
        """Bytes of all weights, those that two parts read counted for each."""
        held: int = sum(tensor.untyped_storage().nbytes() for tensor in self.held.values())
        return held + sum(step.engine.nbytes() or 0 for step in self.steps)


def _memory(tensor: torch.Tensor) -> int | None:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else None
