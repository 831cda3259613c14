"""The report as a page: what is in it, that nothing in it can do harm, and what a real browser makes of it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import layers, recording, report_html
from fxopt.errors import ArtifactError
from fxopt.rewriter import Skip

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.deep, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).relu()
        x = (x + self.deep(x)).relu()
        result: torch.Tensor = self.head(x.mean((2, 3)))
        return result


def compiled(passes: str | None = None, backend: str = "torch", **options: Any) -> fxopt.CompiledModel:
    torch.manual_seed(0)
    return fxopt.compile(Net().eval(), example_inputs=(image(),), passes=passes, backend=backend, **options)


def image(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def quantized() -> fxopt.CompiledModel:
    data = [(image(2) + i,) for i in range(4)]
    return compiled("prune-weights{ratio=0.5},insert-fake-quant", backend="onnx", calibration=data)


class Elements(HTMLParser):
    """The start tags of a page, and the text of its scripts by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str | None, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.setdefault(self.tags[-1][1].get("id"), data)


def read(path: Path) -> tuple[str, Elements, Any]:
    text = path.read_text()
    page = Elements(text)
    return text, page, json.loads(page.scripts["data"])


def test_the_page_holds_graphs_layers_and_reasons(quantized: fxopt.CompiledModel, tmp_path: Path) -> None:
    _, _, data = read(quantized.report.to_html(tmp_path / "r.html"))
    report = quantized.report
    assert data["report"]["model"] == "Net"
    assert data["report"]["latency"]["eager"] == report.latency_ms["eager"]
    assert [one["spec"] for one in data["passes"]] == [record.spec for record in report.passes]
    steps = [one["step"] for one in data["snapshots"]]
    assert steps == ["captured", *(record.name for record in report.passes if record.edits)]
    final = json.loads(zlib.decompress(base64.b64decode(data["snapshots"][-1]["data"])))
    assert "quantized_decomposed.quantize_per_tensor" in final["text"]
    assert len(final["names"]) == len(re.findall(r"^  %\d+: ", final["text"], re.MULTILINE))
    conv = next(layer for layer in data["layers"] if layer["weight"].startswith("deep."))
    assert (conv["bits"], conv["mode"]) == (8, "static")
    assert conv["zeros"] >= 0.5
    assert conv["snr_db"] > 10
    assert len(conv["map"]) == 16
    assert conv["inputs"]["range"]
    assert sum(conv["weights"]["counts"]) == 16 * 16 * 9
    skips = [skip for one in data["passes"] for skip in one["skips"]]
    assert len(skips) == len(report.skips)


def test_layers_add_up(quantized: fxopt.CompiledModel) -> None:
    report = quantized.report
    assert sum(layer.macs for layer in report.layers) == report.macs[1]
    assert sum(layer.bytes for layer in report.layers) == report.bytes[1]
    assert report.captured is not None
    assert sum(report.captured.open().macs) == report.macs[0]


def test_thin_layers_say_their_rank() -> None:
    report = compiled("low-rank-linear{rank=2,smallest=4}").report
    ranks = {layer.weight: layer.rank for layer in report.layers if layer.rank is not None}
    assert ranks == {"head.low_rank_a": 2, "head.low_rank_b": 2}


def test_four_bits_are_four() -> None:
    report = compiled("insert-fake-quant{activations=none,weights=int4}").report
    assert {layer.bits for layer in report.layers if layer.op == "linear"} <= {4, 32}


def test_scripts_and_styles_are_named_by_hash_and_nothing_else_is_allowed(
    quantized: fxopt.CompiledModel, tmp_path: Path
) -> None:
    text, page, _ = read(quantized.report.to_html(tmp_path / "r.html"))
    (policy,) = (
        str(attributes["content"]) for tag, attributes in page.tags if tag == "meta" and "http-equiv" in attributes
    )
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert "connect-src" not in rules
    digest = base64.b64encode(hashlib.sha256(page.scripts[None].encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert not re.search(r"unsafe|https?:", policy)
    assert not [a for _, attributes in page.tags for a in attributes if a in ("src", "style") or a.startswith("on")]
    links = set(re.findall(r"https?://[^\s\"'`)]+", text)) - {"http://www.w3.org/2000/svg"}
    assert not {link for link in links if "fetch(" in link or ".js" in link}
    assert "fetch(" not in page.scripts[None]
    assert "XMLHttpRequest" not in text


def test_names_of_the_model_cannot_become_markup(tmp_path: Path) -> None:
    report = compiled().report
    record = dataclasses.replace(report.passes[0], notes=(EVIL,), skips=(Skip(EVIL, EVIL, EVIL),))
    report = dataclasses.replace(report, model=EVIL, passes=[record, *report.passes[1:]], notes=[EVIL])
    report.layers = tuple(dataclasses.replace(layer, weight=f"{EVIL}.weight") for layer in report.layers)
    text, page, data = read(report.to_html(tmp_path / "r.html", runs=[report_html.Run(report, EVIL)]))
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert "img" not in {tag for tag, _ in page.tags}
    assert "alert(1)</script>" not in text
    assert data["report"]["model"] == EVIL
    assert data["passes"][0]["skips"] == [[EVIL, EVIL, EVIL]]
    assert data["runs"][0]["label"] == EVIL
    assert "<script" not in report._repr_html_()
    assert "<img" not in report._repr_html_()


def test_numbers_that_are_none_do_not_break_the_page(tmp_path: Path) -> None:
    report = dataclasses.replace(compiled().report, error=float("nan"), latency_ms={"fxopt": float("inf")})
    _, _, data = read(report.to_html(tmp_path / "r.html"))
    assert data["report"]["error"] is None
    assert data["report"]["latency"] == {}


def test_runs_are_compared(quantized: fxopt.CompiledModel, tmp_path: Path) -> None:
    plain = compiled().report
    run = report_html.Run(quantized.report, "int8", accuracy=0.98)
    _, _, data = read(report_html.compare([plain, run], tmp_path / "r.html"))
    assert data["report"] is None
    assert [(one["label"], one["accuracy"]) for one in data["runs"]] == [("torch exact", None), ("int8", 0.98)]
    assert data["runs"][1]["bytes"] == quantized.report.bytes[1]
    _, _, data = read(plain.to_html(tmp_path / "r.html", runs=[run]))
    assert [one["label"] for one in data["runs"]] == ["this one", "int8"]
    _, _, data = read(plain.to_html(tmp_path / "r.html"))
    assert data["runs"] == []


def test_what_is_no_run_or_no_path_says_so(tmp_path: Path) -> None:
    report = compiled().report
    with pytest.raises(fxopt.InputError, match="at least one report"):
        report_html.compare([], tmp_path / "r.html")
    with pytest.raises(fxopt.InputError, match="must be a list of reports"):
        report_html.compare(report, tmp_path / "r.html")  # type: ignore[arg-type]
    with pytest.raises(fxopt.InputError, match=r"must be reports or report_html\.Run, not str"):
        report.to_html(tmp_path / "r.html", runs=["int8"])  # type: ignore[list-item]
    with pytest.raises(fxopt.InputError, match=r"wants the path of a file, such as 'report\.html', not 5"):
        report.to_html(5)  # type: ignore[arg-type]
    with pytest.raises(fxopt.InputError, match="cannot write the report"):
        report.to_html(tmp_path / "missing" / "r.html")


def test_a_loaded_report_makes_the_same_page(quantized: fxopt.CompiledModel, tmp_path: Path) -> None:
    quantized.save(tmp_path / "m.fxopt")
    loaded = fxopt.load(tmp_path / "m.fxopt").report
    assert loaded.layers == quantized.report.layers
    _, _, before = read(quantized.report.to_html(tmp_path / "a.html"))
    _, _, after = read(loaded.to_html(tmp_path / "b.html"))
    assert before["outputs"]
    assert after == before


def test_recordings_of_a_hostile_file_are_errors() -> None:
    bomb = zlib.compress(b"0" * (recording._MOST_BYTES + 1))
    graph = {"text": "", "names": [], "macs": [], "lines": [], "sources": []}
    wrong: list[Any] = [[], {}, {**graph, "names": ["a"]}, {**graph, "text": 5}, {**graph, "sources": [1], "macs": [1]}]
    for data in (b"", b"no zlib", bomb, recording.pack(5)[:-3], *map(recording.pack, wrong)):
        with pytest.raises(ArtifactError):
            recording.Snapshot(data).open()
    whole = dataclasses.asdict(layers.Layer("n", "conv2d", "", "", (), 0, 0))
    entries: list[Any] = [5, [5], [{}], [{**whole, "macs": "many"}], [{**whole, "weights": {"low": 0}}]]
    for entry in entries:
        with pytest.raises(ArtifactError):
            layers.decode_layers(base64.b64encode(recording.pack(entry)).decode())
    assert layers.decode_layers(base64.b64encode(recording.pack([whole])).decode())[0].node == "n"


def test_a_graph_is_recorded_where_a_pass_changed_it_alone() -> None:
    report = compiled().report
    assert [record.graph is not None for record in report.passes] == [record.edits > 0 for record in report.passes]
    fused = next(record.graph for record in report.passes if record.name == "fuse-conv-bn-relu")
    assert fused is not None
    assert "activation=relu" in fused.open().text
    assert any("test_report_html.py:" in source for source in fused.open().sources)


def test_notebooks_show_the_report(quantized: fxopt.CompiledModel) -> None:
    text = str(quantized._repr_html_())
    assert text == quantized.report._repr_html_()
    for word in ("<strong>Net</strong>", "insert-fake-quant", "parameters", "lossy"):
        assert word in text
    assert fxopt.compile(Net().eval())._repr_html_() is None


def test_the_bundled_library_is_the_one_that_is_named() -> None:
    folder = Path(report_html.__file__).parent / "vendor"
    (library,) = json.loads((folder / "vendor.json").read_text())
    assert library["license"] == "MIT"
    assert "Permission is hereby granted" in (folder / "dagre.LICENSE.txt").read_text()
    assert f'"{library["version"]}"' in (folder / "dagre.min.js").read_text()
    assert "Permission is hereby granted" in report_html.page("x", {})


def test_the_latency_after_each_pass_is_measured_on_request(tmp_path: Path) -> None:
    data = [(image(2) + i,) for i in range(4)]
    steps = fxopt.waterfall(Net().eval(), image(), passes="insert-fake-quant", calibration=data, backend="torch")
    compiled_report = compiled("insert-fake-quant", calibration=data).report
    ran = [record.name for record in compiled_report.passes if record.edits]
    assert list(steps.ms) == ["eager", "captured", *ran]
    assert all(ms > 0 for ms in steps.ms.values())
    assert "fuse-conv-bn-relu" in str(steps)
    compiled_report.waterfall = steps.ms
    _, _, page_data = read(compiled_report.to_html(tmp_path / "r.html"))
    assert page_data["report"]["waterfall"] == [list(item) for item in steps.ms.items()]


def test_a_waterfall_needs_this_machine_and_an_engine() -> None:
    with pytest.raises(fxopt.PreconditionError, match="another machine"):
        fxopt.waterfall(Net().eval(), image(), target="cortex-a76")
    with pytest.raises(fxopt.SpecError):
        fxopt.waterfall(Net().eval(), image(), backend="auto")


def test_weights_whose_numbers_cannot_be_counted_are_left_out() -> None:
    assert layers._is_plain(torch.zeros(2, dtype=torch.bfloat16))
    for dtype in (torch.float8_e4m3fn, torch.complex64):
        assert not layers._is_plain(torch.zeros(2, dtype=dtype))
    assert not layers._is_plain(torch.zeros(2, 2).to_sparse())
    assert not layers._is_plain(torch.zeros(2, device="meta"))
