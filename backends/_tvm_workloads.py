"""What the kernels of a model compute, each with a name that does not say which model, and which tile it gets.

    linear float32 x=128,768 weights=768,3072          conv2d int8 x=?,56,56,64 weights=64,64,3,3 strides=1,1 …

Two layers with one name are one workload: what was measured of the first (_tvm_tuning) serves the second, in this model
and in others. What is finished elementwise in a kernel's registers is no part of the name.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from fxopt.backends._tvm_tiles import Space, Tile
from fxopt.errors import ArtifactError

Sizes = tuple[int | None, ...]  # None where only a call tells


@dataclasses.dataclass(frozen=True)
class Workload:
    """One convolution or matrix product.

    Attributes:
        op: which.
        dtype: of the right operand: float32, or int8 with a left one of uint8.
        sizes: of the operands, and what else the loops depend on, by name.
    """

    op: Literal["conv2d", "linear", "matmul"]
    dtype: str
    sizes: tuple[tuple[str, Sizes], ...]

    def __str__(self) -> str:
        def text(sizes: Sizes) -> str:
            return ",".join("?" if size is None else str(size) for size in sizes)

        return " ".join([self.op, self.dtype, *(f"{name}={text(sizes)}" for name, sizes in self.sizes)])

    def products(self) -> int:
        """About how many multiplications it is, with unknown sizes taken for 128."""
        sizes = {name: [128 if size is None else size for size in known] for name, known in self.sizes}
        if self.op == "matmul":
            return math.prod(sizes["x"]) * sizes["y"][-1]
        if self.op == "linear":
            return sizes["x"][0] * math.prod(sizes["weights"])
        pixels = max(math.prod(sizes["x"][1:3]) // math.prod(sizes["strides"]), 1)
        return pixels * math.prod(sizes["weights"])


class Tiles:
    """Chooses the tile of each kernel of a model: one that was found by measuring, else that of the rule.

    Attributes:
        found: tiles by the names of workloads. One that is not among those of its kernel does not count.
        asked: the workloads that were asked for, and how often.
        spaces: the tiles that each of them has.
    """

    def __init__(self, found: Mapping[str, Tile] | None = None) -> None:
        self.found = dict(found or {})
        self.asked: Counter[Workload] = Counter()
        self.spaces: dict[Workload, Space] = {}

    @staticmethod
    def restored(said: Any) -> Tiles:
        """Those of an artifact, which may come from anyone.

        Raises:
            ArtifactError: they are none.
        """
        try:
            return Tiles({name: Tile.read(tile) for name, tile in said.items()})
        except (AttributeError, ValueError) as error:
            raise ArtifactError(f"the sizes of its kernels are not sound: {error}") from error

    def of(self, workload: Workload, space: Space) -> Tile:
        """The tile for *workload*, whose tiles are *space*."""
        self.asked[workload] += 1
        self.spaces[workload] = space
        found = self.found.get(str(workload))
        return found if found is not None and found in space.tiles() else space.rule()

    def used(self) -> dict[str, Tile]:
        """Those of :attr:`found` that were asked for."""
        names = {str(workload) for workload in self.asked}
        return {name: tile for name, tile in self.found.items() if name in names}
