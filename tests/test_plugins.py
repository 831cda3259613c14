"""A separate distribution brings a pass and a backend through entry points, and fxopt uses them by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parent / "plugin_example"

USE = """
import json, sys, torch, fxopt, fxopt.passes, fxopt.backends

assert "fxopt_plugin_example" not in sys.modules
listed = [fxopt.passes.available(), fxopt.backends.available()]
loaded_early = "fxopt_plugin_example" in sys.modules
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sigmoid(), torch.nn.ReLU())
x = torch.randn(2, 4)
compiled = fxopt.compile(model, example_inputs=(x,), passes="relu-as-clamp{floor=0.75}", backend="node-by-node")
print(json.dumps({
    "passes": listed[0],
    "backends": listed[1],
    "loaded_early": loaded_early,
    "backend": compiled.backend,
    "ops": [str(node.target) for node in compiled.graph.graph.nodes],
    "error": float((compiled(x) - model(x).clamp_min(0.75)).abs().max()),
}))
"""


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process that has the plug-in installed reports."""
    source = tmp_path_factory.mktemp("source") / "example"
    shutil.copytree(EXAMPLE, source)  # building writes beside the sources
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, capture_output=True)
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", USE], env=env, cwd=site, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_listed_beside_the_builtin_ones(used: dict[str, Any]) -> None:
    assert {"canonicalize", "relu-as-clamp"} <= set(used["passes"])
    assert {"torch", "node-by-node"} <= set(used["backends"])


def test_listing_loads_no_plugin(used: dict[str, Any]) -> None:
    assert not used["loaded_early"]


def test_pass_and_backend_are_used(used: dict[str, Any]) -> None:
    assert used["backend"] == "node-by-node"
    assert any("clamp" in op for op in used["ops"])
    assert not any("aten.relu" in op for op in used["ops"])
    assert used["error"] < 1e-6
