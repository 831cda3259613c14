"""cross-layer-equalization: exact, and channels of very different size become alike."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt import ops, registry, spec
from fxopt.execute import evaluate
from fxopt.passes.insert_fake_quant import quality
from fxopt.testing import Checked, check_pass
from tests.passes.models import Model, chain, image
from tests.passes.quantized_models import FUSED, coarse_schemes

__all__ = ["coarse_schemes"]


def equalize(model: nn.Module, *inputs: torch.Tensor) -> Checked:
    checked = check_pass("cross-layer-equalization", model, inputs, before=FUSED)
    assert checked.difference.within
    return checked


def magnitudes(checked: Checked) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The largest magnitude for each output and each input of the weights, in graph order."""
    found = []
    for node in checked.program.graph.nodes:
        if ops.kind(node) in ("conv", "linear"):
            weight = checked.program.constants[str(ops.arguments(node)["weight"].target)].abs()
            flat = weight.flatten(2).amax(2) if weight.dim() > 2 else weight
            found.append((flat.amax(1), flat.amax(0)))
    return found


def scatter(model: nn.Module, *names: str, spread: float = 100.0) -> nn.Module:
    """*model* with the outputs of its layers *names* scaled at random by up to *spread*; relu lets the next undo it."""
    with torch.no_grad():
        for name in names:
            layer: Any = model.get_submodule(name)
            factor = spread ** torch.linspace(-0.5, 0.5, len(layer.weight))[torch.randperm(len(layer.weight))]
            layer.weight *= factor.reshape(-1, *[1] * (layer.weight.dim() - 1))
            if layer.bias is not None:
                layer.bias *= factor
    return model


def depthwise(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    return chain(
        *(nn.Conv2d(4, 16, 1), activation()),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=16), activation()),
        nn.Conv2d(16, 6, 1),
    )


def test_pairs_and_depthwise_chains_come_to_the_same_magnitudes() -> None:
    model = scatter(depthwise(), "0", "2")
    for name in ("0", "2"):
        nn.init.zeros_(model.get_parameter(f"{name}.bias"))  # no bias to hold a channel back
    first, middle, last = magnitudes(equalize(model, image()))
    assert torch.allclose(first[0], middle[0], rtol=1e-2)  # of a depthwise weight: one for each channel
    assert torch.allclose(middle[0], last[1], rtol=1e-2)


def mobilenet_scattered() -> nn.Module:
    """Channels of 100 times the size of others, undone where they are read: float gives what it gave."""
    model = depthwise()
    with torch.no_grad():
        for first, second in (("0", "2"), ("2", "4")):
            factor = 100 ** (torch.rand(16) - 0.5)
            model.get_parameter(f"{first}.weight").mul_(factor.reshape(-1, 1, 1, 1))
            model.get_parameter(f"{first}.bias").mul_(factor)
            read = model.get_parameter(f"{second}.weight")
            read.div_(factor.reshape(-1, 1, 1, 1) if read.shape[1] == 1 else factor.reshape(1, -1, 1, 1))
    return model


def test_a_mobilenet_with_one_scale_for_each_weight_is_rescued() -> None:
    model = mobilenet_scattered()
    data = [(image(batch=8),) for _ in range(4)]
    quantize = "insert-fake-quant{scheme=per-tensor,smooth=false}"
    exact = check_pass("fuse-conv-bn-relu", model, data[0]).program

    def snr(before: str) -> float:
        program = check_pass(quantize, model, data[0], before=before, calibration=data).program
        return quality.outputs(exact, program, data)[0].snr_db

    assert snr(f"{FUSED},cross-layer-equalization") > snr(FUSED) + 10


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.Identity])
def test_activations_that_scale(activation: type[nn.Module]) -> None:
    assert equalize(scatter(depthwise(activation), "0", "2"), image()).record.edits


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.Sigmoid])
def test_activations_that_do_not_scale(activation: type[nn.Module]) -> None:
    checked = equalize(scatter(depthwise(activation), "0", "2"), image())
    assert checked.record.edits == 0
    assert "not scale-equivariant" in checked.reasons()


def test_groups_pools_linears_and_other_dimensions() -> None:
    torch.manual_seed(0)
    grouped = chain(nn.Conv2d(4, 8, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(8, 6, 1, groups=2))
    assert equalize(scatter(grouped, "0"), image()).record.edits
    mlp = chain(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    assert equalize(scatter(mlp, "0"), torch.randn(3, 6)).record.edits
    line = chain(nn.Conv1d(4, 8, 3, bias=False), nn.AvgPool1d(2), nn.Conv1d(8, 2, 1))
    assert equalize(scatter(line, "0"), image(1)).record.edits


def test_channels_that_are_even_already_stay() -> None:
    model = chain(nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 4, 1))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    assert equalize(model, image()).record.edits == 0


def test_a_dead_channel_is_not_blown_up() -> None:
    model = depthwise()
    with torch.no_grad():
        model.get_parameter("0.weight")[3] = 1e-6
        model.get_parameter("0.weight")[4] = 0
        model.get_parameter("2.weight")[5] = 0
    program = equalize(model, image()).program
    [first] = [n for n in program.graph.nodes if ops.kind(n) == "conv"][:1]
    bias = program.constants[str(ops.arguments(first)["bias"].target)]
    assert bias.abs().max() <= model.get_parameter("0.bias").abs().max() * 10


def twice() -> nn.Module:
    return Model(lambda m, x: m.conv(m.conv(x).relu()), conv=nn.Conv2d(4, 4, 1))


def read_twice() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.a(x).relu()
        return m.b(y) * y

    return Model(forward, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1))


def residual() -> nn.Module:
    return Model(lambda m, x: m.b((m.a(x) + x).relu()), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1))


def two_activations() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.a(x)
        return m.b(y.relu()), m.c(F.leaky_relu(y))

    return Model(forward, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(4, 4, 1))


def reshaped() -> nn.Module:
    return Model(lambda m, x: m.b(m.a(x).flatten(2).unflatten(2, (4, 9))), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1))


def as_residual() -> nn.Module:
    return Model(lambda m, x: (m.b(x) + m.a(x)).relu(), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (twice, "its weight is shared"),
        (read_twice, "its result is read by 2 ops"),
        (residual, "a residual is added"),
        (two_activations, "its result is read by 2 ops"),
        (reshaped, "lies between it and the next layer"),
        (as_residual, "residual|no layer of its kind|is read by"),
    ],
)
def test_what_cannot_be_equalized_has_a_reason(make: Any, reason: str) -> None:
    torch.manual_seed(0)
    model = make()
    names = [name for name, _ in model.named_children()][:1]
    checked = equalize(scatter(model, *names), image())
    assert checked.record.edits == 0
    assert re.search(reason, checked.reasons()), checked.reasons()


def test_the_answer_is_that_of_eager() -> None:
    model = mobilenet_scattered()
    x = image()
    program = equalize(model, x).program
    assert torch.allclose(evaluate(program, [x])[0], model(x), rtol=1e-4, atol=1e-5)


def test_the_threshold_must_be_a_factor() -> None:
    with pytest.raises(ValueError, match="threshold"):
        spec.resolve("cross-layer-equalization{threshold=0.5}", registry.find_pass)
