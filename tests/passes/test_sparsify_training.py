"""n:m sparsity in training, beside other passes, and on engines."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt import masks, registry
from fxopt.errors import PreconditionError
from fxopt.passes.sparsify_2_4 import SparsifyNM
from fxopt.sparsity import N_OF_M, Pattern, matrix
from tests.digits import Mobile, Residual, Vision, answers, digits, top1, trained
from tests.passes.models import Model
from tests.passes.sparse_models import METHODS, X, small

pytestmark = pytest.mark.filterwarnings("ignore:sparsify-2-4. no speed-up:UserWarning")


def train(model: nn.Module, steps: int = 4) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("method", METHODS)
def test_masks_hold_in_training(method: str) -> None:
    passes = f"sparsify-2-4{{method={method}}}"
    prepared = fxopt.prepare(small(), (X,), passes=passes, calibration=[(X,)])
    before = prepared.state_dict()
    held = {name: before[f"{name}_mask"].clone() for name in ("3.weight", "6.weight", "8.weight")}
    moved = {name: before[name].clone() for name in held}
    train(prepared)
    compiled = prepared.compile(backend="torch").graph.state_dict()
    for name, mask in held.items():
        assert bool((matrix(mask).reshape(-1, 4).sum(1) == 2).all())
        assert torch.equal(compiled[name] != 0, mask)
        assert not torch.equal(compiled[name], moved[name]), "what stays has learned"


def test_straight_through_may_change_its_mind() -> None:
    model = small()
    prepared = fxopt.prepare(model, (X,), passes="sparsify-2-4{straight_through=true,permute=false}")
    first = {name: Pattern().kept(model.get_parameter(name).abs()) for name in ("3.weight", "6.weight", "8.weight")}
    train(prepared, 20)
    compiled = prepared.compile(backend="torch").graph.state_dict()
    changed = 0
    for name, mask in first.items():
        after = compiled[name]
        assert bool(((matrix(after) != 0).reshape(-1, 4).sum(1) == 2).all())
        changed += int(((after != 0) != mask).sum())
    assert changed > 0


def test_the_gradient_of_straight_through() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, 0.5]], requires_grad=True)
    result = N_OF_M(weight, 2, 4, 0.1)
    assert result.tolist() == [[0, -4, 3, 0]]
    result.sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.tensor([[1.1, 1.0, 1.0, 1.05]]))


def test_a_pattern_that_was_lost_is_found_at_compile() -> None:
    prepared = fxopt.prepare(small(), (X,), passes="sparsify-2-4")
    state = prepared.state_dict()
    state["6.weight_mask"] = torch.ones_like(state["6.weight_mask"])
    state["6.weight"] = torch.randn_like(state["6.weight"])
    prepared.load_state_dict(state)
    with pytest.raises(PreconditionError, match=r"'6\.weight' was prepared with 2:4 sparsity and has lost it"):
        prepared.compile(backend="torch")


def test_after_prune_weights_zeros_stay_zero() -> None:
    for passes in ("prune-weights{ratio=0.6},sparsify-2-4", "prune-weights{ratio=0.6},sparsify-2-4{method=sparsegpt}"):
        prepared = fxopt.prepare(small(), (X,), passes=passes, calibration=[(X,)])
        gone = {name: value == 0 for name, value in prepared.state_dict().items() if name.endswith("weight")}
        train(prepared)
        compiled = prepared.compile(backend="torch").graph.state_dict()
        for name in ("3.weight", "6.weight", "8.weight"):
            assert float(gone[name].float().mean()) > 0.55
            assert Pattern().holds(compiled[name])
            assert not bool(compiled[name][gone[name]].any())


def test_another_round_keeps_the_pattern() -> None:
    prepared = fxopt.prepare(small(), (X,), passes="sparsify-2-4")
    train(prepared)
    again = fxopt.prepare(prepared, passes="sparsify-2-4")
    train(again)
    compiled = again.compile(backend="torch").graph.state_dict()
    assert torch.equal(compiled["6.weight"] != 0, prepared.state_dict()["6.weight_mask"])
    assert again.masked.patterns.keys() == {"3.weight", "6.weight", "8.weight"}
    assert masks.NOTHING.patterns == {}


def test_pruning_after_it_is_refused_at_once() -> None:
    first = fxopt.prepare(small(), (X,), passes="sparsify-2-4")
    message = r"prune-channels would break the 2:4 sparsity that '.*weight' has from an earlier fxopt.prepare"
    with pytest.raises(PreconditionError, match=message):
        fxopt.prepare(first, passes="prune-channels{multiple=4}")
    again = fxopt.prepare(first, passes="prune-channels{multiple=4},sparsify-2-4").eval()
    assert sum(p.numel() for p in again.parameters()) < 0.6 * sum(p.numel() for p in first.parameters())
    compiled = again.compile(backend="torch")
    torch.testing.assert_close(compiled(X), again(X), atol=1e-5, rtol=1e-4)
    assert all(Pattern().holds(compiled.graph.state_dict()[name]) for name in again.masked.patterns)


@pytest.mark.parametrize("first", ["sparsify-2-4", "sparsify-2-4{straight_through=true}", "prune-weights"])
def test_blocks_that_go_after_it_take_their_masks_along(first: str) -> None:
    model = Model(
        lambda m, x: m.head((lambda y: y + m.b(y).relu())(x + m.a(x).relu())),
        a=nn.Linear(16, 16),
        b=nn.Linear(16, 16),
        head=nn.Linear(16, 16),
    )
    x = torch.randn(4, 16)
    before = fxopt.prepare(model, (x,), passes=first)
    after = fxopt.prepare(before, passes="prune-blocks{count=1}", calibration=[(x,)]).eval()
    assert len(after.masked.patterns) == (0 if first == "prune-weights" else 2)
    if first == "prune-weights":
        after.prune_weights(0.9)
        assert float((after.tensor("head.weight") == 0).float().mean()) == pytest.approx(0.9, abs=0.02)
    torch.testing.assert_close(after.compile(backend="torch")(x), after(x), atol=1e-5, rtol=1e-4)


def test_low_rank_after_it_says_why_not() -> None:
    first = fxopt.prepare(nn.Linear(64, 64), (torch.randn(2, 64),), passes="sparsify-2-4")
    skips = fxopt.prepare(first, passes="low-rank-linear").skips
    assert any("a mask holds zeros, which factors do not keep" in skip.reason for skip in skips)


def test_rewind_finds_permuted_channels() -> None:
    model = small()
    prepared = fxopt.prepare(model, (X,), passes="sparsify-2-4")
    assert "3.weight" in prepared.masked.patterns
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    train(prepared)
    prepared.rewind(model.state_dict())
    for name, mask in ((n, f"{n}_mask") for n in ("3.weight", "6.weight", "8.weight")):
        assert torch.equal(prepared.state_dict()[name] * before[mask], before[name])
    for name in ("0.weight", "1.running_mean", "3.bias"):
        assert torch.equal(prepared.state_dict()[name], before[name])


@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize(
    "after",
    [
        "insert-fake-quant",
        "insert-fake-quant,gptq",
        "insert-fake-quant{activations=none}",
        "smooth-quant,insert-fake-quant",
    ],
)
def test_int8_on_top_keeps_the_pattern(after: str, backend: str) -> None:
    calibration = [(X,), (X.flip(0),)]
    model = small()
    passes = f"sparsify-2-4{{method=sparsegpt}},{after}"
    compiled = fxopt.compile(model, example_inputs=(X,), passes=passes, calibration=calibration, backend=backend)
    integers = {n: v for n, v in compiled.graph.state_dict().items() if v.dtype is torch.int8 and v.dim() > 1}
    sparse = [value for value in integers.values() if value.shape[1] % 4 == 0]
    assert len(sparse) >= (2 if backend == "onnx" else 1)  # the torch engine declines small layers
    assert all(Pattern().holds(value) for value in sparse)
    assert compiled.report.packed_bytes < compiled.report.bytes[1]
    assert F.cosine_similarity(compiled(X).flatten(), model(X).flatten(), dim=0) > 0.8


def test_ada_round_keeps_zeros() -> None:
    passes = "sparsify-2-4,insert-fake-quant,ada-round{iterations=20}"
    compiled = fxopt.compile(
        small(), example_inputs=(X,), passes=passes, calibration=[(X,), (X.flip(0),)], backend="onnx"
    )
    integers = [v for v in compiled.graph.state_dict().values() if v.dtype is torch.int8 and v.dim() > 1]
    assert sum(Pattern().holds(value) for value in integers) >= 2


@pytest.mark.parametrize("straight_through", ["false", "true"])
def test_int8_training_on_top_keeps_the_pattern(straight_through: str) -> None:
    passes = f"sparsify-2-4{{straight_through={straight_through}}},insert-fake-quant{{qat=true}}"
    prepared = fxopt.prepare(small(), (X,), passes=passes, calibration=[(X,)])
    train(prepared)
    compiled = prepared.compile(backend="torch").graph.state_dict()
    for name in ("3.weight_int8", "6.weight_int8", "8.weight_int8"):
        assert Pattern().holds(compiled[name])


def test_fewer_channels_before() -> None:
    compiled = fxopt.compile(small(), example_inputs=(X,), passes="prune-channels{ratio=0.5},sparsify-2-4")
    found = compiled.graph.state_dict()
    assert Pattern().holds(found["6.weight"])
    assert found["6.weight"].shape[0] == 32


def test_onnx_has_plain_weights_with_the_pattern(tmp_path: Any) -> None:
    import onnx
    from onnx import numpy_helper

    fxopt.compile(small(), example_inputs=(X,), passes="sparsify-2-4", backend="onnx").save(tmp_path / "m.onnx")
    tensors = [numpy_helper.to_array(t) for t in onnx.load(tmp_path / "m.onnx").graph.initializer]
    matrices = [torch.from_numpy(t.copy()) for t in tensors if t.ndim >= 2 and 3 not in t.shape[1:2]]
    fitting = [m for m in matrices if Pattern().holds(m) or Pattern().holds(m.T if m.dim() == 2 else m)]
    assert len(fitting) == 3


def test_spec_and_defaults() -> None:
    assert registry.find_pass("sparsify-2-4") is SparsifyNM
    assert SparsifyNM().pattern == Pattern(2, 4)
    assert str(Pattern(4, 8)) == "4:8"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "method"), [*itertools.product([Residual, Mobile, Vision], METHODS)])
def test_trained_models_stay_accurate(kind: Any, method: str) -> None:
    model = trained(kind)
    passes = f"sparsify-2-4{{method={method}}}"
    with torch.random.fork_rng(devices=[]):
        compiled = fxopt.compile(
            model, example_inputs=digits().example(), passes=passes, calibration=digits().calibration(), backend="torch"
        )
    lost = top1(answers(model)) - top1(answers(compiled))
    assert lost <= (0.01 if method == "sparsegpt" else 0.1), f"{lost:.2%}"
