"""Compiled models as files: what is loaded answers as what was saved, and no file can make loading do harm."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxopt
from fxopt.artifact.container import MANIFEST
from fxopt.dump import dump
from fxopt.errors import ArtifactError

Pair = collections.namedtuple("Pair", "first second")


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(self.conv(x).relu().mean((2, 3)))
        return result


class Nested(nn.Module):
    def forward(self, x: torch.Tensor, *, scale: float = 2.0) -> dict[str, Any]:
        return {"pair": Pair(x, x * scale), "answer": Answer(x + 1), "list": [x, (x, None)], "inf": x / 0}


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(1))
        self.n: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n += 1
        return x + self.n


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: self.linear(x).sin(), lambda x: x.cos() * 2, (x,))


class Open(nn.Module):
    """Sizes that depend on sizes, a number that is one, and sizes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.linear(x).reshape(x.shape[0] * 2, -1), x.shape[0] // 2, torch.nonzero(x > 0), x[:, ::2]


X = torch.randn(2, 3)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]] = {
    "small": (Small, (torch.randn(2, 3, 8, 8),), {}),
    "nested": (Nested, (X,), {}),
    "keyword": (Nested, (X,), {"example_kwargs": {"scale": 3.0}}),
    "branch": (Branch, (X,), {}),
    "tuples": (lambda: nn.LSTM(3, 4), (X,), {}),
    "open": (Open, (torch.randn(5, 4),), {"dynamic_shapes": {"x": {0: "n"}}}),
    "bf16": (Small, (torch.randn(2, 3, 8, 8),), {"passes": "cast-precision{dtype=bf16}"}),
    "2:4": (lambda: nn.Linear(64, 64), (torch.randn(2, 64),), {"passes": "sparsify-2-4"}),
    "int4": (
        lambda: nn.Linear(64, 64), (torch.randn(2, 64),),
        {"passes": "insert-fake-quant{activations=none,weights=int4}"},
    ),
    "int8": (
        Small, (torch.randn(2, 3, 8, 8),),
        {"passes": "insert-fake-quant", "calibration": [(torch.randn(2, 3, 8, 8),) for _ in range(4)]},
    ),
}  # fmt: skip


def compiled(case: str, backend: str) -> tuple[fxopt.CompiledModel, tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    make, inputs, arguments = CASES[case]
    model = fxopt.compile(make(), example_inputs=inputs, backend=backend, **arguments)
    return model, inputs, arguments.get("example_kwargs", {})


def same(a: Any, b: Any) -> bool:
    (leaves, spec), (others, other) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    equal = (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(leaves, others, strict=True))
    return spec == other and all(equal)


def text(program: fxopt.Program) -> str:
    """The dump; a symbol for a size may have another number."""
    return re.sub(r"\bs\d+\b", "s", dump(program, ""))


@pytest.mark.filterwarnings("ignore:sparsify-2-4", "ignore:insert-fake-quant", "ignore:smooth-quant")
@pytest.mark.parametrize("backend", ["torch", "onnx", "openvino"])
@pytest.mark.parametrize("case", CASES)
def test_loaded_is_saved(case: str, backend: str, tmp_path: Path) -> None:
    try:
        model, inputs, kwargs = compiled(case, backend)
    except fxopt.UnsupportedOp as reason:
        pytest.skip(str(reason))
    expected = model(*inputs, **kwargs)
    model.save(tmp_path / "m.fxopt")
    loaded = fxopt.load(tmp_path / "m.fxopt")
    assert same(loaded(*inputs, **kwargs), expected)
    assert loaded.backend == backend
    assert str(loaded.report) == str(model.report)
    assert str(loaded.target) == str(model.target)
    assert loaded._fixed is not None
    assert model._fixed is not None
    assert text(loaded._fixed.program) == text(model._fixed.program)
    leaves = pytree.tree_leaves((inputs, kwargs))
    assert same(list(loaded.graph(*leaves)), list(model.graph(*leaves)))
    loaded.save(tmp_path / "again.fxopt")
    assert same(fxopt.load(tmp_path / "again.fxopt")(*inputs, **kwargs), expected)
    model.save(tmp_path / "twice.fxopt")
    assert (tmp_path / "twice.fxopt").read_bytes() == (tmp_path / "m.fxopt").read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


def test_open_sizes_stay_open(tmp_path: Path) -> None:
    model, _, _ = compiled("open", "torch")
    model.save(tmp_path / "m.fxopt")
    loaded = fxopt.load(tmp_path / "m.fxopt")
    for rows in (1, 2, 9):
        x = torch.randn(rows, 4)
        assert same(loaded(x), model(x))
    for wrong in (torch.randn(5, 5), torch.randn(5, 4).double()):
        with pytest.raises(fxopt.InputError, match="captured for x"):
            loaded(wrong)


def test_conditions_on_sizes_are_kept(tmp_path: Path) -> None:
    class Taller(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.shape[0] > x.shape[1] else x - 1

    shapes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    model = fxopt.compile(Taller(), example_inputs=(torch.randn(7, 3),), dynamic_shapes=shapes, backend="torch")
    model.save(tmp_path / "m.fxopt")
    loaded = fxopt.load(tmp_path / "m.fxopt")
    assert torch.equal(loaded(torch.zeros(6, 4)), torch.ones(6, 4))
    with pytest.raises(fxopt.InputError, match=r"x.shape\[0\] > x.shape\[1\]"):
        loaded(torch.zeros(4, 6))


def test_state_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    model = fxopt.compile(Counter(), example_inputs=(X,), backend="torch")
    model(X)
    model.save(tmp_path / "m.fxopt")
    loaded = fxopt.load(tmp_path / "m.fxopt")
    assert torch.equal(loaded(X), X + 2)
    assert torch.equal(loaded(X), X + 3)
    assert torch.equal(model(X), X + 2)


def test_a_foreign_target_loads_and_says_that_it_cannot_run(tmp_path: Path) -> None:
    model = fxopt.compile(Small(), target="arm", example_inputs=(torch.randn(1, 3, 8, 8),), backend="onnx")
    model.save(tmp_path / "m.fxopt")
    loaded = fxopt.load(tmp_path / "m.fxopt")
    with pytest.raises(fxopt.BackendUnavailable, match="arm"):
        loaded(torch.randn(1, 3, 8, 8))
    loaded.save(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").exists()


def test_neither_class_nor_source_is_needed(tmp_path: Path) -> None:
    """A process that knows nothing of this module: outputs keep their names."""
    model, _, _ = compiled("nested", "torch")
    model.save(tmp_path / "m.fxopt")
    torch.save(X, tmp_path / "x.pt")
    code = """
        import sys, torch, fxopt
        path, x = sys.argv[1], torch.load(sys.argv[2])
        y = fxopt.load(path)(x)
        assert torch.equal(y["pair"].second, x * 2) and torch.equal(y["pair"][0], x)
        assert torch.equal(y["answer"].logits, x + 1) and torch.equal(y["answer"]["logits"], x + 1)
        assert y["list"][1][1] is None
        assert type(y["answer"]).__name__ == "Answer"
        assert "tests.core.test_artifact" not in sys.modules and "pickle" not in repr(open(path, "rb").read())
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "m.fxopt"), str(tmp_path / "x.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_a_quantized_model_loads_in_a_new_process(tmp_path: Path) -> None:
    """There nothing has registered the operators of quantization yet."""
    model, inputs, _ = compiled("int8", "torch")
    model.save(tmp_path / "m.fxopt")
    torch.save([inputs[0], model(*inputs)], tmp_path / "x.pt")
    code = "import sys, torch, fxopt; x, y = torch.load(sys.argv[2]); assert torch.equal(fxopt.load(sys.argv[1])(x), y)"
    command = [sys.executable, "-c", code, str(tmp_path / "m.fxopt"), str(tmp_path / "x.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_operators_of_others_only_where_allowed(tmp_path: Path) -> None:
    with torch.library._scoped_library("artifact_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeImplicitAutograd")

        class Twice(nn.Module):
            def forward(self, x: torch.Tensor) -> Any:
                return torch.ops.artifact_test.twice(x)

        fxopt.compile(Twice(), example_inputs=(X,), backend="torch").save(tmp_path / "m.fxopt")
        with pytest.raises(ArtifactError, match=r"allow_ops=\['artifact_test'\]"):
            fxopt.load(tmp_path / "m.fxopt")
        assert torch.equal(fxopt.load(tmp_path / "m.fxopt", allow_ops=["artifact_test"])(X), X * 2)
    with pytest.raises(ArtifactError, match="there is no operator"):
        fxopt.load(tmp_path / "m.fxopt", allow_ops=["artifact_test"])


def test_what_cannot_be_saved_is_named_and_leaves_the_old_file(tmp_path: Path) -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("graph", torch.eye(3).to_sparse())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = torch.sparse.mm(self.graph, x.T)
            return result

    (tmp_path / "m.fxopt").write_text("old")
    model = fxopt.compile(Sparse(), example_inputs=(X,), backend="torch")
    with pytest.raises(ArtifactError, match=r"'graph' is a torch\.sparse_coo tensor"):
        model.save(tmp_path / "m.fxopt")
    assert (tmp_path / "m.fxopt").read_text() == "old"
    small = compiled("small", "torch")[0]
    for path in (tmp_path / "none" / "m.fxopt", tmp_path / "folder.fxopt"):
        (tmp_path / "folder.fxopt").mkdir(exist_ok=True)
        with pytest.raises(ArtifactError, match="cannot write"):
            small.save(path)
    with pytest.raises(ArtifactError, match=r"\.fxopt is for every backend"):
        small.save(tmp_path / "m.so")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.fxopt", "m.fxopt"]


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    code = """
        import sys, torch, fxopt
        model = fxopt.compile(torch.nn.Linear(700, 700), example_inputs=(torch.randn(1, 700),), backend="torch")
        print("ready", flush=True)
        while True:
            model.save(sys.argv[1])
    """
    path = tmp_path / "m.fxopt"
    for delay in range(8):
        command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            while not path.exists():
                pass
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.02 + delay * 0.0137)
            os.kill(process.pid, signal.SIGKILL)
        assert fxopt.load(path)(torch.ones(1, 700)).shape == (1, 700)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "m.fxopt"
    compiled("open", "torch")[0].save(path)
    return path


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sealed(path: Path, parts: dict[str, bytes], manifest: dict[str, Any] | None = None) -> Path:
    """A file with *parts*, its checksums right: what someone would make who means harm."""
    made = json.loads(parts[MANIFEST]) if manifest is None else manifest
    rest = {name: content for name, content in parts.items() if name != MANIFEST}
    made["members"] = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in rest.items()}
    text = json.dumps(made).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {**rest, MANIFEST: text}.items():
            archive.writestr(name, content)
        archive.comment = b"fxopt sha256 " + hashlib.sha256(text).hexdigest().encode()
    return path


def test_the_seal_of_these_tests_is_the_right_one(saved: Path, tmp_path: Path) -> None:
    assert fxopt.load(sealed(tmp_path / "m.fxopt", members(saved)))(torch.randn(3, 4))[1] == 1


def test_damage_is_found(saved: Path, tmp_path: Path) -> None:
    whole, path = saved.read_bytes(), tmp_path / "m.fxopt"
    for cut in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ArtifactError, match=r"no fxopt artifact|cut off|damaged"):
            fxopt.load(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(ArtifactError, match="goes on after its end"):
        fxopt.load(path)
    for name, content in members(saved).items():
        at = whole.index(content) + len(content) // 2
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ArtifactError, match=f"{name} (is not what|was altered)"):
            fxopt.load(path)


def test_a_member_whose_name_is_no_text(saved: Path, tmp_path: Path) -> None:
    path = sealed(tmp_path / "m.fxopt", {**members(saved), "é.bin": b""})  # the name as UTF-8, as a flag beside it says
    content = path.read_bytes()
    path.write_bytes(content.replace("é.bin".encode(), b"\xc0\xc0.bin"))
    with pytest.raises(ArtifactError, match="no fxopt artifact, or is cut off: 'utf-8'"):
        fxopt.load(path)


def test_what_is_no_artifact_gets_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "text.fxopt").write_text("hello")
    with zipfile.ZipFile(tmp_path / "zip.fxopt", "w") as archive:
        archive.writestr("a.txt", "hello")
    torch.save({"a": X}, tmp_path / "torch.fxopt")
    for name, message in (
        ("none.fxopt", "there is no file"), ("text.fxopt", "is no fxopt artifact"), ("zip.fxopt", "no fxopt artifact"),
        ("torch.fxopt", "which no artifact"), (".", "is a folder"),
    ):  # fmt: skip
        with pytest.raises(ArtifactError, match=message):
            fxopt.load(tmp_path / name)
    with pytest.raises(ArtifactError, match=r"load\(\) wants the path"):
        fxopt.load(3)  # type: ignore[arg-type]


def test_a_newer_schema_is_refused(saved: Path, tmp_path: Path) -> None:
    parts = members(saved)
    manifest = json.loads(parts[MANIFEST]) | {"schema": 99}
    with pytest.raises(ArtifactError, match=r"newer fxopt .* update fxopt"):
        fxopt.load(sealed(tmp_path / "m.fxopt", parts, manifest))


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a\\b", "payload/../../x", "payload/a/b", "é", "A.JSON"])
def test_paths_that_lead_elsewhere_are_refused(saved: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="which no artifact has"):
        fxopt.load(sealed(tmp_path / "m.fxopt", {**members(saved), name: b"x"}))
    assert len(list(tmp_path.iterdir())) == 1


def test_compressed_and_doubled_members_are_refused(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.fxopt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("graph.json", bytes(10**7))
    with pytest.raises(ArtifactError, match="compressed"):
        fxopt.load(path)
    sealed(path, members(saved))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("graph.json", b"{}")
    with pytest.raises(ArtifactError, match=r"a member named 'graph\.json'"):
        fxopt.load(path)


def _first(graph: dict[str, Any], key: str) -> dict[str, Any]:
    found: dict[str, Any] = next(node for node in graph["nodes"] if key in node)
    return found


HARM: dict[str, Callable[[dict[str, Any]], object]] = {
    "reads a file": lambda g: _first(g, "call").update(call="aten.from_file.default", args=["/etc/passwd"]),
    "writes in place": lambda g: _first(g, "call").update(call="aten.relu_.default", args=[{"node": 0}]),
    "Python function": lambda g: _first(g, "call").update(call="os.system", args=["true"]),
    "dunder": lambda g: _first(g, "call").update(call="aten.__class__.default"),
    "loads a library": lambda g: _first(g, "call").update(call="aten.load_library.default"),
    "code as a name": lambda g: _first(g, "call").update(name="x): import os; os.system('true') #"),
    "code as an input": lambda g: _first(g, "input").update(input="x): import os #"),
    "code as a constant": lambda g: _first(g, "constant").update(constant="__class__; import os"),
    "no such node": lambda g: _first(g, "output").update(output={"tuple": [{"node": 10**6}]}),
    "its own result": lambda g: _first(g, "call").update(args=[{"node": 99}]),
    "wrong arguments": lambda g: _first(g, "call").update(args=["a", {"dtype": "load"}]),
    "code as a condition": lambda g: g["signature"].update(guards=[["x", "__import__('os').system('true')"]]),
    "attribute in a condition": lambda g: g["signature"].update(guards=[["x", "x[0].__class__"]]),
    "huge power": lambda g: g["signature"]["inputs"][0].update(shape=[["Pow", 10**18, 10**18], 4]),
    "deep": lambda g: g["signature"]["inputs"][0].update(shape=[json.loads("[" * 500 + "]" * 500), 4]),
    "other inputs": lambda g: g["signature"].update(inputs=[]),
    "other outputs": lambda g: g["signature"].update(outputs=["a"]),
    "writes to nothing": lambda g: g["signature"].update(writebacks=[["none", None]]),
    "a module to import": lambda g: g["signature"].update(
        out={"kind": "object", "class": "antigravity:x y", "fields": ["a"], "of": [None]}
    ),
    "no nodes": lambda g: g.update(nodes=[]),
    "a list": lambda g: g.update(nodes=3, signature=[]),
}


@pytest.mark.parametrize("harm", HARM)
def test_hostile_graphs_are_refused(saved: Path, tmp_path: Path, harm: str) -> None:
    parts = members(saved)
    graph = json.loads(parts["graph.json"])
    HARM[harm](graph)
    with pytest.raises(ArtifactError):
        fxopt.load(sealed(tmp_path / "m.fxopt", {**parts, "graph.json": json.dumps(graph).encode()}))
    assert "antigravity" not in sys.modules


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 64, 3, bias=False), nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.up, self.down = nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(self.up(self.second(self.first(x).relu()).relu().mean((2, 3))).relu())


def sparse(backend: str, passes: str = "sparsify-2-4") -> tuple[fxopt.CompiledModel, torch.Tensor]:
    torch.manual_seed(0)
    x, data = torch.randn(2, 16, 9, 9), [(torch.randn(2, 16, 9, 9),) for _ in range(4)]
    return fxopt.compile(Sparse(), example_inputs=(x,), passes=passes, calibration=data, backend=backend), x


@pytest.mark.filterwarnings("ignore:sparsify-2-4", "ignore:insert-fake-quant", "ignore:smooth-quant")
@pytest.mark.parametrize("backend", ["torch", "onnx", "openvino"])
@pytest.mark.parametrize(
    ("passes", "share"),
    [
        ("sparsify-2-4", 0.54),
        ("sparsify-2-4,cast-precision{dtype=fp16}", 0.57),
        ("sparsify-2-4,cast-precision{dtype=bf16}", 0.57),
        ("sparsify-2-4,insert-fake-quant", 0.65),
        ("sparsify-2-4{n=1},insert-fake-quant{activations=none}", 0.35),
    ],
)
def test_sparse_weights_are_packed_for_every_engine(passes: str, share: float, backend: str, tmp_path: Path) -> None:
    try:
        model, x = sparse(backend, passes)
    except fxopt.UnsupportedOp as reason:
        pytest.skip(str(reason))
    model.save(tmp_path / "m.fxopt")
    parts = members(tmp_path / "m.fxopt")
    held = sum(len(one) for name, one in parts.items() if "safetensors" in name or name == "payload/weights")
    assert held <= share * model.report.bytes[1] + 4000, "beside names and places"
    assert "payload/weights" not in parts
    loaded = fxopt.load(tmp_path / "m.fxopt")
    assert torch.equal(loaded(x), model(x))
    before, after = model.graph.state_dict(), loaded.graph.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    loaded.save(tmp_path / "again.fxopt")
    assert torch.equal(fxopt.load(tmp_path / "again.fxopt")(x), model(x))


@pytest.mark.filterwarnings("ignore:sparsify-2-4")
def test_packed_weights_of_an_engine_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, _ = sparse("onnx")
    model.save(tmp_path / "m.fxopt")
    parts = members(tmp_path / "m.fxopt")
    places = '[{"tuple":[0,36864,'
    facts = parts["payload.json"].decode()
    assert places in facts
    for wrong in ('[{"tuple":[1,36864,', '[{"tuple":[0,36860,', '[{"tuple":[-4,36864,', '[{"tuple":["0",36864,', "[["):
        with pytest.raises(ArtifactError):
            fxopt.load(sealed(tmp_path / "x.fxopt", {**parts, "payload.json": facts.replace(places, wrong).encode()}))
    for gone in ("payload/rest", "payload/packed.safetensors"):
        with pytest.raises(ArtifactError):
            fxopt.load(sealed(tmp_path / "x.fxopt", {name: one for name, one in parts.items() if name != gone}))


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_names_of_modules_need_not_be_identifiers(backend: str, tmp_path: Path) -> None:
    """As in torchvision's RegNet: "trunk_output.block1.block1-0.f.se.fc1.weight"."""
    x = torch.randn(2, 64)
    for name in ("block1-0", "a b", "layer:1", "größe", "1"):
        model = nn.Sequential()
        model.add_module(name, nn.Linear(64, 64))
        compiled = fxopt.compile(model, example_inputs=(x,), backend=backend)
        compiled.save(tmp_path / "m.fxopt")
        loaded = fxopt.load(tmp_path / "m.fxopt")
        assert torch.equal(loaded(x), compiled(x))
        assert loaded.graph.state_dict().keys() == compiled.graph.state_dict().keys()
    model = nn.Sequential()
    model.add_module('say "no"', nn.Linear(64, 64))
    with pytest.raises(ArtifactError, match="cannot hold the name"):
        fxopt.compile(model, example_inputs=(x,), backend=backend).save(tmp_path / "m.fxopt")
    assert torch.equal(fxopt.load(tmp_path / "m.fxopt")(x), compiled(x)), "the file from before"


def test_an_onnx_file_that_reads_elsewhere_is_refused(tmp_path: Path) -> None:
    import onnx

    compiled("small", "onnx")[0].save(tmp_path / "m.fxopt")
    parts = members(tmp_path / "m.fxopt")
    model = onnx.load_from_string(parts["payload/model.onnx"])
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../etc/passwd")
    parts["payload/model.onnx"] = model.SerializeToString()
    with pytest.raises(ArtifactError, match="takes weights from"):
        fxopt.load(sealed(tmp_path / "evil.fxopt", parts))


class Sized(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x.shape, {"tail": x.size()[1:], "pair": Pair(x, x.numel())}


def test_sizes_stay_sizes(tmp_path: Path) -> None:
    shapes = {"x": {0: "rows"}}
    compiled = fxopt.compile(Sized(), example_inputs=(torch.ones(2, 3),), dynamic_shapes=shapes, backend="torch")
    compiled.save(tmp_path / "m.fxopt")
    for one in (compiled, fxopt.load(tmp_path / "m.fxopt")):
        size, rest = one(torch.ones(5, 3))
        assert type(size) is type(rest["tail"]) is torch.Size
        assert (size, rest["tail"], rest["pair"].second) == ((5, 3), (3,), 15)


def test_long_names_and_links(tmp_path: Path) -> None:
    compiled = fxopt.compile(Small().eval(), example_inputs=(torch.ones(1, 3, 8, 8),), backend="torch")
    path, link = tmp_path / f"{'x' * 240}.fxopt", tmp_path / "link.fxopt"
    compiled.save(path)
    link.symlink_to(path)
    before = path.stat().st_ino
    compiled.save(link)
    assert link.is_symlink()
    assert path.stat().st_ino != before
    fxopt.load(link)
    with pytest.raises(ArtifactError, match="too long"):
        compiled.save(tmp_path / f"{'x' * 300}.fxopt")


def test_a_loaded_report_has_quantization_and_profile(tmp_path: Path) -> None:
    data = [(torch.randn(4, 3, 32, 32),) for _ in range(4)]
    compiled = fxopt.compile(
        Small().eval(), example_inputs=data[0], passes="insert-fake-quant", calibration=data, backend="torch"
    )
    compiled.profile(data[0], runs=3)
    compiled.save(tmp_path / "m.fxopt")
    report = fxopt.load(tmp_path / "m.fxopt").report
    assert report.profile == compiled.report.profile
    assert report.quantization.outputs == compiled.report.quantization.outputs
    assert str(report.quantization) == str(compiled.report.quantization)
    fxopt.load(tmp_path / "m.fxopt").save(tmp_path / "n.fxopt")
    assert str(fxopt.load(tmp_path / "n.fxopt").report.quantization) == str(report.quantization)


def test_the_report_counts_four_bits_as_the_file_does(tmp_path: Path) -> None:
    passes = "insert-fake-quant{activations=none,weights=int4}"
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).eval()
    compiled = fxopt.compile(model, example_inputs=(torch.randn(2, 256),), passes=passes, backend="torch")
    compiled.save(tmp_path / "m.fxopt")
    with zipfile.ZipFile(tmp_path / "m.fxopt") as archive:
        weights = archive.getinfo("weights.safetensors").file_size
    assert compiled.report.bytes[1] - compiled.report.packed_bytes == 256 * 256
    assert 0.9 < weights / compiled.report.packed_bytes < 1.02  # equal zero points take less still
    assert "weights, packed" in str(compiled.report)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_folders_go_without_a_warning(backend: str, tmp_path: Path) -> None:
    code = f"""
        import os, tempfile, torch, fxopt, warnings
        warnings.simplefilter("error", ResourceWarning)
        x = torch.ones(1, 4)
        compiled = fxopt.compile(torch.nn.Linear(4, 4), example_inputs=(x,), backend={backend!r})
        compiled.save("m.fxopt")
        fxopt.load("m.fxopt")(x)
        compiled = None
        assert not [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("fxopt-")]
    """
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "ResourceWarning" not in done.stderr


def test_complex_weights(tmp_path: Path) -> None:
    class Rotates(nn.Module):
        turn: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("turn", torch.polar(torch.ones(4), torch.arange(4.0)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.view_as_real(torch.view_as_complex(x) * self.turn)

    model, x = Rotates().eval(), torch.randn(3, 4, 2)
    fxopt.compile(model, example_inputs=(x,), backend="torch").save(tmp_path / "m.fxopt")
    assert torch.equal(fxopt.load(tmp_path / "m.fxopt")(x), model(x))
