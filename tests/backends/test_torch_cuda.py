"""Target "cuda" on the PyTorch backend: what is compiled without a GPU, and, where there is one, what it computes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import fxopt
from fxopt import measure, verify
from fxopt.backends import _torch_cuda as cuda
from fxopt.backends import _torch_cuda_int8 as int8
from fxopt.backends._torch_codegen import generate
from fxopt.capture import capture
from fxopt.target import resolve_target
from tests.passes.models import Model, chain

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
X = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))


def mlp(hidden: int = 256) -> nn.Module:
    torch.manual_seed(0)
    return chain(nn.Linear(96, hidden), nn.GELU(), nn.Linear(hidden, 64), nn.ReLU(), nn.Linear(64, 96))


def compiled(model: nn.Module, passes: str | None = None, x: torch.Tensor = X, **options: Any) -> fxopt.CompiledModel:
    data = [(x + 0.01 * i,) for i in range(3)] if passes and "insert" in passes else None
    how = {"target": "cuda", "backend": "torch", "passes": passes, "calibration": data} | options
    return fxopt.compile(model, example_inputs=(x,), **how)


# --- without a GPU


@NO_GPU
@pytest.mark.parametrize(
    "passes", [None, "cast-precision{dtype=bf16}", "cast-precision{dtype=fp16}", "insert-fake-quant", "sparsify-2-4"]
)
def test_everything_compiles_and_a_call_says_what_is_missing(passes: str | None) -> None:
    model = compiled(mlp(), passes)
    assert model.report.latency_ms == {}
    with pytest.raises(fxopt.BackendUnavailable, match=r"compiled for target 'cuda' .*since no CUDA device is here"):
        model(X)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_low_precision_is_in_the_graph(name: str, dtype: torch.dtype) -> None:
    graph = compiled(mlp(), f"cast-precision{{dtype={name}}}").graph
    weights = [value for value in graph.state_dict().values() if value.dim() == 2]
    assert len(weights) == 3
    assert all(weight.dtype is dtype for weight in weights)


def test_turing_has_no_bf16_and_no_sparse_tensor_cores() -> None:
    with pytest.warns(UserWarning, match="target sm_75 has no native bf16 arithmetic.*; it has fp16"):
        compiled(mlp(), "cast-precision{dtype=bf16}", target="sm_75")
    with pytest.warns(UserWarning, match="no engine for sm_75 computes 2:4 weights faster"):
        compiled(mlp(), "sparsify-2-4", target="sm_75")


@NO_GPU
@pytest.mark.parametrize(
    ("passes", "kind"),
    [
        (None, "FLOAT"),
        ("cast-precision{dtype=fp16}", "FLOAT16"),
        ("cast-precision{dtype=bf16}", "BFLOAT16"),
        ("insert-fake-quant", "INT8"),
        ("sparsify-2-4,cast-precision{dtype=fp16}", "FLOAT16"),
    ],
)
def test_an_onnx_file_is_what_there_is_for_tensorrt(passes: str | None, kind: str, tmp_path: Path) -> None:
    model = compiled(mlp(), passes, backend="onnx")
    with pytest.raises(fxopt.BackendUnavailable, match=r"since no CUDA device is here: save it with \.save\('model\."):
        model(X)
    model.save(tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    stored = {one.name: one for one in onnx.load(tmp_path / "model.onnx").graph.initializer}
    weights = [one for one in stored.values() if len(one.dims) == 2]
    assert len(weights) == 3
    assert {onnx.TensorProto.DataType.Name(one.data_type) for one in weights} == {kind}
    if passes is not None and "sparsify" in passes:
        assert all((onnx.numpy_helper.to_array(one) == 0).mean() == 0.5 for one in weights)


# --- int8: torch._int_mm gives the same integers on the CPU


def lowered(model: nn.Module, passes: str, x: torch.Tensor = X) -> tuple[list[Any], list[Any], list[str], str]:
    """What the quantized graph computes, what the one with integer kernels does, its remarks, its source."""
    program = compiled(model, passes, x)._current("graph").whole_program()
    expected = verify.run(program, [x])
    kept = program.tensors()
    originals, notes = int8.lower(program, "cpu")
    code = generate(program)
    with torch.no_grad():
        outputs = code.run([x])
    for name, get in originals.items():
        assert torch.equal(get(), kept[name])
    return expected, outputs, notes, code.source


@pytest.mark.parametrize("activations", ["static", "dynamic"])
@pytest.mark.parametrize("rows", [64, 5])
def test_linears_are_multiplied_as_integers(activations: str, rows: int) -> None:
    expected, outputs, notes, source = lowered(mlp(512), f"insert-fake-quant{{activations={activations}}}", X[:rows])
    count = 2 if (activations, rows) == ("static", 5) else 3  # the last one is too small to be worth it then
    assert notes == [f"int8: {count} linears on integer tensor cores"]
    assert source.count("integer_linear(") == count
    assert ("quantize_dynamic(" in source) is (activations == "dynamic")
    difference = verify.compare(expected, outputs)
    assert difference.error < 1e-2, difference  # a step of 1/127 here and there
    assert difference.cosine > 0.9999


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_low_precision_and_residuals_around_integers(activations: str) -> None:
    model = Model(lambda m, x: (m.b(m.a(x).relu()) + x).relu(), a=nn.Linear(96, 256), b=nn.Linear(256, 96, bias=False))
    passes = f"insert-fake-quant{{activations={activations}}},cast-precision{{dtype=bf16}}"
    expected, outputs, notes, _ = lowered(model, passes)
    assert notes == ["int8: 2 linears on integer tensor cores"]
    assert verify.compare(expected, outputs).error < 3e-2


@pytest.mark.parametrize("zero_point", [None, 3, torch.tensor(-5, dtype=torch.int32)])
@pytest.mark.parametrize("rows", [1, 31, 40])
def test_the_kernel_is_exact_in_integers(zero_point: Any, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, w = (torch.randint(-127, 128, size, dtype=torch.int8, generator=generator) for size in ((rows, 16), (24, 16)))
    scales, bias = torch.rand(24) + 0.1, torch.randn(24)
    y = int8.integer_linear(q[None], w.t(), 0.5, zero_point, scales, w.sum(1, dtype=torch.int32), bias)
    exact = (q.double() - float(zero_point or 0)) @ w.double().t() * scales.double() * 0.5 + bias.double()
    assert y.shape == (1, rows, 24)
    torch.testing.assert_close(y[0].double(), exact, rtol=1e-5, atol=1e-3)


def test_ranges_of_a_call_are_those_of_choose_qparams() -> None:
    for x in (X, X.abs() + 1, -X.abs(), torch.zeros(4, 8)):
        scale, zero_point = torch.ops.quantized_decomposed.choose_qparams.tensor(x, -127, 127, 1e-7, torch.int8)
        q, mine, zero = int8.quantize_dynamic(x, -127, 127, 1e-7)
        assert abs(float(mine) - float(scale)) <= 1e-6 * float(scale)
        assert int(zero) == int(zero_point)
        assert (q.float() - ((x / scale).round() + zero_point).clamp(-127, 127)).abs().max() <= 1


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "sizes": (lambda: mlp(508), "insert-fake-quant", "2 ×: .*sizes must be multiples of 8|1 ×: 508 × 96: sizes must"),
    "unsigned": (mlp, "insert-fake-quant{scheme=torch}", "its activations are torch.uint8, not int8"),
    "weights alone": (mlp, "insert-fake-quant{activations=none}", "its activations are not quantized"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_others_stay_in_floats_for_a_reason(case: str) -> None:
    build, passes, reason = REFUSED[case]
    expected, outputs, notes, _ = lowered(build(), passes)
    assert any(re.search(reason, note) for note in notes), notes
    assert verify.compare(expected, outputs).error < 2e-2
    assert any(re.search(reason, note) for note in compiled(build(), passes).report.notes)


def test_convolutions_stay_in_floats_for_a_reason() -> None:
    x = torch.randn(2, 8, 24, 24)
    model = chain(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(32 * 400, 16))
    made = compiled(model, "insert-fake-quant", x)
    assert "PyTorch has no int8 kernel for convolutions on GPUs" in str(made.report.skips)
    assert made.report.notes[0] == "int8: 1 linears on integer tensor cores"


# --- on a GPU, with the GPU taken out


def test_a_program_moves_with_all_that_it_makes() -> None:
    model = Model(lambda m, x: m.a(x) + torch.arange(6, device="cpu") + torch.zeros(6), a=nn.Linear(4, 6))
    program = capture(model, (torch.randn(2, 4),)).program
    assert cuda.device_of(program) == "cpu"
    away = cuda.moved(program, torch.device("meta"))
    (y,) = generate(away).run([torch.randn(2, 4, device="meta")])
    assert y.device.type == "meta"
    assert y.shape == (2, 6)
    assert all(value.is_cpu for value in program.tensors().values()), "the readable graph stays"
    assert cuda.destination(program, resolve_target("x86")) is None


def test_branches_move_too() -> None:
    def branches(m: Any, x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: m.a(x) + torch.ones(6, device="cpu"), lambda x: m.a(x) * m.b, (x,))

    program = capture(Model(branches, a=nn.Linear(4, 6), b=torch.ones(6)), (torch.randn(2, 4),)).program
    away = cuda.moved(program, torch.device("meta"))
    bodies = [value for value in away.constants.values() if isinstance(value, torch.fx.GraphModule)]
    assert len(bodies) == 2
    devices = [a for body in bodies for node in body.graph.nodes for a in (*node.args, *node.kwargs.values())]
    assert torch.device("cpu") not in devices
    assert torch.device("meta") in devices
    before = [value for value in program.constants.values() if isinstance(value, torch.fx.GraphModule)]
    assert not {id(body) for body in before} & {id(body) for body in bodies}


def fake_record(call: Callable[[], list[Any]]) -> tuple[Callable[[], None], list[Any]]:
    """A recording that runs the call again, and writes where the first outputs are."""
    outputs = call()

    def replay() -> None:
        for mine, new in zip(outputs, call(), strict=True):
            if isinstance(mine, torch.Tensor):
                mine.copy_(new)

    return replay, outputs


def test_a_recording_answers_each_call_anew() -> None:
    calls: list[int] = []

    def run(inputs: Sequence[Any]) -> list[Any]:
        calls.append(1)
        return [inputs[0] * 2, 7]

    replayed = cuda.Replayed(run, [torch.ones(3)], fake_record)
    first, seven = replayed([torch.full((3,), 2.0)])
    second, _ = replayed([torch.full((3,), 5.0)])
    assert (first.tolist(), second.tolist(), seven) == ([4.0] * 3, [10.0] * 3, 7)
    assert len(calls) == 3


def test_a_recording_is_kept_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(nn.Linear(4, 4), (torch.randn(2, 4),)).program
    inputs, run = [torch.randn(2, 4)], generate(program).run

    def chosen(ratio: float, wanted: bool | None) -> tuple[Any, list[str]]:
        monkeypatch.setattr(measure, "race", lambda first, second: (first(), second(), ratio)[2])
        return cuda.replayed(run, program, inputs, wanted, record=fake_record, wait=lambda: None)

    assert isinstance(chosen(0.5, None)[0], cuda.Replayed)
    assert "CUDA graph" in chosen(0.5, None)[1][0]
    assert chosen(0.99, None) == (run, [])
    assert isinstance(chosen(0.99, True)[0], cuda.Replayed)
    assert chosen(0.5, False) == (run, [])
    with torch.no_grad():
        assert torch.equal(chosen(0.5, None)[0](inputs)[0], run(inputs)[0])


def test_what_cannot_be_recorded_says_so() -> None:
    def failing(call: Callable[[], list[Any]]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    program = capture(nn.Linear(4, 4), (torch.randn(2, 4),)).program
    run = generate(program).run
    with torch.no_grad():
        kept, notes = cuda.replayed(run, program, [X[:2, :4]], None, record=failing)
        assert kept is run
        assert notes == ["no CUDA graph: operation not permitted when stream is capturing"]
        with pytest.raises(fxopt.UnsupportedOp, match="cuda_graphs: this model cannot be recorded"):
            cuda.replayed(run, program, [X[:2, :4]], True, record=failing)
    shapes = ({0: torch.export.Dim("n", min=2)},)
    dynamic = capture(nn.Linear(4, 4), (torch.randn(2, 4),), dynamic_shapes=shapes).program
    assert cuda.replayed(run, dynamic, [X[:2, :4]], None, record=failing) == (run, [])
    with pytest.raises(fxopt.UnsupportedOp, match="this model has dynamic ones"):
        cuda.replayed(run, dynamic, [X[:2, :4]], True, record=failing)


# --- with a GPU


CASES = [None, "cast-precision{dtype=fp16}", "insert-fake-quant", "insert-fake-quant{activations=dynamic}"]


@GPU
@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("passes", [*CASES, "sparsify-2-4,cast-precision{dtype=bf16}"])
def test_it_runs_there(passes: str | None, where: str) -> None:
    model, x = mlp(), X.to(where)
    made = compiled(model.to(where), passes, x)
    y = made(x)
    assert y.device.type == where
    assert verify.compare(list(made.graph(x)), [y]).error < (1e-4 if passes is None else 5e-2)


@GPU
@pytest.mark.parametrize("graphs", [True, False])
def test_one_image_with_and_without_a_cuda_graph(graphs: bool) -> None:
    model = chain(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 8)).cuda()
    made = compiled(model, x=torch.randn(1, 3, 8, 8).cuda(), backend_options={"cuda_graphs": graphs})
    for _ in range(3):
        x = torch.randn(1, 3, 8, 8).cuda()
        torch.testing.assert_close(made(x), model(x), rtol=1e-3, atol=1e-3)
    assert any("CUDA graph" in note for note in made.report.notes) is graphs
