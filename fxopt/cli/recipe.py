"""Recipes: how to compile a model, in a YAML or TOML file. What is wrong in one is told with its line.

target: x86                                  backend: onnx
input: ["f32[batch=8,3,224,224]"]            calibration: data:batches
passes:
  - prune-channels: {macs: 0.5}
  - insert-fake-quant
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pydantic
import yaml

from fxopt.errors import FxoptError, InputError, SpecError, near_miss

Path_ = tuple[str | int, ...]


class Recipe(pydantic.BaseModel):
    """What a recipe may hold; the command line overrides it.

    Attributes:
        target: as ``fxopt.compile`` takes it; so are ``backend`` and ``backend_options``.
        input: example inputs, spelled as for ``--input``.
        passes: names, specs, or a pass with its options.
        calibration: ``module:name`` of batches.
        loss: ``module:name`` of a function, for passes that look at gradients.
    """

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    target: str | None = None
    backend: str | None = None
    backend_options: dict[str, Any] = pydantic.Field(default_factory=dict)
    input: list[str] = pydantic.Field(default_factory=list)
    passes: list[str | dict[str, dict[str, Any] | None]] = pydantic.Field(default_factory=list)
    calibration: str | None = None
    loss: str | None = None
    verify: bool = True


def read(path: Path) -> tuple[Recipe, list[Any]]:
    """The recipe in *path*, and its passes as objects.

    Raises:
        InputError: the file cannot be read or parsed, or says something that no recipe says; with the line.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the recipe {path} cannot be read: {error}") from error
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise InputError(f"the recipe {path} must be a .yaml or .toml file")
    content, lines = _toml(path, text) if path.suffix == ".toml" else _yaml(path, text)
    if not isinstance(content, dict):
        raise InputError(f"{path}:1: a recipe is a mapping: target, backend, input, passes, calibration")
    try:
        recipe = Recipe.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = tuple(part for part in first["loc"] if part in _keys(content, first["loc"]))
        name = ".".join(map(str, where)) or "recipe"
        problem = f"{name}: {first['msg']}"
        if first["type"] == "extra_forbidden":
            problem = f"a recipe has no {name!r}.{near_miss(name, Recipe.model_fields)}"
        raise InputError(f"{path}:{_line(lines, where)}: {problem}") from error
    _check(path, recipe, lines)
    return recipe, [_pass(path, item, lines, ("passes", i)) for i, item in enumerate(recipe.passes)]


def _check(path: Path, recipe: Recipe, lines: dict[Path_, int]) -> None:
    """Look up what the recipe names, so that what does not exist is told with its line."""
    from fxopt import registry
    from fxopt.cli import sources
    from fxopt.target import resolve_target

    where: Path_ = ("target",)
    try:
        resolve_target(recipe.target or "x86")
        where = ("backend",)
        if recipe.backend and recipe.backend != "auto":
            engine = registry.find_backend(recipe.backend)
            where = ("backend_options",)
            engine.with_options(recipe.backend_options)
        for i, text in enumerate(recipe.input):
            where = ("input", i)
            sources.example(text)
    except FxoptError as error:
        raise InputError(f"{path}:{_line(lines, where)}: {error}") from error


def _pass(path: Path, item: str | dict[str, Any], lines: dict[Path_, int], where: Path_) -> Any:
    """A pass object of one item."""
    from fxopt import registry, spec

    try:
        if isinstance(item, str):
            (one,) = spec.parse(item, registry.find_pass)
            return one
        if len(item) != 1:
            raise SpecError("write one pass an item, with its options under it")
        ((name, options),) = item.items()
        return spec.build(registry.find_pass(name), _tuples(options or {}))
    except SpecError as error:
        raise InputError(f"{path}:{_line(lines, where)}: {error}") from error
    except ValueError as error:
        raise InputError(f"{path}:{_line(lines, where)}: {item!r}: write one pass an item") from error


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def _yaml(path: Path, text: str) -> tuple[Any, dict[Path_, int]]:
    """Content, and the line of each key and item."""
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise InputError(f"{path}:{line}: {getattr(error, 'problem', None) or error}") from error
    lines: dict[Path_, int] = {}
    seen = set[int]()

    def visit(node: Any, where: Path_) -> None:
        lines.setdefault(where, node.start_mark.line + 1)
        if id(node) in seen:  # *alias of a node that stands elsewhere, or around this place
            return
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if (*where, key.value) in lines:
                    raise InputError(f"{path}:{key.start_mark.line + 1}: {key.value!r} stands here a second time")
                lines[(*where, key.value)] = key.start_mark.line + 1
                visit(value, (*where, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                visit(value, (*where, i))

    if root is not None:
        visit(root, ())
    return content, lines


def _toml(path: Path, text: str) -> tuple[Any, dict[Path_, int]]:
    """Content, and the line in which each name first stands."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: {error}") from error
    lines: dict[Path_, int] = {}

    def visit(value: Any, where: Path_, start: int) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            word = key if isinstance(key, str) else inner if isinstance(inner, str) else None
            line = next((n for n, one in enumerate(text.splitlines(), 1) if n >= start and word and word in one), start)
            lines[(*where, key)] = line
            visit(inner, (*where, key), line)

    visit(content, (), 1)
    return content, lines


def _keys(content: Any, where: tuple[Any, ...]) -> list[Any]:
    """The parts of *where* that are keys or indices of *content*; pydantic adds names of types between."""
    keys = []
    for part in where:
        inside = isinstance(content, dict) and part in content
        if inside or (isinstance(content, list) and isinstance(part, int) and part < len(content)):
            keys.append(part)
            content = content[part]
    return keys


def _line(lines: dict[Path_, int], where: Path_) -> int:
    while where and where not in lines:
        where = where[:-1]
    return lines.get(where, 1)
