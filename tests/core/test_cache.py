"""The cache of compiled models: a hit where nothing changed, a miss where anything did, bounded and shared."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.cache import Cache
from tests.core.test_cli import answer, call

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def compiled(folder: Path, one: nn.Module | None = None, x: torch.Tensor = X, **more: Any) -> fxopt.CompiledModel:
    arguments = {"backend": "torch", "cache": folder, **more}
    return fxopt.compile(one or model(), example_inputs=(x,), **arguments)


def is_hit(one: fxopt.CompiledModel) -> bool:
    return "lower" not in one.report.seconds


@pytest.mark.parametrize("backend", ["torch", "onnx", "auto"])
def test_the_same_again_is_a_load(backend: str, tmp_path: Path) -> None:
    first = compiled(tmp_path / "c", backend=backend)
    second = compiled(tmp_path / "c", backend=backend)
    assert (is_hit(first), is_hit(second)) == (False, True)
    assert torch.equal(first(X), second(X))
    assert second.backend == first.backend
    assert len(Cache.at(tmp_path / "c").files()) == 1
    assert not is_hit(fxopt.compile(model(), example_inputs=(X,), backend=backend))


def _other_weights() -> Any:
    one: Any = model()
    with torch.no_grad():
        one[2].bias[0] += 1e-6
    return one


@pytest.mark.parametrize(
    "change",
    [
        lambda f: compiled(f, _other_weights()),
        lambda f: compiled(f, nn.Sequential(*model(), nn.Tanh())),
        lambda f: compiled(f, x=X[:2]),
        lambda f: compiled(f, passes="cast-precision"),
        lambda f: compiled(f, passes="cast-precision{dtype=fp16}"),
        lambda f: compiled(f, target="x86 -mattr=-avx512_vnni"),
        lambda f: compiled(f, backend="onnx"),
        lambda f: compiled(f, backend="onnx", backend_options={"threads": 1}),
        lambda f: compiled(f, dynamic_shapes=({0: "n"},)),
        lambda f: compiled(f, verify=False),
        lambda f: compiled(f, passes="insert-fake-quant", calibration=[(X,)] * 4),
        lambda f: compiled(f, passes="insert-fake-quant", calibration=[(X * 2,)] * 4),
    ],
)
def test_anything_else_is_not(change: Callable[[Path], fxopt.CompiledModel], tmp_path: Path) -> None:
    compiled(tmp_path)
    assert not is_hit(change(tmp_path))
    assert is_hit(change(tmp_path))


def test_what_cannot_be_told_by_its_value_is_not_kept(tmp_path: Path) -> None:
    loss = nn.functional.cross_entropy
    data = [(X, torch.zeros(4, dtype=torch.int64))] * 2
    passes = "prune-channels{ratio=0.5,criterion=taylor}"
    for _ in range(2):
        assert not is_hit(compiled(tmp_path / "c", passes=passes, calibration=data, loss=loss))
        assert not is_hit(compiled(tmp_path / "c", dump=tmp_path / "dump"))
    assert not (tmp_path / "c").exists()


def test_it_stays_within_its_bound_and_the_latest_used_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for scale in range(3):
        compiled(tmp_path, x=X[: scale + 1])
    each = Cache.at(tmp_path).files()[0].stat().st_size
    os.utime(Cache.at(tmp_path).files()[0], (2**31, 2**31))  # the oldest is used again
    used = Cache.at(tmp_path).files()[-1]
    monkeypatch.setenv("FXOPT_CACHE_GB", str(2.5 * each / 2**30))
    compiled(tmp_path, backend="torch", verify=False)
    left = Cache.at(tmp_path).files()
    assert len(left) <= 3
    assert used in left
    assert Cache.at(tmp_path).nbytes() <= 3 * each
    monkeypatch.setenv("FXOPT_CACHE_GB", "much")
    with pytest.raises(fxopt.InputError, match="FXOPT_CACHE_GB='much' is no number"):
        compiled(tmp_path)


def test_a_damaged_file_is_made_anew(tmp_path: Path) -> None:
    compiled(tmp_path)
    (path,) = Cache.at(tmp_path).files()
    path.write_bytes(path.read_bytes()[:-100])
    assert not is_hit(compiled(tmp_path))
    assert is_hit(compiled(tmp_path))


def test_the_environment_and_wrong_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FXOPT_CACHE", "1")
    one = copy.deepcopy(model())
    fxopt.compile(one, example_inputs=(X,), backend="torch")
    assert is_hit(fxopt.compile(one, example_inputs=(X,), backend="torch"))
    assert not is_hit(fxopt.compile(one, example_inputs=(X,), backend="torch", cache=False))
    assert (tmp_path / "fxopt").stat().st_mode & 0o077 == 0
    with pytest.raises(fxopt.InputError, match="cache must be True, False or a folder"):
        fxopt.compile(one, example_inputs=(X,), cache=3)  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path) -> None:
    code = """
        import sys, torch, fxopt
        torch.manual_seed(0)
        model = torch.nn.Linear(300, 300)
        for _ in range(4):
            y = fxopt.compile(model, example_inputs=(torch.ones(1, 300),), backend="torch", cache=sys.argv[1])
        assert torch.allclose(y(torch.ones(1, 300)), model(torch.ones(1, 300)), atol=1e-5)
    """
    environment = {**os.environ, "FXOPT_CACHE_GB": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    both = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(2)]
    for one in both:
        _, errors = one.communicate(timeout=120)
        assert one.returncode == 0, errors.decode()


def test_the_command(tmp_path: Path) -> None:
    compiled(tmp_path)
    (row,) = answer("cache", "--folder", tmp_path)["models"]
    assert row["model"] == "Sequential"
    assert "1 models" in call("cache", "--folder", tmp_path)
    assert answer("cache", "--folder", tmp_path, "--clear")["removed"] == 1
    assert answer("cache", "--folder", tmp_path)["models"] == []
    assert answer("cache", "--folder", tmp_path / "none", "--clear")["removed"] == 0
