"""Starts a new pass: passes/<name>.py with a rewrite that runs, its test, its page, and its entry point."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from tools import ROOT

PASS = '''"""One sentence on what becomes smaller or faster, then before → after.

    neg(neg(x))   →   x

Why the two are equal, or how far apart they may be.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx

from fxopt.passbase import Pass, PassContext
from fxopt.rewriter import Rewriter

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class {cls}(Pass):
    """neg(neg(x))   becomes   x.  Exact: a sign flips twice without rounding."""

    name: ClassVar[str] = "{name}"
    exact: ClassVar[bool] = True
    runs_after: ClassVar[tuple[str, ...]] = ("canonicalize",)

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """One sweep in graph order."""
        for node in rewriter.nodes():
            inner = node.args[0] if node.target is aten.neg.default else None
            if not isinstance(inner, fx.Node) or inner.target is not aten.neg.default:
                continue
            if len(inner.users) > 1:
                rewriter.skip(node, f"{{inner.name}} has other users")
                continue
            original = inner.args[0]
            assert isinstance(original, fx.Node)
            rewriter.replace(node, original)
'''

TEST = '''"""{name}: what it rewrites, and what it leaves alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxopt.passes.{module} import {cls}
from fxopt.testing import check_pass


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.neg(torch.neg(x)) + 1


class InnerIsUsed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        inner = torch.neg(x)
        return torch.neg(inner) * inner


def test_rewrites() -> None:
    checked = check_pass({cls}(), Twice(), (torch.randn(2, 3),))
    assert "aten.neg" not in checked.ops()
    assert checked.record.edits > 0


def test_leaves_a_shared_value_alone() -> None:
    checked = check_pass({cls}(), InnerIsUsed(), (torch.randn(2, 3),))
    assert checked.record.edits == 0
    assert "other users" in checked.reasons()
'''

# Pages of new passes stand right after this line of mkdocs.yml.
NAV = "      - All passes: passes/index.md"

PAGE = """# {name}

What becomes smaller or faster, in one sentence.

```python
import torch
from torch import nn

from fxopt.testing import check_pass


class Twice(nn.Module):
    def forward(self, x):
        return torch.neg(torch.neg(x)) + 1


model, x = Twice(), torch.randn(2, 3)
for one in ("canonicalize", "{name}"):
    print(check_pass(one, model, (x,)).text)
```

```fxir
```

## Algebra

    neg(neg(x))   →   x

## Options

<!-- options {name} -->
<!-- end -->

## When it hurts

Say it here, with the command that measures it.
"""


def scaffold(name: str, root: Path = ROOT) -> list[Path]:
    """Writes the files of the pass *name* below *root* and declares it in pyproject.toml; returns what changed.

    Raises:
        ValueError: the name is not of the form ``words-with-dashes``, or is taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ValueError(f"{name!r} is no pass name: lower-case words joined by dashes, as in fold-constants")
    module, cls = name.replace("-", "_"), "".join(word.capitalize() for word in name.split("-"))
    project, code, nav = root / "pyproject.toml", root / "passes" / f"{module}.py", root / "mkdocs.yml"
    test, page = root / "tests" / "passes" / f"test_{module}.py", root / "docs" / "passes" / f"{name}.md"
    text = project.read_text()
    if code.exists() or test.exists() or re.search(rf"^{re.escape(name)} = ", text, re.MULTILINE):
        raise ValueError(f"there is a pass {name} already")
    for folder in (test.parent, page.parent):
        folder.mkdir(parents=True, exist_ok=True)
    code.write_text(PASS.format(name=name, cls=cls))
    test.write_text(TEST.format(name=name, cls=cls, module=module))
    page.write_text(PAGE.format(name=name))
    project.write_text(_declared(text, f'{name} = "fxopt.passes.{module}:{cls}"'))
    nav.write_text(nav.read_text().replace(NAV, f"{NAV}\n      - {name}: passes/{name}.md", 1))
    return [code, test, page, project, nav]


def _declared(text: str, line: str) -> str:
    """The text of pyproject.toml with *line* among the entry points of passes, in order."""
    head = '[project.entry-points."fxopt.passes"]\n'
    before, _, rest = text.partition(head)
    table, blank, after = rest.partition("\n\n")
    return before + head + "\n".join(sorted([*table.splitlines(), line])) + blank + after


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the files and says how to go on."""
    parser = argparse.ArgumentParser(prog="tools/new_pass", description=__doc__)
    parser.add_argument("name", help="as it will stand in spec strings, e.g. fold-constants")
    options = parser.parse_args(argv)
    try:
        changed = scaffold(options.name)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    for path in changed:
        print(path.relative_to(ROOT))
    print(f"now run: tools/test {changed[1].relative_to(ROOT)}")
    print(f"and for its page: tools/docs --write {changed[2].relative_to(ROOT)} docs/passes/index.md")


if __name__ == "__main__":
    main()
