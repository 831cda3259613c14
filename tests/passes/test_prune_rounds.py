"""Pruning around training: rounds, lottery tickets, loss terms that make channels small."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.errors import InputError, PreconditionError
from fxopt.passes.prune_channels import batch_norm_l1, group_lasso, per_round
from tests.digits import Residual, answers, digits, fit, top1, trained
from tests.passes.models import chain

HALF = "prune-channels{multiple=1,ratio=0.5}"


def prepare(model: nn.Module, passes: str = HALF) -> fxopt.PreparedModel:
    return fxopt.prepare(model, digits().example(), passes=passes)


def small() -> nn.Module:
    torch.manual_seed(0)
    return chain(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 4, 3))


def test_rounds_multiply_up() -> None:
    assert (1 - per_round(0.75, 3)) ** 3 == pytest.approx(0.25)
    assert per_round(0.5, 1) == 0.5
    for ratio, rounds in ((1.0, 2), (-0.1, 2), (0.5, 0)):
        with pytest.raises(InputError):
            per_round(ratio, rounds)


def test_each_round_goes_on_from_what_training_left() -> None:
    first = prepare(small())
    fit_a_little(first)
    second = prepare(first)
    assert [first.tensor("0.weight").shape[0], second.tensor("0.weight").shape[0]] == [4, 2]
    kept = [row for row in first.tensor("0.weight") if any(torch.equal(row, own) for own in second.tensor("0.weight"))]
    assert len(kept) == 2, "weights are those of the first round, trained"
    x = digits().example()[0]
    assert not torch.equal(second(x), second(x)), "dropout acts in training"
    assert torch.equal(second.eval()(x), second(x))
    compiled = second.compile(backend="torch")
    assert (compiled(x) - second(x)).abs().max() < 1e-5
    assert compiled.report.model == first.name


def fit_a_little(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()(digits().example()[0]).square().mean().backward()
    optimizer.step()


def test_attention_keeps_its_dropout_over_rounds() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, dropout=0.5, batch_first=True)
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.attention(x, x, x, need_weights=False)[0]
            return self.down(self.up(y).relu())

    x = torch.randn(2, 5, 16)
    first = fxopt.prepare(Attending(), (x,), passes=HALF)
    second = fxopt.prepare(first, passes=HALF)
    for model in (first, second):
        assert not torch.equal(model.train()(x), model(x))


def test_nothing_follows_quantization_in_training() -> None:
    rounded = fxopt.prepare(Residual(), digits().example())
    with pytest.raises(PreconditionError, match="prepared for quantization"):
        fxopt.prepare(rounded, passes=HALF)
    pruned = prepare(Residual())
    assert isinstance(fxopt.prepare(pruned, calibration=digits().calibration()), fxopt.PreparedModel)


def test_weights_go_back_to_where_they_began() -> None:
    model = small()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    twice = prepare(prepare(model))
    fit_a_little(twice)
    moved = twice.tensor("0.weight").clone()
    twice.rewind(start)
    assert not torch.equal(moved, twice.tensor("0.weight"))
    rows = [int((start["0.weight"] == row).all(3).all(2).all(1).nonzero()) for row in twice.tensor("0.weight")]
    assert torch.equal(twice.tensor("4.weight"), start["4.weight"][:, rows])
    assert torch.equal(twice.tensor("1.running_var"), start["1.running_var"][rows])


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    pruned = prepare(small())
    before = copy.deepcopy(dict(pruned.named_parameters()))
    state = small().state_dict()
    for wrong, message in (
        ({k: v for k, v in state.items() if k != "4.weight"}, "has no '4.weight'"),
        (state | {"4.weight": torch.zeros(4, 3, 3, 3)}, "from which"),
    ):
        with pytest.raises(InputError, match=message):
            pruned.rewind(wrong)
    assert all(torch.equal(value, before[name]) for name, value in pruned.named_parameters())


def test_the_group_lasso_is_that_of_the_definition() -> None:
    model = prepare(small(), "")
    expected = torch.zeros(())
    for channel in range(8):
        parts = [
            model.tensor("0.weight")[channel], model.tensor("0.bias")[channel], model.tensor("1.weight")[channel],
            model.tensor("1.bias")[channel], model.tensor("4.weight")[:, channel],
        ]  # fmt: skip
        flat = torch.cat([part.flatten() for part in parts])
        expected = expected + len(flat) ** 0.5 * flat.norm()
    assert float(group_lasso(model).detach()) == pytest.approx(float(expected), rel=1e-5)
    assert float(batch_norm_l1(model).detach()) == pytest.approx(float(model.tensor("1.weight").abs().sum()))


def test_terms_of_a_model_that_is_not_prepared() -> None:
    for term in (group_lasso, batch_norm_l1):
        with pytest.raises(InputError, match="not for a Sequential"):
            term(small())  # type: ignore[arg-type]


def test_a_write_into_a_part_is_trained() -> None:
    """The copy that it leaves in a graph has no derivative."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 8, 1), nn.Conv2d(1, 4, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.a(x) * 1
            y[:, :4] = self.b(x)
            y[:, 5] = x[:, 0].double() * 2
            y[:, 6:] = 0
            return self.c(y)

    torch.manual_seed(0)
    model, x = Writes(), digits().example()[0]
    prepared = prepare(model, "")
    for one in (model, prepared):
        one(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(prepared.get_parameter(name).grad, parameter.grad, atol=1e-5), name  # type: ignore[arg-type]


def test_a_zero_channel_has_a_finite_gradient() -> None:
    model = prepare(small(), "")
    with torch.no_grad():
        for name, axis in (("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0), ("4.weight", 1)):
            model.tensor(name).select(axis, 0).zero_()
    group_lasso(model).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.slow
@pytest.mark.parametrize("term", [group_lasso, batch_norm_l1])
def test_a_sparse_model_loses_less(term: Any) -> None:
    """The same training with and without the term; then half of the channels go at once."""
    accuracies = []
    for factor in (0.0, 3e-4 if term is group_lasso else 3e-3):
        model = fxopt.prepare(copy.deepcopy(trained(Residual)), digits().example(), passes="")
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        torch.manual_seed(0)
        for _ in range(8):
            for images, labels in digits().batches():
                loss = F.cross_entropy(model(images), labels) + factor * term(model)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        criterion = "bn-scale" if term is batch_norm_l1 else "l2"
        pruned = prepare(model, f"prune-channels{{multiple=1,ratio=0.4,criterion={criterion}}}")
        accuracies.append(top1(answers(pruned.eval())))
    assert accuracies[1] > accuracies[0]


@pytest.mark.slow
def test_rounds_are_no_worse_than_one_shot() -> None:
    """The same budget and epochs, the mean of three seeds: one image of 512 is 0.002."""
    start: nn.Module = trained(Residual)
    found = {"rounds": 0.0, "once": 0.0}
    for seed in range(3):
        torch.manual_seed(seed)
        rounds = start
        for _ in range(3):
            rounds = prepare(rounds, f"prune-channels{{multiple=1,macs={0.5 ** (1 / 3)}}}")
            fit(rounds, 2, 0.02)
        once = prepare(start, "prune-channels{multiple=1,macs=0.5}")
        fit(once, 6, 0.02)
        found["rounds"] += top1(answers(rounds)) / 3
        found["once"] += top1(answers(once)) / 3
    assert found["rounds"] >= found["once"] - 0.002
    assert found["rounds"] >= top1(answers(start)) - 0.005
