"""The command line: what it prints, writes and answers, in text and in JSON, and how it says what is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fxopt
from fxopt.cli import app
from tests.core import cli_models

M = "tests.core.cli_models"


def call(*arguments: object, status: int = 0) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == status, done.output + repr(done.exception)
    return done.output


def answer(*arguments: object, status: int = 0) -> Any:
    done = CliRunner().invoke(app, [*(str(argument) for argument in arguments), "--json"])
    assert done.exit_code == status, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "m.fxopt"
    call("compile", f"{M}:pair", "-o", path, "--backend", "torch")
    return path


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "q.fxopt"
    call("compile", f"{M}:pair", "-o", path, "--backend", "torch", "--passes", "prune-channels{ratio=0.5}")
    return path


def test_compile_writes_what_it_says(artifact: Path, tmp_path: Path) -> None:
    found = answer("compile", f"{M}:net", "-i", "f32[batch=2,3,16,16]", "--backend", "onnx", "-o", tmp_path / "m.onnx")
    assert found["output"] == {"path": str(tmp_path / "m.onnx"), "bytes": (tmp_path / "m.onnx").stat().st_size}
    assert found["report"]["backend"] == "onnx"
    assert torch.allclose(fxopt.load(artifact)(cli_models.X), cli_models.net()(cli_models.X), atol=1e-5)
    dumps = tmp_path / "dumps"
    assert "Sequential for x86 on torch" in call("compile", f"{M}:pair", "--backend", "torch", "--dump", dumps)
    assert len(list(dumps.iterdir())) > 3


def test_open_sizes_and_named_inputs(tmp_path: Path) -> None:
    call("compile", f"{M}:net", "-i", "input:f32[batch=2,3,16,16]", "--backend", "torch", "-o", tmp_path / "m.fxopt")
    loaded = fxopt.load(tmp_path / "m.fxopt")
    x = torch.randn(5, 3, 16, 16)
    assert torch.allclose(loaded(input=x), cli_models.net()(x), atol=1e-5)


def test_exported_programs(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(cli_models.net(), (cli_models.X,)), tmp_path / "m.pt2")
    call("compile", tmp_path / "m.pt2", "--backend", "torch", "-o", tmp_path / "m.fxopt")
    assert answer("verify", tmp_path / "m.fxopt", tmp_path / "m.pt2")["ok"]


RECIPES = {
    "r.yaml": """
        backend: torch
        passes:
          - prune-channels: {ratio: 0.25}
          - insert-fake-quant
        calibration: tests.core.cli_models:data
        """,
    "r.toml": """
        backend = "torch"
        passes = ["prune-channels{ratio=0.25}", "insert-fake-quant"]
        calibration = "tests.core.cli_models:data"
        """,
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(textwrap.dedent(RECIPES[name]))
    found = answer("compile", f"{M}:pair", "--recipe", tmp_path / name)
    done = [record["spec"] for record in found["report"]["passes"] if record["edits"]]
    assert "prune-channels{ratio=0.25}" in done
    assert "insert-fake-quant" in done
    other = ("--passes", "merge-linears", "--backend", "onnx")
    found = answer("compile", f"{M}:pair", "--recipe", tmp_path / name, *other)["report"]
    assert found["backend"] == "onnx"
    assert "prune-channels" not in [record["name"] for record in found["passes"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "target: x86\npasses:\n  - prune-channels: {ratoi: 0.5}\n",
            r"r.yaml:3: .*no option 'ratoi'.*Did you mean 'ratio'",
        ),
        ("target: x86\n\nbakend: torch\n", r"r.yaml:3: a recipe has no 'bakend'. Did you mean 'backend'"),
        ("passes:\n  - prune-chanels\n", r"r.yaml:2: unknown pass 'prune-chanels'"),
        ("target: x86\npasses: [a: b: c]\n", r"r.yaml:2: "),
        ("verify: 3\n", r"r.yaml:1: verify: .*boolean"),
        ("- target\n", r"r.yaml:1: a recipe is a mapping"),
        ("passes:\n  - {prune-channels: {}, gptq: {}}\n", r"r.yaml:2: write one pass an item"),
        ("target: x86\nbackend: torch\ntarget: arm\n", r"r.yaml:3: 'target' stands here a second time"),
        ("input: [3]\n", r"r.yaml:1: input.0: .*string"),
        ("verify: true\ntarget: x68\n", r"r.yaml:2: unknown target 'x68'"),
        ("verify: true\nbackend: tourch\n", r"r.yaml:2: unknown backend 'tourch'. Did you mean 'torch'"),
        ("backend: torch\nbackend_options: {threds: 1}\n", r"r.yaml:2: backend 'torch' has no option 'threds'"),
        ("input:\n  - f32[1,3,8,8]\n  - f32[1,3,8\n", r"r.yaml:3: --input .*write it like"),
        ("verify: true\nnotes: &a [*a]\n", r"r.yaml:2: a recipe has no 'notes'"),
    ],
)
def test_a_wrong_recipe_is_told_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    error = answer("compile", f"{M}:pair", "--recipe", tmp_path / "r.yaml", status=2)["error"]
    assert error["kind"] == "InputError"
    assert re.search(message, error["message"]), error["message"]


def test_a_wrong_toml_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('target = "x86"\n\nbakend = "torch"\n')
    assert (
        "r.toml:3: a recipe has no 'bakend'"
        in answer("explain", f"{M}:pair", "--recipe", tmp_path / "r.toml", status=2)["error"]["message"]
    )
    (tmp_path / "r.toml").write_text("target = \n")
    assert "line 1" in answer("explain", f"{M}:pair", "--recipe", tmp_path / "r.toml", status=2)["error"]["message"]
    assert (
        "cannot be read"
        in answer("explain", f"{M}:pair", "--recipe", tmp_path / "no.toml", status=2)["error"]["message"]
    )


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("compile", f"{M}:net"), 2, "without example inputs"),
        (("compile", f"{M}:nte"), 2, "Did you mean 'net'"),
        (("compile", "nowhere:net"), 2, "no module 'nowhere'"),
        (("compile", f"{M}:broken"), 2, "calling it failed: RuntimeError: no weights here"),
        (("compile", f"{M}:NUMBER"), 2, "gives a int, not a model"),
        (("compile", "net"), 2, "must be module:name"),
        (("compile", f"{M}:odd"), 2, "gives a int as example inputs"),
        (("compile", "m.fxopt"), 2, "is compiled already: name what it was made from"),
        (("compile", f"{M}:pair", "--calibration", f"{M}:broken"), 2, "broken': calling it failed: RuntimeError"),
        (("dump", "m.fxopt", "--passes", "gptq"), 2, "--passes would change nothing"),
        (("explain", "m.fxopt", "-i", "f32[1]"), 2, "--input would change nothing"),
        (("bench", "m.fxopt", "--backends", "onnx"), 2, "--backends would change nothing"),
        (("compile", f"{M}:pair", "-o", "nowhere/m.fxopt"), 2, "there is no folder 'nowhere'"),
        (("compile", "none.pt2"), 2, "there is no file none.pt2"),
        (("compile", f"{M}:net", "-i", "float[1]"), 2, "write it like"),
        (("compile", f"{M}:net", "-i", "f32[a]"), 2, "'a' is no size"),
        (("compile", f"{M}:net", "-i", "f32[1,3,16,16]", "-i", "x:f32[1]"), 2, "name all inputs"),
        (("compile", f"{M}:net", "-i", "f32[1,4,16,16]"), 2, "channels"),
        (("compile", f"{M}:pair", "--target", "x68"), 2, "unknown target"),
        (("compile", f"{M}:pair", "--backend", "tourch"), 2, "Did you mean 'torch'"),
        (("compile", f"{M}:pair", "--passes", "insert-fake-quant", "--backend", "torch"), 1, "pass calibration="),
        (("run", "none.fxopt"), 1, "there is no file none.fxopt"),
        (("run", f"{M}:pair"), 2, "is no .fxopt file"),
        (("report", "none.fxopt"), 1, "there is no file"),
        (("diff", "none.fxir", "none.fxir"), 2, "neither a .fxopt nor"),
    ],
)
def test_errors_are_one_line_with_a_status(arguments: tuple[str, ...], status: int, message: str) -> None:
    assert message in answer(*arguments, status=status)["error"]["message"]
    output = call(*arguments, status=status)
    assert "Traceback" not in output


def test_verify_takes_objects_apart(tmp_path: Path) -> None:
    """A process that captures nothing has not seen the model's dataclasses yet."""
    call("compile", f"{M}:Answers", "-i", "f32[2,3]", "--backend", "torch", "-o", tmp_path / "m.fxopt")
    done = shell(f"verify {tmp_path / 'm.fxopt'} {M}:Answers")
    assert done.returncode == 0, done.stderr


def test_verify_tells_same_from_other(artifact: Path, lossy: Path) -> None:
    assert answer("verify", artifact, f"{M}:net", "--data", f"{M}:data")["batches"] == 16
    assert not answer("verify", artifact, f"{M}:other", status=1)["ok"]
    assert not answer("verify", lossy, f"{M}:net", "--cosine", "0.9999", status=1)["ok"]
    assert answer("verify", lossy, f"{M}:net", "--cosine", "0.1")["ok"]
    assert "same" in call("verify", artifact, f"{M}:net")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_run_reads_and_writes(artifact: Path, tmp_path: Path, suffix: str) -> None:
    from fxopt.cli import sources

    np.save(tmp_path / "x.npy", cli_models.X.numpy())
    found = answer("run", artifact, "--inputs", tmp_path / "x.npy", "-o", tmp_path / f"y{suffix}")
    (tensor,) = sources.read(tmp_path / f"y{suffix}").values()  # type: ignore[union-attr]
    assert torch.allclose(tensor, cli_models.net()(cli_models.X), atol=1e-5)
    assert found["outputs"]["output"]["shape"] == [1, 10]
    sources.write({"input": cli_models.X}, tmp_path / f"x{suffix}")
    assert answer("run", artifact, "--inputs", tmp_path / f"x{suffix}")["outputs"] == found["outputs"]
    sources.write({"a": cli_models.X, "b": cli_models.X}, tmp_path / f"two{suffix}")
    assert (
        "the model takes"
        in answer("run", artifact, "--inputs", tmp_path / f"two{suffix}", status=2)["error"]["message"]
    )


def test_explain_dump_diff_report(artifact: Path, lossy: Path, tmp_path: Path) -> None:
    assert "fuse-conv-bn-relu" in call("explain", artifact)
    assert answer("explain", f"{M}:pair", "--backend", "torch")["passes"][0]["name"] == "canonicalize"
    text = call("dump", artifact)
    assert "fxopt.conv2d(" in text
    assert text == call("dump", f"{M}:pair")
    assert text == answer("dump", artifact)["fxir"], "lines stay whole, or the text is no dump"
    assert answer("diff", artifact, artifact) == {"same": True, "lines": [], "weights": []}
    assert any(line.startswith("-") for line in answer("diff", artifact, lossy, status=1)["lines"])
    for name in ("a", "b"):
        (tmp_path / f"{name}.fxir").write_text(name)
    assert answer("diff", tmp_path / "a.fxir", tmp_path / "b.fxir", status=1)["lines"][-2:] == ["-a", "+b"]
    assert "Sequential for x86 on torch" in call("report", artifact)
    assert answer("report", artifact)["backend"] == "torch"


def test_weights_that_differ_are_named(artifact: Path, tmp_path: Path) -> None:
    call("compile", f"{M}:other", "-i", "f32[1,3,16,16]", "--backend", "torch", "-o", tmp_path / "o.fxopt")
    assert "5.bias" in answer("diff", artifact, tmp_path / "o.fxopt", status=1)["weights"]


def test_bench(artifact: Path, tmp_path: Path) -> None:
    found = answer("bench", f"{M}:pair", "--backends", "torch,onnx", "--rounds", "1")
    assert set(found["median_ms"]) == {"eager", "torch", "onnx"}
    assert list(answer("bench", artifact, "--rounds", "1")["median_ms"]) == ["torch"]
    call("compile", f"{M}:keywords", "--backend", "torch", "-o", tmp_path / "k.fxopt")
    assert list(answer("bench", tmp_path / "k.fxopt", "--rounds", "1")["median_ms"]) == ["torch"]


def test_listings() -> None:
    assert {row["name"] for row in answer("backends")["backends"]} >= {"torch", "onnx", "openvino"}
    assert {row["name"] for row in answer("passes")["passes"]} >= {"prune-channels", "insert-fake-quant"}
    assert {row["name"] for row in answer("targets")["targets"]} >= {"x86", "arm", "cuda"}
    for name in ("backends", "passes", "targets"):
        assert call(name)


def test_help_needs_no_torch() -> None:
    code = "import sys; from fxopt.cli import app; assert 'torch' not in sys.modules and app.registered_commands"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "compile" in call("--help")
    assert call("--version").startswith("fxopt ")


def test_models_that_do_not_fit_an_artifact(artifact: Path) -> None:
    assert "fails on inputs of the artifact" in call("verify", artifact, f"{M}:keywords", status=2)
    assert answer("verify", artifact, f"{M}:keywords", status=2)["error"]["kind"] == "InputError"
    assert "2 outputs and the artifact 1" in call("verify", artifact, f"{M}:twice", status=2)


def test_what_nobody_foresaw_is_one_line(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.cli.look.report", lambda *args, **kwargs: 1 / 0)
    assert "ZeroDivisionError: division by zero" in call("report", artifact, status=1)
    assert answer("report", artifact, status=1)["error"]["kind"] == "ZeroDivisionError"


def test_backends_to_measure_are_names(artifact: Path) -> None:
    assert "unknown backend 'tourch'" in call("bench", f"{M}:pair", "--backends", "torch,tourch", status=2)
    found = answer("bench", f"{M}:pair", "--backends", " torch , onnx", "--rounds", "1")
    assert set(found["median_ms"]) == {"eager", "torch", "onnx"}


def shell(words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from fxopt.cli import main; main()", *words.split()]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_a_terminal_with_few_letters(artifact: Path) -> None:
    done = shell(f"report {artifact}", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "torch" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
@pytest.mark.parametrize("option", ["", " --json"])
def test_output_that_cannot_be_written(artifact: Path, option: str) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", "from fxopt.cli import main; main()", "report", str(artifact), *option.split()]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("fxopt comp", "compile"),
        ("fxopt compile m:f --backend o", "onnx"),
        ("fxopt compile m:f --target a", "arm"),
        ("fxopt compile m:f --passes gptq,sparsi", "gptq,sparsify-2-4"),
        ("fxopt bench m:f --backends torch,op", "torch,openvino"),
    ],
)
def test_completion(line: str, word: str) -> None:
    words = line.split()
    bash = {"_FXOPT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    assert word in complete(bash)


@pytest.mark.parametrize("name", ["zsh", "fish"])
def test_completion_of_other_shells(name: str) -> None:
    asked = {"_FXOPT_COMPLETE": f"complete_{name}", "_TYPER_COMPLETE_ARGS": "fxopt compile m:f --backend o"}
    assert "onnx" in complete({**asked, "_TYPER_COMPLETE_FISH_ACTION": "get-args"})
    assert "_FXOPT_COMPLETE=complete_" in complete({"_FXOPT_COMPLETE": f"source_{name}"})


def complete(environment: dict[str, str]) -> str:
    code = (
        "import sys; from fxopt.cli import main\nsys.argv = ['fxopt']\n"
        "try: main()\nfinally: assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert "AssertionError" not in done.stderr
    return done.stdout


@pytest.mark.slow
def test_machine_code_is_loaded_where_asked(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    path = tmp_path / "t.fxopt"
    call("compile", f"{M}:pair", "--backend", "tvm", "-o", path)
    assert "on tvm" in call("report", path)
    assert "fuse-conv-bn-relu" in call("explain", path)  # neither needs more than the report
    for words in (("dump", path), ("diff", path, path), ("bench", path, "--rounds", "1"), ("run", path)):
        assert "--allow-code" in call(*words, status=1)
        call(*words, "--allow-code")


def test_a_damaged_report(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "m.fxopt").write_bytes(artifact.read_bytes()[:-500])
    assert "cut off" in call("report", tmp_path / "m.fxopt", status=1)
