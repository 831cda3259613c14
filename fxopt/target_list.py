"""The public ``targets``: every machine that can be compiled for by name, as a table.

print(fxopt.targets())
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from rich.console import RenderableType
from rich.table import Table

from fxopt import target
from fxopt.machines import FAMILIES
from fxopt.show import as_text
from fxopt.target import Target


class Targets(Sequence[Target]):
    """Targets in a row, and a table of them where they are printed."""

    def __init__(self, targets: Iterable[Target]) -> None:
        self._targets = tuple(targets)

    def __getitem__(self, index: int | slice) -> Any:
        return Targets(self._targets[index]) if isinstance(index, slice) else self._targets[index]

    def __len__(self) -> int:
        return len(self._targets)

    def __iter__(self) -> Iterator[Target]:
        return iter(self._targets)

    def __repr__(self) -> str:
        return as_text(self)

    def __rich__(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("target", "kind", "features", "dtypes", "channels", "int8", "2:4", "backends", "here"):
            table.add_column(title, no_wrap=title == "target", overflow="fold")
        for one in self._targets:
            order = FAMILIES[one.name].features
            dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in one.native_dtypes - {torch.float32})
            table.add_row(
                str(one),
                f"{one.name}, {one.arch}",
                " ".join(name for name in order if one.has(name)),
                " ".join(["fp32", *({"bfloat16": "bf16", "float16": "fp16"}[text] for text in dtypes)]),
                str(one.channel_multiple),
                "7 bits" if one.narrow_int8 else "8 bits",
                "fast" if one.fast_2_4 else "",
                " ".join(one.backends),
                "yes" if one.runs_here else "",
            )
        return table


def targets() -> Targets:
    """Every machine that can be compiled for by name; ``print`` shows a table.

    "x86", "arm" and "cuda" come first: this host where it is of that kind, else what the table says.
    """
    return Targets(map(Target.from_string, target.names()))
