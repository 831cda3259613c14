"""The tools that guard the tree, and the scaffold of a new pass."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from fxopt import registry
from fxopt.passbase import Pass
from tools import ROOT, bench, check_imports, check_size, docs, gpu, new_pass, timing


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("fxopt", "import fxopt.passes.canonicalize"),
        ("fxopt", "from fxopt.backends import torch"),
        ("fxopt", "from fxopt import passes"),
        ("fxopt", "from . import backends"),
        ("fxopt", "try:\n    import fxopt.passes\nexcept ImportError:\n    pass"),
        ("fxopt.passes", "def f():\n    import fxopt.backends.torch"),
        ("fxopt.backends", "from fxopt.passes.canonicalize import Canonicalize"),
        ("fxopt.backends", "import openvino"),
        ("fxopt.backends", "def f():\n    import torchvision.models"),
    ],
)
def test_a_forbidden_import_is_found(package: str, source: str) -> None:
    assert list(check_imports.violations(source, package))


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("fxopt", "def f():\n    import fxopt.passes"),
        ("fxopt", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fxopt import passes"),
        ("fxopt.passes", "from fxopt.rewriter import Rewriter\nfrom fxopt.passes import available"),
        ("fxopt.backends", "def f():\n    import openvino"),
        ("fxopt.backends", "import torch\nfrom fxopt.backend import Backend"),
    ],
)
def test_an_allowed_import_is_left_alone(package: str, source: str) -> None:
    assert not list(check_imports.violations(source, package))


def test_sizes_over_the_limit_are_found() -> None:
    body = "\n".join("    pass" for _ in range(check_size.FUNCTION_LINES))
    assert not list(check_size.oversized("def f():\n    pass\n"))
    assert ["f has 51 lines" in text for _, text in check_size.oversized(f"def f():\n{body}\n")] == [True]
    assert [line for line, _ in check_size.oversized("x = 1\n" * (check_size.FILE_LINES + 1))] == [1]


def test_blocks_are_timed_after_the_dropped_calls() -> None:
    calls = []
    assert len(timing.block(lambda: calls.append(1), 3)) == 3
    assert len(calls) == 3 + timing.DROPPED


def test_geometric_mean() -> None:
    assert timing.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder that looks like the repository to the scaffold."""
    (tmp_path / "passes").mkdir()
    for name in ("pyproject.toml", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def _import(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_a_new_pass_passes_its_own_test(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, test, page, *_ = new_pass.scaffold("drop-double-negation", root)
    made: type[Pass] = _import(code, "fxopt.passes.drop_double_negation", monkeypatch).DropDoubleNegation
    find = registry.find_pass
    monkeypatch.setattr(registry, "find_pass", lambda name: made if name == made.name else find(name))
    module = _import(test, "test_drop_double_negation", monkeypatch)
    module.test_rewrites()
    module.test_leaves_a_shared_value_alone()
    assert list(docs.write([page])) == []
    assert "return [%0]" in page.read_text()
    assert "It has no options." in page.read_text()


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_a_new_pass_is_lint_clean(command: list[str], root: Path) -> None:
    changed = new_pass.scaffold("drop-double-negation", root)
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", str(ROOT / "pyproject.toml")]
    # The configuration relaxes docstrings for tests/ of the repository only, so the pass alone is linted here.
    done = subprocess.run([*ruff, str(changed[0])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_new_pass_is_declared_among_the_others(root: Path) -> None:
    new_pass.scaffold("drop-double-negation", root)
    before = tomllib.loads((ROOT / "pyproject.toml").read_text())
    after = tomllib.loads((root / "pyproject.toml").read_text())
    points = after["project"]["entry-points"]["fxopt.passes"]
    assert points.pop("drop-double-negation") == "fxopt.passes.drop_double_negation:DropDoubleNegation"
    assert list(points) == sorted(points)
    assert after == before
    before, after = (yaml.safe_load((folder / "mkdocs.yml").read_text()) for folder in (ROOT, root))
    (passes,) = [entry["Passes"] for entry in after["nav"] if "Passes" in entry]
    assert passes.pop() == {"drop-double-negation": "passes/drop-double-negation.md"}
    assert after == before


@pytest.mark.parametrize("name", ["Bad", "under_score", "-x", "", "canonicalize"])
def test_a_bad_or_taken_pass_name_is_refused(name: str, root: Path) -> None:
    with pytest.raises(ValueError, match="pass"):
        new_pass.scaffold(name, root)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_the_gpu_bench_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 1
    assert "no CUDA device is here" in capsys.readouterr().err


def test_tables_of_the_gpu_bench() -> None:
    one = bench.Row("resnet50, 1", {"eager": 2.0, "max-autotune": 1.0, "fxopt torch": 0.5}, {}, {"fxopt torch": 1e-6})
    one.failures["fxopt tvm"] = "UnsupportedOp: why"
    text = gpu.networks_table([one])
    assert "| fxopt torch | 0.50 | **0.50** |" in text
    assert "- resnet50, 1, fxopt tvm: UnsupportedOp: why" in text
    linear = bench.Row("qkv", {"dense bf16": 0.02, "2:4 bf16": 0.01, "int8": 0.04})
    assert "| qkv | 20.0 | 10.0 | 40.0 | 0.50 | 0.25 |" in gpu.linears_table([linear])
