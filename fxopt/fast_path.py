"""Layers of torch that take another path in eval than when they are traced, and may answer otherwise on it.

On its fast path nn.TransformerEncoder zeroes the rows that ``src_key_padding_mask`` hides; the traced path leaves there
what attention computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt import verify
from fxopt.notice import warn
from fxopt.program import Program
from fxopt.twin import run_eager

Path: TypeAlias = Callable[[], AbstractContextManager[None]]
_LAYERS = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


def same_path(program: Program, model: nn.Module, inputs: list[Any], reference: list[Any]) -> tuple[list[Any], Path]:
    """Eager outputs of the path that *program* was traced on, and a context in which *model* takes it.

    *reference* is what it answers by itself. Where that is another path, a warning says so.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    if not (fast and any(isinstance(module, _LAYERS) for module in model.modules())):
        return reference, nullcontext
    answered = verify.run(program, inputs)[: len(reference)]
    if verify.compare(reference, answered).within:
        return reference, nullcontext
    with _no_fast_path():
        ordinary = run_eager(model, *pytree.tree_unflatten(inputs, program.signature.in_spec))
    if not verify.compare(ordinary, answered).within:
        return reference, nullcontext
    warn(
        f"fxopt: {type(model).__name__} answers otherwise on the fast path of torch's attention layers (it zeroes "
        "padded rows). The compiled model follows the ordinary path, as eager does after "
        "torch.backends.mha.set_fastpath_enabled(False)."
    )
    return ordinary, _no_fast_path


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """The attention layers of torch take their ordinary path; this holds for all threads."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
