"""The report: what was done, what was left alone and why, in plain text where nobody looks at a terminal."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console
from torch import nn

import fxopt
from fxopt import measure, progress
from fxopt.report import Report
from tests.passes.models import Model, chain, image


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = chain(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.Flatten())
        self.pad = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layers(self.pad(self.norm(x)))
        return result


@pytest.fixture(scope="module")
def compiled() -> fxopt.CompiledModel:
    return fxopt.compile(Small(), example_inputs=(image(),), backend="torch")


def test_the_numbers(compiled: fxopt.CompiledModel) -> None:
    report = compiled.report
    assert (report.model, report.target, report.backend, report.exact) == ("Small", "x86", "torch", True)
    convs = 4 * 8 * 9 + 8 + 4 * 4 * 9 + 4
    assert report.parameters == (convs + 4 * 8 + 4 * 8 + 4 * 4, convs + 4 * 8 + 4 * 4)
    assert report.bytes[1] == 4 * report.parameters[1]
    assert report.macs == (2 * (36 * 4 * 36 + 16 * 8 * 36), 2 * (36 * 4 * 36 + 16 * 8 * 36))
    assert set(report.latency_ms) == {"eager", "fxopt"}
    assert all(ms > 0 for ms in report.latency_ms.values())
    assert list(report.seconds) == ["capture", "passes", "lower", "measure"]
    assert report.error is not None
    assert report.error < 1e-5


def test_the_text_is_plain_without_a_terminal(compiled: fxopt.CompiledModel) -> None:
    text = str(compiled.report)
    assert "\x1b" not in text
    assert text.isprintable() or set(re.findall(r"[^\x20-\x7e\n]", text)) <= set("→–×…≤")
    assert "Small for x86 on torch, exact" in text
    for name in ("canonicalize", "common-subexpressions", "fold-constants", "fuse-conv-bn-relu", "merge-linears"):
        assert name in text
    assert re.search(r"latency +\d+\.\d\d ms +\d+\.\d\d ms +\d+\.\d\d × (faster|slower)", text)
    assert re.search(r"parameters +\d+ +\d+ +1\.\d\d × smaller", text)
    assert re.search(r"Compiled in \d+\.\d\d s \(capture \d", text)
    assert max(len(line) for line in text.splitlines()) <= 140


def test_what_was_left_alone_is_said_with_reason_and_line(compiled: fxopt.CompiledModel) -> None:
    text = re.sub(r"\s+", " ", str(compiled.report))
    assert "Left alone" in text
    assert "fuse-conv-bn-relu: conv2d: the conv pads with zeros" in text
    skip = next(s for s in compiled.report.skips if "pads" in s.reason)
    assert "test_report.py:" in skip.source


def test_colours_on_a_terminal(compiled: fxopt.CompiledModel) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    console.print(compiled.report)
    assert "\x1b[" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_lossy_pass_shows_its_error() -> None:
    model = chain(nn.Linear(4, 4), nn.ReLU())
    report = fxopt.compile(
        model, example_inputs=(torch.randn(2, 4),), passes="cast-precision{dtype=bf16}", backend="torch"
    ).report
    assert not report.exact
    assert report.error is not None
    assert 1e-5 < report.error < 5e-2
    text = str(report)
    assert "lossy" in text
    row = text.partition("cast-precision")[2]  # its last column may be broken into lines
    assert re.search(r"^\s+\d+ .*error\s+\d\.\de-0\d\s+of\s+range,\s+cosine\s+0\.99", row, re.DOTALL)


def test_many_reasons_are_summed_up() -> None:
    norms = [nn.BatchNorm2d(4) for _ in range(6)]
    layers: list[nn.Module] = [layer for norm in norms for layer in (norm, nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())]
    text = re.sub(r"\s+", " ", str(fxopt.compile(chain(*layers), example_inputs=(image(),), backend="torch").report))
    assert "conv2d and 5 more: the conv pads with zeros" in text


def test_an_empty_report_prints() -> None:
    assert "Nothing for x86 on " in str(Report("Nothing", "x86"))


def test_auto_shows_what_it_measured() -> None:
    report = fxopt.compile(chain(nn.Linear(4, 4)), example_inputs=(torch.randn(2, 4),)).report
    assert report.backend in report.candidates
    best = min(ms for ms in report.candidates.values() if isinstance(ms, float))
    assert report.candidates[report.backend] == best == report.latency_ms["fxopt"]
    assert re.search(r"Measured: \w+ \d+\.\d\d ms", str(report))


def test_latency_calls_at_least_once_and_no_longer_than_told() -> None:
    calls: list[int] = []
    assert measure.latency_ms(lambda: calls.append(1), calls=3, warmup=2) >= 0
    assert len(calls) == 5
    calls.clear()
    measure.latency_ms(lambda: calls.append(1), budget_s=0.0)
    assert len(calls) == 2


def test_times_of_a_stage_add_up() -> None:
    stages = progress.Stages()
    said: list[str] = []
    with stages.shown("compiling"):
        stages._say = lambda text, part: said.append(text)
        for name in ("capture", "passes", "capture"):
            with stages.stage(name):
                pass
    assert list(stages.seconds) == ["capture", "passes"]
    assert said == ["capture", "passes", "capture"]


def test_a_model_that_is_all_constant_has_no_macs() -> None:
    model = Model(lambda m, x: x + 1)
    report = fxopt.compile(model, example_inputs=(torch.ones(2),), backend="torch").report
    assert (report.macs, report.parameters) == ((0, 0), (0, 0))
    assert "MACs" in str(report)
