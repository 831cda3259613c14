"""The dump: deterministic, complete, short, and the same from one capture to the next."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import dump
from fxopt.capture import capture
from tests.passes.models import Model, chain, image


def network() -> nn.Module:
    torch.manual_seed(0)
    return Model(
        lambda m, x: m.head((m.norm(m.conv(x)) + x).relu().mean((2, 3))).split(2, -1),
        conv=nn.Conv2d(4, 4, 3, padding=1),
        norm=nn.BatchNorm2d(4),
        head=nn.Linear(4, 4),
    )


def text(model: nn.Module, *inputs: Any, shapes: Any = None) -> str:
    return dump.dump(capture(model, inputs, None, shapes).program, "after capture  target x86")


@pytest.mark.parametrize("shapes", [None, (({0: "batch"},),)])
def test_two_captures_give_the_same_text(shapes: Any) -> None:
    assert text(network(), image(), shapes=shapes) == text(network(), image(), shapes=shapes)


def test_weights_do_not_show_and_addresses_neither() -> None:
    first, model = text(network(), image()), network()
    for parameter in model.parameters():
        parameter.data.normal_()
    assert text(model, image()) == first
    assert not re.search(r"0x[0-9a-f]+", first)


def test_the_text_reads_as_designed() -> None:
    assert text(network(), image()).splitlines() == [
        "// fxir 1  after capture  target x86",
        "graph(%args_0: f32[2,4,6,6]):",
        "  %0: f32[2,4,6,6] = conv2d(%args_0) {weight=@conv.weight f32[4,4,3,3], bias=@conv.bias f32[4], "
        "padding=[1,1]}",
        "  %1: f32[2,4,6,6] = batch_norm(%0) {weight=@norm.weight f32[4], bias=@norm.bias f32[4], "
        "running_mean=@norm.running_mean f32[4], running_var=@norm.running_var f32[4], training=False, momentum=0.1, "
        "eps=1e-05, cudnn_enabled=False}",
        "  %2: f32[2,4,6,6] = add.Tensor(%1, %args_0)",
        "  %3: f32[2,4,6,6] = relu(%2)",
        "  %4: f32[2,4] = mean.dim(%3) {dim=[2,3]}",
        "  %5: f32[2,4] = linear(%4) {weight=@head.weight f32[4,4], bias=@head.bias f32[4]}",
        "  %6: (f32[2,2], f32[2,2]) = split.Tensor(%5) {split_size=2, dim=-1}",
        "  %7: f32[2,2] = getitem(%6, 0)",
        "  %8: f32[2,2] = getitem(%6, 1)",
        "  return [%7,%8]",
    ]


def test_every_kind_of_argument() -> None:
    def forward(m: Any, x: torch.Tensor, n: int) -> Any:
        y = torch.cat([x, x * n]).to(torch.float64).clamp(-1e-7, float("inf"))
        return y[:, 0::2], None, n, torch.zeros(2, dtype=torch.int64), x > 0

    shown = text(Model(forward), torch.randn(2, 4), 3)
    assert "cat([%args_0,%mul])" not in shown
    assert re.search(r"cat\(\[%args_0,%\d\]\)", shown)
    assert "{other=3}" in shown
    assert "dtype=float64" in shown
    assert "min=-1e-07, max=inf" in shown
    assert "i64[2]" in shown
    assert "bool[2,4]" in shown
    assert re.search(r"return \[%\d,None,3,%\d,%\d\]", shown)


def test_dynamic_sizes_show() -> None:
    shown = text(network(), image(), shapes=(({0: "batch"},),))
    assert re.search(r"graph\(%args_0: f32\[s\d+,4,6,6\]\)", shown)


def test_writebacks_show() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        m.count.add_(1)
        result: torch.Tensor = x + m.count
        return result

    lines = text(Model(forward, count=torch.zeros(())), torch.randn(2)).splitlines()
    assert {line.strip() for line in lines if "written back" in line} == {
        "// result 1 is written back to count",
        "// result 2 is written back to input 0",
    }


FILES = [
    "00-capture.fxir",
    "01-canonicalize.fxir",
    "02-common-subexpressions.fxir",
    "03-recognize-activations.fxir",
    "04-fold-constants.fxir",
    "05-fuse-conv-bn-relu.fxir",
    "06-merge-linears.fxir",
    "07-cast-precision.fxir",
]


@pytest.mark.parametrize("how", ["argument", "path", "environment"])
def test_compile_writes_a_file_for_each_pass(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, where = tmp_path / "not" / "there", {}
    if how == "environment":
        monkeypatch.setenv("FXOPT_DUMP", str(folder))
    else:
        where = {"dump": folder if how == "path" else str(folder)}
    model = chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    fxopt.compile(model, example_inputs=(image(),), passes="cast-precision", backend="torch", **where)  # type: ignore[arg-type]
    assert sorted(p.name for p in folder.iterdir()) == FILES
    assert (folder / FILES[5]).read_text().startswith("// fxir 1  after fuse-conv-bn-relu  target x86\n")
    assert "fxopt.conv2d" in (folder / FILES[5]).read_text()
    assert "fxopt.conv2d" not in (folder / FILES[4]).read_text()


def test_the_argument_wins_over_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_DUMP", str(tmp_path / "environment"))
    fxopt.compile(nn.ReLU(), example_inputs=(image(),), dump=tmp_path / "argument", backend="torch")
    assert [p.name for p in tmp_path.iterdir()] == ["argument"]


def test_no_folder_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fxopt.compile(nn.ReLU(), example_inputs=(image(),), backend="torch")
    assert list(tmp_path.iterdir()) == []


def test_what_an_earlier_dump_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    options: dict[str, Any] = {"example_inputs": (image(),), "dump": tmp_path}
    fxopt.compile(nn.ReLU(), passes="cast-precision", backend="torch", **options)
    old = [tmp_path / "01-mine.txt", tmp_path / "mine.fxir", tmp_path / "other" / "01-mine.fxir"]
    stale = [tmp_path / "07-cast-precision.fxir", tmp_path / "variant-3" / "00-x.fxir", tmp_path / "onnx" / "09-x.fxir"]
    for file in (*old, *stale):
        file.parent.mkdir(exist_ok=True)
        file.write_text("")
    fxopt.compile(nn.ReLU(), backend="torch", **options)
    assert [file.exists() for file in (*old, *stale)] == [True] * 3 + [False] * 3
    assert sorted(p.name for p in tmp_path.glob("0*.fxir")) == FILES[:-1]


def test_each_captured_variant_has_a_folder(tmp_path: Path) -> None:
    compiled = fxopt.compile(nn.ReLU(), backend="torch", dump=tmp_path)
    compiled(torch.ones(2))
    with pytest.warns(UserWarning, match="captured again"):
        compiled(torch.ones(3))
    heads = [(tmp_path / f"variant-{i}" / FILES[0]).read_text().splitlines()[1] for i in (1, 2)]
    assert ["f32[2]" in heads[0], "f32[3]" in heads[1]] == [True, True]
    assert [p.name for p in tmp_path.glob("*.fxir")] == []


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_folder_that_cannot_be_is_refused_before_the_work(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(fxopt.InputError, match=r"dump needs a folder that can be written, and .*file.* is none"):
        fxopt.compile(nn.ReLU(), dump=tmp_path / where)
