"""The import rules, read from the source without running it.

The core imports no pass and no backend while it is being imported; a pass imports no backend, a backend no pass,
and neither imports a sibling plug-in's engine. Engines and model zoos are optional: nothing may need them at import.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator

from tools import ROOT

NEVER = ("torchvision", "timm", "transformers", "sklearn", "tools", "tests", "passes", "backends")
"""What the installed library imports nowhere, not even inside a function."""

LAZY = ("openvino", "onnxruntime", "tvm", "onnxscript", "xgboost", "psutil", "matplotlib")
"""Engines and extras: imported only inside the function that needs them; a missing one is one clear error there.

The modules ``_tvm_*`` of the backends are written in terms of TVM. They may import it, and are imported like it.
"""

WRITTEN_IN = {"tvm": "fxopt.backends._tvm_"}


def imported_modules(tree: ast.AST, package: str, *, lazy: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each import below *tree*.

    Args:
        tree: a parsed module.
        package: the dotted package the module lives in, which relative imports start from.
        lazy: whether imports inside functions, and those for the type checker only, are wanted too.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif lazy or not _runs_later(node):
            yield from imported_modules(node, package, lazy=lazy)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _runs_later(node: ast.AST) -> bool:
    """Whether *node* holds code that importing the module does not run."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return True
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _within(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def violations(source: str, package: str, name: str = "") -> Iterator[tuple[int, str]]:
    """Line and complaint for each import in *source*, the module *name* of *package*, that breaks a rule."""
    tree = ast.parse(source)
    other = {"fxopt.passes": ("fxopt.backends",), "fxopt.backends": ("fxopt.passes",)}
    for line, module in imported_modules(tree, package, lazy=True):
        if _within(module, NEVER):
            yield line, f"the library never imports {module}"
        for kind, forbidden in other.items():
            if _within(package, (kind,)) and _within(module, forbidden):
                yield line, f"{kind} may not import {module}"
    own = [engine for engine, prefix in WRITTEN_IN.items() if f"{package}.{name}".startswith(prefix)]
    for line, module in imported_modules(tree, package, lazy=False):
        if _within(module, tuple(own)) or any(module.startswith(WRITTEN_IN[engine]) for engine in own):
            continue
        if _within(module, LAZY) or module.startswith(tuple(WRITTEN_IN.values())):
            yield line, f"{module} must be imported inside the function that needs it"
        if not _within(package, tuple(other)) and _within(module, tuple(other)):
            yield line, f"the core may not import {module} at module level"


def main() -> int:
    """Prints every violation; the exit status is 1 where there is one."""
    failed = False
    for folder, package in (("fxopt", "fxopt"), ("passes", "fxopt.passes"), ("backends", "fxopt.backends")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).parent.parts
            for line, complaint in sorted(set(violations(path.read_text(), ".".join([package, *inner]), path.stem))):
                print(f"{path.relative_to(ROOT)}:{line}: {complaint}")
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
