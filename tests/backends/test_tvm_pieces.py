"""Concatenations and paddings on TVM: right at every border, and without a condition in their loops."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from tests.backends.engine_models import Function

pytest.importorskip("tvm")
LANES_CHOOSE = re.compile(r"if_then_else\([^,]*lane")


def compiled(model: nn.Module, *args: torch.Tensor) -> Any:
    return fxopt.compile(model.eval(), example_inputs=args, target="x86", backend="tvm")


def check(model: nn.Module, *args: torch.Tensor) -> None:
    torch.testing.assert_close(compiled(model, *args)(*args), model(*args), rtol=1e-4, atol=1e-5)


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The code of every function that gets loops of ours, as the test goes on."""
    from fxopt.backends import _tvm_graph
    from fxopt.backends._tvm_schedule import schedule

    found: list[str] = []

    def noted(function: Any, lanes: int) -> Any:
        made = schedule(function, lanes)
        found.append("" if made is None else made.script())
        return made

    monkeypatch.setattr(_tvm_graph, "schedule", noted)
    return found


class Dense(nn.Module):
    """A layer of DenseNet: what all layers before gave, put together, normalized, rectified, multiplied."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, width, 3, padding=1) for width in widths)
        self.norm = nn.BatchNorm2d(sum(widths))
        self.norm.running_mean.normal_()  # type: ignore[union-attr]
        self.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        self.head = nn.Conv2d(sum(widths), 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(torch.cat([conv(x) for conv in self.convs], 1))
        result: torch.Tensor = self.head(F.silu(y))
        return result


@pytest.mark.parametrize("widths", [(32, 16), (3, 40, 5, 1), (64, 1), (16,) * 9])
def test_a_concatenation_of_channels(widths: tuple[int, ...], loops: list[str]) -> None:
    torch.manual_seed(0)
    check(Dense(widths), torch.randn(2, 8, 7, 5))
    assert loops
    assert not LANES_CHOOSE.search("".join(loops))


def test_too_many_pieces_stay_conditions() -> None:
    check(Function(lambda x: torch.cat([x[..., i : i + 1] * i for i in range(80)], -1)), torch.randn(3, 80))


FUNCTIONS = {
    "other axes": lambda x: torch.cat([x, x * 2], 0) + torch.cat([x, x + 1], 2).sum(),
    "max pool": lambda x: F.max_pool2d(torch.cat([x, -x], 1), 3, 2, 1),
    "average pool": lambda x: F.avg_pool2d(torch.cat([x, x.abs()], 1), 3, 1, 1),
    "sum": lambda x: torch.cat([x, x * 3], 3).sum(3),
    "softmax": lambda x: torch.cat([x, x * 3], 3).softmax(3),
    "roll": lambda x: x.roll((1, 5), (2, 3)),
    "padding": lambda x: F.pad(x, (2, 7, 1, 0), value=3.0).relu(),
    "reflection": lambda x: F.pad(x, (2, 3, 1, 1), mode="reflect") * 2,
    "in itself": lambda x: torch.cat([torch.cat([x, x + 1], 3), F.pad(x, (3, 1))], 3),
    "one after another": lambda x: F.pad(torch.cat([x, x + 1], 3)[..., 3:-2], (1, 1)),
    "choice": lambda x: torch.cat([torch.where(x > 0, x, x.exp()), x], 3),
    "both ways": lambda x: torch.cat([x, x + 1], 3) + torch.cat([x + 1, x], 3).flip(3),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_reads_by_conditions(name: str) -> None:
    torch.manual_seed(0)
    check(Function(FUNCTIONS[name]), torch.randn(2, 5, 6, 20))


def test_a_choice_in_place_is_vector_code(loops: list[str]) -> None:
    check(Function(lambda x, y: torch.where(x > y, x.exp(), y)), torch.randn(4, 33), torch.randn(4, 33))
    assert loops
    assert not LANES_CHOOSE.search("".join(loops))


def test_nothing_behind_a_tensor_is_read_for_its_padding() -> None:
    x = torch.full((4, 20), 7)  # what lies behind it may be 0, by which no integer can be divided
    check(Function(lambda a, b: F.pad(a // b, (0, 0, 0, 1000))), x, x)


def test_an_index_that_decides_guards_what_is_read(loops: list[str]) -> None:
    check(Function(lambda x: F.pad(x, (0, 0, 0, 9)).tanh()), torch.randn(4, 20))
    assert "if_then_else" in "".join(loops)


def test_code_grows_with_the_number_of_functions_and_not_faster(loops: list[str]) -> None:
    x, sizes = torch.randn(2, 5, 6, 20), []
    for count in (1, 3):
        loops.clear()
        check(Function(lambda x, count=count: [x := x.tanh() for _ in range(count)][-1]), x)
        sizes.append(len("".join(loops)))
    assert sizes[1] < 4 * sizes[0]


def test_heavy_functions_of_a_concatenation() -> None:
    check(Function(lambda x: F.mish(torch.cat([x, x + 1], 1))), torch.randn(2, 5, 6, 20))


def test_an_open_size() -> None:
    model = Function(lambda x: torch.cat([x, x * 2], -1).tanh())
    sizes = {"inputs": ({0: "batch", 1: "width"},)}
    made = fxopt.compile(model, example_inputs=(torch.randn(2, 20),), dynamic_shapes=sizes, target="x86", backend="tvm")
    x = torch.randn(3, 37)
    torch.testing.assert_close(made(x), model(x))


def _chain(*functions: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: functools.reduce(lambda value, function: function(value), functions, x)


CHAINS = {
    "functions of functions": _chain(*[torch.tanh] * 6),
    "behind a concatenation": _chain(lambda x: torch.cat([x, x + 1], 2), *[F.silu] * 8),
    "in rows": _chain(*[F.mish] * 3, lambda x: x.softmax(-1)),
    "doubled": _chain(lambda x: torch.cat([x, x + 1], 0), *[lambda x: x * 0.5 + x.abs() * 0.3] * 14),
}


@pytest.mark.parametrize("name", CHAINS)
def test_code_does_not_grow_by_a_factor_with_each_function(name: str) -> None:
    check(Function(CHAINS[name]), torch.randn(2, 3, 20) / 2)


def test_a_convolution_with_several_functions_after_it() -> None:
    first, second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 1)
    check(nn.Sequential(first, nn.SiLU(), nn.Mish(), nn.Tanh(), second, nn.Mish(), nn.Mish()), torch.randn(1, 3, 9, 9))
