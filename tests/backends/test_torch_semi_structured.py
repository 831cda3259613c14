"""Which linears with 2:4 weights go to sparse tensor cores, why others do not, and that the graph stays right.

No GPU is needed: what compresses is handed in, and here it hands the weight back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxopt
from fxopt import BackendUnavailable
from fxopt.backends import _torch_semi_structured as semi
from fxopt.target import resolve_target
from tests.passes.models import Model, chain

CUDA = resolve_target("cuda")
X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


class Kept:
    """In place of a SparseSemiStructuredTensor."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.packed = weight

    def to_dense(self) -> torch.Tensor:
        return self.packed


def mlp(width: int = 128) -> nn.Module:
    torch.manual_seed(0)
    return chain(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 10))


def compiled(model: nn.Module, passes: str, x: torch.Tensor = X, target: str = "cuda") -> fxopt.CompiledModel:
    return fxopt.compile(model, target=target, example_inputs=(x,), passes=passes, backend="torch")


def notes(model: fxopt.CompiledModel) -> str:
    return "\n".join(model.report.notes)


def test_it_says_which_qualify() -> None:
    model = compiled(mlp(), "sparsify-2-4,cast-precision{dtype=bf16}")
    assert "2 linears on sparse tensor cores, once it is compiled on such a machine; 1 layers" in notes(model)
    assert "10 × 64: sizes must be multiples of 32 × 64" in notes(model)
    assert "torch: 2:4: 2 linears" in str(model.report).replace("\n", " ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can be called here")
def test_called_without_a_gpu_it_says_so() -> None:
    with pytest.raises(BackendUnavailable, match="compiled for target 'cuda'"):
        compiled(mlp(), "sparsify-2-4,cast-precision{dtype=bf16}")(X)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "fp32": (mlp, "sparsify-2-4", "float32: the kernels take fp16 and bf16, see cast-precision"),
    "sizes": (lambda: mlp(72), "sparsify-2-4,cast-precision", "72 × 64: sizes must be multiples of 32 × 64"),
    "conv": (
        lambda: chain(nn.Unflatten(1, (4, 4, 4)), nn.Conv2d(4, 32, 3)),
        "sparsify-2-4,cast-precision",
        "a convolution: PyTorch has sparse kernels for linears alone",
    ),
    "int8": (mlp, "sparsify-2-4,insert-fake-quant{activations=none,scheme=torch}", "its weight is quantized"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_others_stay_dense_for_a_reason(case: str) -> None:
    build, passes, reason = REFUSED[case]
    assert reason in notes(compiled(build(), passes))


def test_nothing_is_said_without_such_weights_or_such_kernels() -> None:
    assert not notes(compiled(mlp(), "cast-precision"))
    with pytest.warns(UserWarning, match="no speed-up on this target"):
        assert not notes(compiled(mlp(), "sparsify-2-4,cast-precision", target="x86"))


@pytest.mark.parametrize("residual", [False, True])
def test_the_rewritten_graph_computes_the_same(residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    if residual:
        model = Model(lambda m, x: (m.b(m.a(x).relu()) + x).relu(), a=nn.Linear(64, 64), b=nn.Linear(64, 64))
    used = list[torch.Tensor]()

    def compress(weight: torch.Tensor) -> Kept:
        used.append(weight)
        return Kept(weight)

    def linear(x: torch.Tensor, weight: semi.Compressed, bias: torch.Tensor | None) -> torch.Tensor:
        return nn.functional.linear(x, weight.weight.packed, bias)

    monkeypatch.setattr(semi, "compressor", lambda target: compress)
    monkeypatch.setattr(semi, "semi_structured_linear", linear)
    here = dataclasses.replace(resolve_target("x86"), fast_2_4=True)
    passes = "sparsify-2-4,cast-precision{dtype=bf16}"
    made = fxopt.compile(model, target=here, example_inputs=(X,), passes=passes, backend="torch")
    assert len(used) == 2
    assert "2 linears on sparse tensor cores;" in notes(made)
    with pytest.warns(UserWarning, match="no speed-up on this target"):
        dense = compiled(model, passes, target="x86")
    assert torch.allclose(made(X), dense(X), atol=2e-2)
    weights = [value for value in made.graph.state_dict().values() if value.dim() == 2]
    assert len(weights) == (3 if not residual else 2), "the readable graph has the weights back"
    nbytes = made._current("").executable.nbytes()
    assert nbytes is not None
    assert nbytes > 0


def test_no_compressor_for_another_machine() -> None:
    assert semi.compressor(resolve_target("x86")) is None
    assert (semi.compressor(CUDA) is None) is not torch.cuda.is_available()
