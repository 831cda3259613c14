"""Capture: values that are no tensors, strides, dicts, and what no inputs make usable."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxopt
from fxopt import structures
from fxopt.capture import capture
from fxopt.compiled import _key
from tests.core.captured import X, run
from tests.passes.models import Model, chain, image


class Cache:
    """Keys of earlier steps, as language models pass them around."""

    def __init__(self, keys: torch.Tensor, position: Any) -> None:
        self.keys = keys
        self.position = position


class Opaque:
    """Prints like every other of its kind."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "Opaque()"

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


VALUES = [
    (1, 2), (1, True), (1, 1.0), ("a", "b"), ([1, 2], [1, 3]), ([1], (1,)), ({"a": 1}, {"a": 2}), ({1, 2}, {1, 3}),
    (Opaque(1), Opaque(2)), (np.arange(9000), np.arange(9000) + (np.arange(9000) == 5000)), (None, 0),
    (np.float32(1), np.float32(2)), (Opaque([Opaque(1)]), Opaque([Opaque(2)])),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), VALUES)
def test_an_object_with_other_attributes_is_another_input(one: Any, other: Any) -> None:
    model = Model(lambda m, x, cache: x + cache.keys)
    captured = capture(model, (X, Cache(X, one)))
    assert torch.equal(run(captured, X, Cache(X, copy.deepcopy(one))), X + X)
    with pytest.raises(fxopt.InputError, match="another structure"):
        run(captured, X, Cache(X, other))
    key = functools.partial(_key, kwargs={})
    assert key((X, Cache(X, one))) == key((X, Cache(X, copy.deepcopy(one)))) != key((X, Cache(X, other)))


@pytest.mark.parametrize(("one", "other"), VALUES)
def test_another_value_that_prints_alike_is_another_input(one: Any, other: Any) -> None:
    assert structures.fingerprint(one) == structures.fingerprint(copy.deepcopy(one)) != structures.fingerprint(other)


def test_an_object_around_itself_has_a_fingerprint() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    assert structures.fingerprint(loop) == structures.fingerprint(copy.deepcopy(loop))
    assert structures.fingerprint(nn.Linear) != structures.fingerprint(nn.Module)
    assert structures.fingerprint(print) != structures.fingerprint(len)


GRID = torch.arange(16.0).reshape(4, 4)
BY_STRIDES = [
    lambda m, x: x.as_strided((4,), (2,)) * 2,
    lambda m, x: x * x.stride(0),
    lambda m, x: x * 2 if x.is_contiguous() else x * 3,
]


@pytest.mark.parametrize("function", BY_STRIDES)
@pytest.mark.parametrize("example", [GRID, GRID.t(), torch.arange(32.0).reshape(4, 8)[:, ::2]])
def test_a_model_that_answers_by_strides_takes_only_those(
    function: Callable[[Any, torch.Tensor], torch.Tensor], example: torch.Tensor
) -> None:
    captured = capture(Model(function), (example,))
    assert torch.equal(run(captured, example), function(None, example))
    other = GRID if example is not GRID else GRID.t()
    with pytest.raises(fxopt.InputError, match=r"'args_0' has strides .* answers by the strides of its inputs"):
        run(captured, other)


def test_a_model_that_looks_for_channels_last_takes_only_what_it_was_captured_for() -> None:
    model = Model(lambda m, x: x * 2 if x.is_contiguous(memory_format=torch.channels_last) else x * 3)
    for example in (image(), image().to(memory_format=torch.channels_last)):
        captured = capture(model, (example,))
        assert torch.equal(run(captured, example), model(example))
        other = image() if example.stride(1) == 1 else image().to(memory_format=torch.channels_last)
        with pytest.raises(fxopt.InputError, match="answers by the strides of its inputs"):
            run(captured, other)


def test_any_other_model_takes_any_strides() -> None:
    model = chain(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten())
    captured = capture(model, (image(),))
    assert captured.program.signature.layouts == ()
    x = image().to(memory_format=torch.channels_last)
    assert torch.allclose(run(captured, x), model(x), atol=1e-6)
    captured = capture(Model(lambda m, x: x.view(-1) * 2), (X,))  # where the strides do not fit, eager fails
    assert captured.program.signature.layouts == ()


def test_an_encoder_with_padding_is_compared_on_the_path_that_was_traced() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).eval()
    mask = torch.tensor([[False, False, True], [False, False, False]])
    x = torch.randn(2, 3, 8)
    with pytest.warns(UserWarning, match="otherwise on the fast path") as caught:
        compiled = fxopt.compile(
            model,
            example_inputs=(x,),
            example_kwargs={"src_key_padding_mask": mask},
            dynamic_shapes={"src": {0: "batch"}, "src_key_padding_mask": {0: "batch"}},
            backend="torch",
        )
    assert len([w for w in caught if "fxopt" in str(w.message)]) == 1
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            expected = model(x, src_key_padding_mask=mask)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert torch.allclose(compiled(x, src_key_padding_mask=mask), expected, atol=1e-5)
    assert torch.allclose(compiled(x[:1], src_key_padding_mask=mask[:1]), expected[:1], atol=1e-5)


def test_a_model_with_python_state_says_which_output_differs() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            self.calls += 1
            return {"same": x * 2, "other": x * self.calls}

    with pytest.raises(fxopt.VerifyError, match=r"output 'other', error .* Usual causes: Python state"):
        fxopt.compile(Counts(), example_inputs=(X,), backend="torch")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, X)])
def test_torchscript_is_refused(make: Callable[[nn.Module], nn.Module]) -> None:
    scripted = make(nn.Linear(3, 3).eval())
    with pytest.raises(fxopt.CaptureError, match=r"is TorchScript.* pass the nn\.Module it was made from"):
        capture(scripted, (X,))
    with pytest.raises(fxopt.CaptureError, match=r"'inner' is TorchScript"):
        capture(Model(lambda m, x: m.inner(x), inner=scripted), (X,))


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_torch_quantized_is_refused() -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 3)), {nn.Linear})
    with pytest.raises(fxopt.CaptureError, match=r"Linear '0' is quantized already .* pass the float model"):
        capture(model, (X,))


def test_weights_on_the_meta_device_are_refused() -> None:
    with pytest.raises(fxopt.InputError, match=r"'weight' is on the meta device .* load the weights first"):
        capture(nn.Linear(3, 3, device="meta"), (X,))


def test_a_lazy_module_is_refused() -> None:
    with pytest.raises(fxopt.InputError, match=r"'weight' has no shape yet, .* call the model once first"):
        capture(nn.LazyLinear(3), (X,))


def test_weights_of_eight_bits() -> None:
    model = Model(lambda m, x: x * m.scale.float(), scale=torch.tensor([1, 2, 3.0]).to(torch.float8_e4m3fn))
    assert torch.equal(fxopt.compile(model, example_inputs=(X,), backend="torch")(X), model(X))
    model.scale[0] = float("nan")  # type: ignore[operator]
    with pytest.raises(fxopt.InputError, match="NaN in scale"):
        capture(model, (X,))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_sparse_buffers(sparse: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = Model(lambda m, x: m.table @ x.t(), table=sparse(torch.eye(3)))
    assert torch.equal(fxopt.compile(model, example_inputs=(X,), backend="torch")(X), X.t())


@pytest.mark.parametrize("wrong", [[1], "x", {1: X}, X])
def test_keyword_inputs_are_a_mapping_of_names(wrong: Any) -> None:
    with pytest.raises(fxopt.InputError, match="example_kwargs must map argument names to inputs"):
        fxopt.compile(nn.Linear(3, 3), example_inputs=(X,), example_kwargs=wrong)


def test_a_dict_in_another_order_is_the_same_input() -> None:
    captured = capture(
        Model(lambda m, t: t["a"] - t["b"][0]["x"] * t["b"][0]["y"]), ({"a": X, "b": [{"x": X, "y": X}]},)
    )
    assert torch.equal(run(captured, {"b": [{"y": X, "x": X + 1}], "a": X}), X - (X + 1) * X)


def test_a_model_that_goes_through_a_dict_in_order_is_held_to_it() -> None:
    captured = capture(Model(lambda m, t: torch.cat(list(t.values()))), ({"a": X, "b": X + 1},))
    assert torch.equal(run(captured, {"a": X + 1, "b": X}), torch.cat([X + 1, X]))
    with pytest.raises(fxopt.InputError, match=r"argument 0 has the keys \['b', 'a'\], expected \['a', 'b'\]"):
        run(captured, {"b": X, "a": X})
    captured = capture(Model(lambda m, **t: torch.cat(list(t.values()))), (), {"a": X, "b": X + 1})
    with pytest.raises(fxopt.InputError, match=r"the keywords \['b', 'a'\], expected \['a', 'b'\]"):
        run(captured, b=X, a=X)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (({"a": X},), {"y": [X]}, r"argument 0 has the keys \['a'\], expected \['a', 'b'\]"),
        (({"a": X, "c": X},), {"y": [X]}, r"argument 0 has the keys \['a', 'c'\], expected \['a', 'b'\]"),
        (([X, X],), {"y": [X]}, "argument 0 is a list, expected a dict"),
        (({"a": X, "b": X},), {"y": [X, X]}, "argument 'y' has 2 entries, expected 1"),
        (({"a": X, "b": (X, X)},), {"y": [X]}, r"argument 0\['b'\] is a tuple, expected one value"),
        ((), {"y": [X]}, "0 positional arguments, expected 1"),
        (({"a": X, "b": X},), {"z": [X]}, r"the keywords \['z'\], expected \['y'\]"),
    ],
)
def test_another_structure_is_described_in_words(args: Any, kwargs: Any, message: str) -> None:
    captured = capture(Model(lambda m, t, y: t["a"] + t["b"] + y[0]), ({"a": X, "b": X},), {"y": [X]})
    with pytest.raises(fxopt.InputError, match=f"another structure than at capture: {message}"):
        run(captured, *args, **kwargs)


def test_weights_that_are_no_plain_tensors_are_refused() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model: Any = nn.Linear(3, 3)
    model.weight = nn.Parameter(TwoTensor(torch.ones(3, 3), torch.ones(3, 3)))
    with pytest.raises(fxopt.CaptureError, match="'weight' is a TwoTensor, which is no plain tensor"):
        fxopt.compile(model, example_inputs=(torch.ones(1, 3),), backend="torch")
