"""Models with sparse constants (graph networks): passes leave what reads them alone, and the rest goes on as usual."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt import ops, verify
from fxopt.program import Program
from fxopt.signature import Signature
from tests.passes.models import Model

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "coo": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
}


@pytest.mark.parametrize("passes", [None, "cast-precision{dtype=bf16}"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "function",
    [
        lambda graph, x: torch.sparse.mm(graph, x),
        lambda graph, x: graph @ (graph @ x),
        lambda graph, x: x @ graph,
        lambda graph, x: F.linear(x, graph),
        lambda graph, x: torch.addmm(x, graph, x),
        lambda graph, x: (graph * 2) @ x,
        lambda graph, x: graph.to_dense() @ x,
    ],
)
def test_a_sparse_operand(function: Callable[..., torch.Tensor], layout: str, passes: str | None) -> None:
    graph = LAYOUTS[layout](torch.randn(4, 4).triu())
    parts = {"links": graph, "layer": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)}
    model = Model(lambda m, x: m.norm(function(m.links, m.layer(x).relu())), **parts)
    x = torch.randn(4, 4)
    compiled = fxopt.compile(model, example_inputs=(x,), passes=passes, backend="torch")
    before = compiled(x)
    assert verify.compare([model(x)], [before]).error <= (1e-5 if passes is None else 3e-2)
    graph.values().zero_() if layout == "csr" else graph._values().zero_()
    assert torch.equal(compiled(x), before)


def test_a_sparse_operand_keeps_its_matmul_in_fp32() -> None:
    model = Model(lambda m, x: m.links @ m.layer(x), links=torch.eye(4).to_sparse(), layer=nn.Linear(4, 4))
    compiled = fxopt.compile(model, example_inputs=(torch.randn(4, 4),), passes="cast-precision", backend="torch")
    casts = [n for n in compiled.graph.graph.nodes if ops.kind(n) == "cast"]
    assert len(casts) == 2
    (skip,) = [s for record in compiled.report.passes for s in record.skips]
    assert "it reads a sparse tensor" in skip.reason


def test_the_bytes_of_a_sparse_tensor_are_those_of_its_parts() -> None:
    ends, places, values = torch.arange(5), torch.arange(4), torch.ones(4)
    tensors: dict[torch.Tensor, int] = {
        torch.sparse_coo_tensor(torch.stack([places, places]), values): 4 * (8 + 8 + 4),
        torch.sparse_csr_tensor(ends, places, values): 5 * 8 + 4 * (8 + 4),
        torch.sparse_csc_tensor(ends, places, values): 5 * 8 + 4 * (8 + 4),
        torch.sparse_bsr_tensor(ends, places, torch.ones(4, 2, 2)): 5 * 8 + 4 * (8 + 16),
        values: 4 * 4,
    }
    signature: Signature = None  # type: ignore[assignment]
    for tensor, size in tensors.items():
        assert Program(torch.fx.Graph(), {"a": tensor, "b": tensor}, signature).nbytes() == size
