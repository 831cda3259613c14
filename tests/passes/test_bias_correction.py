"""bias-correction: the mean of each channel comes back, layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxopt.errors import PreconditionError
from fxopt.execute import evaluate
from fxopt.passes.insert_fake_quant.layerwise import without_quantization
from fxopt.testing import check_pass
from tests.passes.models import Model, chain
from tests.passes.quantized_models import after, coarse_schemes, gain, positive

__all__ = ["coarse_schemes"]


def convs() -> nn.Module:
    torch.manual_seed(0)
    return chain(nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1))


def means(program: Any, data: Any) -> torch.Tensor:
    return torch.stack([evaluate(program, batch)[0].mean((0, 2, 3)) for batch in data]).mean(0)


def test_the_mean_of_each_channel_is_that_of_float() -> None:
    data = positive(4, 8, 12, 12)
    seen = [batch for i, batch in enumerate(data) if i != 1]  # the second batch is kept back
    program = after("bias-correction", convs(), data).program
    exact = without_quantization(program)
    plain = after("freeze-quantized-weights", convs(), data).program
    want = means(after("bias-correction{samples=1}", convs(), data, options=",overrides=['*=float']").program, seen)
    assert (means(program, seen) - want).abs().max() < 1e-5
    assert (means(plain, seen) - want).abs().max() > 1e-2
    assert len(list(exact.graph.nodes)) < len(list(program.graph.nodes))


def test_inputs_that_are_mostly_positive_are_rescued() -> None:
    data = [(x + 10,) for (x,) in positive(4, 8, 12, 12, count=6)]
    assert gain("bias-correction", convs(), data[:4], data[4:]) > 3


@pytest.mark.parametrize("layer", [nn.Conv1d(8, 6, 3, bias=False), nn.Linear(10, 6, bias=False)])
def test_a_layer_without_bias_gets_one(layer: nn.Module) -> None:
    checked = after("bias-correction", chain(layer), positive(4, 8, 10))
    assert any("bias_corrected" in name for name in checked.program.constants)


def test_depthwise_residual_and_activation() -> None:
    torch.manual_seed(0)
    model = Model(
        lambda m, x: nn.functional.hardswish(m.b(m.a(x).relu()) + x),
        a=nn.Conv2d(8, 8, 3, padding=1, groups=8),
        b=nn.Conv2d(8, 8, 1),
    )
    assert gain("bias-correction", model, positive(4, 8, 10, 10), positive(4, 8, 10, 10)) > 0


def test_a_module_used_twice_gets_a_bias_for_each_use() -> None:
    torch.manual_seed(0)
    model = Model(lambda m, x: m.conv(m.conv(x).relu()), conv=nn.Conv2d(8, 8, 3, padding=1))
    checked = after("bias-correction", model, positive(4, 8, 10, 10))
    assert len([name for name in checked.program.constants if "bias_corrected" in name]) == 2


@pytest.mark.parametrize("options", [",activations=none", ",activations=dynamic", ",activations=none,weights=int4"])
def test_linears_that_are_quantized_otherwise(options: str) -> None:
    torch.manual_seed(0)
    model = chain(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    data = positive(16, 16, seed=3)
    assert gain("bias-correction", model, data, data, options=options) > 0


def test_what_a_moved_weight_was_in_float_is_gone_so_its_bias_stays() -> None:
    checked = after("bias-correction", convs(), positive(4, 8, 12, 12), more=",ada-round{iterations=5}")
    assert checked.record.edits == 0
    assert "corrected already" in checked.reasons()


def test_a_computed_bias_stays() -> None:
    model = Model(lambda m, x: nn.functional.linear(x, m.w, x[0, :6]), w=torch.randn(6, 8))
    checked = after("bias-correction", model, positive(4, 8))
    assert "its bias is computed" in checked.reasons()


def test_a_model_that_is_not_quantized_needs_no_data() -> None:
    assert check_pass("bias-correction", convs(), positive(4, 8, 12, 12)[0]).record.edits == 0


def test_it_looks_at_data() -> None:
    model, before = chain(nn.Linear(8, 8)), "canonicalize,insert-fake-quant{activations=none}"
    with pytest.raises(PreconditionError, match="bias-correction looks at data"):
        check_pass("bias-correction", model, (torch.randn(2, 8),), before=before)


def test_samples_must_be_positive() -> None:
    with pytest.raises(ValueError, match="samples"):
        after("bias-correction{samples=0}", convs(), positive(4, 8, 12, 12))
