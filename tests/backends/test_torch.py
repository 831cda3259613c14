"""The PyTorch backend: whatever it makes of a graph computes what ``evaluate`` computes, and touches nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt import verify
from fxopt.backends.torch import TorchBackend, TorchExecutable
from fxopt.capture import capture
from fxopt.errors import BackendUnavailable
from fxopt.execute import evaluate
from fxopt.fused import CONV, LINEAR
from fxopt.ops import ACTIVATIONS
from fxopt.program import Program
from fxopt.target import resolve_target

Tensors = tuple[torch.Tensor, ...]
PARAMETERS = {"hardtanh": [-0.5, 0.5], "leaky_relu": [0.1], "elu": [0.7]}
BIG = 28  # side of images for which a convolution is worth a oneDNN call


def program_of(model: nn.Module, inputs: Tensors, dynamic_shapes: Any = None) -> tuple[Program, list[Any]]:
    captured = capture(model, inputs, dynamic_shapes=dynamic_shapes)
    return captured.program, captured.inputs


def lower(model: nn.Module, inputs: Tensors, dynamic_shapes: Any = None, target: str = "x86") -> TorchExecutable:
    program, flat = program_of(model, inputs, dynamic_shapes)
    executable = TorchBackend().lower(program, resolve_target(target), flat)
    assert isinstance(executable, TorchExecutable)
    return executable


def strides(x: torch.Tensor) -> list[int]:
    """Strides that matter: of dimensions with more than one element, where there are elements at all."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1 and x.numel()]


def check(model: nn.Module, *inputs: torch.Tensor, calls: str = "", never: str = "") -> TorchExecutable:
    """The lowered model against the reference: values, strides, inputs left alone; *calls* is in its source."""
    program, flat = program_of(model, inputs)
    reference = evaluate(program, flat)
    executable = TorchBackend().lower(program, resolve_target("x86"), flat)
    assert isinstance(executable, TorchExecutable)
    for _ in range(2):
        before = [x.clone() for x in flat]
        outputs = executable(flat)
        assert verify.compare(reference, outputs).within, executable.source
        for mine, eager in zip(outputs, reference, strict=True):
            assert strides(mine) == strides(eager), executable.source
            assert not mine.requires_grad
            assert not mine.is_inference()
        for x, old in zip(flat, before, strict=True):
            assert torch.equal(x, old)
    assert calls in executable.source, executable.source
    assert not never or never not in executable.source, executable.source
    return executable


class Conv(nn.Module):
    """One fused convolution with everything it may carry."""

    def __init__(self, dims: int = 2, out: int = 8, channels: int = 4, groups: int = 1, **options: Any) -> None:
        super().__init__()
        self.dims, self.groups = dims, groups
        self.activation = options.pop("activation", "none")
        self.parameters_ = PARAMETERS.get(self.activation, [])
        self.spatial = {"stride": 1, "padding": 1, "dilation": 1} | options
        self.weight = nn.Parameter(torch.randn(out, channels // groups, *[3] * dims))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        stride, padding, dilation = ([v] * self.dims if isinstance(v, int) else v for v in self.spatial.values())
        tail = (stride, padding, dilation, self.groups, self.activation, self.parameters_)
        y: torch.Tensor = CONV[self.dims](x, self.weight, self.bias, residual, *tail)
        return y


class Linear(nn.Module):
    """One fused linear."""

    def __init__(self, inputs: int = 600, outputs: int = 500, activation: str = "none") -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, outputs)
        self.activation = activation

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        tail = (residual, self.activation, PARAMETERS.get(self.activation, []))
        y: torch.Tensor = LINEAR(x, self.inner.weight, self.inner.bias, *tail)
        return y


class Function(nn.Module):
    """A model with one constant tensor, from a function of it and the inputs."""

    def __init__(self, function: Callable[..., Any], *constants: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        self.count = len(constants)
        for i, value in enumerate(constants):
            self.register_buffer(f"c{i}", value)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs, *(getattr(self, f"c{i}") for i in range(self.count)))


def image(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*(shape or (2, 4, BIG, BIG))).to(dtype)


# What oneDNN computes.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_every_activation_on_a_convolution(activation: str, dtype: torch.dtype) -> None:
    check(Conv(activation=activation).to(dtype), image(dtype=dtype), calls="mkldnn__convolution_pointwise")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_every_activation_on_a_linear(activation: str, dtype: torch.dtype) -> None:
    check(Linear(activation=activation).to(dtype), torch.randn(3, 7, 600).to(dtype), calls="mkldnn__linear_pointwise")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["none", "relu", "silu", "elu"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_residual(activation: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    residual = image(2, 8, BIG, BIG, dtype=dtype).to(memory_format=layout)
    model = Conv(activation=activation).to(dtype)
    check(model, image(dtype=dtype), residual, calls="convolution_pointwise_binary", never="pointwise__binary")
    check(Linear(activation=activation).to(dtype), image(9, 600, dtype=dtype), image(9, 500, dtype=dtype))


@pytest.mark.parametrize("shape", [(2, 8, 1, 1), (8, 1, 1), (1, 8, 28, 28), (28,)])
def test_broadcast_residual(shape: tuple[int, ...]) -> None:
    check(Conv(activation="relu"), image(), torch.randn(shape), never="binary")
    check(Linear(activation="relu"), torch.randn(28, 600), torch.randn(3, 28, 500), never="binary")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pixel_residual_of_ambiguous_layout(dtype: torch.dtype) -> None:
    model = Conv(activation="relu", padding=1, channels=64, out=128).to(dtype)
    check(model, image(2, 64, 1, 1, dtype=dtype), image(2, 128, 1, 1, dtype=dtype))
    one_channel = Conv(activation="relu", channels=64, out=1).to(dtype)
    check(one_channel, image(2, 64, BIG, BIG, dtype=dtype), image(2, 1, BIG, BIG, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2},
        {"groups": 4},
        {"stride": 2},
        {"dilation": 2, "padding": 2},
        {"padding": 0},
        {"stride": 3, "padding": 2, "groups": 2, "dilation": 2},
    ],
)
def test_geometry(dims: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    x = image(2, 4, *{1: [400], 2: [BIG, 20], 3: [9, 10, 11]}[dims], dtype=dtype)
    model = Conv(dims, **options, activation="relu").to(dtype)
    check(model, x, calls="mkldnn__convolution_pointwise")
    residual = torch.randn_like(model(x))
    fusible = options.get("groups", 1) == 1
    check(model, x, residual, calls="mkldnn__convolution_pointwise_binary" if fusible else "aten_add__Tensor")


def test_uneven_geometry() -> None:
    check(Conv(stride=[1, 2], padding=[0, 2], dilation=[2, 1]), image(), calls="mkldnn__convolution")


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_named_padding(padding: str) -> None:
    check(nn.Conv2d(4, 8, 4, padding=padding), image())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_convolution(dims: int, groups: int, dtype: torch.dtype) -> None:
    kind = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
    model = kind(4, 6, 3, stride=2, padding=1, output_padding=1, groups=groups).to(dtype)
    calls = "mkldnn__convolution_transpose" if dims > 1 else "aten_conv_transpose1d"
    executable = check(model, image(2, 4, *[9] * dims, dtype=dtype), calls=calls)
    assert torch.equal(executable.constant("weight"), model.weight)


def test_convolution_of_one_pixel_is_a_linear() -> None:
    class Squeeze(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(64, 16, 1), nn.Conv2d(16, 64, 1)

        def forward(self, x: torch.Tensor) -> Any:
            s = F.adaptive_avg_pool2d(x, 1)
            spatial = ([1, 1], [0, 0], [1, 1], 1)
            s = CONV[2](s, self.down.weight, self.down.bias, None, *spatial, "relu", [])
            return x * CONV[2](s, self.up.weight, self.up.bias, None, *spatial, "sigmoid", [])

    executable = check(Squeeze(), image(2, 64, 9, 9), calls="aten_linear", never="convolution")
    assert executable.source.count("aten_permute(") == 2  # before the first and after the last, not between


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 8, 1, 1), (2, 8, BIG, BIG)])
@pytest.mark.parametrize("side", [1, BIG])
def test_pixelwise_residual(side: int, shape: tuple[int, ...]) -> None:
    model = Conv(padding=0, activation="relu")
    model.weight = nn.Parameter(torch.randn(8, 4, 1, 1))
    check(model, image(2, 4, side, side), torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": 1}, {"groups": 2}])
def test_convolution_of_single_pixels(options: dict[str, Any], layout: torch.memory_format, dtype: torch.dtype) -> None:
    last = nn.Conv2d(32, 48, 1)
    model = nn.Sequential(nn.Conv2d(32, 32, 1, **options), last, nn.ReLU()).to(dtype)
    x = image(2, 32, 40, 31, dtype=dtype).to(memory_format=layout)
    executable = check(model, x, calls="mkldnn__linear_pointwise")
    assert torch.equal(executable.constant("1.weight"), last.weight)


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_one_pixel_of_many_channels(rows: int, bias: bool) -> None:
    check(nn.Conv2d(700, 800, 1, bias=bias), image(rows, 700, 1, 1), calls="mkldnn__linear_pointwise")


@pytest.mark.parametrize("shape", [(600,), (1, 600), (2, 3, 4, 600), (0, 600), (2, 0, 600)])
def test_linear_of_any_rank(shape: tuple[int, ...]) -> None:
    check(Linear(activation="relu"), torch.randn(shape))


def test_small_linear_and_convolution_stay_with_aten() -> None:
    check(Linear(8, 8, activation="relu"), torch.randn(2, 8), calls="aten_linear", never="mkldnn")
    check(Conv(activation="silu"), image(1, 4, 8, 8), image(1, 8, 8, 8), calls="aten_conv2d", never="mkldnn")


def test_strided_and_expanded_inputs() -> None:
    wide = torch.randn(2, 4, BIG, 2 * BIG)
    check(Conv(), wide[..., ::2])
    check(Conv(), torch.randn(1, 4, 1, 1).expand(2, 4, BIG, BIG))
    check(Linear(), torch.randn(600, 9).t())


# What it leaves to ATen.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    check(Conv(activation="relu").to(dtype), image(dtype=dtype), never="mkldnn")
    check(Linear().to(dtype), image(9, 600, dtype=dtype), never="mkldnn")
    residual = image(2, 8, BIG, BIG, dtype=dtype)
    check(Conv(activation="gelu").to(dtype), image(dtype=dtype), residual, never="mkldnn")


def test_complex_and_integers() -> None:
    check(Function(lambda x, c: (x * c).real, torch.randn(4, dtype=torch.complex64)), torch.randn(3, 4))
    check(Function(lambda x, c: (x + c) // 3, torch.arange(4)), torch.arange(12).reshape(3, 4))


def test_unbatched_and_empty_images() -> None:
    check(Conv(), image(4, BIG, BIG), never="mkldnn")
    check(Conv(activation="relu"), image(0, 4, BIG, BIG))


def test_computed_weights() -> None:
    check(Function(lambda x, w: F.conv2d(x, w * 2), torch.randn(8, 4, 3, 3)), image(), never="mkldnn")
    check(Function(lambda x, w: F.linear(x, w), torch.randn(600)), torch.randn(5, 600), never="mkldnn")
    check(Function(F.conv2d), image(), torch.randn(8, 4, 3, 3), never="mkldnn")


# Layout.


class Views(nn.Module):
    """A convolution whose channels_last result meets ops that were captured for a contiguous one."""

    def __init__(self, after: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(4, 8, 3), after

    def forward(self, x: torch.Tensor) -> Any:
        return self.after(self.conv(x))


@pytest.mark.parametrize(
    "after",
    [
        lambda y: y,
        lambda y: y.view(2, -1),
        lambda y: y.view(2, 8, -1).transpose(1, 2),
        lambda y: y.flatten(1) + 1,
        lambda y: y.view_as(y.flatten(1)),
        lambda y: y.unflatten(2, (2, 13)),
        lambda y: y.clone().view(16, -1),
        lambda y: F.instance_norm(y).view(-1),
        lambda y: F.group_norm(y, 2).view(-1),
        lambda y: F.channel_shuffle(y, 2).view(-1),
        lambda y: y.roll(1, 3).view(-1),
        lambda y: F.max_pool2d(y, 2).view(2, -1),
        lambda y: torch.stack([y, y]).view(-1),
        lambda y: y.index_select(1, torch.tensor([1, 3])).view(-1),
        lambda y: F.pad(y, (1, 1)).view(-1),
        lambda y: y.as_strided((2, 8), (26, 3), 1),
        lambda y: y.permute(0, 2, 3, 1),
        lambda y: y.permute(1, 0, 3, 2) * 2,
        lambda y: y.mean((0, 3)),
        lambda y: y.sum(1),
        lambda y: y[:, :, 0],
        lambda y: y[..., ::2],
        lambda y: y.unbind(1),
        lambda y: y.chunk(2, 1)[1].reshape(-1),
        lambda y: torch.view_as_complex(y.view(2, 8, 26, 13, 2)).abs(),
        lambda y: y.view(torch.int32),
        lambda y: F.pixel_shuffle(y, 2),
        lambda y: torch.cat([y, y.relu()], 1),
        lambda y: y.contiguous(memory_format=torch.channels_last),
        lambda y: y.expand(3, 2, 8, 26, 26),
        lambda y: (y.max(), y.argmax(), y.flatten().topk(3).values),
        lambda y: torch.einsum("nchw->nhwc", y).softmax(-1),
        lambda y: F.interpolate(y, scale_factor=2.0, mode="bilinear"),
        lambda y: F.unfold(y, 3),
    ],
)
def test_views_of_channels_last(after: Callable[[torch.Tensor], Any]) -> None:
    check(Views(after), image())


def test_custom_ops_see_the_strides_of_capture() -> None:
    @torch.library.custom_op("fxopt_test::strides", mutates_args=())
    def strides(x: torch.Tensor) -> torch.Tensor:
        return torch.tensor(x.stride())

    strides.register_fake(lambda x: torch.empty(x.dim(), dtype=torch.int64))
    check(Views(lambda y: strides(y) + 0), image(), calls="fxopt_test_strides")


# Memory that is written over.


def residual_then(after: Callable[..., Any]) -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Conv(out=4), Conv(out=4, activation="relu")

        def forward(self, x: torch.Tensor) -> Any:
            return after(self, x, self.first(x))

    return Block()


def test_residual_is_overwritten_where_it_dies() -> None:
    model = residual_then(lambda m, x, y: m.second(x, y))
    check(model, image(), calls="mkldnn__convolution_pointwise__binary")


@pytest.mark.parametrize(
    "after",
    [
        lambda m, x, y: (m.second(x, y), y),  # an output
        lambda m, x, y: m.second(x, y) * y,  # read later
        lambda m, x, y: (m.second(x, y), y.view(-1)[:7]),  # an output looks at it
        lambda m, x, y: m.second(x, y.detach()) + y[:, :1],  # read later through a view
        lambda m, x, y: m.second(y, y),  # it is the input of the convolution too
        lambda m, x, y: m.second(y.flip(1).flip(1), y),
        lambda m, x, y: m.second(y.view_as(y), y),  # the same memory by another name
        lambda m, x, y: m.second(y, x),  # an input of the model
        lambda m, x, y: m.second(y, x.view(x.shape)),
        lambda m, x, y: m.second(x, y[:1].expand(2, -1, -1, -1)),  # elements that share memory
        lambda m, x, y: m.second(x, y.transpose(2, 3)),
        lambda m, x, y: m.second(x, y.contiguous()),
        lambda m, x, y: m.second(x, m.second(y, y) + y),
    ],
)
def test_residual_that_is_still_needed(after: Callable[..., Any]) -> None:
    check(residual_then(after), image())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.relu(x),
        lambda x: x.exp().add(1).mul(2).tanh(),
        lambda x: (x + 1).relu() + (x + 1).sigmoid(),
        lambda x: (lambda y: y.relu() + y)(x + 1),
        lambda x: (lambda y: (y, y.t().mul(2)))(x + 1),
        lambda x: (lambda y: y.mul(y))(x + 1),
        lambda x: (lambda y: y.add(y.t()))(x + 1),
        lambda x: (lambda y: y.view(-1).mul(2))(x + 1),
        lambda x: (lambda y: y.expand(3, 6, 6).mul(2))(x + 1),
        lambda x: (lambda y: y[:, :1].expand(6, 6).mul(2))(x + 1),
        lambda x: (lambda y: y[0].add(y))(x + 1),
        lambda x: (lambda a, b: a.mul(2) + b)(*(x + 1).chunk(2)),
        lambda x: (x + 1).add(x.double()),
        lambda x: (x + 1).mul(2).to(torch.float32).relu(),
        lambda x: (x + 1) > 0,
        lambda x: x.sum().mul(x),
        lambda x: torch.einsum("ij->ji", x).mul(2),
        lambda x: x.reshape(36).mul(2),
        lambda x: x.unflatten(0, (2, 3)).relu(),
        lambda x: torch.where(x > 0, x + 1, x - 1).clamp(0, 1),
        lambda x: (lambda y: [y.relu(), y.relu()])(x + 1),
    ],
)
def test_pointwise_in_place(function: Callable[..., Any]) -> None:
    check(Function(function), torch.randn(6, 6))


def test_constants_are_never_written_over() -> None:
    check(Function(lambda x, c: (c * x, c.relu(), c.view(-1).mul(3)), torch.randn(5, 5)), torch.randn(5, 5))
    check(Function(lambda c: c.mul(2), torch.randn(5, 5)))


def test_pointwise_chain_is_in_place() -> None:
    source = check(Function(lambda x: x.exp().add(1).tanh()), torch.randn(4)).source
    assert "aten_add__Tensor" in source
    assert "aten_tanh_(" in source
    assert "aten_exp(" in source


# Small rewrites.


def test_norms_take_low_precision_as_it_is() -> None:
    def block(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Any:
        y = F.layer_norm(x.to(torch.float32), (16,), w, b).transpose(0, 1).to(torch.bfloat16)
        return y, torch.softmax(x.to(torch.float32), 1).to(torch.bfloat16)

    constants = torch.randn(16), torch.randn(16)
    check(Function(block, *constants), image(3, 5, 16, dtype=torch.bfloat16), never="torch.float32)")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (lambda y: (y.to(torch.bfloat16), y + 1))(x.to(torch.float32).softmax(-1)),
        lambda x: x.to(torch.float32).softmax(-1),
        lambda x: x.to(torch.float32).softmax(-1, dtype=torch.float64).to(torch.bfloat16),
        lambda x: F.layer_norm(x.to(torch.float32), (16,)).to(torch.float16),
    ],
)
def test_norms_whose_wide_result_is_needed(function: Callable[..., Any]) -> None:
    check(Function(function), image(3, 5, 16, dtype=torch.bfloat16), calls="torch.float32")


def test_attention_masks() -> None:
    def attend(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    x = torch.randn(2, 3, 5, 8)
    assert "None" in check(Function(attend, torch.ones(5, 5, dtype=torch.bool)), x).source
    check(Function(attend, torch.ones(5, 5).tril().bool()), x, never="None")
    check(Function(attend, torch.ones(5, 5)), x, never="None")


def test_pooling_of_a_convolution() -> None:
    check(Views(lambda y: F.adaptive_avg_pool2d(y, 1)), image(), calls="aten_avg_pool2d")
    check(Views(lambda y: F.adaptive_avg_pool2d(y, 2)), image(), calls="aten_adaptive_avg_pool2d")
    check(Function(lambda x: F.adaptive_avg_pool2d(x, 1)), image(), calls="aten_adaptive_avg_pool2d")


# Dynamic sizes, state, calls.


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
def test_dynamic_batch(batch: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Conv(out=4, activation="relu"), Conv(out=4, activation="relu")
            self.squeeze = nn.Conv2d(4, 4, 1)
            self.head = nn.Linear(4 * BIG * BIG, 300)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.second(self.first(x), x)
            y = y * self.squeeze(F.adaptive_avg_pool2d(y, 1))
            return self.head(y.view(x.shape[0], -1)).relu()

    model = Net()
    program, flat = program_of(model, (image(),), {"x": {0: "batch"}})
    expected = program.copy()
    executable = TorchBackend().lower(program, resolve_target("x86"), flat)
    x = [image(batch, 4, BIG, BIG)]
    assert verify.compare(evaluate(expected, x), executable(x)).within


class Counter(nn.Module):
    count: torch.Tensor
    last: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each call exchanges the two buffers and counts in one of them."""
        last, count = self.last.clone(), self.count.clone()
        self.count.copy_(last + x)
        self.last.copy_(count)
        return self.count * 2, last


def test_state_is_read_live_and_results_do_not_share_it() -> None:
    model = Counter()
    executable = lower(model, (torch.ones(3),))
    for step in range(1, 5):
        x = torch.full((3,), float(step))
        *results, count, last = executable([x])
        executable.constant("count").copy_(count)
        executable.constant("last").copy_(last)
        for mine, eager in zip(results, model(x), strict=True):
            assert torch.equal(mine, eager)  # only now, after the state was written
    assert torch.equal(executable.constant("last"), model.last)


def test_weights_that_the_model_mutates_are_not_packed() -> None:
    class Online(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randn(500, 600))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert isinstance(self.weight, torch.Tensor)
            y = F.linear(x, self.weight)
            self.weight.mul_(0.5)
            return y

    executable = lower(Online(), (torch.randn(9, 600),))
    x = torch.randn(9, 600)
    first, written = executable([x])
    executable.constant("weight").copy_(written)
    second, _ = executable([x])
    torch.testing.assert_close(second, first / 2)


def test_grad_modes_and_autocast() -> None:
    executable, x = lower(nn.Sequential(Conv(), nn.ReLU()), (image(),)), [image()]
    (expected,) = executable(x)
    with torch.inference_mode():
        assert torch.equal(executable(x)[0], expected)
    with torch.enable_grad():
        (result,) = executable(x)
        assert torch.equal(result, expected)
        assert torch.is_grad_enabled()
    (result.requires_grad_() * 2).sum().backward()  # an inference tensor would refuse
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(executable(x)[0], expected)


def test_lowered_under_inference_mode() -> None:
    program, flat = program_of(nn.Sequential(Conv(), nn.ReLU()), (image(),))
    with torch.inference_mode():
        executable = TorchBackend().lower(program, resolve_target("x86"), flat)
    assert not executable(flat)[0].is_inference()


def test_concurrent_calls() -> None:
    model = nn.Sequential(Conv(out=4, activation="silu"), Conv(out=4, activation="relu"), nn.Flatten(), nn.ReLU())
    executable = lower(model, (image(),))
    inputs = [[image()] for _ in range(8)]
    expected = [executable(x)[0] for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(20) if not torch.equal(executable(inputs[i])[0], expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Weights.


def test_weights_are_packed_once_and_released() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(BIG, 700)

        def forward(self, x: torch.Tensor) -> Any:
            return self.head(self.conv(self.conv(x)))

    model = Twice()
    program, flat = program_of(model, (image(),))
    constants = program.constants
    executable = TorchBackend().lower(program, resolve_target("x86"), flat)
    assert sum("packed" in name for name in constants) == 2
    assert not {"conv.weight", "head.weight"} & set(constants)
    assert torch.equal(executable.constant("head.weight"), model.head.weight)
    assert torch.equal(executable.constant("conv.weight"), model.conv.weight)
    size = executable.nbytes()
    unpacked = sum(p.numel() * 4 for p in model.parameters())
    assert size is not None
    assert unpacked <= size <= 2 * unpacked


def test_tied_weight_with_another_user_stays() -> None:
    def tied(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(F.embedding(tokens, weight), weight)

    executable = check(Function(tied, torch.randn(700, 64)), torch.randint(0, 700, (2, 9)), calls="mkldnn__linear")
    assert executable.constant("c0").shape == (700, 64)


# Errors, targets, options.


def test_errors_name_node_and_source_line() -> None:
    executable = lower(Function(F.embedding, torch.randn(10, 4)), (torch.tensor([1]),))
    with pytest.raises(IndexError, match=r"embedding.*\.py:\d+.*failed: index out of range"):
        executable([torch.tensor([99])])
    with pytest.raises(ValueError, match="unpack"):
        executable([])


def test_foreign_target_lowers_but_does_not_run() -> None:
    foreign = "arm" if resolve_target("x86").runs_here else "x86"
    executable = lower(Conv(), (image(),), target=foreign)
    assert "mkldnn" not in executable.source
    with pytest.raises(BackendUnavailable, match=foreign):
        executable([image()])


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    check(Conv(activation="relu"), image(), image(2, 8, BIG, BIG), never="mkldnn")


def test_odd_arguments_and_names() -> None:
    class Odd(nn.Module):
        def forward(self, inputs: Any, run: Any, torch: Any) -> Any:
            y = inputs.masked_fill(run > 0, float("-inf")).clamp(-3.0, float("inf"))
            return y.nan_to_num(nan=float("nan")), {"a": torch.sum(), "b": 3}, None

    executable = lower(Odd(), (torch.randn(3), torch.randn(3), torch.randn(3)))
    y, total, three, nothing = executable([torch.zeros(3), -torch.ones(3), torch.ones(3)])
    assert torch.equal(y, torch.zeros(3))
    assert (float(total), three, nothing) == (3.0, 3, None)


def test_higher_order_ops() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.conv(x)
            with torch.no_grad():
                z = y.view(2, -1) * 2
            return torch.cond(x.sum() > 0, lambda v: v.view(-1) + 1, lambda v: v.view(-1) - 1, (y,)), z

    check(Branch(), image())
    check(Branch(), -image().abs())


def test_no_inputs_and_unused_inputs() -> None:
    check(Function(lambda c: c + 1, torch.ones(2)))
    check(Function(lambda x, y: y + 1), torch.ones(2), torch.zeros(2))
    check(Function(lambda x: x), torch.ones(2))


def test_inductor_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    program, flat = program_of(Conv(), (image(),))
    with pytest.raises(BackendUnavailable, match=r"C\+\+ compiler"):
        TorchBackend(inductor=True).lower(program, resolve_target("x86"), flat)


@pytest.mark.slow
def test_inductor() -> None:
    model = Counter()
    program, flat = program_of(model, (torch.ones(3),))
    executable = TorchBackend(inductor=True).lower(program, resolve_target("x86"), flat)
    for _ in range(3):
        *results, count, last = executable(flat)
        for mine, eager in zip(results, model(*flat), strict=True):
            assert torch.equal(mine, eager)
        for name, value in (("count", count), ("last", last)):
            executable.constant(name).copy_(value)
