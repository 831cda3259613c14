"""The tools that measure what int8 costs, on one model each that is hardly trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tools import accuracy, calibration, digits, models, quantizers, zoo_int8
from tools.accuracy import Score


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """More threads only get in each other's way on models of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fxopt" / "accuracy"


def test_the_tool_trains_quantizes_and_writes(cache: Path, tmp_path: Path) -> None:
    choice = ["--models", "residual", "--contestants", "eager fp32,onnxruntime static", "--steps", "3"]
    accuracy.run(accuracy.arguments([*choice, "--output", str(tmp_path)]))
    exact, quantized = (Score(**found) for found in json.loads((tmp_path / "accuracy.json").read_text()))
    assert len(list(cache.glob("residual-*.pt"))) == 1
    assert [exact.drop, exact.cosine, exact.agreement, exact.smaller] == [0, pytest.approx(1), 1, 1]
    assert not quantized.failure
    assert quantized.cosine is not None
    assert 0.99 < quantized.cosine < 1
    assert quantized.smaller is not None
    assert 3 < quantized.smaller < 4
    assert "onnxruntime static" in (tmp_path / "accuracy.md").read_text()


def test_trained_weights_come_from_the_cache(cache: Path) -> None:
    data = digits.load()
    first = digits.trained("mobilenet", data, 0, steps=1)
    (path,) = cache.glob("*.pt")
    written = path.stat().st_mtime_ns
    second = digits.trained("mobilenet", data, 0, steps=1)
    assert path.stat().st_mtime_ns == written
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    digits.trained("mobilenet", data, 1, steps=1)
    assert len(list(cache.glob("*.pt"))) == 2


def test_no_image_is_in_both_parts() -> None:
    data = digits.load()
    held = {tuple(image.flatten().tolist()) for image in data.held_images}
    assert len(data.held_images) == 540
    assert not any(tuple(image.flatten().tolist()) in held for image in data.images)


def test_a_failure_is_one_line_of_the_table() -> None:
    scores = [Score("m", "eager fp32", 0, top1=0.5), Score("m", "peer", 0, failure="ValueError: no | such op")]
    assert "| peer | failed: ValueError: no \\| such op |" in accuracy.markdown(scores)


def test_seeds_are_averaged() -> None:
    scores = [Score("m", "eager fp32", seed, top1=top1) for seed, top1 in enumerate((0.5, 1.0))]
    assert accuracy.rows(scores)[0][1] == "75.00%"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SystemExit, match="unknown models typo"):
        accuracy.run(accuracy.arguments(["--models", "typo"]))


@pytest.mark.parametrize("name", ["hf-vit", "gpt2", "llama"])
def test_outlier_channels_stand_out_and_keep_what_the_model_computes(name: str) -> None:
    model, inputs = models.load(name)
    norms = [m for m in model.modules() if "Norm" in type(m).__name__]
    with torch.no_grad():
        before = list(model(*inputs).values())[-1]
        models.with_outliers(model, 0, *inputs)
        after = list(model(*inputs).values())[-1]  # logits, or the pooled output
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    weights = [norm.get_parameter("weight").abs() for norm in norms]
    raised = [weight for weight in weights if weight.max() > 10]
    assert len(raised) >= len(weights) - 1  # GPT-2's head is tied to its embedding: the norm before it stays
    chosen = [set(weight.topk(3).indices.tolist()) for weight in raised]
    assert all(one == chosen[0] for one in chosen)
    assert all(weight.topk(4).values[2] > 5 * weight.topk(4).values[3] for weight in raised)


def test_outliers_without_inputs_change_the_norms_alone() -> None:
    model, _ = models.load("hf-vit")
    before = {name: p.clone() for name, p in model.named_parameters()}
    models.with_outliers(model, 1)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("norm" in name for name in changed)


def test_calibration_data_is_seeded_smooth_and_in_the_vocabulary() -> None:
    inputs = (torch.randn(1, 3, 32, 32), torch.tensor([[5, 2]]))
    (image, ids), other = calibration.samples(inputs, 2, seed=3)
    assert torch.equal(image, calibration.samples(inputs, 1, seed=3)[0][0])
    assert not torch.equal(image, other[0])
    assert ids.dtype == torch.int64
    assert int(ids.max()) <= 5
    assert (image[..., 1:] - image[..., :-1]).std() < 0.7 * image.std()


def test_stored_weights_are_those_that_the_graph_reads() -> None:
    graph = torch.fx.symbolic_trace(torch.nn.Linear(4, 4))
    read = quantizers.weight_bytes(graph)
    graph.register_buffer("left_over", torch.zeros(100))
    assert quantizers.weight_bytes(graph) == read


def test_the_quantized_zoo_compares_backends() -> None:
    result = zoo_int8.compare("hf-vit", ("torch", "onnx"), small=True)
    assert result.verdict == "ok", result
    assert set(result.cosine) == {"torch", "onnx"}
    assert result.agreement is not None
    assert zoo_int8.compare("hf-vit", ("typo",)).verdict.startswith("typo: ")
