"""Linears with int4 weights: half a byte each, and what the graph says to bfloat16's rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxopt
from tests.passes.models import Model


def compiled(model: nn.Module, x: torch.Tensor, group: int, more: str = "", **kwargs: object) -> fxopt.CompiledModel:
    spec = f"insert-fake-quant{{activations=none,weights=int4,group_size={group}}}{more}"
    return fxopt.compile(model, example_inputs=(x,), passes=spec, backend="torch", **kwargs)  # type: ignore[arg-type]


def rounded(model: nn.Module, group: int) -> nn.Module:
    """*model* with weights on the grid: ±7 steps, the largest magnitude of a group over 7 each."""
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() == 2):
            groups = weight.unflatten(1, (-1, group))
            scale = groups.abs().amax(-1, keepdim=True) / 7
            weight.copy_(((groups / scale).round() * scale).flatten(1))
    return model


@pytest.mark.parametrize("shape", [(1, 256), (3, 5, 256), (40, 256)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_rounded_model_and_takes_an_eighth(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512, bias=bias), nn.GELU(), nn.Linear(512, 1024, bias=False)).eval()
    x = torch.randn(shape)
    result = compiled(model, x, 64)
    torch.testing.assert_close(result(x), rounded(model, 64)(x), atol=1e-2, rtol=1e-2)
    size = result._current("test").executable.nbytes()
    assert size is not None
    assert size < sum(p.nbytes for p in model.parameters()) / 6


def test_residual_bf16_and_a_batch_that_varies() -> None:
    torch.manual_seed(0)
    model = Model(lambda m, x: torch.relu(m.fc(x) + x), fc=nn.Linear(128, 128)).eval()
    x = torch.randn(4, 128)
    result = compiled(model, x, 32, ",cast-precision{dtype=bf16}", dynamic_shapes={"args": ({0: "batch"},)})
    expected = rounded(model, 32)
    for rows in (4, 1, 33):
        x = torch.randn(rows, 128)
        torch.testing.assert_close(result(x), expected(x), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(("outputs", "group"), [(64, 16), (60, 32)])
def test_what_the_kernel_does_not_take_is_dequantized_once(outputs: int, group: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, outputs)).eval()
    x = torch.randn(3, 128)
    torch.testing.assert_close(compiled(model, x, group)(x), rounded(model, group)(x), atol=1e-5, rtol=1e-5)


def test_the_integers_come_back() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2048)
    model = nn.Sequential(nn.Linear(2048, 64)).eval()
    result = compiled(model, x, 128)
    executable = result._current("test").executable
    groups = model.get_parameter("0.weight").detach().unflatten(1, (-1, 128))
    wanted = (groups / (groups.abs().amax(-1, keepdim=True) / 7)).round().flatten(1)
    assert torch.equal(executable.constant("0.weight_int8").float(), wanted)
