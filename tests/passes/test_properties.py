"""Random small graphs: the exact pipeline keeps outputs, and a second run of any pass changes nothing.

Compared in float64, where a wrong rewrite cannot hide behind rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fxopt import ops, registry, testing, verify
from fxopt.capture import capture
from fxopt.passbase import PassContext
from fxopt.passes.cast_precision import CastPrecision
from fxopt.pipeline import Pipeline, full_pipeline
from fxopt.target import resolve_target
from tests.passes.models import settle

EXAMPLES = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
CHANNELS = 4
TIGHT = 1e-10
"""Largest error in float64, relative to the range: rounding of tiny models is below 1e-13."""

Step = tuple[str, int, int]
"""A step's name, the earlier value that it reads, and a number that its options are drawn from."""

_ACTIVATIONS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    F.relu, F.relu6, F.hardswish, F.silu, F.gelu, torch.sigmoid, torch.tanh, F.elu, F.mish, F.leaky_relu,
]  # fmt: skip
_NO_OPS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: x + 0,
    lambda x: x.clone(),
    lambda x: F.dropout(x, 0.5, False),
    lambda x: x.transpose(1, 2).transpose(2, 1),
    lambda x: x.flatten(2).view(x.shape),
    lambda x: x.detach().contiguous(),
]


class RandomNet(nn.Module):
    """Runs *steps* on images of (batch, 4, h, w) and vectors of (batch, 4)."""

    def __init__(self, steps: list[Step], outputs: int) -> None:
        super().__init__()
        self.steps = steps
        self.outputs = outputs
        self.layers = nn.ModuleDict()
        for number, (name, _, option) in enumerate(steps):
            layer = _layer(name, option)
            if layer is not None:
                self.layers[str(number)] = layer
        settle(self)

    def forward(self, x: torch.Tensor) -> Any:
        values, vectors = [x], [x.mean((2, 3))]
        for number, (name, source, option) in enumerate(self.steps):
            pool = vectors if name.startswith("vector") else values
            value = pool[source % len(pool)]
            if name in ("again", "vector_again"):  # an earlier layer on another value: a shared module
                earlier = [i for i, s in enumerate(self.steps[:number]) if s[0] == _AGAIN[name]]
                pool.append(self.layers[str(earlier[option % len(earlier)])](value) if earlier else value)
            elif str(number) in self.layers:
                pool.append(self.layers[str(number)](value))
            else:
                pool.append(_apply(name, value, pool[option % len(pool)], option))
        results = [*values[-self.outputs :], vectors[-1]]
        return tuple(results)


_AGAIN = {"again": "conv", "vector_again": "vector_linear"}


def _layer(name: str, option: int) -> nn.Module | None:
    """The layer of a step; sizes are chosen so that any image fits any step."""
    bias, groups = option % 2 == 0, (1, 2, 4)[option % 3]
    if name == "conv":
        return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=groups, bias=bias)
    if name == "point_conv":
        return nn.Conv2d(CHANNELS, CHANNELS, 1, groups=groups, bias=bias)
    if name == "same_conv":
        return nn.Conv2d(CHANNELS, CHANNELS, (2, 3), padding="same", dilation=1 + option % 2, bias=bias)
    if name == "transposed_conv":
        return nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1, groups=groups, bias=bias)
    if name == "norm":
        return nn.BatchNorm2d(CHANNELS, affine=option % 4 != 0)
    if name == "vector_linear":
        return nn.Linear(CHANNELS, CHANNELS, bias=bias)
    return nn.BatchNorm1d(CHANNELS) if name == "vector_norm" else None


def _apply(name: str, x: torch.Tensor, other: torch.Tensor, option: int) -> torch.Tensor:
    """A step without weights on the value *x*, with *other* as its second operand."""
    if name.endswith("activation"):
        return _ACTIVATIONS[option % len(_ACTIVATIONS)](x)
    if name.endswith("add"):
        return torch.add(x, other, alpha=2) if option % 5 == 0 else x + other
    if name == "cat":
        return torch.cat([x, other], 1)[:, option % CHANNELS :][:, :CHANNELS]
    if name == "pool":
        return F.max_pool2d(x, 3, stride=1, padding=1)
    if name == "in_place":
        y = x * 0.5
        y[:, option % CHANNELS] += 1
        return y.relu_()
    return _NO_OPS[option % len(_NO_OPS)](x) if name == "no_op" else x * (option % 3)


NAMES = (
    "conv point_conv same_conv transposed_conv norm norm activation add cat pool in_place no_op scale again "
    "vector_linear vector_linear vector_norm vector_activation vector_add vector_again"
).split()
STEPS = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 7), st.integers(0, 59)), min_size=1, max_size=10)


def _pipeline(captured: Any) -> Pipeline:
    return Pipeline(PassContext(resolve_target("x86"), captured.inputs), captured.reference)


@EXAMPLES
@given(STEPS, st.integers(1, 3), st.booleans())
def test_the_exact_pipeline_keeps_outputs(steps: list[Step], outputs: int, dynamic: bool) -> None:
    torch.manual_seed(0)
    model = RandomNet(steps, outputs).double()
    captured = capture(model, (torch.randn(2, CHANNELS, 5, 5).double(),), None, ({0: "batch"},) if dynamic else None)
    program, records = _pipeline(captured).run(captured.program, full_pipeline([], registry.find_pass))
    assert all(record.exact for record in records)
    x = torch.randn(3 if dynamic else 2, CHANNELS, 5, 5).double()
    with torch.no_grad():
        expected = model(x)
    difference = verify.compare(expected, verify.run(program, [x]))
    assert difference.error <= TIGHT
    assert not any(ops.kind(n) == "dropout" or ops.is_mutating(n) for n in program.graph.nodes)


@EXAMPLES
@given(STEPS, st.sampled_from([*full_pipeline([], registry.find_pass), CastPrecision()]))
def test_a_second_run_of_a_pass_changes_nothing(steps: list[Step], one: Any) -> None:
    torch.manual_seed(0)
    testing.check_pass(one, RandomNet(steps, 2), (torch.randn(2, CHANNELS, 5, 5),))


@EXAMPLES
@given(STEPS)
def test_outputs_share_no_memory_that_eager_does_not_share(steps: list[Step]) -> None:
    torch.manual_seed(0)
    model = RandomNet(steps, 3)
    x = torch.randn(2, CHANNELS, 5, 5)
    captured = capture(model, (x,))
    program, _ = _pipeline(captured).run(captured.program, full_pipeline([], registry.find_pass))
    with torch.no_grad():
        expected = model(x)
    outputs, weights = verify.run(program, [x]), [x, *program.tensors().values()]
    theirs = _shared(expected, [x, *model.state_dict().values()])
    assert _shared(outputs, weights) <= theirs


def _shared(outputs: Any, others: list[torch.Tensor]) -> set[tuple[int, int]]:
    """Pairs of outputs (by index) that share memory; (i, -1) for output i and any of *others*."""
    places = [y.untyped_storage().data_ptr() for y in outputs]
    held = {t.untyped_storage().data_ptr() for t in others}
    pairs = {(i, j) for i, a in enumerate(places) for j, b in enumerate(places[:i]) if a == b}
    return pairs | {(i, -1) for i, a in enumerate(places) if a in held}
