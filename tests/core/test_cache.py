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
from fxopt.artifact.container import PARTIAL
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


def test_what_was_left_behind_goes_and_damage_is_shown(tmp_path: Path) -> None:
    compiled(tmp_path)
    left, damaged = tmp_path / f".0123{PARTIAL}", tmp_path / f"{'0' * 64}.fxopt"
    left.write_bytes(b"half")
    damaged.write_bytes(b"garbage")
    compiled(tmp_path, _other_weights())
    assert left.exists()  # somebody may be at it
    os.utime(left, (1, 1))
    compiled(tmp_path, model().double(), X.double())
    assert not left.exists()
    left.write_bytes(b"half")
    assert "damaged: 0000" in call("cache", "--folder", tmp_path)
    assert len(answer("cache", "--folder", tmp_path)["models"]) == 4
    call("cache", "--folder", tmp_path, "--clear")
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not kept in the cache"):
        compiled(tmp_path / "file" / "folder")


@pytest.mark.slow
def test_a_full_disk_is_a_warning(tmp_path: Path) -> None:
    code = """
        import resource, signal, torch, fxopt
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        model, x = torch.nn.Linear(500, 500).eval(), torch.ones(1, 500)
        compiled = fxopt.compile(model, example_inputs=(x,), backend="torch")
        compiled.save("m.fxopt")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        again = fxopt.compile(model, example_inputs=(x,), backend="torch", cache="cache")
        assert torch.allclose(again(x), model(x), atol=1e-5)
        try:
            compiled.save("m.fxopt")
        except fxopt.FxoptError as error:
            print(error)
        fxopt.load("m.fxopt")(x)
        try:
            fxopt.compile(model, example_inputs=(x,), backend="onnx")
        except fxopt.BackendUnavailable as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cannot write m.fxopt: no room for its weights" in done.stdout
    assert "the ONNX file cannot be written" in done.stdout
    assert "not kept in the cache" in done.stderr


def test_a_home_is_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    compiled(Path("~/kept"))
    assert len(Cache.at(tmp_path / "kept").files()) == 1
    with pytest.raises(fxopt.InputError, match="True, False or a folder"):
        fxopt.compile(model(), example_inputs=(X,), cache="")


def test_another_process_finds_it(tmp_path: Path) -> None:
    code = """
        import sys, torch, fxopt
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3).eval()
        fxopt.compile(model, example_inputs=(torch.ones(2, 4),), backend="torch", cache=sys.argv[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    for seed in ("1", "2", "3"):  # of the hashes that order sets
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    assert len(list(tmp_path.glob("*.fxopt"))) == 1
