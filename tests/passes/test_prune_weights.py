"""prune-weights: the smallest weights are zero, and stay zero through training, quantization and compilation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import fxopt
from fxopt import PreparedModel, masks
from fxopt.errors import InputError, PreconditionError, SpecError
from fxopt.masks import Blocks
from fxopt.testing import Checked, check_pass
from tests.digits import Mobile, Residual, Vision, answers, digits, fit, top1, trained
from tests.passes.models import Model, chain
from tools import models

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def small() -> nn.Module:
    torch.manual_seed(0)
    return chain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


def zeros(checked: Checked) -> dict[str, float]:
    found: dict[str, float] = checked.record.details["sparsity"]
    return found


def train(model: nn.Module, inputs: tuple[torch.Tensor, ...] = (X,), steps: int = 3) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        optimizer.step()


def integers(model: fxopt.CompiledModel) -> list[torch.Tensor]:
    return [
        value for _, value in sorted(model.graph.state_dict().items()) if value.dtype is torch.int8 and value.dim() > 1
    ]


# What goes.


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("block", ["1x1", "4x1", pytest.param("16x1", marks=pytest.mark.slow), "2x8"])
def test_the_smallest_blocks_become_zero(block: str, scope: str) -> None:
    model = small()
    checked = check_pass(f"prune-weights{{ratio=0.5,block='{block}',scope={scope}}}", model, (X,))
    rows, columns = map(int, block.split("x"))
    state = model.state_dict()
    stayed, gone = list[tuple[str, float]](), list[tuple[str, float]]()
    for name, share in zeros(checked).items():
        before, after = state[name].flatten(1), checked.program.constants[name].flatten(1)
        assert torch.equal(after[after != 0], before[after != 0])
        for i in range(0, len(before), rows):
            for j in range(0, before.shape[1], columns):
                tile = after[i : i + rows, j : j + columns]
                assert bool((tile == 0).all() or (tile != 0).all()), "a block goes as a whole"
                score = before[i : i + rows, j : j + columns].abs().mean()
                (gone if bool((tile == 0).all()) else stayed).append((name, float(score)))
        if scope == "layer":
            assert share == pytest.approx(0.5, abs=0.07)
    for name in zeros(checked):
        stays = [score for n, score in stayed if n == name or scope == "global"]
        assert min(stays) >= max((score for n, score in gone if n == name or scope == "global"), default=0)


def test_scores_are_those_of_torch() -> None:
    model, twin = small(), small()
    convs: Any = [(twin.get_submodule("0"), "weight"), (twin.get_submodule("4"), "weight")]
    prune.global_unstructured(convs, prune.L1Unstructured, amount=0.6)
    checked = check_pass("prune-weights{ratio=0.6,scope=global}", model, (X,))
    for i in (0, 4):
        assert torch.equal(
            checked.program.constants[f"{i}.weight"],
            twin.state_dict()[f"{i}.weight_orig"] * twin.state_dict()[f"{i}.weight_mask"],
        )


def test_channels_of_a_transposed_convolution() -> None:
    model = chain(nn.ConvTranspose2d(3, 4, 2))
    checked = check_pass("prune-weights{ratio=0.5,block='1x12'}", model, (X,))
    gone = (checked.program.constants["0.weight"] == 0).all(3).all(2).all(0)
    assert gone.tolist().count(True) == 2


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_no_layer_is_emptied(scope: str) -> None:
    model = small()
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(1e-6)
    for block in ("1x1", "64x288"):
        checked = check_pass(f"prune-weights{{ratio=0.99,scope={scope},block='{block}'}}", model, (X,))
        assert all(share < 1 for share in zeros(checked).values())


def test_what_is_sparse_already_stays() -> None:
    model = small()
    with torch.no_grad():
        model.get_parameter("4.weight")[:8] = 0
    checked = check_pass("prune-weights{ratio=0.3}", model, (X,))
    assert torch.equal(checked.program.constants["4.weight"], model.get_parameter("4.weight"))
    assert zeros(checked)["0.weight"] == pytest.approx(0.3, abs=0.01)


def test_nothing_is_asked() -> None:
    assert check_pass("prune-weights{ratio=0}", small(), (X,)).record.edits == 0


# What stays.


def test_keep() -> None:
    checked = check_pass("prune-weights{keep=['4.*']}", small(), (X,))
    assert list(zeros(checked)) == ["0.weight"]
    assert "stays whole, as asked" in checked.reasons()
    with pytest.warns(UserWarning, match="fits no weight"):
        check_pass("prune-weights{keep=['nothing']}", small(), (X,))


def test_a_weight_used_twice_is_pruned_once() -> None:
    model = Model(lambda m, x: m.fc(m.fc(x).relu()), fc=nn.Linear(8, 8))
    assert zeros(check_pass("prune-weights", model, (torch.randn(2, 8),))) == {"fc.weight": 0.5}


def test_a_weight_that_something_else_reads_stays() -> None:
    tied = Model(lambda m, x: F.linear(m.table(x), m.table.weight), table=nn.Embedding(8, 4))
    checked = check_pass("prune-weights", tied, (torch.tensor([1, 2]),))
    assert "read by something else" in checked.reasons()
    computed = Model(lambda m, x: F.linear(x, m.w * x.mean()), w=torch.randn(3, 4))
    assert "not a constant" in check_pass("prune-weights", computed, (torch.randn(2, 4),)).reasons()


@pytest.mark.parametrize("options", ["ratio=1.0", "ratio=-0.1", "block='4'", "block='0x1'", "scope=all"])
def test_options_that_make_no_sense(options: str) -> None:
    with pytest.raises(SpecError):
        fxopt.compile(small(), example_inputs=(X,), passes=f"prune-weights{{{options}}}")


def test_the_order_of_passes() -> None:
    for passes in ("insert-fake-quant,prune-weights", "prune-weights,prune-channels"):
        with pytest.raises(PreconditionError, match="prune-weights"):
            fxopt.compile(small(), example_inputs=(X,), passes=passes, calibration=[(X,)])


# Compiled.


def test_the_report_promises_no_speed() -> None:
    compiled = fxopt.compile(small(), example_inputs=(X,), passes="prune-weights{ratio=0.75}", backend="torch")
    [record] = [one for one in compiled.report.passes if one.name == "prune-weights"]
    assert "75.0% of the weights of 2 layers are zero. No engine here computes faster" in record.notes[0]
    assert not compiled.report.exact


def test_zeros_stay_through_int8() -> None:
    passes = "prune-weights{ratio=0.9},insert-fake-quant"
    compiled = fxopt.compile(small(), example_inputs=(X,), passes=passes, calibration=[(X,)], backend="onnx")
    assert len(integers(compiled)) == 2
    assert all((value == 0).double().mean() >= 0.89 for value in integers(compiled))


@pytest.mark.slow
@pytest.mark.parametrize("after", ["gptq", "ada-round", "bias-correction"])
def test_zeros_stay_when_rounding_is_chosen(after: str) -> None:
    data = [(torch.randn(2, 3, 8, 8),) for _ in range(8)]
    passes = f"prune-weights{{ratio=0.9}},insert-fake-quant,{after}"
    compiled = fxopt.compile(small(), example_inputs=(X,), passes=passes, calibration=data, backend="onnx")
    assert min(float((value == 0).double().mean()) for value in integers(compiled)) > 0.898


# Trained.


def held(prepared: PreparedModel) -> dict[str, torch.Tensor]:
    return {name: mask for name, mask in prepared.named_buffers() if name.endswith("_mask")}


def test_masks_hold_in_training() -> None:
    model = small()
    prepared = fxopt.prepare(model, (X,), passes="prune-weights{ratio=0.8}")
    assert held(prepared).keys() == {"0.weight_mask", "4.weight_mask"}
    assert {n for n, _ in prepared.named_parameters()} == {n for n, _ in model.named_parameters()}
    before = {n: p.detach().clone() for n, p in prepared.named_parameters()}
    train(prepared)
    for name, mask in held(prepared).items():
        weight = prepared.get_parameter(name.removesuffix("_mask"))
        assert mask.double().mean() == pytest.approx(0.2, abs=0.01)
        assert not bool(weight[~mask].any())
        assert weight.grad is not None
        assert not bool(weight.grad[~mask].any())
        assert bool((weight != before[name.removesuffix("_mask")])[mask].all()), "the others train"
    compiled = prepared.eval().compile(backend="torch")
    assert torch.allclose(compiled(X), prepared(X), atol=1e-5)
    [conv, linear] = [v for v in compiled.graph.state_dict().values() if v.dim() > 1]
    assert {int((conv == 0).sum()), int((linear == 0).sum())} == {int((~m).sum()) for m in held(prepared).values()}


def test_masks_are_state() -> None:
    prepared = fxopt.prepare(small(), (X,), passes="prune-weights{ratio=0.8}")
    other = fxopt.prepare(small(), (X,), passes="prune-weights{ratio=0.1}")
    train(prepared)
    other.load_state_dict(prepared.state_dict())
    twin = copy.deepcopy(prepared)
    for same in (other, twin):
        assert torch.equal(same.eval()(X), prepared.eval()(X))
    twin.prune_weights(0.9)
    assert all(int((~m).sum()) > int((~held(prepared)[n]).sum()) for n, m in held(twin).items())
    twin.to(torch.float64)
    assert {m.dtype for m in held(twin).values()} == {torch.bool}


def test_gradual_pruning() -> None:
    prepared = fxopt.prepare(small(), (X,), passes="prune-weights{ratio=0.0,block='2x1'}")
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-2, momentum=0.9)
    before = held(copy.deepcopy(prepared))
    for step in range(5):
        optimizer.zero_grad()
        prepared(X).square().mean().backward()
        optimizer.step()
        prepared.prune_weights(masks.gradual(step + 1, 5, final=0.75))
        for name, mask in held(prepared).items():
            assert not bool((mask & ~before[name]).any()), "what is zero stays"
            assert mask.double().mean() == pytest.approx(1 - masks.gradual(step + 1, 5, final=0.75), abs=0.01)
        before = {name: mask.clone() for name, mask in held(prepared).items()}
    optimizer.step()  # momentum goes on, behind the masks
    compiled = prepared.compile(backend="torch")
    assert torch.allclose(compiled(X), prepared.eval()(X), atol=1e-5)
    weights = [v for v in compiled.graph.state_dict().values() if v.dim() > 1]
    assert [float((v == 0).double().mean()) for v in weights] == pytest.approx([0.75, 0.75], abs=0.01)


def test_the_schedule() -> None:
    assert [masks.gradual(t, 4, 0.8) for t in (0, 2, 4, 9)] == pytest.approx([0, 0.7, 0.8, 0.8])
    assert masks.gradual(0, 4, 0.8, initial=0.5) == 0.5


def test_there_are_no_masks_to_raise() -> None:
    with pytest.raises(PreconditionError, match="no weights are masked"):
        fxopt.prepare(small(), (X,), passes="").prune_weights(0.5)
    with pytest.raises(InputError, match="ratio"):
        fxopt.prepare(small(), (X,), passes="prune-weights").prune_weights(1.5)


def test_in_rounds() -> None:
    """A lottery ticket: prune, rewind, train, prune further."""
    model = small()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    first = fxopt.prepare(model, (X,), passes="prune-weights{ratio=0.5}")
    train(first)
    second = fxopt.prepare(first, passes="prune-weights{ratio=0.75}")
    third = fxopt.prepare(second, passes="")
    for name, mask in held(second).items():
        assert not bool((mask & ~held(first)[name]).any()), "no mask opens"
        assert mask.double().mean() == pytest.approx(0.25, abs=0.01)
        assert torch.equal(held(third)[name], mask)
    third.rewind(start)
    for name, mask in held(third).items():
        weight = name.removesuffix("_mask")
        assert torch.equal(third.get_parameter(weight), start[weight] * mask)
    third.prune_weights(0.9)
    assert all(float(mask.double().mean()) < 0.11 for mask in held(third).values())


@pytest.mark.parametrize("learned", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_masks_and_rounding_together(learned: str) -> None:
    passes = f"prune-weights{{ratio=0.8}},insert-fake-quant{{qat=true,learnable_step={learned}}}"
    prepared = fxopt.prepare(small(), (X,), passes=passes, calibration=[(X,)], backend="onnx")
    assert not prepared.skips
    train(prepared)
    prepared.prune_weights(0.9)
    train(prepared, steps=1)
    for name, mask in held(prepared).items():
        assert not bool(prepared.get_parameter(name.removesuffix("_mask"))[~mask].any())
    compiled = prepared.eval().compile(backend="onnx")
    assert len(integers(compiled)) == 2
    assert all((value == 0).double().mean() >= 0.89 for value in integers(compiled))
    assert F.cosine_similarity(compiled(X).flatten(), prepared(X).flatten(), 0) > 0.999


@pytest.mark.slow
def test_weights_of_another_layout_train_too() -> None:
    model, inputs = models.load("gpt2", small=True)
    prepared = fxopt.prepare(model, inputs, passes="prune-weights")
    names = {name.removesuffix("_mask") for name in held(prepared)}
    assert len(names) == 8, "four linears in each of two layers; the head is the table of the embedding"
    assert names <= {name for name, _ in prepared.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Residual, Mobile, Vision])
def test_trained_with_masks_on_real_digits(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    dense: nn.Module = trained(kind)  # type: ignore[arg-type]
    prepared = fxopt.prepare(dense, digits().example(), passes="prune-weights{ratio=0.3}")
    for epoch in range(4):
        prepared.prune_weights(masks.gradual(epoch + 1, 4, final=0.8, initial=0.3))
        fit(prepared, 1, 1e-2)
    fit(prepared, 2, 1e-3)
    compiled = prepared.compile(backend="torch")
    assert top1(answers(compiled)) >= top1(answers(dense)) - 0.02
    assert torch.allclose(answers(compiled), answers(prepared), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "vit_b_16", "convnext_tiny", "bert", "gpt2", "llama"]
)
def test_models_of_others(name: str) -> None:
    model, inputs = models.load(name, small=True)
    checked = check_pass("prune-weights{block='4x1',ratio=0.6}", model, inputs)
    assert len(zeros(checked)) >= 8
    assert all(0.5 < share < 0.65 for share in zeros(checked).values())


def test_scores_of_blocks_that_are_cut_off() -> None:
    weight = torch.arange(1.0, 7.0).reshape(2, 3)
    assert Blocks(1, 2).scores(weight, 0).tolist() == [[1.5, 3.0], [4.5, 6.0]]
    assert Blocks(2, 2).scores(weight, 1).tolist() == [[3.0], [4.5]]
    kept = Blocks(1, 2).spread(torch.tensor([[True, False], [False, True]]), weight, 0)
    assert kept.tolist() == [[True, True, False], [False, False, True]]
