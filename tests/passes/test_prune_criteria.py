"""prune-channels: what decides which channels go, how many, and what is made up for."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.errors import PassError, PreconditionError, SpecError
from fxopt.passes.prune_channels import Channels, PruneChannels, PruningPlan
from fxopt.passes.prune_channels.criteria import NORMALIZE, scores
from fxopt.report import PassRecord
from tests.digits import Residual, digits
from tests.passes.models import chain

X = (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


def network(padding: int = 0) -> nn.Module:
    torch.manual_seed(0)
    return chain(
        nn.Conv2d(3, 16, 3, padding=padding), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=padding)
    )


def compiled(model: nn.Module, one: str | PruneChannels, inputs: Any = X, **more: Any) -> fxopt.CompiledModel:
    passes = f"prune-channels{{multiple=1,{one}}}" if isinstance(one, str) else one
    return fxopt.compile(model, example_inputs=inputs, passes=passes, backend=more.pop("backend", "torch"), **more)


def record(model: fxopt.CompiledModel) -> PassRecord:
    return next(one for one in model.report.passes if one.name == "prune-channels")


def kept(model: fxopt.CompiledModel) -> tuple[int, ...]:
    [group] = record(model).details["pruning"].groups
    return tuple(group.kept)


def labelled(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(4, 3, 8, 8), torch.randint(0, 8, (4,))) for _ in range(count)]


def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs.mean((2, 3)), labels)


def test_taylor_is_the_squared_change_of_the_loss_to_first_order() -> None:
    """Against the definition, with the gradients of the model itself."""
    model, data = network(), labelled()
    importance = torch.zeros(16, dtype=torch.float64)
    parts: dict[str, torch.Tensor] = {}
    for x, labels in data:
        model.zero_grad()
        loss(model(x), labels).backward()
        for name, axis in (("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0), ("3.weight", 1)):
            weight = model.get_parameter(name)
            assert weight.grad is not None
            product = (weight * weight.grad).detach().double().movedim(axis, 0).flatten(1 if weight.dim() > 1 else 0)
            change = (product.sum(1) if product.dim() > 1 else product).square()
            parts[name] = parts.get(name, torch.zeros(16).double()) + change
    for part in parts.values():
        importance += part / part.mean()
    expected = tuple(importance.topk(8).indices.sort().values.tolist())
    assert kept(compiled(model, "criterion=taylor", calibration=data, loss=loss)) == expected


def test_a_channel_that_never_fires_is_the_first_to_go() -> None:
    model, data = network(), labelled()
    with torch.no_grad():
        model.get_parameter("1.bias")[[2, 5, 7]] = -100
        fires = torch.cat([model[:3](x) for x, _ in data]).amax((0, 2, 3)) > 0  # type: ignore[index]
    dead = set((~fires).nonzero().flatten().tolist())
    assert dead >= {2, 5, 7}
    for options in ("criterion=activation", "criterion=taylor"):
        ratio = len(dead) / 16
        gone = set(range(16)) - set(kept(compiled(model, f"{options},ratio={ratio}", calibration=data, loss=loss)))
        assert gone == dead


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ("criterion=activation", {}, "pass calibration="),
        ("criterion=taylor", {"calibration": labelled()}, "pass loss="),
        ("criterion=taylor", {"calibration": labelled(), "loss": lambda y, t: y}, "one number"),
        ("criterion=taylor", {"calibration": labelled(), "loss": lambda y, t: y.mean() * float("nan")}, "is nan"),
        ("criterion=taylor", {"calibration": [X], "loss": F.cross_entropy}, "loss failed with TypeError.* 0 values"),
        ("criterion=activation", {"calibration": [(X[0] * float("inf"),)]}, "is not finite"),
        ("plan='nowhere.json'", {}, "cannot be read"),
        ("latency_ms=1e-9", {}, "latency_ms=1e-09 cannot be reached"),
    ],
)
def test_what_is_missing_is_said(options: str, more: Any, message: str) -> None:
    with pytest.raises(fxopt.FxoptError, match=message):
        compiled(network(), options, **more)


@pytest.mark.parametrize(
    "options",
    [
        "macs=0.5,params=0.5",
        "macs=0.5,ratio=0.2",
        "latency_ms=0",
        "latency_ms=nan",
        "ratios=['a=2']",
        "ratios=['a']",
        "criterion=l3",
        "multiple=0",
    ],
)
def test_bad_options(options: str) -> None:
    with pytest.raises(SpecError):
        compiled(network(), options)


@pytest.mark.parametrize(
    "wrong", [{"criterion": "l3"}, {"keep": "0.*"}, {"score": 3}, {"plan": 3}, {"ratio": "0.5"}, {"ratio": None}]
)
def test_bad_options_from_python(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="prune-channels"):
        compiled(network(), PruneChannels(**wrong))


def test_a_list_serves_as_a_tuple() -> None:
    found = compiled(network(), PruneChannels(keep=["0.*"]))  # type: ignore[arg-type]
    assert "no group can lose channels" in record(found).notes[0]


def test_what_is_left_whole_is_said() -> None:
    assert "multiple=99 too large" in record(compiled(network(), PruneChannels(multiple=99))).notes[0]
    torch.manual_seed(0)
    model = chain(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    found = compiled(model, "criterion=bn-scale", (torch.randn(3, 4),))
    assert [group.name for group in record(found).details["pruning"].groups] == ["0.weight:0"]
    assert "1 groups stay whole: criterion=bn-scale" in record(found).notes[0]


def test_a_loss_that_is_no_function() -> None:
    with pytest.raises(fxopt.InputError, match="loss must be a function"):
        fxopt.compile(network(), example_inputs=X, loss=3)  # type: ignore[arg-type]


def test_a_function_of_the_user() -> None:
    seen: list[Channels] = []

    def score(channels: Channels) -> torch.Tensor:
        seen.append(channels)
        return torch.arange(channels.size)

    model = compiled(network(), PruneChannels(score=score, multiple=1))
    assert kept(model) == tuple(range(8, 16))
    assert {key: value.shape for key, value in seen[0].weights.items()} == {
        "0.weight:0": (16, 27), "0.bias:0": (16, 1), "1.weight:0": (16, 1), "1.bias:0": (16, 1), "3.weight:1": (16, 72),
    }  # fmt: skip
    for wrong in (torch.ones(3), torch.full((16,), float("nan")), None):
        with pytest.raises(PassError, match="one finite number for each of the 16 channels"):
            compiled(network(), PruneChannels(score=functools.partial(lambda value, channels: value, wrong)))


@pytest.mark.parametrize("aggregate", ["sum", "mean", "max"])
def test_parameters_are_aggregated(aggregate: str) -> None:
    channels = Channels("g", 2, {"a": torch.tensor([[1.0], [3.0]]), "b": torch.tensor([[8.0], [2.0]])})
    expected = {"sum": [0.5 + 1.6, 1.5 + 0.4], "mean": [1.05, 0.95], "max": [1.6, 1.5]}[aggregate]
    assert scores(channels, "l1", aggregate).tolist() == pytest.approx(expected)


def test_lamp_is_that_of_the_paper() -> None:
    given = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    assert NORMALIZE["lamp"](given).tolist() == pytest.approx([9 / 9, 1 / 14, 4 / 13])


def test_ratios_by_pattern() -> None:
    torch.manual_seed(0)
    model = chain(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    found = compiled(model, "ratio=0.5,ratios=['0.*=0.25','nothing=0']", (torch.randn(3, 4),))
    groups = record(found).details["pruning"].groups
    assert [len(group.kept) for group in groups] == [24, 16]
    assert any("'nothing' fits no parameter" in note for note in record(found).notes)


def test_counts_suit_the_target_where_layers_are_large_enough() -> None:
    torch.manual_seed(0)
    model = chain(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 30), nn.ReLU(), nn.Linear(30, 2))
    found = fxopt.compile(model, example_inputs=(torch.randn(3, 4),), passes="prune-channels", backend="torch")
    assert [len(group.kept) for group in record(found).details["pruning"].groups] == [160, 16]


def test_a_latency_is_reached() -> None:
    torch.manual_seed(0)
    model = chain(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 64))
    inputs = (torch.randn(64, 1024),)
    dense = fxopt.compile(model, example_inputs=inputs, backend="onnx").report.latency_ms["fxopt"]
    found = compiled(model, f"latency_ms={dense * 0.5}", inputs, backend="onnx")
    assert 0.02 < found.report.macs[1] / found.report.macs[0] < 0.9
    with pytest.raises(PreconditionError, match="give macs or params"):
        fxopt.prepare(model, inputs, passes="prune-channels{latency_ms=1}")


def test_a_function_cannot_change_the_model() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one = PruneChannels(score=lambda channels: sum(v.zero_().sum(1) for v in channels.weights.values()))
    compiled(model, one)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_plan_is_an_option_from_python() -> None:
    first = compiled(network(), "ratio=0.5")
    again = compiled(network(), PruneChannels(plan=record(first).details["pruning"]))
    assert torch.equal(first(*X), again(*X))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"kept": [-1, 0]}, "channels 0 to 15 of 0.weight:0"),
        ({"kept": [16]}, "channels 0 to 15 of 0.weight:0"),
        ({"kept": []}, "must keep some"),
        ({"kept": [1, 1]}, "twice"),
        ({"kept": [0.5]}, "a channel is no int: 0.5"),
        ({"kept": "01"}, "kept is no list"),
        ({"size": 8}, "of another model"),
        (
            {"name": "3.weight:0", "size": 8, "parameters": ["3.weight", "3.bias"]},
            "stays whole: an output of the model",
        ),
    ],
)
def test_a_damaged_plan(damage: dict[str, Any], message: str) -> None:
    text = json.loads(record(compiled(network(), "ratio=0.5")).details["pruning"].to_json())
    plan = json.dumps([text[0] | damage])
    with pytest.raises(PreconditionError, match=message):
        compiled(network(), PruneChannels(plan=PruningPlan.from_json(plan)))


def test_what_is_no_plan(tmp_path: Path) -> None:
    one = json.loads(record(compiled(network(), "ratio=0.5")).details["pruning"].to_json())[0]
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe")
    with pytest.raises(PreconditionError, match="cannot be read"):
        compiled(network(), f"plan='{tmp_path / 'plan.json'}'")
    for text in ("{}", "null", '"abc"', "[3]"):
        with pytest.raises(PreconditionError, match="no pruning plan"):
            PruningPlan.from_json(text)
    with pytest.raises(PreconditionError, match="twice"):
        compiled(network(), PruneChannels(plan=PruningPlan.from_json(json.dumps([one, one]))))


def test_a_plan_from_a_file_decides_alone(tmp_path: Path) -> None:
    first = compiled(network(), "criterion=random,seed=3")
    plan: PruningPlan = record(first).details["pruning"]
    plan.save(tmp_path / "plan.json")
    again = compiled(network(), f"plan='{tmp_path / 'plan.json'}'")
    assert record(again).details["pruning"] == plan
    assert torch.equal(first(*X), again(*X))


def without(*gone: int) -> Any:
    """A score with which these channels go."""
    return lambda channels: torch.tensor([0.0 if c in gone else 1.0 for c in range(channels.size)])


@pytest.mark.parametrize("calibration", [None, labelled()])
def test_what_removed_channels_contribute_always_is_kept(calibration: Any) -> None:
    """Channels that are constant, since nothing excites them: with compensation nothing is lost."""
    model = network()
    with torch.no_grad():
        model.get_parameter("0.weight")[::2] = 0
        model.get_parameter("1.bias")[::2] += 3
    expected = model(*X)
    errors = []
    for compensate in (True, False):
        one = PruneChannels(score=without(*range(0, 16, 2)), multiple=1, compensate=compensate)
        errors.append(float((compiled(model, one, calibration=calibration)(*X) - expected).abs().max()))
    assert errors[0] < 1e-4 < 0.1 < errors[1]


def test_compensation_of_grouped_convolutions_and_linears_without_a_bias() -> None:
    torch.manual_seed(0)
    model = chain(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1, groups=16, bias=False), nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5, bias=False),
    )  # fmt: skip
    with torch.no_grad():
        model.get_parameter("0.weight")[:8] = 0
        model.get_parameter("0.bias")[:8] = 2
    one = PruneChannels(score=without(*range(8)), multiple=1, compensate=True)
    found = compiled(model, one, backend="onnx")
    assert kept(found) == tuple(range(8, 16))
    assert float((found(*X) - model(*X)).abs().max()) < 1e-4


def test_labels_are_cut_like_the_images() -> None:
    seen = []

    def count(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append((len(outputs), len(labels)))
        return F.cross_entropy(outputs, labels)

    data = [(digits().images[:80], digits().labels[:80])]
    compiled(Residual(), "criterion=taylor", digits().example(), calibration=data, loss=count)
    assert seen == [(32, 32), (32, 32)]
