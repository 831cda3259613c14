"""``compiled.profile``: the time of each node on the torch backend, and the Chrome trace."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fxopt


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.norm(self.conv(x)).relu() * scale
        return self.head(x.mean((2, 3))), x.sort(1)[0]


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(1))
        self.n: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n += 1
        return x + self.n


X = torch.randn(1, 3, 12, 12)


def test_times_belong_to_nodes_of_the_graph() -> None:
    compiled = fxopt.compile(Net().eval(), example_inputs=(X,), backend="torch")
    profile = compiled.profile(X, runs=5)
    assert profile.runs == 5
    names = {node.name for node in compiled.graph.graph.nodes}
    assert set(profile.by_node()) <= names | {""}
    assert sum(profile.by_node().values()) == pytest.approx(sum(one.ms for one in profile.operators))
    assert any("conv" in one.operator.op for one in profile.operators)
    assert all(one.ms > 0 and one.us > 0 for one in profile.operators)
    conv = next(one for one in profile.operators if "conv" in one.operator.op)
    assert conv.operator.node in names
    assert "test_profiling.py:" in conv.operator.source
    assert compiled.report.profile is profile
    assert "conv" in str(profile)


def test_time_of_int8_belongs_to_the_layer_and_not_to_what_it_swallowed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()).eval()
    data = [(torch.randn(2, 16, 32, 32),) for _ in range(4)]
    compiled = fxopt.compile(
        model, example_inputs=data[0], passes="insert-fake-quant", calibration=data, backend="torch"
    )
    times = compiled.profile(data[0], runs=3).by_node()
    quantized = [layer.node for layer in compiled.report.layers if layer.mode == "static"]
    assert quantized
    assert all(times[name] > 0 for name in quantized)


def test_the_trace_is_one_that_chrome_reads(tmp_path: Path) -> None:
    profile = fxopt.compile(Net().eval(), example_inputs=(X,), backend="torch").profile((X,), runs=3)
    profile.save(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(events) == len(profile.operators)
    for before, after in itertools.pairwise(events):
        assert before["ts"] + before["dur"] <= after["ts"] + 1e-2
    assert {"name", "cat", "pid", "tid", "args"} <= events[0].keys()
    with pytest.raises(fxopt.ArtifactError, match="cannot write the trace"):
        profile.save(tmp_path / "missing" / "trace.json")


def test_profiling_changes_no_state() -> None:
    compiled = fxopt.compile(Counter(), example_inputs=(torch.zeros(1),), backend="torch")
    compiled.profile(torch.zeros(1), runs=4)
    torch.testing.assert_close(compiled(torch.zeros(1)), torch.ones(1))


def test_a_lazy_model_is_captured_by_it() -> None:
    model = Net().eval()
    compiled = fxopt.compile(model, backend="torch")
    profile = compiled.profile((X,), {"scale": 2.0}, runs=1)
    assert compiled.report.profile is profile
    torch.testing.assert_close(compiled(X, scale=2.0)[0], model(X, scale=2.0)[0])


def test_what_cannot_be_profiled_says_so() -> None:
    compiled = fxopt.compile(Net().eval(), example_inputs=(X,), backend="onnx")
    with pytest.raises(fxopt.PreconditionError, match="compile with backend='torch'"):
        compiled.profile(X)
    compiled = fxopt.compile(Net().eval(), example_inputs=(X,), backend="torch")
    with pytest.raises(fxopt.InputError, match="at least 1, not 0"):
        compiled.profile(X, runs=0)
    with pytest.raises(fxopt.InputError):
        compiled.profile(torch.randn(1, 3))
