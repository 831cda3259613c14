"""Spec strings and passes convert into each other without loss, and every mistake has one clear error."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt import InputError, SpecError, registry, spec
from fxopt.errors import near_miss
from fxopt.passbase import Pass, PassContext
from fxopt.passes.cast_precision import CastPrecision
from fxopt.passes.fold_constants import FoldConstants
from fxopt.rewriter import Rewriter


@dataclasses.dataclass(frozen=True)
class Options(Pass):
    """Every kind of option there is."""

    name: ClassVar[str] = "options"
    text: str = "plain"
    ratio: float = 0.5
    count: int = 3
    flag: bool = False
    choice: Literal["a", "b c", 3] = "a"
    maybe: str | None = None
    number: int | float | None = None
    sizes: tuple[int, ...] = ()
    words: tuple[str | None, ...] = ("x",)
    nested: tuple[tuple[float, ...], ...] = ()
    anything: Any = None

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """Nothing."""


@dataclasses.dataclass(frozen=True)
class Needs(Pass):
    """An option without a default, and a check of its own."""

    name: ClassVar[str] = "needs"
    ratio: float

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError("ratio must be between 0 and 1")

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """Nothing."""


def find(name: str) -> type[Pass]:
    known: dict[str, type[Pass]] = {"options": Options, "needs": Needs}
    return known[name] if name in known else registry.find_pass(name)


def parse(text: str) -> list[Pass]:
    return spec.parse(text, find)


FLOATS = st.floats(allow_nan=False)
TEXTS = st.text(max_size=12) | st.sampled_from(
    [
        "true",
        "none",
        "False",
        "1",
        "1.5",
        "-3",
        "inf",
        "Infinity",
        "NaN",
        "1e5",
        "a b",
        "it's",
        "\\",
        "'",
        "{a=1}",
        "*",
        "",
    ]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | TEXTS, lambda inner: st.lists(inner, max_size=3).map(tuple)
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(
        st.builds(
            Options,
            text=TEXTS,
            ratio=FLOATS,
            count=st.integers(),
            flag=st.booleans(),
            choice=st.sampled_from(["a", "b c", 3]),
            maybe=st.none() | TEXTS,
            number=st.none() | st.integers() | FLOATS,
            sizes=st.lists(st.integers(), max_size=3).map(tuple),
            words=st.lists(st.none() | TEXTS, max_size=3).map(tuple),
            nested=st.lists(st.lists(FLOATS, max_size=2).map(tuple), max_size=2).map(tuple),
            anything=ANYTHING,
        )
        | st.builds(Needs, ratio=st.floats(0, 1)),
        min_size=1,
        max_size=3,
    )
)
def test_spec_to_pass_to_spec_is_the_identity(passes: list[Pass]) -> None:
    text = spec.format(passes)
    again = parse(text)
    assert again == passes
    assert repr(again) == repr(passes)  # 1, 1.0 and True are equal, but not the same
    assert spec.format(again) == text


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("", []),
        ("  ", []),
        ("options", [Options()]),
        ("options{}", [Options()]),
        (" options , needs { ratio = 0.5 } ", [Options(), Needs(0.5)]),
        ("options{text=a-b.c/d*,count=-4,ratio=1e-3}", [Options("a-b.c/d*", 0.001, -4)]),
        ("options{ratio=2}", [Options(ratio=2.0)]),
        ("options{ratio=inf,number=-inf}", [Options(ratio=math.inf, number=-math.inf)]),
        ("options{maybe=none,flag=true}", [Options(flag=True)]),
        (r"options{text='it\'s, {a} \\ b'}", [Options(r"it's, {a} \ b")]),
        ("options{sizes=[1,2,],words=[none,'',b]}", [Options(sizes=(1, 2), words=(None, "", "b"))]),
        ("options{nested=[[],[1]]}", [Options(nested=((), (1.0,)))]),
        ("options{choice='b c'},options{choice=3}", [Options(choice="b c"), Options(choice=3)]),
        ("cast-precision{dtype=fp16}", [CastPrecision("fp16")]),
    ],
)  # fmt: skip
def test_what_is_written_is_what_is_meant(text: str, passes: list[Pass]) -> None:
    assert repr(parse(text)) == repr(passes)


def test_only_what_differs_from_its_default_is_written() -> None:
    assert spec.format([Options(count=4), FoldConstants()]) == "options{count=4},fold-constants"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optoins", r"unknown pass 'optoins'\."),
        ("cast-precison", r"unknown pass 'cast-precison'\. Did you mean 'cast-precision'\? Known: .*canonicalize, "),
        ("options{coutn=4}", r"options has no option 'coutn'\. Did you mean 'count'\? Known: anything, choice, count"),
        ("options{count=4,count=4}", "has the option 'count' twice"),
        ("options{count=x}", r"options\{count=\.\.\.\}: 'x' is not of type int"),
        ("options{count=1.5}", "1.5 is not of type int"),
        ("options{count=true}", "True is not of type int"),
        ("options{flag=1}", "1 is not of type bool"),
        ("options{text=3}", "3 is not of type str"),
        ("options{ratio=half}", "'half' is not of type float"),
        ("options{ratio=true}", "True is not of type float"),
        ("options{sizes=3}", "3 is not of type tuple"),
        ("options{sizes=a}", r"'a' is not of type tuple: write \[a\]"),
        ("options{sizes=[a]}", "'a' is not of type int"),
        ("options{choice=c}", r"'c' is not a choice\. .*Known: 3, a, b c"),
        ("options{choice=true}", "True is not a choice"),
        ("needs", "needs: .*ratio"),
        ("needs{ratio=2}", "ratio must be between 0 and 1"),
        ("options,", r"expected 'word', found 'the end' at position 8 of the spec 'options,'"),
        (",options", "expected 'word', found ','"),
        ("options needs", r"expected ',', found 'needs'"),
        ("options{count}", r"expected '=', found '}'"),
        ("options{count=}", r"expected 'word', found '}'"),
        ("options{count=4", r"expected ',', found 'the end'"),
        ("options{text='open}", r"expected 'word', found \"'\""),
        ("options{sizes=[1,2}", r"expected ',', found '}'"),
        ("options}", r"expected ',', found '}'"),
        ("options;needs", r"expected ',', found ';'"),
        ("options{text=2:4}", r"expected ',', found ':' \(in a value it is quoted, 'like this'\) at position 14"),
        ("options{number=a}", r"'a' is not of type int \| float \| None"),
        ("low-rank-conv{rank=vmbf}", r"'vmbf' is not of type int \| 'vbmf' \| None"),
    ],
)
def test_mistakes_are_explained(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse(text)


def test_passes_are_names_specs_and_objects() -> None:
    one = Options(count=9)
    assert spec.resolve(one, find) == [one]
    assert spec.resolve(["options", one, "options{count=2},needs{ratio=1}"], find) == [
        Options(), one, Options(count=2), Needs(1.0),
    ]  # fmt: skip
    assert spec.resolve((), find) == []


@pytest.mark.parametrize("wrong", [3, {"a": 1}, object(), 1.5])
def test_what_is_no_list_of_passes_is_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match="passes must be a spec string or a sequence of passes, not"):
        spec.resolve(wrong, find)


@pytest.mark.parametrize("wrong", [3, None, Options, ["options"]])
def test_what_is_no_pass_is_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match="an item of passes must be a name, a spec or a Pass object"):
        spec.resolve([wrong], find)


def test_options_given_as_values_are_checked_the_same_way() -> None:
    assert spec.build(Options, {"sizes": [1, 2]}) == Options(sizes=(1, 2))
    with pytest.raises(SpecError, match="is not of type int"):
        spec.build(Options, {"count": "3"})


def test_a_near_miss_lists_what_there_is() -> None:
    assert near_miss("tonch", ["torch", "onnx"]) == " Did you mean 'torch'? Known: onnx, torch."
    assert near_miss("xyz", ["torch", "onnx"]) == " Known: onnx, torch."
    assert near_miss("x", []) == " Known: none."


def test_an_error_names_its_pass_once() -> None:
    with pytest.raises(SpecError) as caught:
        spec.parse("prune-channels{macs=2}", registry.find_pass)
    assert str(caught.value).count("prune-channels") == 1
