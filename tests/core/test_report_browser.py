"""The report page in a real browser: no complaints, keys alone, dark and light, phones, 1,600 nodes, hostile names."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import report_html
from fxopt.rewriter import Skip

pytestmark = pytest.mark.slow
EVIL = "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'>"
TAB, ENTER, ESCAPE, LEFT, RIGHT, DOWN = "\ue004", "\ue007", "\ue00c", "\ue012", "\ue014", "\ue015"
FOCUS = "const e = document.activeElement; return e.id || e.getAttribute('aria-label') || e.textContent.slice(0, 40)"


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.c, self.d = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = (x + self.d(self.c(self.b(self.a(x)).relu()))).relu()
        return result


def model(blocks: int, channels: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(channels) for _ in range(blocks))).eval()


@pytest.fixture(scope="module")
def report() -> fxopt.report.Report:
    data = [(torch.randn(2, 32, 16, 16),) for _ in range(4)]
    compiled = fxopt.compile(
        model(3),
        example_inputs=data[0],
        passes="prune-weights{ratio=0.6},insert-fake-quant",
        calibration=data,
        backend="torch",
    )
    compiled.profile(data[0], runs=3)
    return compiled.report


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from tests import chromium

    chromium.require()
    with chromium.browser(tmp_path_factory.mktemp("chromium")) as one:
        yield one


@pytest.fixture
def page(window: Any, report: fxopt.report.Report, tmp_path: Path) -> Iterator[Any]:
    window.size(1280, 800)
    window.scheme("light")
    runs = [report_html.Run(report, "this", accuracy=0.97), report_html.Run(report, "other", accuracy=0.98)]
    window.open(report.to_html(tmp_path / "r.html", runs=runs))
    yield window
    assert window.complaints() == []


def colours(png: bytes, box: tuple[int, int, int, int]) -> list[tuple[int, ...]]:
    """The colours in a part of a picture, the most frequent first."""
    from PIL import Image

    part = Image.open(io.BytesIO(png)).convert("RGB").crop(box)
    counted = part.getcolors(part.width * part.height) or []
    return [colour for _, colour in sorted(counted, reverse=True)]  # type: ignore[misc]


def test_every_section_is_there(page: Any) -> None:
    titles = page.run("return [...document.querySelectorAll('h2')].map(e => e.textContent)")
    assert titles == ["Graphs and layers", "Passes", "Weights and activations", "Zeros", "Runs", "Left alone"]
    assert page.run("return document.querySelectorAll('.layers tbody tr').length") == 6
    assert page.run("return document.querySelectorAll('.histogram').length") >= 6
    assert page.run("return document.querySelectorAll('.zero-map').length") == 6
    assert page.run("return document.querySelectorAll('.scatter circle').length") == 2
    heads = page.run("return [...document.querySelectorAll('.layers th[scope=col]')].map(e => e.textContent)")
    assert {"MACs", "Bytes", "ms", "Bits", "Zeros", "SNR, dB", "Source"} <= set(heads)


def test_it_reads_nothing_from_anywhere(page: Any) -> None:
    found = page.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in found if not name.startswith("blob:")] == []
    refused = page.driver.execute_async_script(
        "const done = arguments[0]; fetch('http://127.0.0.1:9/').then(() => done('no'), (e) => done(String(e)))"
    )
    assert "Failed to fetch" in refused
    complaints = page.complaints()
    assert complaints
    assert all("Content Security Policy" in one for one in complaints)


def test_keys_alone_reach_everything(page: Any) -> None:
    seen = []
    for _ in range(40):
        page.keys(TAB)
        seen.append(page.run(FOCUS))
    for wanted in ("theme", "search", "step", "Next change", "Filter layers", "Layers"):
        assert any(wanted in one for one in seen), (wanted, seen)
    assert sum("operators. Arrow keys follow the edges" in one for one in seen) == 2
    page.run("document.activeElement.blur()")
    page.keys("/")
    assert page.run(FOCUS) == "search"
    page.driver.switch_to.active_element.send_keys("conv2d")
    assert "found" in page.run("return document.querySelector('.found').textContent")
    first = page.run("return document.querySelector('.detail .mono').textContent")
    page.keys(ENTER)
    assert page.run("return document.querySelector('.detail .mono').textContent") != first
    page.keys(ESCAPE)
    assert page.run("return document.querySelector('#search').value") == ""
    before = page.run("return document.querySelector('.detail').textContent")
    page.keys(DOWN)  # the focus is in a graph now: along an edge
    assert page.run("return document.querySelector('.detail').textContent") != before
    page.keys(ESCAPE)
    assert "Select a node" in page.run("return document.querySelector('.detail').textContent")


def test_arrows_move_the_slider_and_what_changed_is_marked(page: Any, report: fxopt.report.Report) -> None:
    page.run("document.querySelector('#step').focus()")
    last = page.run("return document.querySelector('.step-name').textContent")
    assert last == f"{len([one for one in report.passes if one.edits])}. freeze-quantized-weights"
    page.keys(*[LEFT] * (int(last[0]) - 1))
    page.wait("return document.querySelector('.step-name').textContent === '1. prune-weights'")
    page.wait("return document.querySelectorAll('figcaption')[1].textContent.includes('1. prune-weights')")
    page.keys(RIGHT)
    page.wait("return document.querySelector('.hop .quiet').textContent.includes('removed')")
    page.run("document.querySelector('[value=before]').click()")
    page.wait("return document.querySelectorAll('figcaption')[0].textContent.includes('1. prune-weights')")
    page.run("document.querySelector('#below-1').click()")
    gone = page.run("return [...document.querySelectorAll('.fxir .gone')].map(e => e.textContent)")
    new = page.run("return [...document.querySelectorAll('.fxir .new')].map(e => e.textContent)")
    assert any("batch_norm" in line for line in gone)
    assert any("fxopt.conv2d" in line and "activation=relu" in line for line in new)
    assert not any("batch_norm" in line for line in new)


def test_a_row_shows_its_node_and_a_node_its_row(page: Any) -> None:
    page.run("document.querySelectorAll('.layers tbody tr')[3].click()")
    chosen = "return document.querySelector('.layers tbody tr[aria-selected=true]')?.dataset.id"
    name = page.run(chosen)
    assert page.run("return document.querySelector('.detail .mono').textContent") == name[1:]
    assert page.run("return document.querySelectorAll('.detail-spreads .histogram').length") >= 1
    page.run("document.querySelectorAll('.layers tbody tr')[3].focus()")
    page.keys(DOWN, ENTER)
    assert page.run(chosen) != name
    page.run("document.querySelectorAll('canvas')[1].focus()")
    page.keys("\ue011")  # Home: the input, which is no layer
    assert page.run(chosen) is None


def test_the_table_sorts_and_filters(page: Any) -> None:
    def column(i: int) -> list[str]:
        cells = page.run(
            f"return [...document.querySelectorAll('.layers tbody tr > :nth-child({i})')].map(e => e.textContent)"
        )
        return [str(cell) for cell in cells]

    page.run("[...document.querySelectorAll('.sorter')].find(e => e.textContent === 'MACs').click()")
    macs = [float(cell.split()[0]) * {"k": 1e3, "M": 1e6}[cell.split()[1]] for cell in column(3)]
    assert macs == sorted(macs, reverse=True)
    assert page.run("return document.querySelectorAll('.layers [aria-sort=descending]').length") == 1
    page.run("const f = document.querySelector('.layers input'); f.value = '1.c'; f.dispatchEvent(new Event('input'))")
    assert column(1) == ["1.c"]
    page.run("const f = document.querySelector('.layers input'); f.value = ''; f.dispatchEvent(new Event('input'))")
    page.run("document.querySelector('.layers [type=checkbox]').click()")
    assert len(column(1)) > 6


def test_dark_and_light(page: Any) -> None:
    box = (300, 500, 620, 790)
    light = colours(page.picture(), box)[0]
    page.scheme("dark")
    page.wait("return document.querySelector('#theme').title === 'Switch to light colours'")
    page.run("return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    dark = colours(page.picture(), box)[0]
    assert min(light) > 230
    assert max(dark) < 40
    page.run("document.querySelector('#theme').click()")
    page.run("return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert colours(page.picture(), box)[0] == light


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_nothing_is_wider_than_the_screen(page: Any, width: int, height: int) -> None:
    page.size(width, height)
    page.wait("return document.querySelector('canvas').width > 0")
    assert page.run("return document.documentElement.scrollWidth") <= width
    wide = page.run(
        "return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroller, .fxir, svg')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.className || e.tagName)"
    )
    assert wide == []


def test_text_has_contrast(page: Any) -> None:
    script = """
    const lum = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map((v) => (v /= 255) <= 0.03928 ? v / 12.92
        : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const [text, muted, back] = ["text", "muted", "bg"].map((name) => { const s = document.createElement("span");
        s.style.color = `var(--${name})`; document.body.append(s); return lum(getComputedStyle(s).color); });
    const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    return [ratio(text, back), ratio(muted, back)];
    """
    for scheme in ("light", "dark"):
        page.scheme(scheme)
        text, muted = page.run(script)
        assert text > 7
        assert muted > 4.5


def test_sixteen_hundred_nodes_do_not_freeze(window: Any, tmp_path: Path) -> None:
    compiled = fxopt.compile(model(230, 4), example_inputs=(torch.randn(1, 4, 6, 6),), backend="torch")
    assert compiled.report.passes[0].nodes[0] >= 1600
    path = compiled.report.to_html(tmp_path / "r.html")
    assert path.stat().st_size < 2**20
    window.open(path)
    load = window.run("return busy.splice(0)")
    for script in (
        "const s = document.querySelector('#step'); s.value = 0; s.dispatchEvent(new Event('input'))",
        "const s = document.querySelector('#step'); s.value = 1; s.dispatchEvent(new Event('input'))",
        "document.querySelector('#below-1').click()",
        "document.querySelector('[aria-label=\"Before: whole graph\"]').click()",
        "document.querySelector('[aria-label=\"Next change\"]').click()",
    ):
        window.run(script)
        window.driver.execute_async_script("const done = arguments[0]; setTimeout(done, 400)")
    act = window.run("return busy.splice(0)")
    assert max(load, default=0) < 1500  # on a machine that others use too; 300 ms alone
    assert max(act, default=0) < 1000
    assert window.complaints() == []


def test_hostile_names_are_text(window: Any, report: fxopt.report.Report, tmp_path: Path) -> None:
    record = dataclasses.replace(report.passes[0], notes=(EVIL,), skips=(Skip(EVIL, EVIL, EVIL),))
    hostile = dataclasses.replace(report, model=EVIL, target=EVIL, passes=[record, *report.passes[1:]], notes=[EVIL])
    hostile.layers = tuple(dataclasses.replace(one, weight=f"{EVIL}.weight", source=EVIL) for one in report.layers)
    window.open(hostile.to_html(tmp_path / "r.html", runs=[report_html.Run(report, EVIL)]))
    window.run(
        "document.querySelectorAll('.layers tbody tr')[1].click(); document.querySelector('details').open = true"
    )
    assert window.run("return window.hit") is None
    assert window.run("return document.querySelector('h1').textContent") == EVIL
    assert window.run("return document.images.length") == 0
    assert window.complaints() == []


def test_a_layer_with_a_hostile_name(window: Any, tmp_path: Path) -> None:
    net = nn.Sequential()
    net.add_module("</script><script>window", nn.Conv2d(3, 4, 3))
    compiled = fxopt.compile(net.eval(), example_inputs=(torch.randn(1, 3, 8, 8),), backend="torch")
    window.open(compiled.report.to_html(tmp_path / "r.html"))
    assert window.run("return document.querySelectorAll('script').length") == 3
    assert window.complaints() == []


def test_a_reason_leads_to_the_step_that_has_its_node(window: Any, report: fxopt.report.Report, tmp_path: Path) -> None:
    assert report.captured is not None
    fused = next(record.graph for record in report.passes if record.name == "fuse-conv-bn-relu")
    last = next(record.graph for record in reversed(report.passes) if record.graph is not None)
    assert fused is not None
    name = next(iter(set(fused.open().names) - set(last.open().names) - set(report.captured.open().names)), None)
    name = name or next(iter(set(report.captured.open().names) - set(last.open().names)))
    record = dataclasses.replace(report.passes[0], skips=(Skip(name, "a reason", "model.py:7"),))
    one = dataclasses.replace(report, passes=[record, *report.passes[1:]])
    window.open(one.to_html(tmp_path / "r.html"))
    window.run("document.querySelector('.reason').open = true; document.querySelector('.reason .link').click()")
    window.wait(f"return document.querySelector('.detail .mono')?.textContent === '{name}'")
    assert "model.py:7" in window.run("return document.querySelector('.reason').textContent")
    assert window.complaints() == []


def test_pages_of_runs_alone_and_of_reports_without_graphs(
    window: Any, report: fxopt.report.Report, tmp_path: Path
) -> None:
    window.open(report_html.compare([report, report_html.Run(report, "b", accuracy=0.5)], tmp_path / "r.html"))
    assert window.run("return document.querySelectorAll('.scatter circle').length") >= 1
    bare = dataclasses.replace(report, captured=None, layers=())
    window.open(bare.to_html(tmp_path / "r.html"))
    assert window.run("return document.querySelectorAll('canvas').length") == 0
    window.open(dataclasses.replace(report, captured=None).to_html(tmp_path / "r.html"))
    assert window.run("return document.querySelectorAll('.layers tbody tr').length") == 6
    assert window.complaints() == []


@pytest.mark.parametrize(
    ("net", "inputs"),
    [
        (nn.Identity(), (torch.randn(2),)),
        (nn.Flatten(), (torch.randn(2, 3, 4),)),
        (nn.Bilinear(2, 3, 4), (torch.randn(5, 2), torch.randn(5, 3))),
        (nn.LSTM(4, 4), (torch.randn(3, 1, 4),)),
    ],
)
def test_the_smallest_and_the_odd(window: Any, tmp_path: Path, net: nn.Module, inputs: Any) -> None:
    window.open(fxopt.compile(net.eval(), example_inputs=inputs, backend="torch").report.to_html(tmp_path / "r.html"))
    window.run("document.querySelectorAll('canvas')[1].focus()")
    window.keys(DOWN, DOWN)
    window.run("document.querySelector('#below-1').click()")
    assert window.run("return document.querySelector('.fxir').textContent").count("return") >= 1
    assert window.complaints() == []


def test_layouts_of_awkward_graphs(window: Any, report: fxopt.report.Report, tmp_path: Path) -> None:
    class Dense(nn.Module):  # everything reads everything before it
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(60))
            self.side = nn.Parameter(torch.randn(8))

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
            found = [x]
            for layer in self.layers:
                found.append(layer(torch.stack(found[-24:]).sum(0)) * mask)
            return found[-1], found[3], self.side.exp()

    torch.manual_seed(0)
    compiled = fxopt.compile(Dense(), example_inputs=(torch.randn(2, 8), torch.randn(2, 8)), backend="torch")
    window.open(compiled.report.to_html(tmp_path / "r.html"))
    overlaps = window.driver.execute_async_script(
        """
        const done = arguments[0], data = JSON.parse(document.getElementById("data").textContent);
        (async () => {
            const found = [];
            for (const step of data.snapshots) {
                const graph = parse(await unpack(step.data)), { x, y } = await new Layouts().of(graph);
                for (let i = 0; i < x.length; i++) for (let j = 0; j < i; j++)
                    if (Math.abs(x[i] - x[j]) < 168 && Math.abs(y[i] - y[j]) < 40) found.push([i, j]);
                if (x.some(Number.isNaN) || y.some(Number.isNaN)) found.push("NaN");
            }
            done(found);
        })().catch((error) => done(String(error)));
        """
    )
    assert overlaps == []
    assert window.complaints() == []


def test_the_text_of_a_step_is_what_was_dumped(page: Any, report: fxopt.report.Report) -> None:
    assert report.captured is not None
    lines = page.driver.execute_async_script(
        """
        const done = arguments[0], data = JSON.parse(document.getElementById("data").textContent);
        unpack(data.snapshots[0].data).then((one) => done(parse(one).nodes.map((node) => [node.op, node.type])));
        """
    )
    wanted = re.findall(r"^  %\d+: (.+?) = ([^\s(]+)\(", report.captured.open().text, re.MULTILINE)
    assert [line for line in lines if line[0] not in ("input", "output")] == [[op, kind] for kind, op in wanted]
