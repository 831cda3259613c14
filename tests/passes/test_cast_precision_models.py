"""cast-precision on third-party models: no farther from fp32 than eager under bf16 autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import fxopt
from fxopt import structures
from tools import models

PADDED = ("gpt2", "t5-encoder", "llama")
OTHERS = ("bert", "hf-vit", "hf-swin", "whisper-encoder", *PADDED)
SLOW = [*((name, False) for name in OTHERS), *((name, True) for name in PADDED)]
CASES = [("bert", True), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


def leaves(output: Any) -> list[torch.Tensor]:
    structures.register(output)
    return [x.double() for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor)]


def angle(reference: list[torch.Tensor], actual: list[torch.Tensor]) -> float:
    """Largest 1 - cosine over the outputs."""
    pairs = zip(reference, actual, strict=True)
    return max(1 - float(torch.cosine_similarity(a.flatten(), b.flatten(), 0)) for a, b in pairs)


@pytest.mark.filterwarnings("ignore:cast-precision")
@pytest.mark.parametrize(("name", "padded"), CASES)
def test_as_near_to_fp32_as_autocast(name: str, padded: bool) -> None:
    """*padded*: from the left, so that rows of the mask hide everything."""
    model, inputs = models.load(name)
    kwargs = {"attention_mask": (torch.arange(inputs[0].shape[1]) > 3).long()[None]} if padded else {}
    options: dict[str, Any] = {"passes": "cast-precision{dtype=bf16}", "backend": "torch"}
    compiled = fxopt.compile(model, example_inputs=inputs, example_kwargs=kwargs, **options)
    with torch.no_grad():
        reference = leaves(model(*inputs, **kwargs))
        with torch.autocast("cpu", torch.bfloat16):
            autocast = leaves(model(*inputs, **kwargs))
    # 1.1: which way single roundings fall is luck.
    assert angle(reference, leaves(compiled(*inputs, **kwargs))) <= 1.1 * angle(reference, autocast)
