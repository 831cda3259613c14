"""Models that ``torch.nn.utils.prune`` has pruned, with their masks still on: compiled, trained, quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import fxopt
from fxopt.testing import check_pass
from tests.passes.models import settle
from tools import models

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(128, 5)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


def _everywhere(model: Net) -> None:
    layers = [(model.conv, "weight"), (model.head, "weight"), (model.head, "bias")]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=0.6)


def _twice(model: Net) -> None:
    prune.l1_unstructured(model.conv, "weight", 0.5)
    prune.ln_structured(model.conv, "weight", 0.3, 2, 1)


def _by_mask(model: Net) -> None:
    prune.custom_from_mask(model.head, "weight", (torch.rand(5, 128) > 0.7).float())


PRUNED: dict[str, Callable[[Net], Any]] = {
    "l1_unstructured": lambda model: prune.l1_unstructured(model.conv, "weight", 0.5),
    "ln_structured": lambda model: prune.ln_structured(model.conv, "weight", 0.5, 2, 0),
    "random_unstructured": lambda model: prune.random_unstructured(model.head, "weight", 0.5),
    "random_structured": lambda model: prune.random_structured(model.head, "weight", 0.5, 1),
    "global_unstructured": _everywhere,
    "custom_from_mask": _by_mask,
    "twice": _twice,
    "a batch norm": lambda model: prune.l1_unstructured(model.norm, "weight", 0.5),
    "identity": lambda model: prune.identity(model.conv, "weight"),
}


FAST = ("global_unstructured", "twice")
HOW = [how if how in FAST else pytest.param(how, marks=pytest.mark.slow) for how in PRUNED]


def pruned(how: str) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    PRUNED[how](model)
    return settle(model)


def masks_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: mask.clone() for name, mask in model.named_buffers() if name.endswith("_mask")}


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(X), torch.tensor([1, 2])).backward()
        optimizer.step()


@pytest.mark.parametrize("how", HOW)
def test_compiled_as_one_constant(how: str) -> None:
    model = pruned(how)
    compiled = fxopt.compile(model, example_inputs=(X,), backend="torch")
    assert torch.allclose(compiled(X), model(X), atol=1e-5)
    assert "aten.mul" not in str(compiled.graph.code)
    assert compiled.report.exact
    weights = [value for value in compiled.graph.state_dict().values() if value.dim() > 1]
    expected = sum(int((mask == 0).sum()) for mask in masks_of(model).values() if mask.dim() > 1)
    if how != "a batch norm":  # whose zeros go into the weights of the conv before it
        assert sum(int((value == 0).sum()) for value in weights) == expected


@pytest.mark.parametrize("how", HOW)
def test_training_is_that_of_the_model_itself(how: str) -> None:
    model = pruned(how).train()
    prepared = fxopt.prepare(model, (X,), passes="")
    assert {n for n, _ in prepared.named_parameters()} == {n for n, _ in model.named_parameters()}
    assert prepared.state_dict().keys() == model.state_dict().keys()
    before = masks_of(model)
    train(model)
    train(prepared)
    for name, value in prepared.state_dict().items():
        assert torch.allclose(value.float(), model.state_dict()[name].float(), atol=1e-4), name
    assert all(torch.equal(mask, before[name]) for name, mask in masks_of(prepared).items())
    compiled = prepared.eval().compile(backend="torch")
    assert torch.allclose(compiled(X), model.eval()(X), atol=1e-4)
    zeros = sum(int((v == 0).sum()) for v in compiled.graph.state_dict().values() if v.dim() > 1)
    assert zeros >= sum(int((mask == 0).sum()) for mask in before.values() if mask.dim() > 1)


def test_the_state_of_the_model_loads() -> None:
    prepared = fxopt.prepare(pruned("twice"), (X,), passes="")
    other = pruned("twice")
    train(other)
    prepared.load_state_dict(other.state_dict())
    assert torch.allclose(prepared.eval()(X), other.eval()(X), atol=1e-5)


@pytest.mark.parametrize("learned", ["true", "false"])
@pytest.mark.parametrize("how", ["twice", pytest.param("global_unstructured", marks=pytest.mark.slow)])
def test_trained_with_rounding(how: str, learned: str) -> None:
    model, passes = pruned(how), f"insert-fake-quant{{qat=true,learnable_step={learned}}}"
    prepared = fxopt.prepare(model, (X,), passes=passes, calibration=[(X,)], backend="onnx")
    assert not prepared.skips
    assert {n for n, _ in model.named_parameters()} <= {n for n, _ in prepared.named_parameters()}
    train(prepared)
    compiled = prepared.eval().compile(backend="onnx")
    assert F.cosine_similarity(compiled(X).flatten(), prepared(X).flatten(), 0) > 0.999
    found = {n: v for n, v in compiled.graph.state_dict().items() if v.dtype is torch.int8 and v.dim() > 1}
    assert len(found) == 2
    zeros = sum(int((value == 0).sum()) for value in found.values())
    assert zeros >= sum(int((mask == 0).sum()) for mask in masks_of(model).values() if mask.dim() > 1)


@pytest.mark.parametrize("passes", ["insert-fake-quant", "prune-channels{ratio=0.5}", "prune-weights{ratio=0.7}"])
def test_other_passes(passes: str) -> None:
    model = pruned("twice")
    compiled = fxopt.compile(model, example_inputs=(X,), passes=passes, calibration=[(X,)], backend="onnx")
    assert compiled(X).shape == (2, 5)


def test_channels_are_pruned_with_their_masks() -> None:
    prepared = fxopt.prepare(pruned("twice"), (X,), passes="prune-channels{ratio=0.5}")
    weight, mask = prepared.get_parameter("conv.weight_orig"), prepared.get_buffer("conv.weight_mask")
    assert weight.shape == mask.shape == (4, 3, 3, 3)
    train(prepared)
    compiled = prepared.eval().compile(backend="torch")
    assert torch.allclose(compiled(X), prepared(X), atol=1e-5)


class Attending(nn.Module):
    """Reads the weight of ``out_proj`` without calling it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.head = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 5)
        prune.l1_unstructured(self.attention.out_proj, "weight", 0.5)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_a_weight_that_is_read_without_a_call() -> None:
    model, x = Attending(), torch.randn(2, 6, 16)
    expected = model(x)
    prepared = fxopt.prepare(model, (x,), passes="")
    assert prepared.state_dict().keys() == model.state_dict().keys()
    assert torch.allclose(prepared(x), expected, atol=1e-6)
    before = prepared.get_parameter("attention.out_proj.weight_orig").clone()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    F.cross_entropy(prepared(x), torch.tensor([1, 2])).backward()
    optimizer.step()
    moved = prepared.get_parameter("attention.out_proj.weight_orig") != before
    assert torch.equal(moved, prepared.get_buffer("attention.out_proj.weight_mask") != 0)
    compiled = prepared.eval().compile(backend="torch")
    assert torch.allclose(compiled(x), prepared(x), atol=1e-5)


def test_a_weight_that_is_read_without_a_call_and_out_of_date() -> None:
    model, x = Attending(), torch.randn(2, 6, 16)
    with torch.no_grad():
        model.get_parameter("attention.out_proj.weight_orig").add_(1)
    with pytest.warns(UserWarning, match="attention.out_proj.weight is no longer the product"):
        prepared = fxopt.prepare(model, (x,), passes="")
    assert torch.allclose(prepared.eval()(x), model.eval()(x), atol=1e-5)


def test_masks_close_further() -> None:
    model = pruned("twice")
    prepared = fxopt.prepare(model, (X,), passes="prune-weights{ratio=0.9}")
    before, after = masks_of(model)["conv.weight_mask"], prepared.get_buffer("conv.weight_mask")
    assert not bool(((after == 1) & (before == 0)).any())
    assert float(after.mean()) == pytest.approx(0.1, abs=0.01)
    assert prepared.get_buffer("head.weight_mask").dtype is torch.bool
    prepared.prune_weights(0.95)
    assert float(prepared.get_buffer("conv.weight_mask").mean()) == pytest.approx(0.05, abs=0.01)
    train(prepared)
    compiled = prepared.eval().compile(backend="torch")
    assert torch.allclose(compiled(X), prepared(X), atol=1e-5)


def test_layers_keep_their_names() -> None:
    passes = "insert-fake-quant{overrides=['head*=float']}"
    compiled = fxopt.compile(pruned("twice"), example_inputs=(X,), passes=passes, calibration=[(X,)], backend="onnx")
    assert [layer.mode for layer in compiled.report.quantization.layers] == ["static", "float"]
    assert "conv" in compiled.report.quantization.layers[0].path


def test_removed_masks_leave_an_ordinary_model() -> None:
    model = pruned("l1_unstructured")
    prune.remove(model.get_submodule("conv"), "weight")
    checked = check_pass("prune-weights{ratio=0.5,keep=['head*']}", model, (X,))
    assert checked.record.edits == 0, "it is that sparse already"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "bert"])
def test_models_of_others(name: str) -> None:
    model, inputs = models.load(name, small=True)
    kinds = (nn.Conv2d, nn.Linear)  # nn.MultiheadAttention never calls its out_proj, so torch masks it only once
    layers: Any = [(m, "weight") for m in model.modules() if type(m) in kinds]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=0.5)
    compiled = fxopt.compile(model, example_inputs=inputs, backend="torch")
    with torch.no_grad():
        mine, theirs = (y if isinstance(y, torch.Tensor) else y[0] for y in (compiled(*inputs), model(*inputs)))
    assert torch.allclose(mine, theirs, atol=1e-4 * float(theirs.abs().max()))
    prepared = fxopt.prepare(model, inputs, passes="")
    assert masks_of(prepared).keys() == masks_of(model).keys()
