"""One short dump for each pattern of each pass, read as a diff in review.

``FXOPT_GOLDEN=write pytest tests/passes/test_golden.py`` writes them anew.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt import fake_quant, registry, testing
from tests.passes.models import Model, chain

GOLDEN = Path(__file__).parents[1] / "golden"
Case: TypeAlias = tuple[nn.Module, tuple[Any, ...]]


def conv_bn_relu() -> Case:
    return chain(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()), (torch.randn(1, 3, 8, 8),)


def residual() -> Case:
    model = Model(
        lambda m, x: (m.bn2(m.conv2(m.bn1(m.conv1(x)).relu())) + x).relu(),
        conv1=nn.Conv2d(4, 4, 3, padding=1),
        bn1=nn.BatchNorm2d(4),
        conv2=nn.Conv2d(4, 4, 3, padding=1),
        bn2=nn.BatchNorm2d(4),
    )
    return model, (torch.randn(1, 4, 8, 8),)


def stages() -> Case:
    model = Model(
        lambda m, x: m.head((m.block(m.stem(x)) + m.stem(x)).relu()),
        stem=nn.Conv2d(3, 4, 1),
        block=nn.Conv2d(4, 4, 3, padding=1),
        head=nn.Conv2d(4, 2, 1),
    )
    return model, (torch.randn(1, 3, 8, 8),)


def bn_before_conv() -> Case:
    return chain(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), (torch.randn(1, 4, 8, 8),)


def bn_before_padded_conv() -> Case:
    return chain(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)), (torch.randn(1, 4, 8, 8),)


def mlp() -> Case:
    return chain(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), (torch.randn(2, 4),)


def no_ops() -> Case:
    return Model(lambda m, x: (F.dropout(x.cos(), 0.5, False).clone() + 0).float().sin()), (torch.randn(2, 4),)


def reshapes() -> Case:
    return Model(lambda m, x: x.cos().view(6, 4).unsqueeze(0).view(4, 6).sin()), (torch.randn(2, 3, 4),)


def permutes() -> Case:
    return Model(lambda m, x: x.cos().permute(2, 0, 1).transpose(0, 1).sin()), (torch.randn(2, 3, 4),)


def same_padding() -> Case:
    return chain(nn.Conv2d(3, 4, (3, 4), padding="same")), (torch.randn(1, 3, 8, 8),)


def matmul() -> Case:
    return Model(lambda m, x: x @ m.w + m.b, w=torch.randn(4, 5), b=torch.randn(5)), (torch.randn(2, 3, 4),)


def in_place() -> Case:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = m.conv(x)
        y += 1
        return y.relu_()

    return Model(forward, conv=nn.Conv2d(3, 4, 3)), (torch.randn(1, 3, 8, 8),)


def mutated_buffer() -> Case:
    def forward(m: Any, x: torch.Tensor) -> Any:
        m.count.add_(1)
        return x * m.count

    return Model(forward, count=torch.zeros(())), (torch.randn(4),)


def twice() -> Case:
    return Model(lambda m, x: x.cos().sin() + x.cos().sin()), (torch.randn(4),)


def constants() -> Case:
    return Model(lambda m, x: x + m.a.exp() * torch.arange(4), a=torch.randn(4)), (torch.randn(4),)


def gelu() -> Case:
    model = Model(lambda m, x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
    return model, (torch.randn(4),)


def attention() -> Case:
    model = Model(
        lambda m, x: (m.q(x) @ m.k(x).transpose(1, 2)).softmax(-1) @ m.v(x),
        q=nn.Linear(4, 6),
        k=nn.Linear(4, 6, bias=False),
        v=nn.Linear(4, 6),
    )
    return model, (torch.randn(1, 3, 4),)


def outlier_channel() -> Case:
    model = Model(lambda m, x: m.fc(m.norm(x)), norm=nn.LayerNorm(4), fc=nn.Linear(4, 3))
    with torch.no_grad():
        model.get_parameter("norm.weight")[2] = 50.0
    return model, (torch.randn(1, 5, 4),)


def positive() -> Case:
    return chain(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False)), (torch.rand(1, 3, 4, 4),)


def unequal() -> Case:
    model, inputs = positive()
    with torch.no_grad():
        model.get_parameter("0.weight")[1] *= 50
        model.get_parameter("2.weight")[:, 1] /= 50
    return model, inputs


def trained_rounding() -> Case:
    """What a prepared model hands to the compiler: weights on a grid, values marked."""
    fc = nn.Linear(4, 2)
    with torch.no_grad():
        fc.weight.copy_(torch.randint(-127, 128, (2, 4)) * 0.01)
    model = Model(lambda m, x: m.fc(fake_quant.FAKE_QUANTIZED(x, 0.02, 128, 0, 255, torch.uint8)), fc=fc)
    return model, (torch.randn(3, 4),)


CASES: list[tuple[str, Callable[[], Case]]] = [
    ("fuse-conv-bn-relu", conv_bn_relu),
    ("fuse-conv-bn-relu", residual),
    ("fuse-conv-bn-relu", bn_before_conv),
    ("fuse-conv-bn-relu", bn_before_padded_conv),
    ("fuse-conv-bn-relu", mlp),
    ("canonicalize", no_ops),
    ("canonicalize", reshapes),
    ("canonicalize", permutes),
    ("canonicalize", same_padding),
    ("canonicalize", matmul),
    ("canonicalize", in_place),
    ("canonicalize", mutated_buffer),
    ("common-subexpressions", twice),
    ("fold-constants", constants),
    ("recognize-activations", gelu),
    ("merge-linears", attention),
    ("cast-precision", attention),
    ("cast-precision", conv_bn_relu),
    ("smooth-quant", outlier_channel),
    ("insert-fake-quant", residual),
    ("insert-fake-quant", mlp),
    ("freeze-quantized-weights", mlp),
    ("convert-fake-quant", trained_rounding),
    ("cross-layer-equalization", unequal),
    ("bias-correction", positive),
    ("ada-round", positive),
    ("gptq", mlp),
    ("low-rank-linear", mlp),
    ("low-rank-conv", residual),
    ("prune-channels", residual),
    ("prune-weights", mlp),
    ("sparsify-2-4", mlp),
    ("prune-blocks", stages),
]

# Options that a case needs, passes that stand before, and what looks at data.
OPTIONS = {
    "cast-precision": "{dtype=bf16}",
    "prune-blocks": "{criterion=l1}",
    "low-rank-linear": "{rank=2,smallest=1}",
    "low-rank-conv": "{rank=2,smallest=1}",
    "insert-fake-quant": "{scheme=torch}",
}
QUANTIZED = "canonicalize,fuse-conv-bn-relu,insert-fake-quant{scheme=torch,smooth=false}"
BEFORE = {
    "prune-blocks": "canonicalize,common-subexpressions",
    **dict.fromkeys(("bias-correction", "ada-round", "gptq"), QUANTIZED),
    "insert-fake-quant": "canonicalize,fuse-conv-bn-relu",
    "freeze-quantized-weights": "canonicalize,insert-fake-quant{activations=none}",
}
CALIBRATED = ("smooth-quant", "insert-fake-quant", "bias-correction", "ada-round", "gptq")


@pytest.mark.parametrize(("name", "case"), CASES)
def test_golden(name: str, case: Callable[[], Case]) -> None:
    model, inputs = case()
    data = [inputs] * 4 if name in CALIBRATED else None
    spec, before = name + OPTIONS.get(name, ""), BEFORE.get(name, "canonicalize")
    text = testing.check_pass(spec, model, inputs, before=before, calibration=data).text
    file = GOLDEN / name / f"{case.__name__}.fxir"
    if os.environ.get("FXOPT_GOLDEN") == "write":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


def test_every_pass_of_ours_has_a_golden_dump() -> None:
    """Also that no file is left of a case that is gone."""
    cases = {f"{name}/{case.__name__}.fxir" for name, case in CASES}
    assert {str(f.relative_to(GOLDEN)) for f in GOLDEN.rglob("*.fxir")} == cases
    own = {n for n in registry.available("fxopt.passes") if registry.find_pass(n).__module__.startswith("fxopt.passes")}
    assert own == {name for name, _ in CASES}
