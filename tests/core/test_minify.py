"""When something goes wrong: the smallest part that fails, where values part, the line of a warning, the log."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn

import fxopt
from fxopt import notice, ops
from fxopt.backends.torch import TorchBackend
from fxopt.passbase import Pass, PassContext


class Wrong(Pass):
    """Turns the second relu into a tanh: a mistake."""

    name: ClassVar[str] = "wrong"
    exact: ClassVar[bool] = True

    def run(self, rewriter: fxopt.Rewriter, ctx: PassContext) -> None:
        relus = [node for node in rewriter.nodes() if ops.packet(node) in ("relu", "relu_")]
        if len(relus) > 1:
            new = rewriter.call(torch.ops.aten.tanh.default, relus[1].args, before=relus[1])
            rewriter.replace(relus[1], new)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu() + 1
        return x


X = torch.randn(4, 8)


def test_the_smallest_part_is_a_script_that_fails_alike(tmp_path: Path) -> None:
    class NoSoftplus(TorchBackend):
        def lower(self, program: fxopt.Program, target: Any, inputs: Sequence[Any]) -> Any:
            if any(ops.packet(node) == "softplus" for node in program.graph.nodes):
                raise fxopt.UnsupportedOp("no softplus here")
            return super().lower(program, target, inputs)

    class Net(Deep):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.softplus(super().forward(x).to(torch.float64).float()).mean()

    script = fxopt.minify(Net(), (X,), backend=NoSoftplus(), folder=tmp_path / "repro")
    text = script.read_text()
    assert text.startswith("# no softplus here")
    assert text.count("torch.ops.aten") == 1
    assert "w0" not in text
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # fxopt's own backend takes it: the failure was NoSoftplus's


@pytest.mark.slow
def test_a_script_fails_by_itself(tmp_path: Path) -> None:
    class Net(Deep):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = torch.ops.aten._fft_r2c.default(super().forward(x), [1], 0, True).abs() * 2
            return result

    script = fxopt.minify(Net(), (X,), backend="openvino", folder=tmp_path)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "UnsupportedOp" in done.stderr
    assert script.read_text().count("torch.ops.aten") <= 2


def test_what_compiles_cannot_be_shrunk(tmp_path: Path) -> None:
    with pytest.raises(fxopt.InputError, match="there is nothing to shrink"):
        fxopt.minify(Deep(), (X,), folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_no_part_of_the_graph_is_told(tmp_path: Path) -> None:
    class Counts(Deep):
        calls: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(x) + self.calls

    with pytest.raises(fxopt.InputError, match=r"around its graph.*changes its buffer 'calls'"):
        fxopt.minify(Counts(), (X,), backend="onnx", folder=tmp_path)


@pytest.mark.parametrize("wrong", [{"passes": "prune-chanels"}, {"backend": "tourch"}])
def test_what_no_part_is_to_blame_for_is_raised(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(fxopt.SpecError, match="Did you mean"):
        fxopt.minify(Deep(), (X,), folder=tmp_path / "repro", **wrong)
    assert not (tmp_path / "repro").exists()


def test_a_wrong_pass_is_told_with_the_node_where_values_part() -> None:
    with pytest.raises(fxopt.VerifyError) as caught:
        fxopt.compile(Deep(), example_inputs=(X,), passes=[Wrong()], backend="torch")
    line = inspect.getsourcelines(Deep.forward)[1] + 2
    text = str(caught.value)
    assert "pass wrong" in text
    assert "part first at" in text
    assert f"test_minify.py:{line}" in text
    assert "made by this pass" in text


def test_a_wrong_engine_is_told_with_the_node_where_values_part() -> None:
    class Wrongly(TorchBackend):
        """Computes the fourth linear of a graph otherwise."""

        def lower(self, program: fxopt.Program, target: Any, inputs: Sequence[Any]) -> Any:
            linears = [node for node in program.graph.nodes if ops.kind(node) == "linear"]
            if len(linears) >= 4:
                node: fx.Node = linears[3]
                with program.graph.inserting_after(node):
                    new = program.graph.call_function(torch.ops.aten.mul.Scalar, (node, 1.5))
                new.meta = dict(node.meta)
                node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
            return super().lower(program, target, inputs)

    with pytest.raises(fxopt.VerifyError, match=r"first at \w*linear\w*_3"):
        fxopt.compile(Deep(), example_inputs=(X,), backend=Wrongly())


def test_warnings_point_to_the_line_of_the_user() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
        fxopt.compile(model, example_inputs=(X,), passes="sparsify-2-4", backend="torch")
    own = [one for one in caught if "sparsify-2-4" in str(one.message)]
    assert own
    assert all((one.filename, one.lineno) == (__file__, line) for one in own)
    lazy = fxopt.compile(model, backend="torch")
    lazy(X)
    with pytest.warns(UserWarning, match="captured again") as caught_again:
        lazy(torch.randn(2, 8))
    assert caught_again[0].filename == __file__


def test_the_log_follows_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FXOPT_LOG", "info")
    try:
        notice.configure_log()
        fxopt.compile(Deep(), example_inputs=(X,), backend="torch")
        assert "fuse-conv-bn-relu: " in capsys.readouterr().err
    finally:
        notice.LOG.handlers.clear()
        notice.LOG.setLevel(logging.NOTSET)
    monkeypatch.setenv("FXOPT_LOG", "loud")
    with pytest.raises(fxopt.InputError, match="FXOPT_LOG='loud': it must be one of debug"):
        notice.configure_log()
