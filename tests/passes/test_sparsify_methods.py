"""The methods of sparsify-2-4, by the error of a layer's output."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.testing import check_pass
from tests.passes.models import chain
from tests.passes.sparse_models import METHODS

pytestmark = pytest.mark.filterwarnings("ignore:sparsify-2-4. no speed-up:UserWarning")


def correlated(rows: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Rows of few factors and a little noise, columns of very different size."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(rows, inputs // 8, generator=generator) @ torch.randn(
        inputs // 8, inputs, generator=generator
    )
    noise = torch.randn(rows, inputs, generator=generator)
    return (factors + 0.3 * noise) * torch.linspace(0.1, 3, inputs)[torch.randperm(inputs, generator=generator)]


def errors(layer: nn.Module, x: torch.Tensor) -> dict[str, float]:
    exact, found = layer(x).detach(), {}
    for method in METHODS:
        spec = f"sparsify-2-4{{method={method},permute=false,samples=4096}}"
        state = check_pass(spec, chain(layer), (x[:2],), calibration=[(x,)]).program.constants
        with torch.no_grad():
            y = torch.func.functional_call(layer, {k.removeprefix("0."): v for k, v in state.items()}, x)
        found[method] = float((y - exact).square().sum() / exact.square().sum())
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_on_correlated_inputs_sparsegpt_beats_wanda_beats_magnitude(seed: int) -> None:
    torch.manual_seed(seed)
    found = errors(nn.Linear(64, 48), correlated(512, 64, seed))
    assert found["sparsegpt"] < 0.5 * found["wanda"]
    assert found["wanda"] < found["magnitude"]


@pytest.mark.parametrize("options", [{"groups": 2}, {"stride": 2, "padding": 1, "dilation": 2}, {"padding": (0, 2)}])
def test_likewise_for_convolutions(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = correlated(8 * 49, 16).reshape(8, 7, 7, 16).permute(0, 3, 1, 2)
    found = errors(nn.Conv2d(16, 12, 3, **options), x)
    assert found["sparsegpt"] < found["wanda"] < found["magnitude"]


@pytest.mark.parametrize(("rows", "warned"), [(16, True), (127, True), (128, False)])
def test_sparsegpt_says_where_it_has_too_few_rows(rows: int, warned: bool) -> None:
    model, x = chain(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(rows, 64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = check_pass("sparsify-2-4{method=sparsegpt}", model, (x,), calibration=[(x,)])
    texts = [str(one.message) for one in caught if "fits noise" in str(one.message)]
    assert len(texts) == warned
    for text in texts:
        assert f"in {2 if rows < 32 else 1} of 2 layers" in text
        assert f"linear has 64 inputs, and {rows} rows of calibration data" in text
        assert "From 2 rows for each input on it can be trusted: give more data and a higher samples (now 512)" in text
        assert text.removeprefix("sparsify-2-4: ") in done.record.notes


def test_rows_of_a_convolution_are_positions() -> None:
    """16 · 9 inputs, and 2 · 6 · 6 positions."""
    conv, x = nn.Conv2d(16, 8, 3, groups=1, padding=1, stride=2), torch.randn(2, 16, 12, 12)
    with pytest.warns(UserWarning, match="conv2d has 144 inputs, and 72 rows"):
        check_pass("sparsify-2-4{method=sparsegpt}", chain(conv), (x,), calibration=[(x,)])


def test_two_rows_for_each_input_are_enough() -> None:
    """On rows that it has not seen: with few, it is worse than magnitude; from two for each input on it is better."""
    torch.manual_seed(0)
    layer, basis = nn.Linear(64, 128, bias=False), torch.linalg.qr(torch.randn(64, 64)).Q
    spread = 0.97 ** torch.arange(64.0)
    unseen = (torch.randn(4096, 64) * spread) @ basis
    off = {}
    for rows in (32, 128, 2048):
        data = [((torch.randn(rows, 64) * spread) @ basis,)]
        for method in ("magnitude", "sparsegpt"):
            spec = f"sparsify-2-4{{method={method},permute=false,samples=4096}}"
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*fits noise")
                weight = check_pass(spec, chain(layer), data[0], calibration=data).program.constants["0.weight"]
            off[method, rows] = float((unseen @ (weight - layer.weight.detach()).T).square().sum())
    assert off["sparsegpt", 32] > off["magnitude", 32]
    assert off["sparsegpt", 128] < off["magnitude", 128]
    assert off["sparsegpt", 128] < 1.25 * off["sparsegpt", 2048]


def test_sparsegpt_is_as_good_as_least_squares_on_its_own_mask() -> None:
    """With the mask given, the best weights are known: those of least squares over the columns that stay."""
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 8, bias=False), correlated(256, 16)
    spec = "sparsify-2-4{method=sparsegpt,permute=false,damping=1e-8}"
    kept = check_pass(spec, chain(layer), (x[:2],), calibration=[(x,)]).program.constants["0.weight"]
    best = torch.zeros_like(kept)
    with torch.no_grad():
        for row, goal in enumerate(layer.weight):
            columns = kept[row] != 0
            best[row, columns] = torch.linalg.lstsq(x[:, columns], x @ goal).solution
        bound, found = ((layer(x) - F.linear(x, w)).square().sum() for w in (best, kept))
        plain = (layer(x) - F.linear(x, torch.where(kept != 0, layer.weight, 0))).square().sum()
    assert bound <= found * (1 + 1e-4)
    assert found - bound < 0.5 * (plain - bound), "columns that went early are made up for by later ones alone"


def test_inputs_that_are_always_zero_go_first() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 4), torch.randn(64, 8)
    x[:, [0, 5]] = 0
    with torch.no_grad():
        layer.weight[:, [0, 5]] = 10
    for method in ("wanda", "sparsegpt"):
        done = check_pass(f"sparsify-2-4{{method={method},permute=false}}", chain(layer), (x[:2],), calibration=[(x,)])
        assert not bool(done.program.constants["0.weight"][:, [0, 5]].any())


def test_layers_make_up_for_those_before() -> None:
    """The second layer sees what the sparse first one gives, and aims at what the dense model gives."""
    torch.manual_seed(1)
    model, x = chain(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)), correlated(512, 32, 1)
    spec = "sparsify-2-4{method=sparsegpt,permute=false}"
    whole = check_pass(spec, model, (x,), calibration=[(x,)]).program.constants
    part = check_pass(spec.replace("}", ",keep=['0.*']}"), model, (x,), calibration=[(x,)]).program.constants
    apart = {**whole, "2.weight": part["2.weight"], "2.bias": part["2.bias"]}
    with torch.no_grad():
        wanted = model(x)
        off, off_apart = (
            (torch.func.functional_call(model, state, x) - wanted).square().sum() for state in (whole, apart)
        )
    assert off < 0.8 * off_apart


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("norm", [False, True])
def test_the_means_of_channels_stay(method: str, norm: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 12, 3, bias=not norm)
    model = chain(conv, nn.BatchNorm2d(12)) if norm else chain(conv)
    x = correlated(8 * 49, 16).reshape(8, 7, 7, 16).permute(0, 3, 1, 2) + 1
    done = check_pass(f"sparsify-2-4{{method={method}}}", model, (x,), calibration=[(x,)])
    with torch.no_grad():
        before, after = model(x), torch.func.functional_call(model, done.program.constants, x)
    assert not torch.allclose(before, after, atol=0.1)
    torch.testing.assert_close(before.mean((0, 2, 3)), after.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
