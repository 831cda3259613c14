"""The order of channels that sparsify-2-4 chooses: never worse, exact wherever channels go, the same each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxopt import ops, verify
from fxopt.passes.prune_channels import find_groups
from fxopt.passes.sparsify_2_4 import permutation
from fxopt.program import Program
from fxopt.rewriter import Rewriter
from fxopt.sparsity import Pattern
from tests.passes.models import Model, chain
from tests.passes.pruned_models import cleaned
from tools import models


def readers(program: Program, pattern: Pattern) -> dict[str, torch.Tensor]:
    """The weights of convs and linears that the pattern fits."""
    units = [n for n in program.graph.nodes if ops.kind(n) in ("conv", "linear")]
    names = [str(w.target) for n in units if (w := ops.arguments(n)["weight"]).op == "get_attr"]
    return {name: value for name in names if pattern.fits(value := program.constants[name].detach())}


def reordered(program: Program, pattern: Pattern) -> tuple[Program, dict[str, float]]:
    """*program* with its channels in another order, and by how much the magnitude that stays of each weight rises."""
    after = program.copy()
    groups, weights = find_groups(after), readers(program, pattern)
    orders = permutation.find(groups, weights, [], pattern)
    assert orders
    assert all(torch.equal(order.sort().values, torch.arange(len(order))) for order in orders.values())
    permutation.carry(Rewriter(after), groups, orders)
    verify.check_graph(after)
    new = readers(after, pattern)
    share = permutation.kept_magnitude
    return after, {name: share(new[name], pattern) - share(weights[name], pattern) for name in weights}


def settled(y: torch.Tensor) -> torch.Tensor:
    """Small whole numbers again: then every sum is exact in float64, in whichever order it is added up."""
    return (y / 8).round().clamp(-8, 8)


def whole_numbers(model: nn.Module) -> nn.Module:
    """*model* in float64 with small whole numbers for parameters, statistics with exact roots."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        values = torch.randint(-3, 4, parameter.shape, generator=generator)
        parameter.data = values.double() * (
            torch.rand(parameter.shape[:1], generator=generator) > 0.3
        ).double().reshape(-1, *[1] * (parameter.dim() - 1)) + torch.randint(
            -1, 2, parameter.shape, generator=generator
        )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
            module.running_mean = torch.randint(-2, 3, (module.num_features,), generator=generator).double()
            module.running_var = 4.0 ** torch.randint(-1, 2, (module.num_features,), generator=generator).double()
    return model.double().eval()


def residual() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = settled(m.bn0(m.stem(x))).relu()
        x = settled(m.bn2(m.b(settled(m.bn1(m.a(x))).relu()))) + x
        result: torch.Tensor = m.head(settled(x.sum((2, 3))))
        return result

    convs = {"stem": nn.Conv2d(4, 16, 3), "a": nn.Conv2d(16, 24, 3, padding=1), "b": nn.Conv2d(24, 16, 1)}
    norms = {f"bn{i}": nn.BatchNorm2d(n) for i, n in enumerate((16, 24, 16))}
    return Model(forward, head=nn.Linear(16, 5), **convs, **norms)


def dense_net() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = settled(m.a(x))
        x = torch.cat([x, settled(m.b(x.relu()))], 1)
        result: torch.Tensor = m.head(settled(F.max_pool2d(m.c(x), 2)).flatten(1))
        return result

    convs = {"a": nn.Conv2d(3, 16, 3), "b": nn.Conv2d(16, 8, 3, padding=1), "c": nn.Conv2d(24, 12, 1)}
    return Model(forward, head=nn.Linear(12 * 9, 5), **convs)


def shuffle_net() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = settled(m.grouped(settled(m.stem(x))))
        x = x.unflatten(1, (2, 16)).transpose(1, 2).flatten(1, 2)
        left, right = settled(m.wise(x)).chunk(2, 1)
        result: torch.Tensor = m.head((left * right.sign()).relu())
        return result

    convs = {"stem": nn.Conv2d(3, 32, 1), "grouped": nn.Conv2d(32, 32, 3, groups=2)}
    return Model(forward, wise=nn.Conv2d(32, 32, 3, groups=32), head=nn.Conv2d(16, 4, 1), **convs)


def gated_mlp() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = settled(m.embed(x.flatten(2).transpose(1, 2)))
        x = x + settled(m.down(settled(m.gate(x)).relu() * settled(m.up(x))))
        q, k, v = settled(m.qkv(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = settled(settled(q @ k.transpose(-1, -2)).relu() @ v)
        result: torch.Tensor = m.out(mixed.transpose(1, 2).flatten(2))
        return result

    linears = {"embed": (3, 16), "gate": (16, 32), "up": (16, 32), "down": (32, 16), "qkv": (16, 48), "out": (16, 4)}
    return Model(forward, **{name: nn.Linear(*sizes) for name, sizes in linears.items()})


@pytest.mark.parametrize("build", [residual, dense_net, shuffle_net, gated_mlp])
def test_the_model_answers_bit_by_bit_the_same(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = whole_numbers(build())
    x = torch.randint(-4, 5, (2, 4 if build is residual else 3, 8, 8)).double()
    before, flat = cleaned(model, (x,))
    after, gains = reordered(before, Pattern())
    assert all(gain >= 0 for gain in gains.values())
    assert max(gains.values()) > 0.001
    [old], [new] = verify.run(before, flat), verify.run(after, flat)
    assert float(old.abs().max()) < 2**40
    assert len(old.unique()) > 5
    assert torch.equal(old, new)


@pytest.mark.parametrize(
    "name",
    ["bert", "hf-vit", "shufflenet_v2_x0_5"]
    + [
        pytest.param(n, marks=pytest.mark.slow)
        for n in ("llama", "gpt2", "hf-swin", "densenet121", "mobilenet_v3_small")
    ],
)
def test_third_party_models_are_the_same_but_for_the_order_of_sums(name: str) -> None:
    model, inputs = models.load(name, small=True)
    before, flat = cleaned(model, inputs)
    after, gains = reordered(before, Pattern())
    assert sum(gains.values()) > 0  # of weights that share channels one may lose what the others gain
    difference = verify.compare(verify.run_double(before, flat), verify.run_double(after, flat))
    assert difference.error < 1e-12


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 8),
    st.sampled_from([Pattern(2, 4), Pattern(1, 4), Pattern(1, 2), Pattern(4, 8), Pattern(2, 3)]),
    st.integers(0, 2**32 - 1),
)
def test_the_magnitude_that_stays_never_falls(rows: int, stripes: int, pattern: Pattern, seed: int) -> None:
    columns = torch.randn(rows, stripes * pattern.m, generator=torch.Generator().manual_seed(seed)).square()
    order = permutation.search(columns, pattern)
    assert torch.equal(order.sort().values, torch.arange(columns.shape[1]))
    assert torch.equal(order, permutation.search(columns, pattern))
    share = permutation.kept_magnitude
    assert share(columns[:, order], pattern) >= share(columns, pattern) - 1e-6


def test_the_gain_of_an_exchange_is_what_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    for pattern in (Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(1, 2)):
        a, b = (torch.randint(0, 5, (3, pattern.m, 7), generator=generator).float() for _ in range(2))
        found = permutation._gain(a, b, pattern)
        for i in range(pattern.m):
            for j in range(pattern.m):
                changed = a.clone()
                changed[:, i] = b[:, j]
                new, old = (one.topk(pattern.n, dim=1).values.sum((1, 2)) for one in (changed, a))
                assert torch.allclose(found[:, i, j], new - old)


def test_large_columns_are_spread() -> None:
    weight = torch.full((8, 16), 0.01)
    weight[:, :8] = 1.0
    order = permutation.search(weight, Pattern())
    assert permutation.kept_magnitude(weight, Pattern()) < 0.52
    assert permutation.kept_magnitude(weight[:, order], Pattern()) > 0.98


def test_channels_that_lie_across_groups_of_neighbours_stay() -> None:
    """After a flatten of 3 × 3 positions neighbours are positions of several channels."""
    torch.manual_seed(0)
    model = chain(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 10))
    program, _ = cleaned(model, (torch.randn(1, 3, 5, 5),))
    assert not permutation.find(find_groups(program), readers(program, Pattern()), [], Pattern())


def test_inputs_of_a_sparse_weight_stay_in_order() -> None:
    torch.manual_seed(0)
    program, _ = cleaned(chain(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), (torch.randn(2, 8),))
    groups = find_groups(program)
    weights = {"2.weight": program.constants["2.weight"].detach()}
    assert permutation.find(groups, weights, [], Pattern())
    assert not permutation.find(groups, weights, ["2.weight"], Pattern())
