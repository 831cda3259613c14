"""Third-party models: compiled, each equals eager within 1e-4 of the output's range."""

from __future__ import annotations

import pytest
import torch

from tools import models, zoo


@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize("name", zoo.FAST)
def test_equals_eager(name: str, backend: str) -> None:
    result = zoo.compare(name, backend, small=True)
    zoo.free_memory()
    assert result.ok, result


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_every_family_equals_eager(name: str, backend: str) -> None:
    result = zoo.compare(name, backend, small=True)
    zoo.free_memory()
    assert result.ok, result


def test_the_table_covers_torchvision_and_transformers() -> None:
    assert len(models.torchvision_names()) >= 80
    assert set(zoo.FAST) | set(zoo.FAMILIES) <= {*models.torchvision_names(), *models.transformers_names()}


def test_unsettled_models_have_no_constant_parameter() -> None:
    model, (image,) = models.load("vit_b_32", small=True)
    assert all(p.min() < p.max() for p in model.parameters() if p.numel() > 1)
    with torch.no_grad():
        assert model(image).std() > 0


def test_relative_error_sees_a_difference() -> None:
    expected = {"a": torch.tensor([0.0, 10.0])}
    assert zoo.relative_error({"a": torch.tensor([0.0, 10.0])}, expected) == 0
    assert zoo.relative_error({"a": torch.tensor([0.0, 10.1])}, expected) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("actual", [{"b": torch.zeros(2)}, {"a": torch.zeros(3)}, {"a": torch.full((2,), torch.nan)}])
def test_relative_error_refuses_what_cannot_be_compared(actual: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="output"):
        zoo.relative_error(actual, {"a": torch.zeros(2)})
