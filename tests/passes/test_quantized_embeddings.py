"""Embedding tables as int8: looked up as integers in every engine, and left alone where they would suffer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxopt
from fxopt.testing import Checked, check_pass
from tests.passes.models import Model

IDS = (torch.randint(0, 500, (2, 12), generator=torch.Generator().manual_seed(0)),)


def tied(rows: int = 500) -> nn.Module:
    torch.manual_seed(0)
    model = Model(lambda m, i: m.head(m.norm(m.embed(i))), embed=nn.Embedding(rows, 64), norm=nn.LayerNorm(64))
    model.head = nn.Linear(64, rows, bias=False)
    model.head.weight = model.get_parameter("embed.weight")
    return model.eval()


def quantize(model: nn.Module, options: str = "") -> Checked:
    return check_pass(f"insert-fake-quant{{activations=none{options}}}", model, IDS, calibration=[IDS] * 3)


def reason(checked: Checked) -> str:
    [layer] = [one for one in checked.record.details["quantization"].layers if one.kind == "embedding"]
    return str(layer.reason)


def test_rows_are_looked_up_as_integers() -> None:
    checked = quantize(tied())
    lookups = [n for n in checked.program.graph.nodes if "embedding" in str(n.target)]
    assert [n.meta["val"].dtype for n in lookups] == [torch.int8, torch.float32]
    assert lookups[1].meta["val"].shape == (2, 12, 1)
    assert reason(checked) == ""
    assert checked.difference.cosine > 0.999


@pytest.mark.parametrize("backend", ["torch", "onnx", "openvino"])
def test_every_engine_agrees_and_stores_bytes(backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    model = Model(lambda m, i: m.embed(i), embed=nn.Embedding(500, 64)).eval()
    compiled = fxopt.compile(
        model, example_inputs=IDS, passes="insert-fake-quant{activations=none}", backend=backend, calibration=[IDS] * 3
    )
    other = (torch.flip(IDS[0], (1,)),)
    with torch.no_grad():
        step = model.get_parameter("embed.weight").abs().max() / 127
        assert (compiled(*other) - model(*other)).abs().max() < step
    size = compiled._current("test").executable.nbytes()
    assert size is not None
    assert size < 0.4 * model.get_parameter("embed.weight").nbytes


def test_what_would_suffer_or_gain_nothing_stays() -> None:
    outlier = tied()
    with torch.no_grad():
        outlier.get_parameter("embed.weight")[:, 3] *= 100
    assert "outliers" in reason(quantize(outlier))
    small = Model(lambda m, i: m.embed(i), embed=nn.Embedding(500, 4)).eval()
    assert "fewer than" in reason(quantize(small))
    for pattern in ("embedding", "embed", "embed.weight"):
        assert "as asked" in reason(quantize(tied(), f",overrides=['{pattern}=float']"))


def test_dynamic_sequences() -> None:
    model = tied()
    compiled = fxopt.compile(
        model,
        example_inputs=IDS,
        passes="insert-fake-quant{activations=none}",
        backend="onnx",
        calibration=[IDS] * 3,
        dynamic_shapes={"args": ({1: "tokens"},)},
    )
    ids = torch.randint(0, 500, (2, 7))
    with torch.no_grad():
        expected = model(ids)
        assert torch.nn.functional.cosine_similarity(compiled(ids).flatten(), expected.flatten(), 0) > 0.999
