"""Quantized programs in the PyTorch backend: integers all the way, and what the graph says to one quantization step."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt import ops
from fxopt.backends import _torch_int8, _torch_int8_worth
from fxopt.backends.torch import TorchBackend, TorchExecutable
from fxopt.execute import evaluate
from fxopt.fused import CONV, LINEAR
from fxopt.ops import ACTIVATIONS
from fxopt.program import Program
from fxopt.quantized import QUANTIZE, parameters
from fxopt.target import resolve_target
from tests.backends.int8_models import Quantizer, add_dynamic, add_weight_only, fused

PARAMETERS = {"hardtanh": [-0.5, 0.5], "leaky_relu": [0.1], "elu": [0.7]}
CONVOLUTION, BINARY = "onednn_qconv_pointwise(", "onednn_qconv2d_pointwise_binary("
LINEARS = "onednn_qlinear_pointwise"


@pytest.fixture(autouse=True)
def _small_models_too(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(_torch_int8_worth, "_TINY", 0)


def lower(program: Program, flat: list[Any]) -> TorchExecutable:
    executable = TorchBackend().lower(program, resolve_target("x86"), flat)
    assert isinstance(executable, TorchExecutable)
    return executable


def agree(program: Program, flat: list[Any], steps: float = 1.01) -> TorchExecutable:
    """Lower *program*, and compare with its reference evaluation, in quantization steps of the outputs."""
    reference = evaluate(program, flat)
    scales = [_output_step(value) for value in program.output.args[0]]  # type: ignore[union-attr]
    executable = lower(program, flat)
    for _ in range(2):
        before = [x.clone() for x in flat]
        for mine, expected, scale in zip(executable(flat), reference, scales, strict=True):
            assert mine.dtype == expected.dtype
            assert mine.shape == expected.shape
            assert mine.stride() == expected.stride() or 1 in mine.shape or not mine.numel(), executable.source
            error = (mine.float() - expected.float()).abs().max() if mine.numel() else torch.zeros(())
            assert error <= steps * scale, f"{error / scale} steps\n{executable.source}"
        assert all(torch.equal(x, old) for x, old in zip(flat, before, strict=True))
    return executable


def _output_step(node: Any) -> float:
    for source in node.all_input_nodes:
        if source.target is QUANTIZE:
            return float(parameters(source).scale)  # type: ignore[arg-type]
    return 1e-3


def check(
    model: nn.Module,
    *inputs: torch.Tensor,
    calls: str = "",
    never: str = "",
    steps: float = 1.01,
    dynamic_shapes: Any = None,
    dtype: torch.dtype = torch.uint8,
    bits: int = 8,
    **options: bool,
) -> TorchExecutable:
    """Quantize *model* by its inputs, lower it, and compare."""
    program, flat = fused(model, inputs, dynamic_shapes)
    Quantizer(program, flat, dtype, bits).run(**options)
    executable = agree(program, flat, steps)
    assert calls in executable.source, executable.source
    assert not never or never not in executable.source, executable.source
    return executable


class Conv(nn.Module):
    """One fused convolution with everything it may carry."""

    def __init__(self, dims: int = 2, out: int = 8, channels: int = 4, groups: int = 1, **options: Any) -> None:
        super().__init__()
        self.dims, self.groups = dims, groups
        self.activation = options.pop("activation", "none")
        kernel = options.pop("kernel", 3)
        self.parameters_ = PARAMETERS.get(self.activation, [])
        bias = options.pop("bias", True)
        self.spatial = {"stride": 1, "padding": 1, "dilation": 1} | options
        self.weight = nn.Parameter(torch.randn(out, channels // groups, *[kernel] * dims) / 4)
        self.bias = nn.Parameter(torch.randn(out)) if bias else None

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        stride, padding, dilation = ([v] * self.dims if isinstance(v, int) else v for v in self.spatial.values())
        tail = (stride, padding, dilation, self.groups, self.activation, self.parameters_)
        y: torch.Tensor = CONV[self.dims](x, self.weight, self.bias, residual, *tail)
        return y


class Linear(nn.Module):
    """One fused linear."""

    def __init__(self, inputs: int = 64, outputs: int = 48, activation: str = "none", bias: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, outputs, bias)
        self.activation = activation

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        tail = (residual, self.activation, PARAMETERS.get(self.activation, []))
        y: torch.Tensor = LINEAR(x, self.inner.weight, self.inner.bias, *tail)
        return y


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 4, 14, 14)))


# Units.


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("kernel", [1, 3])
def test_every_activation_on_a_convolution(activation: str, kernel: int) -> None:
    check(Conv(activation=activation, kernel=kernel, padding=kernel // 2), image(), calls="onednn_q")


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_every_activation_on_a_linear(activation: str) -> None:
    check(Linear(activation=activation), image(3, 7, 64), calls=LINEARS)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("positive", [True, False])  # whether the zero point is 0
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"groups": 2},
        {"groups": 4},
        {"stride": 2},
        {"dilation": 2, "padding": 2},
        {"padding": 0},
        {"stride": 3, "padding": 2, "groups": 2, "dilation": 2},
        {"kernel": 1, "padding": 0},
    ],
)
def test_geometry(dims: int, options: dict[str, Any], positive: bool) -> None:
    x = image(2, 4, *{1: [40], 2: [14, 11], 3: [6, 7, 5]}[dims])
    check(Conv(dims, activation="relu", **options), x.abs() if positive else x, calls="onednn_q")


def test_uneven_geometry() -> None:
    check(Conv(stride=[1, 2], padding=[0, 2], dilation=[2, 1]), image(), calls=CONVOLUTION)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_asymmetric_padding(value: float) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = Conv(padding=0, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.conv(F.pad(x, (0, 1, 2, 0), value=value))
            return y

    check(Padded(), image(), calls=CONVOLUTION, never="aten_pad" if value == 0 else "")


def test_named_padding() -> None:
    check(nn.Conv2d(4, 8, 4, padding="valid"), image(), calls=CONVOLUTION)
    check(nn.Conv2d(4, 8, 4, padding="same"), image())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution_falls_back(dims: int, groups: int) -> None:
    kind = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
    check(kind(4, 6, 3, stride=2, padding=1, groups=groups), image(2, 4, *[7] * dims), never="decomposed")


@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu", "elu"])
@pytest.mark.parametrize("quantized_residual", [True, False])
@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("kernel", [1, 3])
def test_residual(activation: str, quantized_residual: bool, outputs: bool, kernel: int) -> None:
    model = Conv(activation=activation, kernel=kernel, padding=kernel // 2)
    options: dict[str, Any] = {"residual": quantized_residual, "outputs": outputs}
    steps = 1.01 if outputs else 5
    check(model, image(), image(2, 8, 14, 14), calls="binary", steps=steps, **options)
    check(Linear(activation=activation), image(9, 64), image(9, 48), calls="binary", steps=steps, **options)


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_residual_of_other_dimensions(dims: int, groups: int) -> None:
    sizes = [9] * dims
    check(Conv(dims, groups=groups, activation="relu"), image(2, 4, *sizes), image(2, 8, *sizes), calls="onednn_q")


def test_residual_of_a_grouped_convolution() -> None:
    check(Conv(groups=4, activation="relu"), image(), image(2, 8, 14, 14), calls=BINARY)


@pytest.mark.parametrize("shape", [(2, 8, 1, 1), (8, 1, 1), (1, 8, 14, 14), (14,)])
def test_broadcast_residual(shape: tuple[int, ...]) -> None:
    check(Conv(activation="relu"), image(), torch.randn(shape), calls=CONVOLUTION)


def test_residual_that_broadcasts_the_convolution() -> None:
    check(Conv(kernel=1, padding=0), image(1, 4, 1, 1), image(2, 8, 5, 5))
    check(Linear(), image(1, 64), image(5, 48))


@pytest.mark.parametrize("kernel", [1, 3])
def test_residual_used_twice(kernel: int) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options: dict[str, Any] = {"kernel": kernel, "padding": kernel // 2, "channels": 8}
            self.layers = nn.ModuleList(Conv(activation="relu", **options) for _ in range(4))

        def forward(self, x: torch.Tensor) -> Any:
            a, b, c, d = self.layers
            r = a(x)
            y = b(r, r)
            z = c(y, r)
            return d(z, y), y

    executable = check(Twice(), image(2, 8, 14, 14).abs(), steps=2.01)
    assert executable.source.count("aten_clone") == 1, executable.source  # r lives on after its first use


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("activation", ["none", "relu", "hardtanh", "hardswish"])
def test_signed_and_narrow_integers(bits: int, dtype: torch.dtype, activation: str) -> None:
    model = nn.Sequential(Conv(activation=activation), Conv(channels=8, activation="relu"))
    check(model, image(), dtype=dtype, bits=bits, calls=CONVOLUTION, steps=2.01)
    check(Conv(activation="relu"), image(), image(2, 8, 14, 14), dtype=dtype, bits=bits, calls=BINARY)


def test_result_wanted_as_floats_too() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Conv(activation="relu"), Conv(channels=8)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.a(x)
            return self.b(y), y.exp()

    check(Both(), image(), calls=CONVOLUTION, steps=1.01)


def test_bfloat16() -> None:
    model = nn.Sequential(Conv(activation="relu"), Conv(channels=8, activation="gelu")).bfloat16()
    check(model, image().bfloat16(), calls=CONVOLUTION, steps=3)
    check(Linear().bfloat16(), image(5, 64).bfloat16(), calls=LINEARS, steps=3)


def test_single_pixels_single_channels_and_empty_batches() -> None:
    check(Conv(kernel=1, padding=0), image(1, 4, 1, 1), calls="onednn_q")
    check(Conv(channels=1, out=1), image(2, 1, 9, 9), calls="onednn_q")
    check(Linear(1, 1), image(1, 1), calls="onednn_q")


def test_unbatched_inputs_fall_back() -> None:
    check(nn.Conv2d(4, 8, 3), image(4, 9, 9), never="decomposed")
    check(nn.Linear(64, 5), image(64), never="decomposed")


def test_weight_used_twice_in_different_ways() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.conv2d(F.conv2d(x, self.weight, padding=1), self.weight, padding=2, dilation=2)

    check(Tied(), image(), calls=CONVOLUTION, steps=2.01)


def test_dynamic_batch_and_sizes() -> None:
    model = nn.Sequential(Conv(activation="relu"), nn.MaxPool2d(2), Conv(channels=8, kernel=1, padding=0))
    batch, height = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("half", min=2, max=64)
    program, flat = fused(model, (image(3, 4, 12, 12),), ({0: batch, 2: 2 * height},))
    Quantizer(program, flat).run()
    copy = program.copy()
    executable = lower(program, flat)
    for shape in [(3, 4, 12, 12), (1, 4, 12, 12), (7, 4, 30, 12)]:
        x = flat[0].new_empty(shape).uniform_(-2, 2)
        [mine], [expected] = executable([x]), evaluate(copy, [x])
        assert (mine - expected).abs().max() <= 2.01 * _output_step(copy.output.all_input_nodes[0])


# Values that only move, and arithmetic between quantized values.


class Function(nn.Module):
    """A convolution, something that is done with its result, and another one."""

    def __init__(self, function: Any, channels: int = 8) -> None:
        super().__init__()
        self.a, self.c, self.b = Conv(activation="relu"), Conv(), Conv(channels=channels)
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        y: torch.Tensor = self.b(self.function(self.a(x), self.c(x)))
        return y


@pytest.mark.parametrize(
    ("function", "channels"),
    [
        (lambda x, y: F.max_pool2d(x, 3, 2, 1), 8),
        (lambda x, y: F.max_pool2d(x, 2, ceil_mode=True), 8),
        (lambda x, y: x.view(2, 4, 28, 14), 4),
        (lambda x, y: x.reshape(2, 4, 28, 14), 4),
        (lambda x, y: x.permute(0, 1, 3, 2), 8),
        (lambda x, y: x.transpose(1, 2).reshape(2, 7, 16, 14)[:, :4], 4),
        (lambda x, y: x[:, 2:6], 4),
        (lambda x, y: torch.cat([x, y], 1), 16),
        (lambda x, y: torch.cat([*x.chunk(2, 1), *y.split([3, 5], 1)][1:], 1), 12),
        (lambda x, y: x.unbind(0)[1].unsqueeze(0), 8),
        (lambda x, y: F.pad(x, (1, 0, 0, 2)), 8),
        (lambda x, y: F.channel_shuffle(x, 4), 8),
        (lambda x, y: F.max_pool2d(y, 1).relu(), 8),
        (lambda x, y: F.relu6(F.max_pool2d(y, 1)), 8),
    ],
)
def test_moves_stay_integers(function: Any, channels: int) -> None:
    executable = check(Function(function, channels), image(), calls=CONVOLUTION, steps=3.01)
    assert executable.source.count("dequantize(") == 1, executable.source  # the output


@pytest.mark.parametrize(
    ("function", "calls"),
    [
        (lambda x, y: x + F.max_pool2d(y, 1), "= add("),
        (lambda x, y: torch.relu(x * 0.5 + y), ""),
        (lambda x, y: x + y[:, :1], "= add("),
        (lambda x, y: x * y, "= mul("),
        (lambda x, y: x * y.mean((2, 3), keepdim=True), "= mul("),
        (lambda x, y: F.hardswish(F.max_pool2d(y, 1)), "hardswish("),
        (lambda x, y: F.leaky_relu(F.max_pool2d(y, 1), 0.2), "leaky_relu("),
        (lambda x, y: torch.sigmoid(F.max_pool2d(y, 1)), ""),
        (lambda x, y: F.avg_pool2d(x, 2), ""),
        (lambda x, y: F.adaptive_avg_pool2d(x, 3), ""),
        (lambda x, y: torch.add(x, y, alpha=2), ""),
        (lambda x, y: x * x, ""),
        (lambda x, y: F.max_pool2d(x, 2, return_indices=True)[0], ""),
    ],
)
def test_arithmetic_between_integers(function: Any, calls: str) -> None:
    check(Function(function), image(), calls=calls, never="decomposed", steps=4)


def test_relu_of_a_sum() -> None:
    model = Function(lambda x, y: torch.relu(x + F.max_pool2d(y, 1)))
    executable = check(model, image(), calls="= add(", steps=4, relu=False)
    assert executable.source.count("dequantize(") == 1  # the output


# Linears over ranges found at each call, and weights alone.


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "elu"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("rows", [3, 200])
def test_dynamic_ranges(activation: str, dtype: torch.dtype, rows: int) -> None:
    for shift in (0.0, 5.0, -5.0):
        program, flat = fused(Linear(activation=activation), (image(rows, 64) + shift, image(rows, 48)))
        add_dynamic(program, dtype)
        executable = agree(program, flat, steps=50)
        assert ("linear_dynamic" if rows == 3 else "quantize_dynamic") in executable.source


def test_one_dynamic_range_for_several_linears() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Linear(), Linear(outputs=64)

        def forward(self, x: torch.Tensor) -> Any:
            y = torch.tanh(x)
            return self.a(y), self.b(y)

    program, flat = fused(Several(), (image(100, 64),))
    add_dynamic(program)
    assert agree(program, flat, steps=20).source.count("quantize_dynamic(") <= 2


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("size", [64, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_alone(rows: int, size: int, dtype: torch.dtype) -> None:
    program, flat = fused(
        Linear(size, size, "relu").to(dtype), (image(rows, size).to(dtype), image(rows, size).to(dtype))
    )
    add_weight_only(program)
    agree(program, flat, steps=1 if dtype == torch.float32 else 100)


def test_weights_alone_of_a_convolution() -> None:
    program, flat = fused(Conv(), (image(),))
    add_weight_only(program)
    agree(program, flat)


# Whole models.


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


# Bookkeeping.


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
