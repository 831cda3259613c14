"""ada-round: learned rounding beats rounding to nearest, deterministically, and survives an interrupt."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxopt.progress
from fxopt import ops, quantized
from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.errors import PreconditionError
from fxopt.execute import evaluate
from fxopt.passbase import PassContext
from fxopt.passes.insert_fake_quant.samples import Samples
from fxopt.pipeline import Pipeline, full_pipeline
from fxopt.registry import find_pass
from fxopt.spec import resolve
from fxopt.target import resolve_target
from fxopt.testing import check_pass
from tests.passes.models import Model, chain
from tests.passes.quantized_models import FUSED, after, coarse_schemes, gain, positive

__all__ = ["coarse_schemes"]
QUICK = "ada-round{iterations=150}"


def convs() -> nn.Module:
    torch.manual_seed(0)
    return chain(nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1))


def test_correlated_inputs_are_rescued() -> None:
    data = [(nn.functional.avg_pool2d(x, 3, 1, 1),) for (x,) in positive(8, 8, 12, 12, count=8)]
    learned = gain(QUICK, convs(), data[:6], data[6:])
    assert learned > 3
    assert learned > 1 + gain("bias-correction", convs(), data[:6], data[6:])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 16, 3, padding=1, groups=8),
        nn.Conv2d(8, 6, (3, 1), stride=(2, 1), padding=(1, 0), dilation=(2, 1), groups=2),
        nn.Conv1d(8, 4, 3, padding=2),
        nn.Conv3d(8, 4, 2),
        nn.Linear(6, 5),
    ],
)
def test_every_kind_of_layer_as_a_matrix_product(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    dims = len(layer.kernel_size) if isinstance(layer, nn.modules.conv._ConvNd) else 2
    taken: list[Samples] = []
    take = Samples.take

    def spy(*args: object) -> tuple[Samples, Samples]:
        both: tuple[Samples, Samples] = take(*args)  # type: ignore[arg-type]
        taken.extend(both)
        return both

    monkeypatch.setattr(Samples, "take", staticmethod(spy))
    after("ada-round{iterations=2}", chain(layer), positive(2, 8, *[6] * dims, seed=2))
    for samples in taken:
        bias = samples.layer.bias
        assert bias is not None
        # Nearly what float gives: patches are read at the positions that targets are.
        off = samples.product(samples.layer.weight) + bias - samples.target
        assert off.abs().max() < 0.05 * samples.target.abs().max()


def test_residual_and_activation_are_part_of_what_is_learned() -> None:
    torch.manual_seed(0)
    model = Model(lambda m, x: (m.b(m.a(x).relu()) + x).relu(), a=nn.Conv2d(8, 8, 3, padding=1), b=nn.Conv2d(8, 8, 1))
    assert gain(QUICK, model, positive(8, 8, 8, 8), positive(8, 8, 8, 8)) > 1


def test_weights_are_on_their_grid_and_neighbours_of_the_float_weight() -> None:
    model, data = convs(), positive(4, 8, 12, 12)
    program = after(QUICK, model, data).program
    for node in program.graph.nodes:
        if node.target is quantized.QUANTIZE_CHANNEL:
            weight, scale = (program.constants[str(n.target)] for n in node.args[:2])
            steps = weight / scale.reshape(-1, 1, 1, 1)
            assert (steps - steps.round()).abs().max() < 1e-3
            given = model.get_parameter(str(node.args[0].target).removesuffix("_rounded"))
            assert (weight - given).abs().max() <= scale.max() * 1.001


def test_it_is_deterministic() -> None:
    data = positive(4, 8, 12, 12)
    first, second = (after(QUICK, convs(), data).program for _ in range(2))
    assert torch.equal(evaluate(first, data[0])[0], evaluate(second, data[0])[0])


def test_an_interrupt_keeps_the_layers_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(text: str) -> None:
        if "layer 2" in text:
            raise KeyboardInterrupt

    monkeypatch.setattr(fxopt.progress, "say", interrupt)
    data = positive(4, 8, 12, 12)
    captured = capture(convs(), data[0])
    ctx = PassContext(resolve_target("x86"), captured.inputs, Calibration(data, captured.program.signature))
    spec = f"{FUSED},insert-fake-quant{{scheme=w4}},{QUICK}"
    program, records = Pipeline(ctx, captured.reference).run(captured.program, resolve(spec, find_pass))
    assert sum(name.endswith("_rounded") for name in program.constants) == 1
    assert "interrupted: 1 of 2 layers" in " ".join(records[-1].notes)


def test_a_weight_that_two_layers_share_rounds_to_nearest() -> None:
    model = Model(lambda m, x: m.conv(m.conv(x).relu()), conv=nn.Conv2d(8, 8, 3, padding=1))
    checked = after(QUICK, model, positive(4, 8, 8, 8))
    assert checked.record.edits == 0
    assert "its weight is shared" in checked.reasons()


def test_integers_come_last() -> None:
    before = f"{FUSED},insert-fake-quant{{activations=none}},freeze-quantized-weights"
    with pytest.raises(PreconditionError, match="ada-round"):
        full_pipeline(resolve(f"{before},ada-round", find_pass), find_pass)


def test_a_model_that_is_not_quantized_stays() -> None:
    assert check_pass("ada-round", convs(), positive(4, 8, 12, 12)[0]).record.edits == 0


@pytest.mark.parametrize("option", ["iterations=0", "batch=0", "learning_rate=0.0", "samples=0"])
def test_bad_options_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=option.partition("=")[0]):
        after(f"ada-round{{{option}}}", convs(), positive(4, 8, 12, 12))


def test_transposed_convolutions_round_to_nearest() -> None:
    checked = after(QUICK, chain(nn.ConvTranspose2d(8, 4, 2)), positive(2, 8, 4, 4), scheme="openvino")
    assert "transposed" in checked.reasons()
    assert all(ops.kind(n) != "conv" for n in checked.program.graph.nodes)
