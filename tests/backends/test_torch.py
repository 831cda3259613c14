"""The PyTorch backend: state, concurrent calls, errors, targets and options."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt import verify
from fxopt.backends.torch import TorchBackend
from fxopt.errors import BackendUnavailable
from fxopt.execute import evaluate
from fxopt.target import resolve_target
from tests.backends.torch_models import BIG, Conv, Counter, Function, check, image, lower, program_of
from tests.passes.models import Model

# Dynamic sizes, state, calls.


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
def test_dynamic_batch(batch: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Conv(out=4, activation="relu"), Conv(out=4, activation="relu")
            self.squeeze = nn.Conv2d(4, 4, 1)
            self.head = nn.Linear(4 * BIG * BIG, 300)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.second(self.first(x), x)
            y = y * self.squeeze(F.adaptive_avg_pool2d(y, 1))
            return self.head(y.view(x.shape[0], -1)).relu()

    model = Net()
    program, flat = program_of(model, (image(),), {"x": {0: "batch"}})
    expected = program.copy()
    executable = TorchBackend().lower(program, resolve_target("x86"), flat)
    x = [image(batch, 4, BIG, BIG)]
    assert verify.compare(evaluate(expected, x), executable(x)).within


def test_state_is_read_live_and_results_do_not_share_it() -> None:
    model = Counter()
    executable = lower(model, (torch.ones(3),))
    for step in range(1, 5):
        x = torch.full((3,), float(step))
        *results, count, last = executable([x])
        executable.constant("count").copy_(count)
        executable.constant("last").copy_(last)
        for mine, eager in zip(results, model(x), strict=True):
            assert torch.equal(mine, eager)  # only now, after the state was written
    assert torch.equal(executable.constant("last"), model.last)


def test_weights_that_the_model_mutates_are_not_packed() -> None:
    class Online(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randn(500, 600))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert isinstance(self.weight, torch.Tensor)
            y = F.linear(x, self.weight)
            self.weight.mul_(0.5)
            return y

    executable = lower(Online(), (torch.randn(9, 600),))
    x = torch.randn(9, 600)
    first, written = executable([x])
    executable.constant("weight").copy_(written)
    second, _ = executable([x])
    torch.testing.assert_close(second, first / 2)


def test_grad_modes_and_autocast() -> None:
    executable, x = lower(nn.Sequential(Conv(), nn.ReLU()), (image(),)), [image()]
    (expected,) = executable(x)
    with torch.inference_mode():
        assert torch.equal(executable(x)[0], expected)
    with torch.enable_grad():
        (result,) = executable(x)
        assert torch.equal(result, expected)
        assert torch.is_grad_enabled()
    (result.requires_grad_() * 2).sum().backward()  # an inference tensor would refuse
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(executable(x)[0], expected)


def test_lowered_under_inference_mode() -> None:
    program, flat = program_of(nn.Sequential(Conv(), nn.ReLU()), (image(),))
    with torch.inference_mode():
        executable = TorchBackend().lower(program, resolve_target("x86"), flat)
    assert not executable(flat)[0].is_inference()


def test_concurrent_calls() -> None:
    model = nn.Sequential(Conv(out=4, activation="silu"), Conv(out=4, activation="relu"), nn.Flatten(), nn.ReLU())
    executable = lower(model, (image(),))
    inputs = [[image()] for _ in range(8)]
    expected = [executable(x)[0] for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(20) if not torch.equal(executable(inputs[i])[0], expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Errors, targets, options.


def test_errors_name_node_and_source_line() -> None:
    executable = lower(Function(F.embedding, torch.randn(10, 4)), (torch.tensor([1]),))
    with pytest.raises(IndexError, match=r"embedding.*\.py:\d+.*failed: index out of range"):
        executable([torch.tensor([99])])
    with pytest.raises(ValueError, match="unpack"):
        executable([])


def test_an_index_out_of_range_fails_as_in_eager_and_leaves_no_trace() -> None:
    def forward(m: Any, tokens: torch.Tensor) -> torch.Tensor:
        m.count.add_(1)
        y = m.table(tokens) * 2
        m.total.add_(y.sum())
        result: torch.Tensor = y + m.count
        return result

    def fresh() -> Model:
        return Model(forward, table=table, count=torch.zeros(()), total=torch.zeros(()))

    table, good = nn.Embedding(10, 4), torch.tensor([1, 9])
    compiled = fxopt.compile(fresh(), example_inputs=(good,), backend="torch")
    for bad in (torch.tensor([3, 10]), torch.tensor([-1, 0])):
        with pytest.raises(IndexError) as eager:
            fresh()(bad)
        with pytest.raises(IndexError, match=r"embedding.*\.py:\d+.*failed") as error:
            compiled(bad)
        assert str(error.value).endswith(str(eager.value))
        assert str(error.value.__cause__) == str(eager.value)
    untouched = fresh()
    for _ in range(2):
        assert torch.equal(compiled(good), untouched(good))


def test_foreign_target_lowers_but_does_not_run() -> None:
    foreign = "arm" if resolve_target("x86").runs_here else "x86"
    executable = lower(Conv(), (image(),), target=foreign)
    assert "mkldnn" not in executable.source
    with pytest.raises(BackendUnavailable, match=foreign):
        executable([image()])


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    check(Conv(activation="relu"), image(), image(2, 8, BIG, BIG), never="mkldnn")


def test_odd_arguments_and_names() -> None:
    class Odd(nn.Module):
        def forward(self, inputs: Any, run: Any, torch: Any) -> Any:
            y = inputs.masked_fill(run > 0, float("-inf")).clamp(-3.0, float("inf"))
            return y.nan_to_num(nan=float("nan")), {"a": torch.sum(), "b": 3}, None

    executable = lower(Odd(), (torch.randn(3), torch.randn(3), torch.randn(3)))
    y, total, three, nothing = executable([torch.zeros(3), -torch.ones(3), torch.ones(3)])
    assert torch.equal(y, torch.zeros(3))
    assert (float(total), three, nothing) == (3.0, 3, None)


def test_higher_order_ops() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.conv(x)
            with torch.no_grad():
                z = y.view(2, -1) * 2
            return torch.cond(x.sum() > 0, lambda v: v.view(-1) + 1, lambda v: v.view(-1) - 1, (y,)), z

    check(Branch(), image())
    check(Branch(), -image().abs())


def test_no_inputs_and_unused_inputs() -> None:
    check(Function(lambda c: c + 1, torch.ones(2)))
    check(Function(lambda x, y: y + 1), torch.ones(2), torch.zeros(2))
    check(Function(lambda x: x), torch.ones(2))


def test_inductor_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    program, flat = program_of(Conv(), (image(),))
    with pytest.raises(BackendUnavailable, match=r"C\+\+ compiler"):
        TorchBackend(inductor=True).lower(program, resolve_target("x86"), flat)


@pytest.mark.slow
def test_inductor() -> None:
    model = Counter()
    program, flat = program_of(model, (torch.ones(3),))
    executable = TorchBackend(inductor=True).lower(program, resolve_target("x86"), flat)
    for _ in range(3):
        *results, count, last = executable(flat)
        for mine, eager in zip(results, model(*flat), strict=True):
            assert torch.equal(mine, eager)
        for name, value in (("count", count), ("last", last)):
            executable.constant(name).copy_(value)
