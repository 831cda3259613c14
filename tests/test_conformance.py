"""The conformance suite: each backend passes or declines each graph, and the suite finds what backends do wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch

import fxopt
from fxopt import backends, conformance
from fxopt.backends.torch import TorchBackend
from fxopt.program import Program
from fxopt.registry import find_backend
from tests.plugin_example.fxopt_plugin_example import NodeByNodeBackend
from tools import conformance as tool

OTHERS = [name for name in backends.available() if name != "torch"]


def test_there_are_graphs_for_everything() -> None:
    names = [case.name for case in conformance.cases()]
    assert len(names) == len(set(names)) >= 60
    topics = {name.partition(": ")[0] for name in names}
    assert topics >= set(
        "elementwise linear conv pool norm attention dtype size state control int8 int4 bf16 2:4".split()
    )


@pytest.mark.parametrize("topic", sorted({case.name.partition(": ")[0] for case in conformance.cases()}))
def test_the_torch_backend_passes_every_graph(topic: str) -> None:
    found = conformance.run("torch", only=topic)
    assert all(one.verdict == "passed" for one in found), found


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_backend_passes_or_declines(name: str) -> None:
    try:
        find_backend(name).require()
    except fxopt.BackendUnavailable as error:
        pytest.skip(str(error))
    found = conformance.run(name)
    assert not found.failures, found
    assert found.tally(name)["passed"] > len(found) / 2, found


def test_a_backend_of_somebody_else_tries_itself() -> None:
    found = conformance.run(NodeByNodeBackend(), only=["conv", "state", "structure", "int8"])
    assert not found.failures, found
    assert found.backends == ["node-by-node"]


# --- what backends do wrong


class _Runs(fxopt.Executable):
    def __init__(self, run: Callable[[Sequence[Any]], list[Any]]) -> None:
        self.run = run

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        return self.run(inputs)


class _Erring(fxopt.Backend):
    """The torch backend with an error: what *spoil* makes of its results."""

    name: ClassVar[str] = "erring"
    spoil: Callable[[Sequence[Any], list[Any]], list[Any]]

    def lower(self, program: Program, target: fxopt.Target, inputs: Sequence[Any]) -> fxopt.Executable:
        inner = TorchBackend().lower(program, target, inputs)
        return _Runs(lambda flat: type(self).spoil(flat, inner(flat)))


def _raise(error: Exception) -> list[Any]:
    raise error


_memory: list[torch.Tensor] = []


def _reuse(inputs: Sequence[Any], outputs: list[Any]) -> list[Any]:
    _memory[:] = _memory or [outputs[0].clone()]
    _memory[0].copy_(outputs[0])
    return [_memory[0]]


def _touch(inputs: Sequence[Any], outputs: list[Any]) -> list[Any]:
    inputs[0].zero_()
    return outputs


ERRORS: dict[str, tuple[Callable[[Sequence[Any], list[Any]], list[Any]], str]] = {
    "numbers": (lambda i, o: [y * 1.01 for y in o], "call 1: output 0: error"),
    "NaN": (lambda i, o: [y * torch.nan for y in o], "call 1: output 0: error inf"),
    "shape": (lambda i, o: [y[:1] for y in o], r"a result is torch.float32 \[1, 7\], not torch.float32 \[2, 7\]"),
    "dtype": (lambda i, o: [y.double() for y in o], "a result is torch.float64"),
    "gradient": (lambda i, o: [y.clone().requires_grad_() for y in o], "a result requires grad"),
    "memory": (_reuse, "a later call overwrites the results of call 1"),
    "inputs": (_touch, "its inputs are not left as the model leaves them"),
    "exception": (lambda i, o: _raise(IndexError("out of range")), "IndexError: out of range"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_is_found(error: str) -> None:
    spoil, message = ERRORS[error]
    made = type("_Made", (_Erring,), {"spoil": staticmethod(spoil)})()
    (outcome,) = conformance.run(made, only="linear: no bias")
    assert outcome.verdict == "failed"
    assert re.search(message, outcome.reason), outcome.reason
    assert len(conformance.run(made, only="linear: no bias").failures) == 1


class _Refusing(fxopt.Backend):
    name: ClassVar[str] = "refusing"
    error: ClassVar[Exception]

    def lower(self, program: Program, target: fxopt.Target, inputs: Sequence[Any]) -> fxopt.Executable:
        raise self.error


@pytest.mark.parametrize(
    ("error", "verdict", "reason"),
    [
        (fxopt.UnsupportedOp("no kernel for\nlinear"), "declined", "no kernel for linear"),
        (fxopt.UnsupportedOp(""), "failed", "UnsupportedOp without a reason"),
        (NotImplementedError("linear"), "failed", "NotImplementedError: linear"),
        (fxopt.FxoptError("hm"), "failed", "FxoptError: hm"),
    ],
)
def test_declining_needs_the_right_error_and_a_reason(error: Exception, verdict: str, reason: str) -> None:
    made = type("_Made", (_Refusing,), {"error": error})()
    found = conformance.run(made, only="linear: no bias")
    assert (found[0].verdict, found[0].reason) == (verdict, reason)
    assert reason in repr(found)
    assert f"1 {verdict}" in repr(found)


def test_other_sizes_and_state_are_compared() -> None:
    """A backend that answers every call as the first one fails where calls differ."""

    class Frozen(_Erring):
        def lower(self, program: Program, target: fxopt.Target, inputs: Sequence[Any]) -> fxopt.Executable:
            first: list[Any] = []

            def run(flat: Sequence[Any]) -> list[Any]:
                first[:] = first or inner(flat)
                return [y.clone() for y in first]

            inner = TorchBackend().lower(program, target, inputs)
            return _Runs(run)

    found = conformance.run(Frozen(), only=["size: batch", "control: cond"])
    assert [one.verdict for one in found] == ["failed", "failed"]
    assert all("call 2" in one.reason for one in found)


def test_declining_at_a_call_is_too_late() -> None:
    def spoil(inputs: Sequence[Any], outputs: list[Any]) -> list[Any]:
        return _raise(fxopt.UnsupportedOp("no batch of 1")) if len(inputs[0]) == 1 else outputs

    (outcome,) = conformance.run(type("_Made", (_Erring,), {"spoil": staticmethod(spoil)})(), only="size: batch")
    assert outcome.reason == "call 2: declined when called, not when compiled: no batch of 1"


def test_bad_arguments_have_one_clear_error() -> None:
    with pytest.raises(fxopt.InputError, match=r"there is no graph 'convs'\. Did you mean 'conv"):
        conformance.run("torch", only="convs")
    with pytest.raises(fxopt.SpecError, match="unknown backend 'trch'"):
        conformance.run("trch")
    with pytest.raises(fxopt.BackendUnavailable, match="target sm_120 cannot run here"):
        conformance.run("torch", target="sm_120")


def test_the_page_is_of_these_graphs() -> None:
    """Written by ``tools/conformance``: after a change of graphs or backends it has to run again."""
    text = tool.DOCUMENT.read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert rows[2:-1] == [case.name for case in conformance.cases()]
    assert "fails" not in text
    head = next(line for line in text.splitlines() if line.startswith("| graph"))
    assert {"torch", "onnx", "openvino"} <= set(head.strip("| ").split(" | "))


def test_the_page_lists_reasons_once() -> None:
    outcome = conformance.Outcome
    found = conformance.Conformance(
        [
            outcome("a", "x", "passed"),
            outcome("a", "y", "declined", "no a_b at /somewhere/models.py:44"),
            outcome("b", "x", "failed", "ValueError: 3"),
            outcome("b", "y", "declined", "no a_b at /somewhere/models.py:45"),
        ]
    )
    page = tool.markdown(found)
    assert "| a | yes | 1 |" in page
    assert "| b | **fails** 2 | 1 |" in page
    assert "**1 of 2** | **0 of 2**" in page
    assert page.endswith("1. no a\\_b\n2. ValueError: 3\n")
