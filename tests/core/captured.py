"""What tests of capture share: a run of what was captured, compared with the model."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt import verify
from fxopt.capture import Captured, capture

X = torch.linspace(-1, 1, 6).reshape(2, 3)


def run(captured: Captured, *args: Any, **kwargs: Any) -> Any:
    """What the captured graph answers, in the user's structure."""
    signature = captured.program.signature
    flat = verify.run(captured.program, signature.bind(args, kwargs))
    return signature.unflatten(flat[: len(signature.outputs)])


def same(a: Any, b: Any) -> bool:
    """Equal structure, types and values."""
    one, other = pytree.tree_flatten(a), pytree.tree_flatten(b)
    pairs = zip(one[0], other[0], strict=True)
    return one[1] == other[1] and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y and type(x) is type(y) for x, y in pairs
    )


def check(model: nn.Module, *args: Any, **kwargs: Any) -> Captured:
    captured = capture(model, args, kwargs)
    verify.check_graph(captured.program)
    with torch.no_grad():
        assert same(run(captured, *args, **kwargs), model(*args, **kwargs))
    return captured


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] | None = None
    steps: int = 3
