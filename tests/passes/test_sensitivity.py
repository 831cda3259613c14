"""Which layers quantization harms, and pictures of what is quantized."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import InputError, PreconditionError
from fxopt.passes.insert_fake_quant.pictures import Counts
from fxopt.passes.insert_fake_quant.quality import Quality
from fxopt.testing import check_pass

INPUTS = (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


class Net(nn.Module):
    """The second conv has outliers in its weight that its output does not need."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fine, self.coarse = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            self.fine.weight[0] = 0
            self.fine.bias[0] = 0  # type: ignore[index]
            self.coarse.weight[:, 0] = 300

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.coarse(self.fine(x).relu()).relu().mean((2, 3)))
        return y


def batches(count: int = 3) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 8, 8, generator=generator),) for _ in range(count)]


def test_the_worst_layer_comes_first() -> None:
    spec = "insert-fake-quant{scheme=torch,smooth=false}"
    found = fxopt.sensitivity(Net(), INPUTS, batches(), backend="torch", passes=spec)
    assert found.layers[0].weight == "coarse.weight"
    assert found.layers[0].source
    assert [one.snr_db for one in found.layers] == sorted(one.snr_db for one in found.layers)
    assert found.layers[0].cosine < found.layers[-1].cosine
    lines = str(found).splitlines()
    assert "SNR" in lines[0]
    assert "coarse.weight" in lines[1]


def test_its_overrides_are_those_of_the_pass() -> None:
    found = fxopt.sensitivity(Net(), INPUTS, batches(), backend="torch", passes="insert-fake-quant{scheme=torch}")
    [override] = found.overrides(1)
    checked = check_pass(
        f"insert-fake-quant{{scheme=torch,overrides=['{override}']}}",
        Net().eval(),
        INPUTS,
        before="canonicalize,fold-constants,fuse-conv-bn-relu",
        calibration=batches(),
    )
    modes = {layer.weight: layer.mode for layer in checked.record.details["quantization"].layers}
    assert modes["coarse.weight"] == "float"
    assert list(modes.values()).count("float") == 1


def test_linears_alone_with_int4_weights() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    data = [(torch.randn(4, 8),) for _ in range(3)]
    spec = "insert-fake-quant{activations=none,weights=int4,group_size=8}"
    assert len(fxopt.sensitivity(model, data[0], data, passes=spec).layers) == 2


def test_passes_must_quantize() -> None:
    with pytest.raises(InputError, match="insert-fake-quant"):
        fxopt.sensitivity(Net(), INPUTS, batches(), passes="smooth-quant")


def quality() -> Quality:
    before = "canonicalize,fold-constants,fuse-conv-bn-relu"
    one = "insert-fake-quant{scheme=torch,cosine=0.0}"
    checked = check_pass(one, Net().eval(), INPUTS, before=before, calibration=batches())
    found = checked.record.details["quantization"]
    assert isinstance(found, Quality)
    return found


def test_histograms_count_weights_and_inputs() -> None:
    found = quality()
    assert list(found.histograms) == [layer.name for layer in found.layers]
    first = found.histograms[found.layers[0].name]
    assert sum(first.weight.counts) == 8 * 3 * 9
    assert first.input is not None
    assert sum(first.input.counts) == INPUTS[0].numel()
    assert first.input.range is not None
    assert first.input.range[0] < 0 < first.input.range[1]


def test_counts_of_what_is_constant_or_not_finite() -> None:
    assert Counts.of(torch.full((3,), 2.0)).counts == (3,)
    assert sum(Counts.of(torch.tensor([1.0, float("nan"), 3.0])).counts) == 2
    assert Counts.of(torch.full((3,), float("inf"))).counts == (0,)


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "layers.png"
    quality().plot(file)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PreconditionError, match=r"fxopt\[plot\]"):
        quality().plot(tmp_path / "layers.png")


def test_a_picture_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(PreconditionError, match="no histograms"):
        Quality("torch", (), ()).plot(tmp_path / "layers.png")
