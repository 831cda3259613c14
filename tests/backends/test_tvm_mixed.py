"""Mixed mode: TVM runs what it can of a model, PyTorch the rest, and the two together compute what the model does."""

from __future__ import annotations

import itertools
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.backends._tvm_parts import Part, split
from fxopt.backends.torch import TorchBackend
from fxopt.backends.tvm import TvmBackend, TvmExecutable
from fxopt.capture import capture
from fxopt.execute import evaluate
from fxopt.program import Program
from fxopt.target import resolve_target
from tools import models

pytest.importorskip("tvm")

from fxopt.backends._tvm_mixed_executable import MixedExecutable

MIXED = {"mixed": True}


def compiled(model: nn.Module, *inputs: Any, **options: Any) -> fxopt.CompiledModel:
    return fxopt.compile(
        model.eval(), example_inputs=inputs, backend="tvm", backend_options=MIXED, verify=True, **options
    )


def executable(model: fxopt.CompiledModel) -> MixedExecutable:
    made = model._current("executable").executable
    assert isinstance(made, MixedExecutable)
    return made


def engines(model: fxopt.CompiledModel) -> str:
    """The engines of the parts in order: "tvm torch tvm"."""
    return " ".join("torch" if step.on_torch else "tvm" for step in executable(model).steps)


def same(model: nn.Module, compiled_model: fxopt.CompiledModel, *inputs: Any) -> None:
    with torch.no_grad():
        expected = model(*inputs)
    torch.testing.assert_close(compiled_model(*inputs), expected, rtol=1e-4, atol=1e-5)


# --- a layer in the middle


class Spectral(nn.Module):
    """A global filter, as in GFNet."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, side, side // 2 + 1, 2) / side)

    def forward(self, x: torch.Tensor) -> Any:
        return torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(self.weight), s=x.shape[-2:])  # filter


class Filtered(nn.Module):
    """A CNN with a Fourier filter between its convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.filter, self.norm = nn.Conv2d(3, 16, 3, padding=1), Spectral(16, 8), nn.BatchNorm2d(16)
        self.body, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.relu(self.stem(image))
        y = F.relu(self.body(self.norm(self.filter(x))) + x)
        return self.head(y.mean((2, 3))), torch.special.bessel_j0(y)  # bessel


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.endswith(f"# {text}"))


def test_a_cnn_with_a_fourier_layer_and_a_dynamic_batch() -> None:
    torch.manual_seed(0)
    model = Filtered()
    mixed = compiled(model, torch.randn(2, 3, 8, 8), dynamic_shapes={"image": {0: "batch"}})
    assert engines(mixed) == "tvm torch tvm torch"
    for batch in (2, 1, 5):
        same(model, mixed, torch.randn(batch, 3, 8, 8))


@pytest.fixture(scope="module")
def filtered() -> fxopt.CompiledModel:
    return compiled(Filtered(), torch.randn(2, 3, 8, 8))


def test_the_report_tells_what_runs_where_and_why(filtered: fxopt.CompiledModel) -> None:
    notes = filtered.report.notes
    assert re.fullmatch(r"\d+ ops in 2 parts on TVM, \d+ in 2 parts on PyTorch", notes[0])
    assert any(f"test_tvm_mixed.py:{line_of('filter')} (TVM has no importer for DFT)" in note for note in notes)
    assert any("aten.special_bessel_j0" in note and f":{line_of('bessel')} (ONNX" in note for note in notes)


def test_without_it_every_op_is_listed_with_its_line() -> None:
    with pytest.raises(fxopt.UnsupportedOp) as info:
        fxopt.compile(Filtered(), example_inputs=(torch.randn(2, 3, 8, 8),), backend="tvm")
    message = str(info.value)
    assert f"aten.special_bessel_j0.default at {__file__}:{line_of('bessel')}" in message
    assert f"aten.fft_rfft2.default at {__file__}:{line_of('filter')}" in message
    assert "mixed" in message
    assert len(info.value.nodes) == 2


def test_complex_weights_are_kept_as_they_are() -> None:
    """They are pairs of numbers in an ONNX file that TVM declines."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), Spectral(16, 8), nn.Conv2d(16, 4, 1))
    mixed = compiled(model, torch.randn(2, 3, 8, 8))
    image = torch.randn(2, 3, 8, 8)
    same(model, mixed, image)
    torch.testing.assert_close(mixed.graph(image)[0], mixed(image), rtol=1e-4, atol=1e-5)


class TwoSpectra(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        y = torch.fft.rfft(x).abs()  # first
        return torch.bincount(x.int().flatten().abs()), torch.fft.rfft(y + 1).abs()  # second


def test_ops_after_an_unsupported_one_are_listed_too() -> None:
    with pytest.raises(fxopt.UnsupportedOp) as info:
        fxopt.compile(TwoSpectra(), example_inputs=(torch.randn(4, 8),), backend="tvm")
    for line in ("first", "second"):
        assert re.search(rf"fft_rfft\S* at \S*:{line_of(line)} ", str(info.value))


# --- real architectures


class Crnn(nn.Module):
    """Text recognition: a CNN, its columns as a sequence for an LSTM, a linear head (Shi et al., 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
        self.rnn = nn.LSTM(16 * 4, 12, bidirectional=True, batch_first=True)
        self.head = nn.Linear(24, 7)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, (_, cell) = self.rnn(self.cnn(image).permute(0, 3, 1, 2).flatten(2))
        return self.head(y).log_softmax(-1), cell


def test_an_lstm_between_a_cnn_and_a_head() -> None:
    torch.manual_seed(0)
    model = Crnn()
    mixed = compiled(model, torch.randn(2, 1, 8, 20), dynamic_shapes={"image": {0: "batch"}})
    assert engines(mixed) == "tvm torch tvm"
    for batch in (2, 4, 3):
        same(model, mixed, torch.randn(batch, 1, 8, 20))


@torch.library.custom_op("fxopt_tests_mixed::keep", mutates_args=())
def keep(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Boxes that no better one overlaps, best first, as torchvision's nms."""
    left = scores.argsort(descending=True, stable=True).tolist()
    kept = []
    while left:
        best = left.pop(0)
        kept.append(best)
        left = [i for i in left if _overlap(boxes[best], boxes[i]) <= threshold]
    return torch.tensor(kept, dtype=torch.int64)


@keep.register_fake
def _(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    low, high = torch.maximum(a[:2], b[:2]), torch.minimum(a[2:], b[2:])
    shared = (high - low).clamp(min=0).prod()
    return float(shared / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - shared))


class Detector(nn.Module):
    """A backbone, boxes and scores of each cell, those that survive, and a head on the features of these."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
        self.boxes, self.scores = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 1, 1)
        self.head = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.backbone(image)
        center, size = self.boxes(features)[0].flatten(1).T.split(2, -1)
        size = F.softplus(size) * 0.1
        boxes, scores = torch.cat([center - size, center + size], -1), self.scores(features)[0].flatten()
        kept = keep(boxes, scores.sigmoid(), 0.3)  # the custom op
        return {"boxes": boxes[kept], "classes": self.head(features[0].flatten(1).T[kept]).softmax(-1)}


def test_a_detector_whose_number_of_boxes_depends_on_the_data() -> None:
    torch.manual_seed(0)
    model = Detector()
    mixed = compiled(model, torch.randn(1, 3, 24, 24))
    assert engines(mixed) == "tvm torch tvm"
    counts = set()
    for seed in range(4):
        torch.manual_seed(seed)
        image = torch.randn(1, 3, 24, 24) * 3**seed
        same(model, mixed, image)
        counts.add(len(mixed(image)["boxes"]))
    assert len(counts) > 1
    assert any(
        "fxopt_tests_mixed.keep" in note and f":{line_of('the custom op')}" in note for note in mixed.report.notes
    )


@pytest.mark.slow
def test_a_transformer_that_mixes_tokens_by_fourier_transforms() -> None:
    models.declare_torchvision_operators()
    from transformers import FNetConfig, FNetModel

    torch.manual_seed(0)
    config = FNetConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, intermediate_size=64, max_position_embeddings=32
    )
    model = FNetModel(config).eval()
    mixed = compiled(model, torch.randint(0, 64, (2, 16)), dynamic_shapes={"input_ids": {0: "batch"}})
    assert engines(mixed).count("torch") == 3
    for batch in (2, 1, 3):
        ids = torch.randint(0, 64, (batch, 16))
        with torch.no_grad():
            expected = model(ids)
        torch.testing.assert_close(mixed(ids)[0], expected[0], rtol=1e-4, atol=1e-4)


# --- what crosses the borders, and what does not


class Sizes(nn.Module):
    """Sizes and numbers are read on both sides, and returned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 64), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        y = self.a(x) * x.shape[0]
        z = torch.fft.fft(y, dim=0).abs().sum(0) / (x.shape[0] // 2)
        return self.b(z.expand(x.shape[0], -1)) / x.shape[0], x.shape[0] * 2


def test_sizes_are_computed_where_they_are_read() -> None:
    torch.manual_seed(0)
    model = Sizes()
    mixed = compiled(model, torch.randn(6, 4), dynamic_shapes={"x": {0: torch.export.Dim("n", min=2, max=32)}})
    for n in (6, 2, 9):
        same(model, mixed, torch.randn(n, 4))


class Halves(nn.Module):
    """Half of a size crosses a border, and no input of the part behind it has the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        y = self.a(image)
        z: torch.Tensor = F.relu(self.b(torch.special.bessel_j1(y)))
        return torch.add(z, y.mean((2, 3), keepdim=True))


@pytest.mark.slow
@pytest.mark.parametrize("multiple", [1, 4])
def test_sizes_that_are_expressions_cross_borders(multiple: int) -> None:
    torch.manual_seed(0)
    model, side = Halves(), torch.export.Dim("side", min=5 if multiple == 1 else 2, max=64)
    shapes = {"image": {2: side if multiple == 1 else multiple * side, 3: torch.export.Dim("width", min=5)}}
    mixed = compiled(model, torch.randn(1, 3, 16, 12), dynamic_shapes=shapes)
    assert engines(mixed) == "tvm torch tvm"
    for height, width in ((16, 12), (8, 9), (28, 7)):
        same(model, mixed, torch.randn(1, 3, height, width))


class Stateful(nn.Module):
    """Writes a row of a cache, as a decoder does, counts its calls, and swaps two buffers."""

    count: torch.Tensor
    cache: torch.Tensor
    old: torch.Tensor
    new: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(6, 8))
        self.register_buffer("old", torch.zeros(8))
        self.register_buffer("new", torch.ones(8))

    def forward(self, x: torch.Tensor, place: torch.Tensor) -> Any:
        self.cache.index_copy_(0, place, self.project(x))
        self.count.add_(1)
        before = self.old.clone()
        self.old.copy_(self.new)
        self.new.copy_(before + x[0])
        return torch.softmax(x @ self.cache.T, -1) @ self.cache + self.count + torch.fft.rfft(self.new).abs().sum()


def test_state_is_kept_between_calls_and_in_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Stateful()
    mixed = compiled(model, torch.randn(1, 8), torch.tensor([0]))
    for place in (0, 3, 5, 3):
        same(model, mixed, torch.randn(1, 8), torch.tensor([place]))
    assert "tvm" in engines(mixed)
    mixed.save(tmp_path / "m.fxopt")
    loaded = fxopt.load(tmp_path / "m.fxopt")
    for place in (1, 5):
        same(model, loaded, torch.randn(1, 8), torch.tensor([place]))


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        deep = self.b(self.a(x) + torch.rand_like(x))
        return deep * torch.rand_like(deep) + torch.randn(8)


def test_random_numbers_are_drawn_in_the_order_of_the_model() -> None:
    torch.manual_seed(0)
    model, x = Noisy(), torch.randn(4, 8)
    mixed = compiled(model, x)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(mixed(x), expected.detach(), rtol=1e-4, atol=1e-5)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = self.a(torch.view_as_real(x).flatten(1))
        return torch.view_as_complex(y.unflatten(1, (4, 2))), y.relu(), x


def test_complex_numbers_stay_with_pytorch() -> None:
    torch.manual_seed(0)
    model = Complex()
    mixed = compiled(model, torch.randn(3, 4, dtype=torch.complex64))
    same(model, mixed, torch.randn(3, 4, dtype=torch.complex64))
    assert "complex numbers" in "".join(mixed.report.notes)


class LowPrecision(nn.Module):
    """bfloat16 crosses the borders."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32).bfloat16(), nn.Linear(32, 8).bfloat16()

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(torch.cummax(self.a(x), 1)[0])  # cummax


@pytest.mark.slow
def test_bfloat16_crosses_borders() -> None:
    torch.manual_seed(0)
    model, x = LowPrecision(), torch.randn(4, 16).bfloat16()
    mixed = compiled(model, x)
    assert engines(mixed) == "tvm torch tvm"
    with torch.no_grad():
        torch.testing.assert_close(mixed(x), model(x), rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "passes", ["insert-fake-quant", "insert-fake-quant{activations=none,weights=int4}", "cast-precision{dtype=bf16}"]
)
def test_low_precision_on_both_sides_of_a_border(passes: str) -> None:
    torch.manual_seed(0)
    parts = nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), Spectral(32, 20), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()
    model, image = nn.Sequential(*parts, nn.Flatten(2), nn.Linear(400, 10)), torch.randn(2, 8, 20, 20)
    mixed = compiled(model, image, passes=passes, calibration=[(image,)])  # and verified
    assert engines(mixed) == "tvm torch tvm"
    if passes == "insert-fake-quant":
        size = sum(p.numel() * 4 for layer in (parts[0], parts[3], model[6]) for p in layer.parameters())
        integers = sum(step.engine.nbytes() or 0 for step in executable(mixed).steps if not step.on_torch)
        assert integers < 0.4 * size


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = lambda y: (y.abs() + 1,)  # noqa: E731 - while_loop wants functions
        [y] = torch._higher_order_ops.while_loop(lambda y: y.sum() < 90, step, (self.a(x),))
        z: torch.Tensor = self.b(torch.cond(y.sum() > 100, torch.sin, torch.cos, (y,)))
        return z


@pytest.mark.slow
def test_loops_and_branches() -> None:
    torch.manual_seed(0)
    model = Loop()
    mixed = compiled(model, torch.randn(3, 4))
    for scale in (1, 50):
        same(model, mixed, torch.randn(3, 4) * scale)
    assert engines(mixed).startswith("tvm torch")


# --- what the executable does


def test_a_model_that_tvm_can_run_is_a_plain_one(tmp_path: Path) -> None:
    plain = compiled(nn.Linear(8, 8), torch.randn(2, 8))
    assert isinstance(plain._current("executable").executable, TvmExecutable)
    plain.save(tmp_path / "m.so")
    assert (tmp_path / "m.so").is_file()


class Spectrum(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return torch.fft.rfft(x.relu()).abs() + 1


def test_a_model_of_which_nothing_is_worth_tvm_is_declined() -> None:
    with pytest.raises(fxopt.UnsupportedOp, match=r"fft_rfft.*no other part of this model is worth it.*'torch'"):
        compiled(Spectrum(), torch.randn(4, 8))


def test_artifacts_are_compiled_again_and_a_library_is_refused(tmp_path: Path) -> None:
    model, image = Crnn(), torch.randn(2, 1, 8, 20)
    mixed = compiled(model, image)
    mixed.save(tmp_path / "m.fxopt")
    loaded = fxopt.load(tmp_path / "m.fxopt")
    torch.testing.assert_close(loaded(image), mixed(image))
    assert engines(loaded) == engines(mixed)
    with pytest.raises(fxopt.ArtifactError, match=r"PyTorch runs 1 of its 3 parts: save it as \.fxopt"):
        mixed.save(tmp_path / "m.so")
    assert mixed.graph(image)[0].shape == (2, 10, 7)  # all weights can still be had


def test_the_weights_are_held_once() -> None:
    model = nn.Sequential(nn.Linear(256, 256), Spectrum(), nn.Linear(129, 256))
    mixed = compiled(model, torch.randn(4, 256))
    size = sum(p.numel() * 4 for p in model.parameters())
    assert size <= executable(mixed).nbytes() < 1.2 * size
    assert not [t for t in mixed._current("program").program.tensors().values() if t.dim() > 1]


def test_values_are_let_go_after_their_last_part(filtered: fxopt.CompiledModel) -> None:
    mixed = executable(filtered)
    read = [set(step.reads) | set(step.gives) for step in mixed.steps]
    dying = [set(names) for names in mixed._dying]
    assert [names for names in dying if names]
    for i, names in enumerate(dying):
        assert names <= read[i]
        assert not any(names & later for later in read[i + 1 :])


def test_concurrent_calls_and_results_of_earlier_ones(filtered: fxopt.CompiledModel) -> None:
    images = [torch.randn(2, 3, 8, 8) for _ in range(3)]
    expected = [filtered(image) for image in images]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            results = filtered(images[i])
            wrong.extend(i for a, b in zip(results, expected[i], strict=True) if not torch.allclose(a, b, atol=1e-6))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_foreign_target_compiles_and_says_that_it_cannot_run() -> None:
    mixed = compiled(Filtered(), torch.randn(2, 3, 8, 8), target="cortex-a76")
    with pytest.raises(fxopt.BackendUnavailable, match=r"cortex-a76.*\.fxopt"):
        mixed(torch.randn(2, 3, 8, 8))


# --- what is declined, where TVM does not say it


@pytest.mark.parametrize(("trials", "shares"), [(12, [6, 3, 3]), (10, [5, 2, 3]), (1, [0, 0, 1]), (0, [0, 0, 0])])
def test_parts_share_the_budget_of_tuning(monkeypatch: pytest.MonkeyPatch, trials: int, shares: list[int]) -> None:
    from fxopt.backends import _tvm_tuning
    from fxopt.backends._tvm_workloads import Tiles

    budgets: list[tuple[int, float]] = []

    def tuned(file: Any, machine: Any, threads: Any, tuning: Any) -> Any:
        budgets.append((tuning.trials, tuning.seconds))
        return Tiles(), "not at all"

    monkeypatch.setattr(_tvm_tuning, "tuned", tuned)
    ends = nn.Linear(5, 8), Spectrum(), nn.Linear(5, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), Spectrum(), *ends)
    options = {**MIXED, "tune": {"trials": trials, "seconds": 40}}
    mixed = fxopt.compile(model, example_inputs=(torch.randn(2, 8),), backend="tvm", backend_options=options)
    assert budgets[-3:] == list(zip(shares, (20.0, 10.0, 10.0), strict=True))
    assert mixed.report.notes.count("tuned: not at all") == 3


class Rooted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).abs().sqrt()
        return x


def test_an_op_on_which_tvm_fails_without_a_word_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    tries = []
    build = TvmBackend.build

    def failing(self: TvmBackend, file: Any, target: Any) -> Any:
        tries.append(file)
        if any(node.op_type == "Sqrt" for node in onnx.load(file.path).graph.node):
            raise fxopt.UnsupportedOp("TVM cannot compile this model: no idea")
        return build(self, file, target)

    monkeypatch.setattr(TvmBackend, "build", failing)
    torch.manual_seed(0)
    model, x = Rooted(), torch.randn(2, 8)
    mixed = compiled(model, x)
    same(model, mixed, x)
    assert engines(mixed) == " ".join(["tvm torch"] * 4)
    assert len([note for note in mixed.report.notes if "aten.sqrt" in note and "no idea" in note]) == 1
    assert len(tries) < 12  # one search for all four
    with pytest.raises(fxopt.UnsupportedOp, match=r"aten\.sqrt\.default at \S*test_tvm_mixed.py:\d+ .*no idea.*mixed"):
        fxopt.compile(model, example_inputs=(x,), backend="tvm")


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.conv2d(x, self.weight)  # convolved


def test_what_a_pass_has_made_is_declined_with_the_line_of_the_op_that_it_is_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter

    convert = ONNXGraphImporter._convert_operator

    def failing(self: Any, op_name: str, *args: Any) -> Any:
        if op_name == "QuantizeLinear":
            raise NotImplementedError("not today")
        return convert(self, op_name, *args)

    monkeypatch.setattr(ONNXGraphImporter, "_convert_operator", failing)
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(fxopt.UnsupportedOp) as info:
        fxopt.compile(
            Convolved(), example_inputs=(x,), backend="tvm", passes="insert-fake-quant", calibration=[(x,)] * 2
        )
    place = f"{__file__}:{line_of('convolved')}"
    assert f"quantize_per_tensor.default at {place} (TVM cannot import QuantizeLinear: not today)" in str(info.value)


@pytest.mark.slow
def test_conformance() -> None:
    found = fxopt.conformance.run(TvmBackend(mixed=True))
    assert not found.failures, found
    declined = {one.case for one in found if one.verdict == "declined"}
    assert not [
        name for name in declined if not re.match("recurrent|index|fourier|dtype: complex|state|control|sparse", name)
    ]
    assert "state: a cache that is written" not in declined


# --- how programs are cut


def run_parts(parts: list[Part], program: Program, inputs: list[Any]) -> list[Any]:
    """The outputs of *program* where its parts run one after another, all on PyTorch."""
    values = dict(zip([n.name for n in program.placeholders], inputs, strict=True))
    values |= {n.name: program.constants[str(n.target)] for n in program.graph.find_nodes(op="get_attr")}
    for part in parts:
        engine = TorchBackend().lower(part.program(), resolve_target("x86"), [])
        results = engine([values[node.name] for node in part.reads])
        values |= zip([node.name for node in part.gives], results, strict=True)
    return [values[r.name] if isinstance(r, torch.fx.Node) else r for r in program.output.args[0]]  # type: ignore[union-attr]


PROGRAMS: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...], Any]]] = {
    "filter": lambda: (Filtered(), (torch.randn(2, 3, 8, 8),), {"image": {0: "batch"}}),
    "detector": lambda: (Detector(), (torch.randn(1, 3, 24, 24),), None),
    "sizes": lambda: (Sizes(), (torch.randn(6, 4),), {"x": {0: torch.export.Dim("n", min=2, max=32)}}),
    "state": lambda: (Stateful(), (torch.randn(1, 8), torch.tensor([1])), None),
    "lstm": lambda: (Crnn(), (torch.randn(2, 1, 8, 20),), None),
    "transformer": lambda: (
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
        (torch.randn(2, 5, 16),),
        ({0: "batch", 1: "tokens"},),
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_however_it_is_cut_the_parts_compute_the_whole(name: str) -> None:
    torch.manual_seed(0)
    model, args, shapes = PROGRAMS[name]()
    captured = capture(model.eval(), args, None, shapes)
    program, draw = captured.program, random.Random(0)
    calls = [node.name for node in program.graph.nodes if node.op == "call_function"]
    expected = evaluate(program, captured.inputs)
    for share in (0.0, 0.1, 0.3, 0.5, 0.9, 1.0):
        declined = [node for node in calls if draw.random() < share]
        parts, strays = split(program.copy(), declined, small=True)
        assert all(a.on_torch != b.on_torch for a, b in itertools.pairwise(parts)) or share == 0
        computed = {node.name: part for part in parts for node in part.nodes}
        assert all(computed[one].on_torch for one in {*declined, *strays} if one in computed)
        torch.testing.assert_close(run_parts(parts, program, captured.inputs), expected)
