"""The documentation: its code runs and prints what it shows, tables are those of the code, links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fxopt import registry, spec
from tools import ROOT, docs, docs_blocks, docs_tables

SLOW = {"docs/recipes.md", "docs/faq.md"}
PAGES = {str(page.relative_to(ROOT)): page for page in docs.pages()}


def _marked() -> list[Any]:
    named = [name for name, page in PAGES.items() if docs_blocks.runs(page)]
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in named]


@pytest.mark.parametrize("name", _marked())
def test_the_code_of_a_page_runs_and_prints_what_it_shows(name: str) -> None:
    problems = docs_blocks.run(PAGES[name])
    assert not problems, "\n\n".join(problems)


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_those_of_the_code(name: str) -> None:
    """``tools/docs --write`` writes them."""
    assert docs_tables.updated(PAGES[name]) == PAGES[name].read_text()


def _nav(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for inner in entry.values() if isinstance(entry, dict) else entry:
            yield from _nav(inner)


def test_every_page_is_in_the_navigation() -> None:
    listed = list(_nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(listed) == sorted(str(page.relative_to(docs.PAGES)) for page in docs.PAGES.rglob("*.md"))


@pytest.mark.parametrize("kind", ["passes", "backends"])
def test_every_pass_and_backend_has_a_page(kind: str) -> None:
    find = registry.find_pass if kind == "passes" else registry.find_backend
    own = [n for n in registry.available(f"fxopt.{kind}") if find(n).__module__.startswith(f"fxopt.{kind}")]
    pages = {page.stem: page.read_text() for page in (docs.PAGES / kind).glob("*.md") if page.stem != "index"}
    assert sorted(pages) == sorted(own)
    for name, text in pages.items():
        assert text.startswith(f"# {name}\n")
        assert f"<!-- {'options' if kind == 'passes' else 'backend'} {name} -->" in text
        assert re.search(r"^```python$", text, re.MULTILINE), f"{name} has no code that runs"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = PAGES[name]
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        assert not target.startswith(("http:", "https:")), f"{target}: pages are read without a network"
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name} links to {target}"
        if anchor:
            assert anchor in _anchors(found), f"{name} links to {target}"


def _anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head.lower()).strip()) for head in heads}


@pytest.mark.parametrize("name", PAGES)
def test_specs_in_the_text_parse(name: str) -> None:
    text = PAGES[name].read_text().replace("\\|", "|")
    for written in re.findall(r'passes="([a-z0-9-]+[^"…|]*)"', text):
        assert spec.parse(written, registry.find_pass)


MEASURED = ("README.md", "docs/measurements.md")


@pytest.mark.parametrize("name", [name for name in PAGES if name not in (*MEASURED, "docs/conformance.md")])
def test_measured_numbers_are_those_of_the_measurements(name: str) -> None:
    """So that what is measured anew has one place to be written, and the pages that repeat it are found."""
    text = PAGES[name].read_text()
    hidden, tables, fences = r"^<!-- setup.*?^-->$", r"^<!-- \w.*?^<!-- end -->$", r"^```.*?^```$"
    for beside in (hidden, tables, fences, r"^    .*?$", r"`.*?`", r"arXiv:\S+", r"section \S+"):
        text = re.sub(beside, "", text, flags=re.DOTALL | re.MULTILINE)
    numbers = r"(?<![\d.])\d+\.\d+"
    measured = "".join(PAGES[page].read_text() for page in MEASURED)
    assert set(re.findall(numbers, text)) <= set(re.findall(numbers, measured))


@pytest.mark.slow
def test_the_site_builds_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text()
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(?:https?:)?//[^>]+", text)
        assert "<!-- setup" not in text
        assert "unpkg" not in text


# --- what checks the pages finds what is wrong in one

WRONG = {
    "an error": ("```python\n1 / 0\n```\n", "page.md:2: ZeroDivisionError"),
    "another output": ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "page.md:2 prints\n1\n"),
    "a hidden error": ("<!-- setup\nx = y\n-->\n", "page.md:2: NameError"),
    "a wrong option": ("```console\n$ fxopt passes --jsn\n```\n", "exits with 2"),
    "another status": ("```console\n$ fxopt passes --json   # exit status 1\n```\n", "exits with 0"),
    "another answer": ("```console\n$ fxopt --version\nfxopt 77\n```\n", "prints\nfxopt "),
    "an unknown command": ("```sh\nrm -r .\n```\n", "no command of fxopt"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_in_a_page_is_found(case: str, tmp_path: Path) -> None:
    text, problem = WRONG[case]
    (tmp_path / "page.md").write_text(text)
    (found,) = docs_blocks.run(tmp_path / "page.md")
    assert problem in found


def test_a_page_shares_names_and_files_among_its_blocks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- setup\nx = 1\n-->\n\n"
        '```python title="words.py"\nWORD = "file"\n```\n\n'
        "```python\nimport words\nprint(x, words.WORD, 'a', 'b')\n```\n\n"
        "```text\n1 file ... b\n```\n\n"
        "```console\n$ fxopt --version\nfxopt ...\n$ pip install fxopt\n```\n"
    )
    before = Path.cwd(), list(sys.path)
    assert docs_blocks.run(page) == []
    assert (Path.cwd(), list(sys.path)) == before
    assert "words" not in sys.modules


def test_writing_puts_in_what_is_printed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nprint(1)\n```\n\n```text\n```\n\nEnd.\n\n<!-- options bias-correction -->\n<!-- end -->\n"
    )
    assert list(docs.write([page])) == []
    text = page.read_text()
    assert "```text\n1\n```\n\nEnd." in text
    assert "| `samples` | integer | `512` | rows of calibration data" in text
    assert list(docs.write([page])) == []
    assert page.read_text() == text


def test_an_option_without_words_of_its_own_says_where_they_are() -> None:
    assert "| `m` | integer | `4` | see `n` |" in docs_tables.options("sparsify-2-4")
