"""Lazy capture: the first call captures, other shapes capture again, and no answer is ever wrong."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import compiler
from fxopt.capture import capture
from fxopt.compiled import CompiledModel
from tests.core.captured import Answer
from tests.passes.models import Model, chain


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each capture."""
    seen: list[Any] = []
    original = capture

    def counting(*args: Any) -> Any:
        seen.append(args[1])
        return original(*args)

    monkeypatch.setattr(compiler, "capture", counting)
    return seen


def lazy(model: nn.Module, **options: Any) -> CompiledModel:
    return fxopt.compile(model, backend="torch", **options)


def quietly(compiled: CompiledModel, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compiled(*args, **kwargs)


def test_nothing_is_captured_before_the_first_call(builds: list[Any]) -> None:
    model = chain(nn.Linear(4, 3), nn.ReLU())
    compiled = lazy(model)
    assert builds == []
    assert "captured at the first call" in repr(compiled)
    x = torch.randn(2, 4)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    compiled(x + 1)
    assert len(builds) == 1
    assert "input: float32[2, 4]" in repr(compiled)


@pytest.mark.parametrize("what", ["report", "graph", "backend", "save"])
def test_what_is_not_there_yet_says_what_to_do(what: str) -> None:
    compiled = lazy(nn.Linear(4, 3))
    read = compiled.save if what == "save" else lambda path: getattr(compiled, what)
    with pytest.raises(fxopt.FxoptError, match=r"captured at its first call\. Call it once, or give example_inputs"):
        read("model.onnx")


def test_a_new_shape_or_dtype_captures_again_with_one_warning(builds: list[Any]) -> None:
    model = Model(lambda m, x: x.relu() * 2)
    compiled = lazy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(torch.randn(2, 4))
    for x in (torch.randn(3, 4), torch.randn(2, 4).double(), torch.arange(8).reshape(2, 4), torch.randn(8)):
        with pytest.warns(UserWarning, match="fxopt") as caught:
            result = compiled(x)
        assert len(caught) == 1
        assert "is captured again" in str(caught[0].message)
        assert "dynamic_shapes" in str(caught[0].message)
        assert caught[0].filename == __file__
        assert result.dtype == x.dtype
        assert torch.equal(result, model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(torch.randn(2, 4))
    assert len(builds) == 5


def test_another_constant_or_structure_captures_again() -> None:
    model = Model(lambda m, x, scale=1.0, flag=False: -x * scale if flag else x * scale)
    compiled = lazy(model)
    x = torch.randn(3)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x,), {}), ((x, 2.0), {}), ((x, 3.0), {}), ((x,), {"flag": True}), ((x, 2.0), {"flag": 0}),
    ]  # fmt: skip
    for args, kwargs in calls:
        assert torch.equal(quietly(compiled, *args, **kwargs), model(*args, **kwargs))


def test_eight_variants_are_kept(builds: list[Any]) -> None:
    compiled = lazy(Model(lambda m, x: x * 2))
    for size in range(1, 10):
        quietly(compiled, torch.ones(size))
    assert len(compiled._lazy) == 8
    quietly(compiled, torch.ones(2))  # the second oldest is still there
    assert len(builds) == 9
    assert quietly(compiled, torch.ones(1)).shape == (1,)  # the oldest is not
    assert len(builds) == 10
    quietly(compiled, torch.ones(2))  # used since, so kept
    assert len(builds) == 10


def test_an_object_is_recognised_from_the_first_call_on(builds: list[Any]) -> None:
    class Wrapped:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    compiled = lazy(Model(lambda m, a, b: a.logits + b.tensor))
    for value in (1.0, 2.0):
        result = compiled(Answer(torch.ones(2)), Wrapped(torch.full((2,), value)))
        assert torch.equal(result, torch.full((2,), 1 + value))
    assert len(builds) == 1


def test_keywords_in_another_order_are_the_same_call(builds: list[Any]) -> None:
    compiled = lazy(Model(lambda m, a, b: a - b))
    x = torch.ones(2)
    assert torch.equal(compiled(a=x, b=x * 3), compiled(b=x * 3, a=x))
    assert len(builds) == 1


def test_strides_do_not_capture_again(builds: list[Any]) -> None:
    model = chain(nn.Conv2d(3, 4, 3), nn.Flatten())
    compiled = lazy(model)
    x = torch.randn(2, 3, 5, 5)
    for y in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3), torch.randn(2, 3, 5, 10)[..., ::2]):
        assert torch.allclose(compiled(y), model(y), atol=1e-5)
    assert len(builds) == 1


def test_all_variants_have_one_state() -> None:
    """Whichever shape is called, a counter counts on, also when its variant was dropped and captured again."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.count.add_(1)
        result: torch.Tensor = x * m.count
        return result

    compiled = lazy(Model(forward, count=torch.zeros(())))
    sizes = [1, 2, 1, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 2]
    assert [float(quietly(compiled, torch.ones(n))[0]) for n in sizes] == list(range(1, 15))


def test_dynamic_shapes_capture_once(builds: list[Any]) -> None:
    compiled = lazy(nn.Linear(4, 3).eval(), dynamic_shapes=({0: "batch"},))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in (1, 5, 2):
            assert compiled(torch.randn(batch, 4)).shape == (batch, 3)
    assert len(builds) == 1


def test_positional_and_keyword_are_the_same_call(builds: list[Any]) -> None:
    class Minus(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return (a - b) * scale

    compiled = lazy(Minus())
    x = torch.ones(2)
    for result in (compiled(x, x * 3), compiled(x, b=x * 3), compiled(b=x * 3, a=x), compiled(x, x * 3, 1.0)):
        assert torch.equal(result, -2 * x)
    assert len(builds) == 1


def test_a_failed_first_call_can_be_repeated() -> None:
    model = nn.Linear(4, 3)
    compiled = lazy(model)
    with pytest.raises(fxopt.InputError, match="the model itself fails"):
        compiled(torch.randn(2, 5))
    assert compiled(torch.randn(2, 4)).shape == (2, 3)


def test_inputs_that_require_grad_are_refused() -> None:
    compiled = lazy(nn.Linear(4, 3))
    with pytest.raises(fxopt.InputError, match="requires grad"):
        compiled(torch.randn(2, 4, requires_grad=True))
    with torch.no_grad():
        assert compiled(torch.randn(2, 4, requires_grad=True)).shape == (2, 3)


def test_a_calibration_iterator_serves_every_capture() -> None:
    compiled = lazy(Model(lambda m, x: x * 2), calibration=iter([(torch.ones(2),)]))
    assert compiled(torch.ones(2)).shape == (2,)
    assert quietly(compiled, torch.ones(3)).shape == (3,)


def test_threads_capture_each_shape_once(builds: list[Any]) -> None:
    model = chain(nn.Linear(4, 4), nn.ReLU())
    compiled = lazy(model)
    inputs = [torch.randn(n % 3 + 1, 4) for n in range(24)]
    start = threading.Barrier(6)

    def call(part: list[torch.Tensor]) -> list[torch.Tensor]:
        start.wait(timeout=60)
        return [compiled(x) for x in part]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ThreadPoolExecutor(6) as pool:
            results = list(pool.map(call, [inputs[i::6] for i in range(6)]))
    for i, part in enumerate(results):
        for x, y in zip(inputs[i::6], part, strict=True):
            assert torch.allclose(y, model(x), atol=1e-6)
    assert len(builds) == 3


def test_threads_share_the_state() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.count.add_(1)
        result: torch.Tensor = x * m.count
        return result

    compiled = lazy(Model(forward, count=torch.zeros(())))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ThreadPoolExecutor(4) as pool:
            seen = list(pool.map(lambda n: float(compiled(torch.ones(n % 2 + 1))[0]), range(40)))
    assert sorted(seen) == list(range(1, 41))


def test_an_object_with_another_attribute_is_captured_anew() -> None:
    class Cache:
        def __init__(self, keys: torch.Tensor, position: int) -> None:
            self.keys = keys
            self.position = position

    compiled = lazy(Model(lambda m, x, cache: x * cache.position + cache.keys))
    x = torch.ones(2)
    for position in (1, 2, 1, 3):
        assert torch.equal(quietly(compiled, x, Cache(x, position)), x * position + 1)


def test_a_model_that_answers_by_strides_is_captured_for_each(builds: list[Any]) -> None:
    model = Model(lambda m, x: x * 2 if x.is_contiguous() else x * 3)
    compiled = lazy(model)
    x = torch.randn(3, 4)
    for y in (x, x.t().contiguous().t(), x, x.repeat(1, 2)[:, ::2]):
        assert torch.equal(quietly(compiled, y), model(y))
    assert len(builds) == 3


def test_a_model_that_answers_by_the_order_of_keywords_is_captured_for_each(builds: list[Any]) -> None:
    model = Model(lambda m, **named: torch.cat(list(named.values())))
    compiled = lazy(model)
    a, b = torch.zeros(1), torch.ones(1)
    for named in ({"a": a, "b": b}, {"b": b, "a": a}, {"a": b, "b": a}, {"b": a, "a": b}):
        assert torch.equal(quietly(compiled, **named), model(**named))
    assert len(builds) == 2
