"""Models of PyTorch's own lists for Dynamo: ``torch.compile(backend="fxopt")`` compiles all of each, equal to eager."""

from __future__ import annotations

import pytest

from tools import dynamo_models, dynamo_zoo, zoo

FAST = ("BertForQuestionAnswering",)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in dynamo_zoo.NAMES]
)
def test_equals_eager(name: str) -> None:
    result = dynamo_zoo.compare(name)
    zoo.free_memory()
    assert result.ok, result
    assert result.graphs >= 2  # for two batch sizes


def test_every_name_is_there_once() -> None:
    assert len(set(dynamo_zoo.NAMES)) == len(dynamo_zoo.NAMES)
    assert len(dynamo_models.TIMM) == 18
    assert len(dynamo_models.TRANSFORMERS) == 55
