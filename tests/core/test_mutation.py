"""Writes inside of a model, and into its buffers."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import ops, verify
from fxopt.capture import capture
from tests.passes.models import Model, chain

X = torch.linspace(-1, 1, 12).reshape(3, 4)

Function = Callable[[torch.Tensor], Any]


def in_place_add(x: torch.Tensor) -> Any:
    y = x * 2
    y += x
    return y


def read_before_and_after(x: torch.Tensor) -> Any:
    y = x * 2
    before = y.sum()
    y.relu_()
    return before, y, y.sum()


def column(x: torch.Tensor) -> Any:
    y = x * 2
    y[:, 0] = 7
    y[1:, 2:] *= 3
    return y


def view_then_write(x: torch.Tensor) -> Any:
    y = x * 2
    view = y.view(-1)
    y.add_(5)
    return view, y


def write_through_view(x: torch.Tensor) -> Any:
    y = x * 2
    y[0].zero_()
    y.view(-1)[5:].mul_(2)
    return y


def write_after_two_views(x: torch.Tensor) -> Any:
    y = x * 2
    a, b = y.t(), y[1]
    a[0].fill_(9.0)
    return a, b, y


def index_and_mask(x: torch.Tensor) -> Any:
    y = x.clone()
    y[x > 0] = 0
    y[torch.tensor([0, 2])] += 1
    y.index_put_((torch.tensor([1]),), torch.ones(4))
    return y.masked_fill_(x < -0.5, 3.0)


def promotion(x: torch.Tensor) -> Any:
    y = x.to(torch.bfloat16) * 2
    y += x
    return y


def comparison(x: torch.Tensor) -> Any:
    y = x * 2
    y.gt_(0)
    return y


def integer_division(x: torch.Tensor) -> Any:
    y = torch.arange(4)
    y.mul_(3).floor_divide_(2)
    return y + x


def copies(x: torch.Tensor) -> Any:
    y = torch.empty(3, 4)
    y.copy_(x.double())
    z = torch.zeros(2, 4)
    z[0].copy_(x[1])
    return y, z


def out_argument(x: torch.Tensor) -> Any:
    y = torch.empty(3, 4)
    torch.add(x, 1, out=y)
    return y


def chunks(x: torch.Tensor) -> Any:
    y = x * 2
    a, b = y.chunk(2, dim=1)
    a.add_(b)
    return y, b


def transpose_in_place(x: torch.Tensor) -> Any:
    y = x * 2
    y.t_()
    y.unsqueeze_(0)
    return y


FUNCTIONS: list[Function] = [
    in_place_add, read_before_and_after, column, view_then_write, write_through_view, write_after_two_views,
    index_and_mask, promotion, comparison, integer_division, copies, out_argument, chunks, transpose_in_place,
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
def test_in_place_ops_become_functional(function: Function) -> None:
    model = Model(lambda m, x: function(x))
    captured = capture(model, (X,))
    verify.check_graph(captured.program)
    assert not any(ops.is_mutating(n) for n in captured.program.graph.nodes)
    for x in (X, X.flip(0)):
        assert verify.compare(_leaves(model(x)), verify.run(captured.program, [x])).error <= 1e-6
    compiled = fxopt.compile(model, example_inputs=(X,), backend="torch")
    assert verify.compare(_leaves(model(X)), _leaves(compiled(X))).error <= 1e-6


def _leaves(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple) else [value]


def test_in_place_activations_take_the_short_way() -> None:
    """Going through torch's own functionalization would take batch_norm apart and cost a second trace."""
    model = chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(inplace=True))
    kinds = [ops.kind(n) for n in capture(model, (torch.randn(1, 3, 5, 5),)).program.graph.nodes]
    kept = [k for k in kinds if k not in ("get_attr", "placeholder", "output")]
    assert kept == ["conv", "batch_norm", "activation", "dropout"]


def test_batch_norm_survives_the_long_way() -> None:
    model = Model(lambda m, x: column(m.norm(x)), norm=nn.BatchNorm1d(4))
    kinds = [ops.kind(n) for n in capture(model, (X,)).program.graph.nodes]
    assert "batch_norm" in kinds


def counter(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.count.add_(1)
    result: torch.Tensor = x * m.count
    return result


def reassigned(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.count = m.count + 1
    result: torch.Tensor = x * m.count
    return result


def cache(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.keys[m.count.view(1)] = x[:1]
    m.count.add_(1)
    result: torch.Tensor = m.keys.sum(0) + x
    return result


STATEFUL = [counter, reassigned, cache]


def stateful(forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> Model:
    return Model(forward, count=torch.zeros((), dtype=torch.int64), keys=torch.zeros(8, 4))


@pytest.mark.parametrize("forward", STATEFUL)
def test_a_mutated_buffer_goes_on_from_call_to_call(forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    model = stateful(forward)
    compiled = fxopt.compile(model, example_inputs=(X,), backend="torch")
    assert int(model.count) == 0  # type: ignore[arg-type]
    results = [compiled(X * i) for i in range(1, 5)]
    for i, result in enumerate(results, start=1):
        assert torch.equal(result, model(X * i))


def test_two_compiled_models_have_a_state_each() -> None:
    model = stateful(counter)
    one, other = (fxopt.compile(model, example_inputs=(X,), backend="torch") for _ in range(2))
    one(X)
    assert torch.equal(one(X), X * 2)
    assert torch.equal(other(X), X)
    assert int(model.count) == 0  # type: ignore[arg-type]


def test_a_model_with_state_answers_one_caller_at_a_time() -> None:
    compiled = fxopt.compile(stateful(counter), example_inputs=(X,), backend="torch")
    variant = compiled._fixed
    assert variant is not None
    run = variant.executable

    class Slow(fxopt.Executable):
        """Gives other callers time to come between the call and the writing back of the state."""

        def __call__(self, inputs: Any) -> list[Any]:
            outputs = run(inputs)
            time.sleep(0.005)
            return outputs

        def constant(self, name: str) -> torch.Tensor:
            return run.constant(name)

    variant.executable = Slow()
    with ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(lambda _: float(compiled(X)[0, 0] / X[0, 0]), range(20)))
    assert sorted(seen) == list(range(1, 21))


def test_results_of_an_earlier_call_stay() -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        m.total.add_(x)
        return m.total, m.total.view(-1)

    compiled = fxopt.compile(Model(forward, total=torch.zeros(3, 4)), example_inputs=(X,), backend="torch")
    first, flat = compiled(X)
    compiled(X)
    assert torch.equal(first, X)
    assert torch.equal(flat, X.view(-1))


def test_a_buffer_that_is_an_output_before_its_mutation() -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        before = m.total.clone()
        m.total.add_(x)
        return before, m.total * 1

    compiled = fxopt.compile(Model(forward, total=torch.zeros(3, 4)), example_inputs=(X,), backend="torch")
    compiled(X)
    before, after = compiled(X)
    assert torch.equal(before, X)
    assert torch.equal(after, 2 * X)


def test_a_mutated_buffer_in_two_modules_is_refused() -> None:
    class Adds(nn.Module):
        total: torch.Tensor

        def __init__(self, total: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("total", total)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.total.add_(1)
            return x + self.total

    total = torch.zeros(())
    model = nn.Sequential(Adds(total), Adds(total))
    with pytest.raises(fxopt.CaptureError, match=r"mutates a buffer that shares memory .*: 0\.total and 1\.total"):
        capture(model, (X,))


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_other_engines_refuse_state_with_the_reason(backend: str) -> None:
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[backend])
    with pytest.raises(fxopt.UnsupportedOp, match=r"count.*backend='torch'"):
        fxopt.compile(stateful(counter), example_inputs=(X,), backend=backend)


def test_auto_takes_the_engine_that_can() -> None:
    compiled = fxopt.compile(stateful(counter), example_inputs=(X,))
    assert compiled.backend == "torch"
    assert all(isinstance(v, str) for name, v in compiled.report.candidates.items() if name != "torch")
