"""Spec strings: ``prune-channels{ratio=0.3,scope=global},insert-fake-quant`` ⇄ a list of pass objects.

    spec  := pass ("," pass)*          pass  := name [ "{" [ option ("," option)* ] "}" ]
    option := key "=" value            value := true | false | none | number | word | 'quoted' | [ value, ... ]

``parse`` and ``format`` are each other's inverse on passes; only options that differ from their default are written.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from fxopt.errors import InputError, SpecError, near_miss
from fxopt.passbase import Pass

_TOKEN = re.compile(r"\s*(?:'((?:[^'\\]|\\.)*)'|([\w.+\-*/]+)|([{}\[\],=]))")
_WORD = re.compile(r"[A-Za-z_*][\w.+\-*/]*")
Finder = Callable[[str], type[Pass]]


def resolve(passes: str | Pass | Sequence[str | Pass], find: Finder) -> list[Pass]:
    """Pass objects from what the user gave as ``passes=``; *find* gives the class for a name.

    Raises:
        SpecError: bad syntax, unknown pass or option, or a value of a wrong type.
    """
    if isinstance(passes, str):
        return parse(passes, find)
    if isinstance(passes, Pass):
        return [checked(passes)]
    if not isinstance(passes, Sequence):
        raise InputError(f"passes must be a spec string or a sequence of passes, not {type(passes).__name__}")
    result: list[Pass] = []
    for item in passes:
        if not isinstance(item, (str, Pass)):
            raise InputError(f"an item of passes must be a name, a spec or a Pass object, not {item!r}")
        result.extend(parse(item, find) if isinstance(item, str) else [checked(item)])
    return result


def parse(text: str, find: Finder) -> list[Pass]:
    """The passes that *text* names; "" names none.

    Raises:
        SpecError: as for :func:`resolve`.
    """
    return _Parser(text, find).passes() if text.strip() else []


def format(passes: Sequence[Pass]) -> str:  # noqa: A001 - the counterpart of parse
    """The spec string of *passes*."""
    return ",".join(_format_pass(p) for p in passes)


def build(cls: type[Pass], options: dict[str, Any]) -> Pass:
    """A pass from its options, checked against the types of its fields.

    Raises:
        SpecError: unknown option, or a value that does not fit.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}
    values = {}
    for key, value in options.items():
        if key not in fields:
            raise SpecError(f"{cls.name} has no option {key!r}.{near_miss(key, fields)}")
        values[key] = fit(value, hints[key], f"{cls.name}{{{key}=...}}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        text = str(error)  # some passes say whose option it is themselves
        raise SpecError(text if text.startswith(f"{cls.name}: ") else f"{cls.name}: {text}") from error


def checked(one: Pass) -> Pass:
    """*one*, which was made in Python, with its options checked as those of a spec string are.

    Raises:
        SpecError: a value does not fit.
    """
    options = {field.name: getattr(one, field.name) for field in dataclasses.fields(one) if field.init}
    return build(type(one), options)


def _format_pass(p: Pass) -> str:
    changed = [(f.name, getattr(p, f.name)) for f in dataclasses.fields(p) if getattr(p, f.name) != _default(f)]
    body = ",".join(f"{name}={_format_value(value)}" for name, value in changed)
    return f"{p.name}{{{body}}}" if body else p.name


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _format_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return f"[{','.join(_format_value(v) for v in value)}]"
    if isinstance(value, str) and (not _WORD.fullmatch(value) or _plain(value) is not value):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return repr(value) if isinstance(value, float) else str(value)


def _plain(text: str) -> Any:
    """What an unquoted word stands for: true, false, none, a number ("inf" is one), or itself."""
    if text in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text]
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


class _Parser:
    def __init__(self, text: str, find: Finder) -> None:
        self.text, self.find, self.at = text, find, 0

    def fail(self, what: str) -> typing.NoReturn:
        raise SpecError(f"{what} at position {self.at} of the spec {self.text!r}")

    def peek(self) -> tuple[str, str]:
        """(kind, text) of the next token: kind is "quoted", "word", a punctuation character, or "end"."""
        match = _TOKEN.match(self.text, self.at)
        if match is None:
            return ("end", "") if not self.text[self.at :].strip() else ("bad", self.text[self.at])
        quoted, word, mark = match.groups()
        if quoted is not None:
            return "quoted", re.sub(r"\\(.)", r"\1", quoted)
        return ("word", word) if word else (mark, mark)

    def take(self, kind: str) -> str:
        found, text = self.peek()
        if found != kind:
            quoted = " (in a value it is quoted, 'like this')" if found == "bad" else ""
            self.fail(f"expected {kind!r}, found {text or 'the end'!r}{quoted}")
        match = _TOKEN.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        return text

    def passes(self) -> list[Pass]:
        result = [self.one()]
        while self.peek()[0] != "end":
            self.take(",")
            result.append(self.one())
        return result

    def one(self) -> Pass:
        cls = self.find(self.take("word"))
        options: dict[str, Any] = {}
        for key, value in self.series(self.option, "{", "}") if self.peek()[0] == "{" else []:
            if key in options:
                self.fail(f"{cls.name} has the option {key!r} twice")
            options[key] = value
        return build(cls, options)

    def option(self) -> tuple[str, Any]:
        key = self.take("word")
        self.take("=")
        return key, self.value()

    def value(self) -> Any:
        kind, text = self.peek()
        if kind == "[":
            return tuple(self.series(self.value, "[", "]"))
        if kind == "quoted":
            return self.take("quoted")
        self.take("word")
        return _plain(text)

    def series(self, item: Callable[[], Any], opening: str, closing: str) -> list[Any]:
        self.take(opening)
        items: list[Any] = []
        while self.peek()[0] != closing:
            items.append(item())
            if self.peek()[0] != closing:
                self.take(",")
        self.take(closing)
        return items


def fit(value: Any, hint: Any, where: str) -> Any:
    """*value* if it is of the type *hint* (an int serves as a float); SpecError otherwise."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value is None and None not in args:
            value = "none"  # the word for nothing, where it is one of the choices
        if value in args and type(value) in {type(a) for a in args}:
            return value
        raise SpecError(f"{where}: {value!r} is not a choice.{near_miss(str(value), map(str, args))}")
    if origin in (typing.Union, types.UnionType):
        for choice in args:
            try:
                return fit(value, choice, where)
            except SpecError:
                continue
    elif origin is tuple and isinstance(value, (tuple, list)):
        inner = args[0] if args else Any
        return tuple(fit(v, inner, where) for v in value)
    elif origin is Callable:
        if callable(value):
            return value
    elif hint is Any or (hint is type(None) and value is None) or _is_instance(value, hint):
        return value
    elif hint is float and type(value) is int:
        return float(value)
    advice = f": write [{value}]" if origin is tuple and isinstance(value, str) else ""
    raise SpecError(f"{where}: {value!r} is not of type {_name(hint)}{advice}")


def _name(hint: Any) -> str:
    """The type *hint* as one would write it: "int | 'vbmf' | None"."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(map(_name, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(hint)))
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _is_instance(value: Any, hint: Any) -> bool:
    """isinstance, but True is no int."""
    return isinstance(hint, type) and isinstance(value, hint) and isinstance(value, bool) == (hint is bool)
