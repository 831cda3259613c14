"""Capture: every kind of model, input and output comes back as the user wrote it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxopt
from fxopt import structures, verify
from fxopt.capture import Captured, capture
from fxopt.compiled import _key
from tests.passes.models import Model, chain, image

X = torch.linspace(-1, 1, 6).reshape(2, 3)


def run(captured: Captured, *args: Any, **kwargs: Any) -> Any:
    """What the captured graph answers, in the user's structure."""
    signature = captured.program.signature
    flat = verify.run(captured.program, signature.bind(args, kwargs))
    return signature.unflatten(flat[: len(signature.outputs)])


def same(a: Any, b: Any) -> bool:
    """Equal structure, types and values."""
    one, other = pytree.tree_flatten(a), pytree.tree_flatten(b)
    pairs = zip(one[0], other[0], strict=True)
    return one[1] == other[1] and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y and type(x) is type(y) for x, y in pairs
    )


def check(model: nn.Module, *args: Any, **kwargs: Any) -> Captured:
    captured = capture(model, args, kwargs)
    verify.check_graph(captured.program)
    with torch.no_grad():
        assert same(run(captured, *args, **kwargs), model(*args, **kwargs))
    return captured


# --- outputs


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] | None = None
    steps: int = 3


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: Any


Pair = namedtuple("Pair", ["left", "right"])


class Typed(NamedTuple):
    a: torch.Tensor
    b: int


class Plain:
    """An object that pytree does not know."""

    def __init__(self, tensor: torch.Tensor, label: str) -> None:
        self.tensor = tensor
        self.label = label


@pytest.mark.parametrize(
    "answer",
    [
        lambda y: y,
        lambda y: (y,),
        lambda y: [y, y + 1],
        lambda y: (y, None, 3, True, 2.5, "text"),
        lambda y: {"b": y, "a": (y + 1, [y + 2])},
        lambda y: OrderedDict(z=y, a=y + 1),
        lambda y: {1: y, (2, 3): y + 1},
        lambda y: Pair(y, {"x": y + 1}),
        lambda y: Typed(y, 4),
        lambda y: Answer(y, (y + 1, y + 2)),
        lambda y: Answer(y),
        lambda y: Frozen([y, None]),
        lambda y: (y, y, y),
        lambda y: ((), y, []),
    ],
)
def test_outputs_keep_their_structure(answer: Callable[[torch.Tensor], Any]) -> None:
    check(Model(lambda m, x: answer(x * 2)), X)


def test_a_plain_object_keeps_its_other_attributes() -> None:
    result = run(capture(Model(lambda m, x: Plain(x * 2, "logits")), (X,)), X)
    assert isinstance(result, Plain)
    assert result.label == "logits"
    assert torch.equal(result.tensor, X * 2)


def test_the_outputs_of_a_transformer_are_its_own_class() -> None:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    model = Model(lambda m, x: BaseModelOutputWithPooling(last_hidden_state=x * 2, hidden_states=(x, x + 1)))
    result = run(capture(model, (X,)), X)
    assert type(result) is BaseModelOutputWithPooling
    assert result.pooler_output is None
    assert torch.equal(result["last_hidden_state"], X * 2)
    assert len(result.hidden_states) == 2


def test_an_input_can_be_an_output() -> None:
    check(Model(lambda m, x, y: (x, x + y, y)), X, X + 1)


def test_a_parameter_can_be_an_output() -> None:
    check(Model(lambda m, x: (x, m.w), w=nn.Parameter(torch.ones(2))), X)


def test_no_tensor_output_at_all() -> None:
    check(Model(lambda m, x: (1, None)), X)


def test_a_size_can_be_an_output() -> None:
    captured = capture(Model(lambda m, x: (x * 2, x.shape[0])), (X,), None, ((({0: "b"},)),))
    assert run(captured, torch.ones(5, 3))[1] == 5


def test_output_names_are_readable_and_unique() -> None:
    captured = capture(Model(lambda m, x: {"logits": x + 1, "cache": (x + 2, [x + 3])}), (X,))
    assert [leaf.name for leaf in captured.program.signature.outputs] == ["logits", "cache_0", "cache_1_0"]
    captured = capture(Model(lambda m, x: (x + 1, (x + 2, [x + 3]))), (X,))
    assert [leaf.name for leaf in captured.program.signature.outputs] == ["output_0", "output_1_0", "output_1_1_0"]


def test_an_output_that_refers_to_itself_is_refused() -> None:
    def forward(m: Any, x: torch.Tensor) -> Plain:
        result = Plain(x * 2, "loop")
        result.label = result  # type: ignore[assignment]
        return result

    with pytest.raises(fxopt.InputError, match="Plain among the inputs or outputs refers back to itself"):
        capture(Model(forward), (X,))


# --- inputs


class Inputs(nn.Module):
    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, *, scale: float = 2.5, flag: bool = False
    ) -> torch.Tensor:
        y = x * scale if mask is None else x * mask
        return -y if flag else y


def test_nested_inputs() -> None:
    model = Model(lambda m, pair, table: pair[0] + pair[1][0] * table["a"] + table["b"]["c"])
    check(model, (X, [X + 1]), {"a": X, "b": {"c": X - 1}})


def test_a_dataclass_as_input() -> None:
    check(Model(lambda m, a: a.logits * 2 + a.hidden[0]), Answer(X, (X,)))


def test_keywords_in_any_order() -> None:
    captured = capture(Model(lambda m, a, b: a - b), (), {"a": X, "b": X + 1})
    assert torch.equal(run(captured, b=X, a=X + 1), torch.ones(2, 3))


def test_positional_and_keyword_spellings_are_one() -> None:
    captured = capture(Inputs(), (X,), {"mask": X})
    expected = X * X
    for args, kwargs in [((X,), {"mask": X}), ((X, X), {}), ((), {"x": X, "mask": X}), ((), {"mask": X, "x": X})]:
        assert torch.equal(run(captured, *args, **kwargs), expected)
    captured = capture(Inputs(), (X, X))
    assert torch.equal(run(captured, X, mask=X), expected)


def test_a_default_may_be_spelled_out() -> None:
    captured = capture(Inputs(), (X,))
    assert torch.equal(run(captured, X, None, scale=float("2.5"), flag=False), X * 2.5)


def test_another_value_than_the_default_is_refused() -> None:
    captured = capture(Inputs(), (X,))
    for options in ({"scale": 3.0}, {"mask": X}, {"flag": True}):
        with pytest.raises(fxopt.InputError, match="another structure"):
            run(captured, X, **options)


def test_constants_among_the_inputs_are_fixed() -> None:
    captured = capture(Inputs(), (X, None), {"scale": 2.0, "flag": True})
    assert torch.equal(run(captured, X, None, scale=2.0, flag=True), X * -2)
    with pytest.raises(fxopt.InputError, match=r"'scale' is 3\.0, expected 2\.0"):
        run(captured, X, None, scale=3.0, flag=True)
    with pytest.raises(fxopt.InputError, match="is 1, expected True"):
        run(captured, X, None, scale=2.0, flag=1)
    with pytest.raises(fxopt.InputError, match="expected None"):
        run(captured, X, X, scale=2.0, flag=True)


def test_variable_arguments() -> None:
    class Sums(nn.Module):
        def forward(self, *xs: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
            return xs[0] + xs[1] * named["a"] - named["b"]

    captured = check(Sums(), X, X + 1, a=X, b=X)
    assert torch.equal(run(captured, X, X + 1, b=X, a=X), X + (X + 1) * X - X)
    with pytest.raises(fxopt.InputError, match="another structure"):
        run(captured, X, a=X, b=X)


def test_the_same_tensor_twice() -> None:
    captured = check(Model(lambda m, a, b: a - 2 * b), X, X)
    assert torch.equal(run(captured, X, X + 1), X - 2 * (X + 1))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "missing a required argument: 'x'"),
        ((X, None, X), {}, "too many positional arguments"),
        ((X,), {"masks": X}, "unexpected keyword argument 'masks'"),
        ((X.double(),), {}, r"'x' has dtype torch\.float64, expected torch\.float32"),
        ((X[:, :2],), {}, "has size 2 in dimension 1, expected 3"),
        ((X[0],), {}, "has 1 dimensions, expected 2"),
        (([X, X],), {}, "another structure"),
        ((3,), {}, "is int, expected a tensor"),
        ((X.to("meta"),), {}, "is on meta, expected cpu"),
    ],
)
def test_a_call_that_does_not_fit_says_why(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    captured = capture(Inputs(), (X,))
    with pytest.raises(fxopt.InputError, match=message):
        run(captured, *args, **kwargs)


# --- kinds of models


def test_an_exported_program() -> None:
    model = chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    exported = torch.export.export(model, (image(),))
    before = str(exported.graph)
    captured = capture(exported, ())
    assert same(run(captured, image() * 0 + 1), model(image() * 0 + 1).detach())
    assert str(exported.graph) == before


def test_an_exported_program_with_in_place_ops_is_left_as_it_is() -> None:
    exported = torch.export.export(chain(nn.Linear(3, 3), nn.ReLU(inplace=True)), (X,))
    before = str(exported.graph)
    assert "aten.relu_.default" in before
    assert "aten.relu_.default" not in str(capture(exported, (X,)).program.graph)
    assert str(exported.graph) == before


def test_an_exported_program_keeps_its_dynamic_sizes() -> None:
    exported = torch.export.export(nn.Linear(3, 4).eval(), (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert run(capture(exported, ()), torch.ones(7, 3)).shape == (7, 4)


def test_an_exported_program_without_example_inputs_needs_some() -> None:
    exported = torch.export.export(nn.Linear(3, 4).eval(), (X,))
    exported.example_inputs = None
    with pytest.raises(fxopt.InputError):
        capture(exported, ())
    assert run(capture(exported, (X,)), X).shape == (2, 4)


@pytest.mark.parametrize("trace", [torch.fx.symbolic_trace, lambda m: torch.export.export(m, (image(),)).module()])
def test_a_graph_module(trace: Callable[[nn.Module], nn.Module]) -> None:
    model = chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    traced = trace(model)
    assert isinstance(traced, torch.fx.GraphModule)
    check(traced, image())


@pytest.mark.parametrize(
    "reparametrize",
    [
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
        torch.nn.utils.parametrizations.orthogonal,
        torch.nn.utils.spectral_norm,
        pytest.param(torch.nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore")),
    ],
)
def test_reparametrized_weights(reparametrize: Callable[[nn.Module], nn.Module]) -> None:
    check(reparametrize(nn.Linear(3, 4)).eval(), X)


def test_tied_weights_are_one_constant() -> None:
    table, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = table.weight
    captured = check(Model(lambda m, i: m.head(m.table(i)), table=table, head=head), torch.tensor([1, 4]))
    (name,) = captured.program.constants
    assert captured.program.constants[name].data_ptr() == table.weight.data_ptr()
    assert len(captured.program.graph.find_nodes(op="get_attr")) == 1


def test_weights_are_shared_with_the_user() -> None:
    model = nn.Linear(3, 4)
    captured = capture(model, (X,))
    assert {t.data_ptr() for t in captured.program.tensors().values()} == {p.data_ptr() for p in model.parameters()}


def test_forward_hooks_are_part_of_the_model() -> None:
    model = nn.Linear(3, 4).eval()
    model.register_forward_hook(lambda module, inputs, output: output * 2)
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    check(model, X)
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == (1, 1)


def test_branches_on_tensors_with_torch_cond() -> None:
    model = Model(
        lambda m, x: torch.cond(x.sum() > 0, lambda y: m.layer(y), lambda y: y - 1, (x,)), layer=nn.Linear(3, 3)
    )
    captured = check(model, X)
    for x in (X + 1, X - 1):
        assert torch.allclose(run(captured, x), model(x))


def test_branches_on_shapes_and_options_are_settled() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        for i in range(x.shape[0]):
            x = x + i if m.training else x - i
        return x

    check(Model(forward), X)


# --- what cannot be captured


def data_dependent(m: Any, x: torch.Tensor) -> torch.Tensor:
    if x.sum() > 0:  # the line that the error shows
        return x
    return -x


def test_data_dependent_control_flow_shows_the_line() -> None:
    with pytest.raises(fxopt.CaptureError) as caught:
        capture(Model(data_dependent), (X,))
    text = str(caught.value)
    assert "Model cannot be captured" in text
    assert "test_capture.py" in text
    assert "the line that the error shows" in text
    assert "torch.where or torch.cond" in text


def test_item_shows_the_line() -> None:
    with pytest.raises(fxopt.CaptureError, match=r"test_capture\.py.*\n.*range\(int\(x\.max"):
        capture(Model(lambda m, x: [x for _ in range(int(x.max().item()))]), (X + 3,))


def test_a_model_that_cannot_be_copied_says_so() -> None:
    model = nn.Linear(3, 4)
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(fxopt.CaptureError, match=r"Linear cannot be copied .*copy\.deepcopy\(model\) work"):
        capture(model, (X,))


def test_an_output_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(fxopt.CaptureError, match="cannot be captured"):
        capture(Model(lambda m, x: {x * 2}), (X,))


@pytest.mark.parametrize("wrong", [3, "model", lambda x: x, None, nn.Linear])
def test_what_is_no_model_is_refused(wrong: Any) -> None:
    with pytest.raises(fxopt.InputError, match="model must be an nn"):
        capture(wrong, (X,))


def test_inputs_that_the_model_refuses() -> None:
    with pytest.raises(fxopt.InputError, match=r"the model itself fails on the example inputs: RuntimeError: mat1"):
        capture(nn.Linear(4, 4), (X,))


@pytest.mark.parametrize("where", ["weight", "running_var"])
def test_nan_weights_are_refused_by_name(where: str) -> None:
    model = chain(nn.Linear(3, 3), nn.BatchNorm1d(3))
    getattr(model[1], where).data[1] = float("nan")  # type: ignore[index]
    with pytest.raises(fxopt.InputError, match=rf"NaN in 1\.{where}"):
        capture(model, (X,))


def test_infinite_weights_are_not() -> None:
    model = chain(nn.Linear(3, 3))
    model[0].weight.data[0] = torch.tensor([float("inf"), -float("inf"), 0.0])  # type: ignore[index]
    assert capture(model, (X,)).program.numel() == 12


# --- values that are no tensors


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


# --- strides


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


# --- layers with a fast path


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


# --- what no inputs make usable


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


# --- dicts


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
