"""Passes and backends by name, calibration data, and targets."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxopt
from fxopt import registry
from fxopt.backends.torch import TorchBackend
from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.passes.fold_constants import FoldConstants
from fxopt.target import resolve_target
from tests.passes.models import Model

X = torch.linspace(-1, 1, 8).reshape(2, 4)


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    """Entry points that other packages declare, beside fxopt's own."""
    original, extra = entry_points, list[EntryPoint]()
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [*[e for e in extra if e.group == group], *original(group=group)]
    )
    registry._entries.cache_clear()
    yield extra
    registry._entries.cache_clear()


def test_names_find_their_classes() -> None:
    assert registry.find_pass("fold-constants") is FoldConstants
    assert registry.find_backend("torch") is TorchBackend
    for name in registry.available("fxopt.passes"):
        assert registry.find_pass(name).name == name
    assert {"torch", "onnx", "openvino"} <= set(registry.available("fxopt.backends"))
    assert list(registry.available("fxopt.passes")) == sorted(registry.available("fxopt.passes"))


def test_a_plugin_that_cannot_be_loaded_is_named(declared: list[EntryPoint]) -> None:
    declared.append(EntryPoint("broken", "no_such_module:Thing", "fxopt.passes"))
    assert "broken" in registry.available("fxopt.passes")
    with pytest.raises(fxopt.FxoptError, match=r"pass 'broken' \(no_such_module:Thing\) cannot be loaded: No module"):
        registry.find_pass("broken")
    assert registry.find_pass("fold-constants") is FoldConstants


@pytest.mark.parametrize("value", ["torch:nn", "fxopt.backends.torch:TorchBackend"])
def test_a_plugin_that_is_no_pass_is_named(declared: list[EntryPoint], value: str) -> None:
    declared.append(EntryPoint("odd", value, "fxopt.passes"))
    with pytest.raises(fxopt.FxoptError, match=r"pass 'odd' is not a subclass of fxopt\.Pass"):
        registry.find_pass("odd")


def test_a_plugin_that_is_no_backend_is_named(declared: list[EntryPoint]) -> None:
    declared.append(EntryPoint("odd", "fxopt.passes.fold_constants:FoldConstants", "fxopt.backends"))
    with pytest.raises(fxopt.FxoptError, match=r"backend 'odd' is not a subclass of fxopt\.Backend"):
        registry.find_backend("odd")


def test_a_name_that_is_taken_stays_with_its_owner(declared: list[EntryPoint]) -> None:
    declared.append(EntryPoint("fold-constants", "somewhere.else:Fold", "fxopt.passes"))
    with pytest.warns(UserWarning, match="somewhere.else:Fold has the name 'fold-constants', which is taken"):
        assert registry.find_pass("fold-constants") is FoldConstants


# --- calibration


def signature(model: nn.Module, *inputs: Any, **named: Any) -> fxopt.Signature:
    return capture(model, inputs, named).program.signature


def test_batches_are_tuples_mappings_and_tensors() -> None:
    one = signature(Model(lambda m, a, b: a + b), X, X)
    data = Calibration([(X, X + 1), [X, X + 2], (X, X + 3, "a label")], one)
    assert [float((b - a).mean()) for a, b in data.batches()] == [1, 2, 3]
    named = signature(Model(lambda m, a, b: a + b), a=X, b=X)
    assert [len(batch) for batch in Calibration([{"b": X, "a": X}], named).batches()] == [2]
    single = signature(nn.ReLU(), X)
    assert [len(batch) for batch in Calibration([X, (X,)], single).batches()] == [1, 1]


def test_a_data_loader_is_calibration_data() -> None:
    loader = DataLoader(TensorDataset(torch.randn(6, 4), torch.arange(6)), batch_size=2)
    data = Calibration(loader, signature(nn.Linear(4, 4), X))
    assert [tuple(batch[0].shape) for batch in data.batches()] == [(2, 4)] * 3


def test_data_can_be_read_again_and_a_generator_too() -> None:
    for source in ([X, X + 1], (x for x in (X, X + 1))):
        data = Calibration(source, signature(nn.ReLU(), X))
        assert [len(list(data.batches())) for _ in range(3)] == [2, 2, 2]


def test_a_batch_that_does_not_fit_is_refused_at_once() -> None:
    with pytest.raises(fxopt.InputError):
        Calibration([{"y": X}], signature(nn.ReLU(), X))
    with pytest.raises(fxopt.InputError):
        Calibration([()], signature(nn.ReLU(), X))


# --- targets


def test_named_targets() -> None:
    assert {name: resolve_target(name).arch for name in ("x86", "arm")} == {"x86": "x86_64", "arm": "aarch64"}
    for name in ("x86", "arm", "cuda"):
        target = resolve_target(name)
        assert str(target) == name
        assert torch.float32 in target.native_dtypes
        assert set(target.backends) <= set(registry.available("fxopt.backends"))
    own = fxopt.Target("x86", "x86_64")
    assert resolve_target(own) is own


def test_a_target_knows_whether_it_runs_here() -> None:
    arch = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    assert fxopt.Target("mine", arch).runs_here
    assert not fxopt.Target("other", "sparc").runs_here
    assert resolve_target("cuda").runs_here is torch.cuda.is_available()


def test_a_target_is_a_frozen_value() -> None:
    target = fxopt.Target("x86", "x86_64", frozenset({"avx2"}))
    assert target.has("avx2")
    assert not target.has("amx_bf16")
    assert target == fxopt.Target("x86", "x86_64", frozenset({"avx2"}))
    assert hash(target) == hash(fxopt.Target("x86", "x86_64", frozenset({"avx2"})))
    with pytest.raises(AttributeError):
        target.name = "arm"  # type: ignore[misc]
