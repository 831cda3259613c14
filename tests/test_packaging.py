"""The wheel and the sdist: what is in them, and that the wheel works where nothing of this repository is."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fxopt.registry import find_backend, find_pass

ROOT = Path(__file__).resolve().parent.parent

SMOKE = """
import sys
import torch
import fxopt, fxopt.passes.canonicalize, fxopt.backends.torch

assert fxopt.__file__.startswith(sys.prefix), fxopt.__file__
assert fxopt.passes.__file__.startswith(sys.prefix), fxopt.passes.__file__
assert fxopt.__version__ == sys.argv[1], fxopt.__version__
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
x = torch.randn(1, 3, 8, 8)
for backend in ("torch", "onnx"):
    compiled = fxopt.compile(model, example_inputs=(x,), backend=backend)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert "Content-Security-Policy" in compiled.report.to_html(f"{backend}.html").read_text()
print("works")
"""


def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy of what git would ship."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fxopt", "passes", "backends"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_the_wheel_holds_every_module(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode()
    expected = {"fxopt/py.typed"}
    for folder, installed in (("fxopt", "fxopt"), ("passes", "fxopt/passes"), ("backends", "fxopt/backends")):
        expected |= {f"{installed}/{p.relative_to(ROOT / folder)}" for p in (ROOT / folder).rglob("*.py")}
    page = ROOT / "fxopt" / "report_html"
    expected |= {f"fxopt/{p.relative_to(ROOT / 'fxopt')}" for p in page.rglob("*.*") if "__pycache__" not in p.parts}
    assert held == expected
    assert "License-Expression: Apache-2.0" in metadata


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert (source / "LICENSE").is_file()
    for folder in ("fxopt", "passes", "backends"):
        assert {p.name for p in (source / folder).rglob("*.py")} == {p.name for p in (ROOT / folder).rglob("*.py")}


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, capture_output=True)
    python = environment / "bin" / "python"
    install = [str(python), "-I", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    # -I: a PYTHONPATH that some other test left would show this checkout.
    # The dependencies are taken from this environment: a plain path in a .pth file is searched for modules, but
    # the .pth files inside it, the link of the editable fxopt among them, are not read.
    (site,) = (environment / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    version = str(_project()["version"])
    done = subprocess.run(
        [str(python), "-I", "-c", SMOKE, version], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "works"


def test_every_declared_pass_loads_under_its_name() -> None:
    for name in _project()["entry-points"]["fxopt.passes"]:
        assert find_pass(name).name == name


def test_every_declared_backend_loads_under_its_name() -> None:
    for name in _project()["entry-points"]["fxopt.backends"]:
        assert find_backend(name).name == name
