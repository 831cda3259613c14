"""low-rank-linear with data, with a remainder, in training, and beside other passes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import fxopt
from fxopt.errors import InputError
from fxopt.passes.low_rank_linear import LowRankLinear
from fxopt.testing import check_pass
from tests.digits import BATCH, TRAINED, Vision, answers, digits, top1, trained
from tests.passes.low_rank_models import decaying, linear, mlp, ranks
from tests.passes.models import Model, chain
from tools import models


def test_whitened_factors_keep_what_the_data_say(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(linear(96, 64, 0.99), nn.GELU(), linear(64, 96, 0.99))
    spread = decaying(64, 64, 0.85).float()
    batches = [torch.randn(64, 64) @ spread for _ in range(6)]
    errors = []
    for method, parts in (("svd", 1), ("whitened", 1), ("whitened", 2**30)):
        monkeypatch.setattr("fxopt.passes.low_rank_linear._MOMENTS", parts)  # all at once, or a layer at a time
        checked = check_pass(f"low-rank-linear{{ratio=0.4,method={method}}}", model, (batches[0],), calibration=batches)
        errors.append(1 - checked.difference.cosine)
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] == pytest.approx(errors[2], rel=1e-3)


def test_inputs_that_are_always_zero_leave_a_layer_alone() -> None:
    model = Model(lambda m, x: m.fc(x * 0) + m.own(x), fc=linear(64, 64), own=linear(64, 64))
    checked = check_pass(
        "low-rank-linear{method=whitened}", model, (torch.randn(2, 64),), calibration=[torch.randn(2, 64)]
    )
    assert set(ranks(checked)) == {"own.weight"}
    assert "what it reads is zero on the calibration data" in checked.reasons()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_whitening_with_data_that_are_not_finite(value: float) -> None:
    x = torch.randn(3, 64)
    with pytest.raises(InputError, match=r"calibration: what .* reads has squares that are not finite"):
        check_pass("low-rank-linear{method=whitened}", mlp(), (x,), calibration=[x, x * value] * 8)


@pytest.mark.parametrize(("remainder", "share"), [("int8", 0.25), ("'2:4'", 0.5)])
def test_a_remainder_makes_up_for_what_is_cut(remainder: str, share: float) -> None:
    model, x = mlp(), torch.randn(16, 64)
    plain = check_pass("low-rank-linear{ratio=0.3}", model, (x,))
    fuller = check_pass(f"low-rank-linear{{ratio=0.3,remainder={remainder}}}", model, (x,))
    assert 1 - fuller.difference.cosine < 0.5 * (1 - plain.difference.cosine)
    for name, value in fuller.program.constants.items():
        if not name.endswith("remainder"):
            continue
        if remainder == "int8":
            assert value.dtype is torch.int8
        else:
            assert bool(((value.unflatten(1, (-1, 4)) != 0).sum(2) <= 2).all())
    assert (remainder == "int8") == (fuller.program.nbytes() < 0.6 * 4 * (3 * 64 * 64 + 2 * 64 * 64))


def test_a_remainder_leaves_less_room_for_the_rank() -> None:
    x = (torch.randn(2, 128),)
    for remainder, rank in (("none", 63), ("int8", 47), ("'2:4'", 29)):
        spec = f"low-rank-linear{{rank={rank},remainder={remainder}}}"
        assert ranks(check_pass(spec, chain(linear(128, 128, 0.99)), x)) == {"0.weight": rank}
        spec = f"low-rank-linear{{rank={rank + 1},remainder={remainder}}}"
        assert ranks(check_pass(spec, chain(linear(128, 128, 0.99)), x)) == {"0.weight": None}
    checked = check_pass("low-rank-linear{rank=4,remainder='2:4'}", chain(linear(64, 66)), (torch.randn(2, 66),))
    assert "no multiple of 4" in checked.reasons()


@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize("remainder", ["int8", "'2:4'"])
def test_remainders_run(backend: str, remainder: str) -> None:
    x = torch.randn(8, 64)
    spec = f"low-rank-linear{{ratio=0.3,remainder={remainder}}}"
    model = mlp()
    compiled = fxopt.compile(model, example_inputs=(x,), passes=spec, backend=backend)
    assert torch.cosine_similarity(compiled(x).flatten(), model(x).flatten(), 0) > 0.97


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_sparsity_by_data_beside_a_remainder_in_int8(method: str) -> None:
    model, x = mlp(), torch.randn(64, 64)
    before = check_pass("low-rank-linear{remainder=int8}", model, (x,)).program
    after = fxopt.compile(
        model,
        example_inputs=(x,),
        passes=f"low-rank-linear{{remainder=int8}},sparsify-2-4{{method={method}}}",
        calibration=[(torch.randn(64, 64),) for _ in range(8)],
        backend="torch",
    ).graph
    assert torch.cosine_similarity(after(x)[0].flatten(), model(x).flatten(), 0) > 0.8
    for name, value in before.constants.items():
        if name.endswith("remainder"):
            assert torch.equal(after.get_buffer(name), value)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_a_remainder_of_two_of_four_makes_the_compiled_model_smaller(backend: str) -> None:
    spec, x = "low-rank-linear{ratio=0.3,remainder='2:4'}", torch.randn(8, 64)
    report = fxopt.compile(mlp(), example_inputs=(x,), passes=spec, backend=backend).report
    assert report.packed_bytes < report.bytes[0]


def test_factors_train_and_compile() -> None:
    model, x = mlp(), torch.randn(16, 64)
    before = copy.deepcopy(model.state_dict())
    prepared = fxopt.prepare(model, (x,), passes="low-rank-linear{ratio=0.5}")
    names = dict(prepared.named_parameters())
    assert {"0.low_rank_a", "0.low_rank_b", "0.bias"} <= set(names)
    assert "0.weight" not in names
    target = model(x).detach()
    optimizer = torch.optim.Adam(prepared.parameters(), lr=1e-3)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(prepared(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    compiled = prepared.eval().compile(backend="torch")
    assert torch.allclose(compiled(x), prepared(x), atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_remainder_keeps_its_pattern_in_training() -> None:
    x = torch.randn(16, 64)
    prepared = fxopt.prepare(mlp(), (x,), passes="low-rank-linear{ratio=0.3,remainder='2:4'}")
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    for _ in range(3):
        prepared(x).square().mean().backward()
        optimizer.step()
    compiled = prepared.eval().compile(backend="torch")
    state = prepared.state_dict()
    for layer in "024":
        weight, mask = state[f"{layer}.low_rank_remainder"], state[f"{layer}.low_rank_remainder_mask"]
        assert bool((mask.unflatten(1, (-1, 4)).sum(2) <= 2).all())
        assert not weight[~mask].any()
    assert torch.allclose(compiled(x), prepared(x), atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_what_is_factorised_is_fused_and_quantized(backend: str) -> None:
    model, batches = mlp(), [torch.randn(256, 64) for _ in range(6)]
    compiled = fxopt.compile(
        model,
        example_inputs=(batches[0],),
        passes="low-rank-linear{energy=0.99},insert-fake-quant",
        calibration=batches,
        backend=backend,
    )
    quantized = [layer for layer in compiled.report.quantization.layers if layer.mode == "static"]
    assert len(quantized) == 6
    assert compiled.report.bytes[1] < 0.4 * compiled.report.bytes[0]
    assert torch.cosine_similarity(compiled(batches[0]).flatten(), model(batches[0]).flatten(), 0) > 0.97


def test_what_is_factorised_is_pruned() -> None:
    x = torch.randn(4, 64)
    first = fxopt.prepare(mlp(), (x,), passes="low-rank-linear{rank=24}")
    second = fxopt.prepare(first, passes="prune-channels{ratio=0.5,multiple=1}")
    assert sum(p.numel() for p in second.parameters()) < 0.6 * sum(p.numel() for p in first.parameters())
    assert second.eval().compile(backend="torch")(x).shape == (4, 64)
    both = fxopt.compile(
        mlp(), example_inputs=(x,), passes="prune-channels,low-rank-linear,prune-weights", backend="torch"
    )
    assert both(x).shape == (4, 64)


def test_nothing_depends_on_chance() -> None:
    x = (torch.randn(3, 64),)
    model = mlp()
    texts = [check_pass("low-rank-linear{ratio=0.5}", model, x).program.constants["0.low_rank_a"] for _ in range(2)]
    assert torch.equal(*texts)


def tuned(model: nn.Module) -> nn.Module:
    """*model*, trained for six epochs more with a learning rate that ends at zero."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = 6 * -(-TRAINED // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    model.train()
    for _ in range(6):
        for images, labels in digits().batches():
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["svd", "whitened"])
def test_half_of_a_trained_transformer_is_enough(method: str) -> None:
    data, model = digits(), trained(Vision)
    passes = f"low-rank-linear{{ratio=0.5,method={method},smallest=16}}"
    prepared = fxopt.prepare(model, data.example(), passes=passes, calibration=data.calibration())
    assert len([name for name, _ in prepared.named_parameters() if "low_rank" in name]) >= 12
    tuned(prepared)
    compiled = prepared.compile(backend="torch")
    assert top1(answers(compiled)) >= top1(answers(model)) - 0.005
    assert top1(answers(compiled)) >= top1(answers(tuned(copy.deepcopy(model)))) - 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "gpt2",
        "llama",
        "t5-encoder",
        "hf-swin",
        "whisper-encoder",
        "resnet18",
        "mobilenet_v3_small",
        "googlenet",
    ],
)
def test_architectures_are_factorised_and_compile(name: str) -> None:
    model, inputs = models.load(name, small=True)
    passes = "low-rank-linear{ratio=0.9,multiple=1},low-rank-conv{ratio=0.8,multiple=1}"
    prepared = fxopt.prepare(model, inputs, passes=passes).eval()
    own = sum(parameter.numel() for parameter in prepared.parameters())
    assert own < 0.97 * sum(parameter.numel() for parameter in model.parameters())
    compiled = prepared.compile(backend="torch")
    for a, b in zip(*(pytree.tree_leaves(one(*inputs)) for one in (prepared, compiled)), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


def test_the_pass_has_no_options_that_do_not_survive_their_spec() -> None:
    from fxopt import registry, spec

    one = LowRankLinear(rank=None, ratio=0.3, scope="global", keep=("a*",), remainder="2:4", overrides=("x=3",))
    assert spec.parse(spec.format([one]), registry.find_pass) == [one]
