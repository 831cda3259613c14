"""The documentation: built into site/, served while it is written, and brought up to date with the code."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools import ROOT, docs_blocks, docs_tables

PAGES = ROOT / "docs"


def pages() -> list[Path]:
    """Every page with something to run or to keep up to date, README.md first."""
    return [ROOT / "README.md", *sorted(PAGES.rglob("*.md"))]


def write(chosen: Sequence[Path]) -> Iterator[str]:
    """Bring tables and shown outputs of *chosen* pages up to date; gives what is wrong beyond that."""
    for page in chosen:
        text = docs_tables.updated(page)
        if text != page.read_text():
            page.write_text(text)
        if docs_blocks.runs(page):
            yield from docs_blocks.run(page, write=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Builds, serves or writes; the exit status is 0 where all is well."""
    parser = argparse.ArgumentParser(prog="tools/docs", description=__doc__)
    parser.add_argument("--serve", action="store_true", help="show the site on localhost, anew after each change")
    parser.add_argument("--write", action="store_true", help="write what tables and blocks of code give into the pages")
    parser.add_argument("pages", nargs="*", type=Path, help="for --write; all where none is given")
    options = parser.parse_args(argv)
    if options.write:
        problems = list(write([page.resolve() for page in options.pages] or pages()))
        print("\n\n".join(problems))
        return int(bool(problems))
    command = ["serve"] if options.serve else ["build", "--strict", "--site-dir", str(ROOT / "site")]
    done = subprocess.run([sys.executable, "-m", "mkdocs", *command, "--config-file", str(ROOT / "mkdocs.yml")])
    if not options.serve and done.returncode == 0:
        print(f"built: {ROOT / 'site' / 'index.html'}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
