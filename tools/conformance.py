"""Tries every backend on the conformance graphs and writes the table of docs/conformance.md.

It ends with status 1 where a backend computes something wrong, or fails otherwise than by declining.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fxopt import backends, conformance
from fxopt.conformance import Conformance
from fxopt.registry import find_backend
from tools import ROOT

DOCUMENT = ROOT / "docs" / "conformance.md"

HEAD = """# Conformance

What each backend does with the small graphs of `fxopt.conformance`: *yes* means that every call gives what eager gives
(after lossy passes: what the graph gives that is left), and a number stands for the reason why it declines, below. A
backend declines when it is compiled, with `UnsupportedOp`; it never computes something else. What an operator makes of
NaN is the engine's own affair and not held to that: [onnx](backends/onnx.md#limits) and
[openvino](backends/openvino.md#limits) lose NaN in operators that are named there. `tools/conformance` writes this
page, and `fxopt.conformance.run("name")` tries a backend of your own.
"""


def markdown(found: Conformance) -> str:
    """The page."""
    reasons: dict[str, int] = {}
    outcomes = {(one.case, one.backend): one for one in found}
    lines = [["graph", *found.backends], ["---"] + [":---:"] * len(found.backends)]
    for case in dict.fromkeys(one.case for one in found):
        cells = []
        for backend in found.backends:
            one = outcomes[case, backend]
            number = reasons.setdefault(_plain(one.reason), len(reasons) + 1) if one.reason else 0
            cells.append({"passed": "yes", "declined": f"{number}", "failed": f"**fails** {number}"}[one.verdict])
        lines.append([case, *cells])
    tallies = [found.tally(backend) for backend in found.backends]
    lines.append(["**passed of all**", *(f"**{t['passed']} of {sum(t.values())}**" for t in tallies)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    listed = "\n".join(f"{number}. {reason}" for reason, number in reasons.items())
    return f"{HEAD}\n{table}\n\n{listed}\n"


def _plain(reason: str) -> str:
    """*reason* without the place in the source of the graphs, which says nothing there."""
    text = re.sub(r" at \S+\.py:\d+", "", reason)
    return text.replace("|", "\\|").replace("<", "\\<").replace("*", "\\*").replace("_", "\\_")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs, prints and writes."""
    parser = argparse.ArgumentParser(prog="tools/conformance", description=__doc__)
    parser.add_argument("--backends", default="", help="comma-separated; default: all that are installed")
    parser.add_argument("--only", default="", help="comma-separated graphs or topics; then nothing is written")
    parser.add_argument("--output", type=Path, default=DOCUMENT)
    options = parser.parse_args(argv)
    torch.set_num_threads(2)
    names = [name for name in options.backends.split(",") if name] or [*backends.available()]
    names.sort(key=lambda name: (name != "torch", name))
    for name in names:
        find_backend(name).require()
    found = conformance.run(names, only=[name for name in options.only.split(",") if name] or None)
    print(found)
    if not options.only:
        options.output.parent.mkdir(exist_ok=True)
        options.output.write_text(markdown(found))
        print(f"written to {options.output}")
    sys.exit(1 if found.failures else 0)


if __name__ == "__main__":
    main()
