"""Weights of the PyTorch backend: packed once, released, and nobody else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt.backends.torch import TorchBackend
from fxopt.target import resolve_target
from tests.backends.torch_models import BIG, Function, check, image, program_of


def test_weights_are_packed_once_and_released() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(BIG, 700)

        def forward(self, x: torch.Tensor) -> Any:
            return self.head(self.conv(self.conv(x)))

    model = Twice()
    program, flat = program_of(model, (image(),))
    constants = program.constants
    executable = TorchBackend().lower(program, resolve_target("x86"), flat)
    assert sum("packed" in name for name in constants) == 2
    assert not {"conv.weight", "head.weight"} & set(constants)
    assert torch.equal(executable.constant("head.weight"), model.head.weight)
    assert torch.equal(executable.constant("conv.weight"), model.conv.weight)
    size = executable.nbytes()
    unpacked = sum(p.numel() * 4 for p in model.parameters())
    assert size is not None
    assert unpacked <= size <= 2 * unpacked


@pytest.mark.parametrize("groups", [1, 2, 4, 32])
@pytest.mark.parametrize("passes", [None, "cast-precision{dtype=bf16}"])
def test_weights_of_transposed_convolutions_come_back(groups: int, passes: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 32, 9, 11)
    for outputs, more in ((64, 0), (64, 1), (32, 1)):
        model = nn.ConvTranspose2d(32, outputs, 3, stride=2, groups=groups, output_padding=more)
        compiled = fxopt.compile(model, example_inputs=(x,), passes=passes, backend="torch")
        [weight] = [value for value in compiled.graph.state_dict().values() if value.dim() == 4]
        assert torch.equal(weight, model.weight.to(weight.dtype))
        compiled.save(tmp_path / "m.fxopt")
        assert torch.equal(fxopt.load(tmp_path / "m.fxopt")(x), compiled(x))


def test_tied_weight_with_another_user_stays() -> None:
    def tied(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(F.embedding(tokens, weight), weight)

    executable = check(Function(tied, torch.randn(700, 64)), torch.randint(0, 700, (2, 9)), calls="mkldnn__linear")
    assert executable.constant("c0").shape == (700, 64)


class Mixed(nn.Module):
    """Weights that are packed, and all sorts that are not."""

    row: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 600)
        self.large, self.small = nn.Linear(600, 500), nn.Linear(500, 3)
        self.norm = nn.LayerNorm(500)
        self.wide = nn.Parameter(torch.randn(500, 6))
        self.register_buffer("row", torch.randn(1, 3).expand(4, 3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.large(self.table(tokens)))
        result: torch.Tensor = self.small(y) + self.row + y @ self.wide[:, ::2]
        return result


def change(model: nn.Module) -> None:
    """What an optimizer does, and load_state_dict: new numbers in the same memory."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b[:1] for b in model.buffers())):
            tensor.add_(1.0)


@pytest.mark.parametrize("passes", [None, "cast-precision{dtype=bf16}"])
@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_model_is_a_snapshot(inductor: bool, passes: str | None) -> None:
    model, tokens = Mixed().eval(), torch.tensor([0, 3, 1, 8])
    options = {"inductor": True} if inductor else {}
    compiled = fxopt.compile(model, example_inputs=(tokens,), passes=passes, backend="torch", backend_options=options)
    before, graph = compiled(tokens), compiled.graph
    state = {name: value.clone() for name, value in graph.state_dict().items()}
    change(model)
    assert torch.equal(compiled(tokens), before)
    assert all(torch.equal(value, state[name]) for name, value in graph.state_dict().items())
    assert not torch.equal(compiled(tokens), model(tokens))


def test_an_exported_program_is_a_snapshot_too() -> None:
    model, tokens = Mixed().eval(), torch.tensor([0, 3, 1, 8])
    compiled = fxopt.compile(torch.export.export(model, (tokens,)), backend="torch")
    before = compiled(tokens)
    change(model)
    assert torch.equal(compiled(tokens), before)


def test_the_snapshot_copies_nothing_twice() -> None:
    def forward(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return x + a.sum() + b.sum() + c.sum()

    flat = torch.randn(1000, 10)
    model = Function(forward, flat[:, :5], flat[:, 5:], torch.randn(1, 10).expand(1000, 10))
    program, inputs = program_of(model, (torch.randn(3),))
    program.constants.update(c0=flat[:, :5], c1=flat[:, 5:], c2=torch.randn(1, 10).expand(1000, 10))
    executable = TorchBackend().lower(program, resolve_target("x86"), inputs)
    assert executable.nbytes() == flat.nbytes + 10 * 4
