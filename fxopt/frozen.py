"""What a prepared model and its copies share: the graph, and what was decided when it was made."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from torch import fx, nn

from fxopt.execute import last_users
from fxopt.masks import Masked
from fxopt.program import Program
from fxopt.rewriter import Skip
from fxopt.signature import Signature
from fxopt.target import Target


@dataclasses.dataclass(frozen=True, eq=False)
class Frozen:
    """What training does not change, and copies of a prepared model share.

    Attributes:
        program: the graph; its tensors are the module's, by name.
        name: class name of the model.
        target: to compile for.
        inputs: flat example input leaves.
        skips: what passes left alone.
        masked: the weights that are held at zero.
        notes: remarks of the passes, for the report of what is compiled.
    """

    program: Program
    name: str
    target: Target
    inputs: list[Any]
    skips: list[Skip]
    masked: Masked
    notes: tuple[str, ...] = ()

    def __deepcopy__(self, memo: object) -> Frozen:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a PreparedModel does not pickle: save its state_dict(), and load that into one that fxopt.prepare makes "
            "from the same model"
        )

    @functools.cached_property
    def dying(self) -> dict[fx.Node, list[fx.Node]]:
        """For each node, the values that are needed for the last time there."""
        return last_users(self.program.graph)

    @functools.cache  # noqa: B019 - lives as long as the graph does
    def signature(self, device: str) -> Signature:
        """The signature for inputs on *device*."""
        signature = self.program.signature
        leaves = tuple(dataclasses.replace(leaf, device=device) for leaf in signature.inputs)
        return signature if leaves == signature.inputs else dataclasses.replace(signature, inputs=leaves)


class Part(nn.Module):
    """A submodule of the user's model, as the place of its parameters."""
