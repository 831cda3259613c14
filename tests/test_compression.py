"""The tool that measures what low rank and sparsity cost and bring."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fxopt import cost
from fxopt.capture import capture
from tools import compression, compression_cost, digits


def text(table: Table) -> str:
    console = Console(width=200, record=True)
    console.print(table)
    return console.export_text()


def test_every_method_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(digits, "trained", lambda name, data, seed: digits.MODELS[name][0]().eval())
    whitened = "low rank, whitened, 50 % of each linear"
    kept = {name: method for name, method in compression.METHODS["vit"].items() if name in ("dense", whitened)}
    monkeypatch.setitem(compression.METHODS, "vit", kept)
    lines = text(compression.accuracy(["vit"], 1, steps=1)).splitlines()
    [dense] = [line for line in lines if "dense " in line and "vit" in line]
    [thin] = [line for line in lines if whitened in line]
    assert "1.00" in dense
    assert "+0.00" in dense
    assert float(thin.split("linear")[1].split()[1]) < 0.6


def test_the_thin_ffns_are_those_that_are_asked_for() -> None:
    """On a model of the names that torchvision's has; the budget is of the whole model."""
    mlp = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    model = nn.ModuleDict({"self_attention": nn.Linear(64, 64), "mlp": mlp})

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.parts["mlp"](self.parts["self_attention"](x))
            return y

    prepared = compression.low_rank("low-rank-linear{macs=0.5,keep=['*self_attention*'],multiple=1}")
    images = torch.randn(600, 64)
    data = digits.Digits(images, torch.zeros(600), images, torch.zeros(600))
    thin = prepared(Block().eval(), data, 0)
    assert "parts.self_attention.weight" in dict(thin.named_parameters())
    dense = cost.macs(capture(Block().eval(), (images[:64],), None, None).program)
    assert 0.47 * dense < compression.macs(thin) <= 0.5 * dense


@pytest.mark.parametrize("arguments", [["speed"], ["accuracy", "--networks", "lenet"], ["latency", "--models", "vit"]])
def test_what_is_not_known_is_told(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tools/compression", *arguments])
    with pytest.raises(SystemExit):
        compression.main()
    assert f"no {arguments[-1]!r}; known are" in capsys.readouterr().err


def test_spectra_fall() -> None:
    layer = compression_cost.with_decaying_spectra(nn.Linear(128, 64))
    values = torch.linalg.svdvals(layer.get_parameter("weight").detach())
    assert float(values[-1]) < 0.3 * float(values[0])
    assert float(layer.get_parameter("weight").detach().std()) == pytest.approx(0.02, rel=0.01)
