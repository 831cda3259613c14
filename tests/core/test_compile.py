"""compile(): one clear error for each bad argument, and a model that is called like the original."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import fxopt
from fxopt import compiler, registry
from fxopt.backends.torch import TorchBackend
from fxopt.program import Program
from tests.passes.models import Model, chain, image

X = torch.linspace(-1, 1, 8).reshape(2, 4)
MODEL = chain(nn.Linear(4, 4), nn.ReLU())


def compiled(model: Any = MODEL, **options: Any) -> fxopt.CompiledModel:
    return fxopt.compile(model, **({"example_inputs": (X,), "backend": "torch"} | options))


# --- bad arguments


BAD: list[tuple[dict[str, Any], type[fxopt.FxoptError], str]] = [
    ({"model": "resnet18"}, fxopt.InputError, "model must be an nn.Module, ExportedProgram or GraphModule, not str"),
    ({"model": nn.Linear}, fxopt.InputError, "model must be an nn.Module"),
    ({"model": lambda x: x}, fxopt.InputError, "model must be an nn.Module"),
    ({"target": "x68"}, fxopt.SpecError, r"unknown target 'x68'\. Did you mean 'x86'\? Known: arm, cuda, x86\."),
    ({"target": None}, fxopt.InputError, "target must be a name or an fxopt.Target, not NoneType"),
    ({"passes": "fuse-conv-bn"}, fxopt.SpecError, "unknown pass 'fuse-conv-bn'. Did you mean 'fuse-conv-bn-relu'"),
    ({"passes": "cast-precision{dtyp=bf16}"}, fxopt.SpecError, "no option 'dtyp'. Did you mean 'dtype'"),
    ({"passes": "cast-precision{dtype=int8}"}, fxopt.SpecError, "'int8' is not a choice"),
    ({"passes": 3}, fxopt.InputError, "passes must be a spec string or a sequence"),
    ({"passes": [None]}, fxopt.InputError, "an item of passes must be"),
    ({"backend": "tocrh"}, fxopt.SpecError, r"unknown backend 'tocrh'\. Did you mean 'torch'\? Known: onnx, "),
    ({"backend": 3}, fxopt.InputError, "backend must be a name or a Backend object, not int"),
    ({"backend_options": {"inductr": True}}, fxopt.SpecError, "no option 'inductr'. Did you mean 'inductor'"),
    ({"backend": "auto", "backend_options": {"a": 1}}, fxopt.InputError, "backend_options go with a backend name"),
    ({"backend": TorchBackend(), "backend_options": {"inductor": True}}, fxopt.InputError, "go with a backend name"),
    ({"backend_options": [1]}, fxopt.InputError, "backend_options must map option names to values"),
    ({"backend_options": {"inductor": "yes"}}, fxopt.SpecError, "option 'inductor': 'yes' is not of type bool"),
    ({"dump": 3}, fxopt.InputError, "dump must be a folder, not 3"),
    ({"verify": "no"}, fxopt.InputError, "verify must be True or False"),
    ({"calibration": []}, fxopt.InputError, "calibration is empty"),
    ({"calibration": iter(())}, fxopt.InputError, "calibration is empty"),
    ({"calibration": 3}, fxopt.InputError, "calibration must be an iterable of input tuples, not int"),
    ({"calibration": X}, fxopt.InputError, "calibration must be an iterable of input tuples, not Tensor"),
    ({"calibration": [3]}, fxopt.InputError, "a calibration batch must be a tuple of inputs"),
    ({"calibration": [{"y": X}]}, fxopt.InputError, "does not fit the model's forward"),
    ({"example_inputs": np.zeros((2, 4))}, fxopt.InputError, "example_inputs must be a tuple of positional inputs"),
    ({"example_inputs": {"x": X}}, fxopt.InputError, "keyword inputs go into example_kwargs"),
    ({"example_inputs": (X, X)}, fxopt.InputError, "the model itself fails on the example inputs"),
    ({"example_inputs": (X[:, :3],)}, fxopt.InputError, "the model itself fails on the example inputs: RuntimeError"),
    ({"example_inputs": ("text",)}, fxopt.InputError, "the model itself fails on the example inputs"),
    ({"example_kwargs": {"y": X}}, fxopt.InputError, "the model itself fails on the example inputs: TypeError"),
    ({"dynamic_shapes": {"y": {0: "n"}}}, fxopt.InputError, "dynamic_shapes does not fit the inputs"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "message"), BAD)
def test_a_bad_argument_has_one_clear_error(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        compiled(**options)
    assert "\n\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_a_sparse_input_of_a_call_is_refused(backend: str) -> None:
    with pytest.raises(fxopt.InputError, match=r"layout torch.sparse_coo, expected a dense tensor"):
        compiled(backend=backend)(X.to_sparse())


def test_a_file_has_a_path() -> None:
    with pytest.raises(fxopt.ArtifactError, match="wants the path of a file"):
        compiled().save(3)  # type: ignore[arg-type]


def test_an_exported_program_with_dynamic_shapes_is_refused() -> None:
    exported = torch.export.export(MODEL, (X,))
    with pytest.raises(fxopt.InputError, match="has its dynamic sizes already"):
        compiled(exported, dynamic_shapes=({0: "n"},))


def test_what_is_wrong_with_the_options_is_found_before_the_model_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("captured")

    monkeypatch.setattr(compiler, "capture", never)
    for options, _, _ in BAD:
        if {"target", "passes", "backend", "backend_options"} & options.keys():
            with pytest.raises(fxopt.FxoptError):
                compiled(**options)
    with pytest.raises(fxopt.SpecError):
        fxopt.compile(MODEL, passes="canonicalise")  # lazy, too


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with torch and no other engine."""
    original = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        return None if name.split(".")[0] in ("onnxruntime", "openvino", "onnx") else original(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)


@pytest.mark.usefixtures("bare")
def test_a_missing_engine_says_what_to_install() -> None:
    with pytest.raises(fxopt.BackendUnavailable, match=r"backend 'onnx' needs .*onnxruntime.*pip install .*onnx"):
        compiled(backend="onnx")
    with pytest.raises(fxopt.BackendUnavailable, match=r"openvino.*pip install"):
        compiled(backend="openvino")


@pytest.mark.usefixtures("bare")
def test_auto_with_nothing_but_torch_is_torch() -> None:
    result = compiled(backend="auto")
    assert result.backend == "torch"
    assert isinstance(result.report.candidates["torch"], float)
    assert "pip install" in str(result.report.candidates["onnx"])


@pytest.mark.usefixtures("bare")
def test_no_engine_at_all_lists_why() -> None:
    target = fxopt.Target("x86", "x86_64", backends=("onnx",))
    with pytest.raises(fxopt.BackendUnavailable, match=r"no backend of target x86 takes this model: onnx: .*install"):
        compiled(backend="auto", target=target)


# --- engines that err


class _Executable(fxopt.Executable):
    def __init__(self, run: Callable[[Sequence[Any]], list[Any]]) -> None:
        self.run = run

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        return self.run(inputs)


class _Wrong(fxopt.Backend):
    """Answers with zeros."""

    name: ClassVar[str] = "wrong"

    def lower(self, program: Program, target: fxopt.Target, inputs: Sequence[Any]) -> fxopt.Executable:
        return _Executable(lambda flat: [torch.zeros(2, 4)])


class _Refuses(fxopt.Backend):
    name: ClassVar[str] = "refuses"

    def lower(self, program: Program, target: fxopt.Target, inputs: Sequence[Any]) -> fxopt.Executable:
        raise fxopt.UnsupportedOp("relu is beyond me")


def test_an_engine_that_answers_wrongly_is_caught() -> None:
    with pytest.raises(fxopt.VerifyError, match="backend wrong does not compute what the graph does: error 1"):
        compiled(backend=_Wrong())
    assert torch.equal(compiled(backend=_Wrong(), verify=False)(X), torch.zeros(2, 4))


def test_auto_passes_over_engines_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    original, own = registry.find_backend, {"wrong": _Wrong, "refuses": _Refuses}
    monkeypatch.setattr(registry, "find_backend", lambda name: own[name] if name in own else original(name))
    target = fxopt.Target("x86", "x86_64", backends=("wrong", "refuses", "torch"))
    with pytest.warns(UserWarning, match="backend wrong is left out, it failed"):
        result = compiled(backend="auto", target=target)
    assert result.backend == "torch"
    assert "does not compute what the graph does" in str(result.report.candidates["wrong"])
    assert result.report.candidates["refuses"] == "relu is beyond me"
    shown = " ".join(str(result.report).split())  # where its lines break follows from the length of a path in it
    assert "refuses: relu is beyond me" in shown


# --- calls


def test_it_is_called_like_the_model() -> None:
    assert torch.allclose(compiled()(X), MODEL(X), atol=1e-6)
    assert torch.allclose(compiled(example_inputs=X)(X), MODEL(X), atol=1e-6)
    assert torch.allclose(compiled(example_inputs=[X])(input=X), MODEL(X), atol=1e-6)
    assert torch.allclose(compiled(example_inputs=None, example_kwargs={"input": X})(X), MODEL(X), atol=1e-6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X[:1],), r"input 'input_?1?' has size 1 in dimension 0, expected 2; the model was captured for input"),
        ((X.double(),), "has dtype torch.float64, expected torch.float32"),
        ((), "does not fit the model's forward"),
        ((X, X), "does not fit the model's forward"),
        ((X.numpy(),), "is ndarray, expected a tensor"),
    ],
)
def test_wrong_inputs_at_call_time(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(fxopt.InputError, match=message):
        compiled()(*args)


def test_strides_of_the_inputs_are_free() -> None:
    model = chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    result = compiled(model, example_inputs=(image(),))
    x = torch.randn(2, 4, 6, 12)
    for y in (
        image().to(memory_format=torch.channels_last),
        x[..., ::2],
        image().transpose(2, 3),
        image()[:1].expand(2, -1, -1, -1),
    ):
        assert torch.allclose(result(y), model(y), atol=1e-5)


def test_parameters_and_subclasses_are_tensors() -> None:
    with torch.no_grad():
        assert torch.allclose(compiled()(nn.Parameter(X)), MODEL(X), atol=1e-6)


def test_grad_is_refused_with_what_to_do() -> None:
    result, x = compiled(), X.clone().requires_grad_()
    with pytest.raises(
        fxopt.InputError, match=r"requires grad.*torch\.no_grad\(\) or with detached inputs.*train the original"
    ):
        result(x)
    with torch.no_grad():
        y = result(x)
    with torch.inference_mode():
        z = result(x)
    assert torch.equal(y, z)
    assert not y.requires_grad
    assert not result(x.detach()).requires_grad


def test_a_model_compiled_in_inference_mode_works_outside() -> None:
    with torch.inference_mode():
        result = compiled()
    x = X.clone()
    assert torch.allclose(result(x), MODEL(x), atol=1e-6)
    weight = torch.ones(4, requires_grad=True)
    (result(x) * weight).sum().backward()  # the result may take part in autograd outside
    assert weight.grad is not None


def test_results_do_not_share_memory_with_each_other_or_the_model() -> None:
    model = Model(lambda m, x: (x + 0, m.w * 2, m.w.clone().view(-1), x.relu()), w=nn.Parameter(torch.randn(4)))
    result, x = compiled(model), X.clone()
    first = [y.clone() for y in result(x)]
    for y in result(x):
        y.fill_(7.0)
    assert torch.equal(x, X)
    assert all(torch.equal(a, b) for a, b in zip(first, result(x), strict=True))


def test_results_of_one_call_survive_the_next() -> None:
    result = compiled(chain(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    first = result(X)
    kept = first.clone()
    result(X + 1)
    assert torch.equal(first, kept)


def test_concurrent_calls() -> None:
    model = chain(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    result = compiled(model, example_inputs=(image(),))
    inputs = [image() for _ in range(32)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    start = threading.Barrier(4)

    def call(part: int) -> list[torch.Tensor]:
        start.wait(timeout=60)
        return [result(x) for x in inputs[part::4]]

    with ThreadPoolExecutor(4) as pool:
        for part, answers in enumerate(pool.map(call, range(4))):
            for y, z in zip(answers, expected[part::4], strict=True):
                assert torch.allclose(y, z, atol=1e-5)


def test_the_graph_is_whole_and_runs() -> None:
    result = compiled(chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), example_inputs=(image(),))
    (y,) = result.graph(image() * 0 + 1)
    assert torch.allclose(y, result(image() * 0 + 1), atol=1e-5)
    assert "fxopt.conv2d" in result.graph.code


def test_saving_where_there_is_no_format_says_so(tmp_path: Path) -> None:
    with pytest.raises(fxopt.ArtifactError, match=r"cannot write '\.onnx' files: .* backend='onnx' writes"):
        compiled().save(tmp_path / "model.onnx")


def test_a_foreign_target_compiles_and_says_when_called() -> None:
    result = compiled(target=fxopt.Target("arm", "aarch64", backends=("torch",)))
    assert result.report.latency_ms == {}
    assert result.report.error is None
    with pytest.raises(fxopt.BackendUnavailable, match=r"compiled for target 'arm' \(aarch64\), which cannot run here"):
        result(X)


def test_half_models_compile_in_half() -> None:
    model = chain(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4)).bfloat16()
    result = compiled(model, example_inputs=(X.bfloat16(),))
    assert result(X.bfloat16()).dtype is torch.bfloat16
    assert result.report.exact


def test_constants_alone() -> None:
    result = compiled(Model(lambda m, x: m.w * 2, w=nn.Parameter(torch.ones(3))))
    assert torch.equal(result(X), torch.full((3,), 2.0))
    assert compiled(nn.Identity())(X) is not None


def test_names_of_the_public_surface() -> None:
    for name in fxopt.__all__:
        assert getattr(fxopt, name) is not None
    assert set(fxopt.__all__) <= set(dir(fxopt))
    with pytest.raises(AttributeError, match="no attribute 'compil'"):
        fxopt.compil  # noqa: B018
