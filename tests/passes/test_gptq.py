"""gptq: less error than rounding to nearest on correlated inputs, on every grid that linears have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxopt.errors import PreconditionError
from fxopt.testing import check_pass
from tests.passes.models import Model, chain
from tests.passes.quantized_models import FUSED, after, coarse_schemes, gain

__all__ = ["coarse_schemes"]
INT4 = ",activations=none,weights=int4,group_size=16"


def correlated(width: int = 64, rows: int = 64, count: int = 6, seed: int = 0) -> list[tuple[torch.Tensor]]:
    """Inputs of few underlying factors, some of them large."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width // 4, width, generator=generator) * torch.logspace(0, 1, width // 4)[:, None]
    noise = 0.1

    def batch() -> torch.Tensor:
        return torch.randn(rows, width // 4, generator=generator) @ mix + noise * torch.randn(
            rows, width, generator=generator
        )

    return [(batch(),) for _ in range(count)]


def linears() -> nn.Module:
    torch.manual_seed(0)
    return chain(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))


@pytest.mark.parametrize(
    ("options", "scheme", "decibels"), [(INT4, "torch", 6), ("", "w4", 4), (",activations=none", "torch", 4)]
)
@pytest.mark.parametrize("order", ["true", "false"])
def test_correlated_inputs_are_rescued(options: str, scheme: str, decibels: float, order: str) -> None:
    data = correlated(count=8)
    one = f"gptq{{act_order={order},block=24}}"
    assert gain(one, linears(), data[:7], data[7:], options=options, scheme=scheme) > decibels


def test_int8_is_no_worse() -> None:
    data = correlated(count=8)
    assert gain("gptq", linears(), data[:7], data[7:], scheme="torch") > -0.2


def test_blocks_change_nothing() -> None:
    data = correlated()
    gains = [
        gain(f"gptq{{block={size}}}", linears(), data, data, options=INT4, scheme="torch") for size in (1, 10, 128)
    ]
    assert max(gains) - min(gains) < 0.3


@pytest.mark.parametrize("rows", [2, 4])
def test_few_samples_and_inputs_that_are_always_zero(rows: int) -> None:
    data: list[Any] = [(x * (torch.arange(64) % 3 > 0),) for (x,) in correlated(rows=rows, count=3)]
    checked = after("gptq", linears(), data, options=INT4, scheme="torch")
    assert all(bool(value.isfinite().all()) for value in checked.program.tensors().values())
    assert gain("gptq", linears(), data, data[:1], options=INT4, scheme="torch") > 0


def test_a_weight_of_zeros_and_a_bias_of_none() -> None:
    model = chain(nn.Linear(64, 64, bias=False), nn.Linear(64, 8))
    with torch.no_grad():
        model.get_parameter("0.weight")[:3] = 0
    checked = after("gptq", model, correlated(), options=INT4, scheme="torch")
    assert sum("bias_corrected" in name for name in checked.program.constants) == 1


def test_convolutions_keep_rounding_to_nearest() -> None:
    model = chain(nn.Conv1d(64, 8, 1))
    checked = after("gptq", model, [(x[:, :, None],) for (x,) in correlated()])
    assert checked.record.edits == 0
    assert "gptq is for linears" in checked.reasons()


def test_a_weight_that_two_layers_share_stays() -> None:
    model = Model(lambda m, x: m.fc(m.fc(x).relu()), fc=nn.Linear(64, 64))
    checked = after("gptq", model, correlated())
    assert checked.record.edits == 0
    assert "its weight is shared" in checked.reasons()


def test_an_embedding_keeps_the_float_weight_that_it_shares() -> None:
    model = Model(lambda m, i: m.head(m.embed(i)), embed=nn.Embedding(32, 16), head=nn.Linear(16, 32, bias=False))
    model.head.weight = model.embed.weight  # type: ignore[union-attr]
    tokens = [(torch.randint(0, 32, (4, 8)),) for _ in range(3)]
    program = after("gptq", model, tokens, options=",activations=none,weights=int4,group_size=8").program
    [embedding] = [n for n in program.graph.nodes if "embedding" in str(n.target)]
    assert torch.equal(program.constants[str(embedding.args[0].target)], model.get_parameter("embed.weight"))


def test_it_looks_at_data() -> None:
    before = f"{FUSED},insert-fake-quant{{activations=none}}"
    with pytest.raises(PreconditionError, match="gptq looks at data"):
        check_pass("gptq", linears(), correlated()[0], before=before)


@pytest.mark.parametrize("option", ["damping=0.0", "block=0", "samples=0"])
def test_bad_options_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=option.partition("=")[0]):
        after(f"gptq{{{option}}}", linears(), correlated())
