"""int8 on the torch backend: whole models, weights that come and go, concurrent calls."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt import ops
from fxopt.backends import _torch_int8, _torch_int8_worth
from tests.backends.int8_models import Quantizer, add_dynamic, add_weight_only, fused
from tests.backends.int8_programs import Conv, Linear, agree, check, image, lower, small_models_too

__all__ = ["small_models_too"]


class Residual(nn.Module):
    """A ResNet block."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.short = short if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.b(self.a(x)) + self.short(x))


class Inverted(nn.Module):
    """A MobileNetV3 block: depthwise, hardswish, squeeze-and-excitation."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.grow = nn.Sequential(nn.Conv2d(channels, inner, 1), nn.BatchNorm2d(inner), nn.Hardswish())
        self.depth = nn.Sequential(
            nn.Conv2d(inner, inner, 3, 1, 1, groups=inner), nn.BatchNorm2d(inner), nn.Hardswish()
        )
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(inner, 8, 1), nn.ReLU())
        self.excite = nn.Sequential(nn.Conv2d(8, inner, 1), nn.Hardsigmoid())
        self.shrink = nn.Sequential(nn.Conv2d(inner, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depth(self.grow(x))
        y = y * self.excite(self.squeeze(y))
        return x + torch.as_tensor(self.shrink(y))


class Transformer(nn.Module):
    """A ViT block."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.one(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + torch.as_tensor(self.down(F.gelu(self.up(self.two(x)))))


def resnet() -> nn.Module:
    stem = [nn.Conv2d(3, 16, 7, 2, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks = [Residual(16, 16), Residual(16, 16), Residual(16, 32, 2), Residual(32, 32)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def mobilenet() -> nn.Module:
    stem = [nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Hardswish()]
    return nn.Sequential(
        *stem, Inverted(16, 48), Inverted(16, 48), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )


def vit() -> nn.Module:
    return nn.Sequential(Transformer(), Transformer(), nn.Linear(64, 10))


MODELS = {"resnet": (resnet, (2, 3, 64, 64)), "mobilenet": (mobilenet, (2, 3, 32, 32)), "vit": (vit, (2, 17, 64))}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("pointwise", [True, False])
def test_models_do_not_drift(name: str, pointwise: bool) -> None:
    make, shape = MODELS[name]
    check(make(), image(*shape), steps=6, pointwise=pointwise, never="decomposed")


def test_integers_all_the_way_through_a_resnet() -> None:
    source = check(resnet(), image(2, 3, 64, 64), steps=3).source
    assert source.count("= quantize(") == 2  # the input, and what follows the average
    assert source.count("= dequantize(") == 2  # before the average, and the output
    assert "aten_clone" not in source


def test_weights_leave_the_program_and_come_back() -> None:
    program, flat = fused(
        nn.Sequential(Conv(out=16, channels=4, groups=2), nn.Flatten(), Linear(16 * 81, 64)), (image(2, 4, 9, 9),)
    )
    Quantizer(program, flat).run()
    weights = {n: v.clone() for n, v in program.tensors().items() if v.dtype == torch.int8}
    biases = {n: v.clone() for n, v in program.tensors().items() if n.endswith("bias")}
    assert len(weights) == 2
    executable = lower(program, flat)
    assert not any(v.dtype == torch.int8 and v.layout == torch.strided for v in program.tensors().values())
    for name, value in {**weights, **biases}.items():
        assert torch.equal(executable.constant(name), value)
    total = sum(v.numel() for v in weights.values())
    assert total <= executable.nbytes() < 3 * total


def test_dynamic_and_lone_weights_come_back() -> None:
    for rows, size, insert in [
        (3, 64, add_dynamic),
        (100, 64, add_dynamic),
        (3, 1100, add_weight_only),
        (3, 64, add_weight_only),
    ]:
        program, flat = fused(Linear(size, size), (image(rows, size), image(rows, size)))
        insert(program)
        [(name, value)] = [(n, v.clone()) for n, v in program.tensors().items() if v.dtype == torch.int8]
        executable = lower(program, flat)
        assert torch.equal(executable.constant(name), value)
        assert executable.nbytes() >= value.numel()


def test_concurrent_calls() -> None:
    program, flat = fused(resnet(), (image(1, 3, 64, 64),))
    Quantizer(program, flat).run()
    executable = lower(program, flat)
    inputs = [image(1, 3, 64, 64) for _ in range(4)]
    alone = [executable([x])[0] for x in inputs]
    results: dict[int, list[torch.Tensor]] = {}

    def work(i: int) -> None:
        results[i] = [executable([inputs[i]])[0] for _ in range(10)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(alone):
        assert all(torch.equal(result, expected) for result in results[i])


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (nn.Conv2d(4, 8, 3), image(2, 4, 9, 9), None),
        (nn.Conv2d(64, 64, 1), image(1, 64, 28, 28), None),
        (nn.Conv2d(64, 64, 1), image(1, 64, 1, 1), "multiplications"),
        (nn.Linear(64, 48), image(3, 64), "multiplications"),
        (nn.Linear(512, 512), image(3, 512), None),
        (nn.Conv2d(4, 8, 3), image(4, 9, 9), "batch"),
        (nn.ConvTranspose2d(4, 8, 3), image(1, 4, 9, 9), "transposed"),
        (nn.Conv2d(4, 8, 3).double(), image(1, 4, 9, 9).double(), "float64"),
    ],
)
def test_what_int8_is_worth(
    model: nn.Module, x: torch.Tensor, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    program, flat = fused(model, (x,))
    [node] = [n for n in program.graph.nodes if ops.kind(n) in ("conv", "conv_transpose", "linear")]
    found = _torch_int8_worth.worth(node)
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)
    if reason == "multiplications":
        Quantizer(program, flat).run()
        assert "onednn" not in agree(program, flat).source


def test_float_programs_are_left_alone() -> None:
    program, _ = fused(resnet(), (image(1, 3, 64, 64),))
    before = [str(node.target) for node in program.graph.nodes]
    assert _torch_int8.lower(program) == {}
    assert [str(node.target) for node in program.graph.nodes] == before
