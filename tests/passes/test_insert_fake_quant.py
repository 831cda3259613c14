"""Where quantize and dequantize go, and what is left alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxopt
from fxopt import ops, quantized
from fxopt.errors import InputError, PreconditionError, SpecError, VerifyError
from fxopt.program import Program
from fxopt.testing import Checked, check_pass

BEFORE = "canonicalize,fold-constants,fuse-conv-bn-relu"
IMAGE = (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),)


def batches(*shape: int, count: int = 3) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(shape, generator=generator),) for _ in range(count)]


def quantize(
    model: nn.Module, inputs: Sequence[Any] = IMAGE, options: str = "scheme=torch,smooth=false", **kwargs: Any
) -> Checked:
    torch.manual_seed(0)
    data = kwargs.pop("calibration", batches(*inputs[0].shape))
    return check_pass(
        f"insert-fake-quant{{{options}}}", model.eval(), inputs, before=BEFORE, calibration=data, **kwargs
    )


def calls(program: Program, packet: str) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.op == "call_function" and ops.packet(n) == packet]


def quality(checked: Checked) -> Any:
    return checked.record.details["quantization"]


def params(node: object) -> tuple[Any, Any]:
    assert isinstance(node, fx.Node)
    found = quantized.parameters(node)
    return found.scale, found.zero_point


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.pool(self.stem(x).relu())
        x = (self.b(self.a(x).relu()) + x).relu()
        return self.head(x.mean((2, 3)))


def test_a_chain_stays_integer_from_the_input_to_the_last_linear() -> None:
    checked = quantize(Residual())
    program = checked.program
    for unit in [*calls(program, "conv2d"), *calls(program, "linear")]:
        a = ops.arguments(unit)
        operands = [unit.all_input_nodes[0], a["weight"], a.get("residual")]
        assert all(quantized.is_dequantize(n) for n in operands if n is not None)
    [pool] = calls(program, "max_pool2d")
    [after] = pool.users
    assert params(pool.args[0]) == params(after), "a pool of the maximum hands integers on as they are"
    assert checked.difference.cosine > 0.995
    layers = quality(checked).layers
    assert [layer.mode for layer in layers] == ["static"] * 4
    assert all(layer.clipped is not None and layer.clipped < 0.1 for layer in layers)
    assert layers[0].path in str(quality(checked))


def test_each_value_is_quantized_once() -> None:
    program = quantize(Residual()).program
    for node in program.graph.nodes:
        assert sum(quantized.is_quantize(user) for user in node.users) <= 1


def test_onnxruntime_wants_the_add_and_the_hardswish_apart() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)
            self.b = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> Any:
            y = nn.functional.hardswish(self.a(x))
            return torch.relu(self.b(y) + y)

    program = quantize(Net(), options="scheme=onnxruntime,smooth=false").program
    for conv in calls(program, "conv2d"):
        assert all(quantized.is_quantize(user) for user in conv.users), "QLinearConv gives integers only"
    assert len(calls(program, "hardswish")) == len(calls(program, "add")) == 1


def test_a_concatenation_shares_one_scale_and_a_split_hands_it_on() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            left, right = torch.cat([self.a(x).relu(), 9 * self.b(x).sigmoid() if False else self.b(x)], 1).chunk(2, 1)
            return self.c(left), self.c(right)

    program = quantize(Net()).program
    [cat] = calls(program, "cat")
    operands = cat.all_input_nodes
    assert len({params(n) for n in operands}) == 1
    pieces = [n for n in program.graph.nodes if ops.kind(n) == "getitem"]
    assert all(params(user) == params(operands[0]) for piece in pieces for user in piece.users)


def test_elementwise_between_linears_stays_float() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> Any:
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x)) + x

    program = quantize(Gated(), (torch.randn(2, 4, 8),)).program
    [mul] = calls(program, "mul")
    assert not any(quantized.is_dequantize(n) for n in mul.all_input_nodes)
    assert all(quantized.is_quantize(user) for user in mul.users)


def test_a_float_op_reads_the_value_from_before_quantization_where_a_float_op_made_it() -> None:
    class PostNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.norm(x)
            return self.b(self.a(y).tanh()) * y

    program = quantize(PostNorm(), (torch.randn(2, 4, 8),)).program
    [mul] = calls(program, "mul")
    assert calls(program, "layer_norm")[0] in mul.all_input_nodes


def test_a_module_used_twice_has_its_weight_quantized_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> Any:
            return self.conv(self.conv(x).relu())

    program = quantize(Twice()).program
    assert len(calls(program, "quantize_per_channel")) == 1
    assert len(calls(program, "conv2d")) == 2


def test_a_weight_tied_to_an_embedding_stays_float_there() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> Any:
            return self.head(self.embed(x))

    tokens = torch.randint(0, 12, (2, 5))
    checked = quantize(Tied(), (tokens,), calibration=[(tokens,), (tokens,)])
    [embedding] = calls(checked.program, "embedding")
    assert embedding.args[0].op == "get_attr"  # type: ignore[union-attr]


def test_what_cannot_be_quantized_has_a_reason() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(8, 64)
            self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.nn.functional.linear(x, self.w(x[0]).view(8, 8)), self.up(y)

    inputs = (torch.randn(1, 8), torch.randn(1, 8, 4, 4))
    checked = quantize(Net(), inputs, calibration=[inputs, inputs])
    reasons = [layer.reason for layer in quality(checked).layers if layer.mode == "float"]
    assert reasons == [
        "its weight is computed, not a constant",
        "this engine has no int8 kernel for transposed convolutions",
    ]
    assert all(skip.source for skip in checked.record.skips)


def test_overrides_by_weight_name_the_last_that_fits_wins() -> None:
    options = "scheme=torch,smooth=false,overrides=['*=float','a.*=static','head*=dynamic']"
    layers = quality(quantize(Residual(), options=options)).layers
    assert [layer.mode for layer in layers] == ["float", "static", "float", "dynamic"]


def test_first_and_last_layer_on_request() -> None:
    layers = quality(quantize(Residual(), options="scheme=torch,smooth=false,first_last=false")).layers
    assert [layer.mode for layer in layers] == ["float", "static", "static", "float"]


@pytest.mark.parametrize("options", ["overrides=['a=int3']", "overrides=[a]", "weights=int4", "scheme=tensorflow"])
def test_bad_options_are_refused(options: str) -> None:
    with pytest.raises(SpecError):
        quantize(Residual(), options=options)


def test_static_activations_need_calibration_data() -> None:
    with pytest.raises(PreconditionError, match="calibration="):
        quantize(Residual(), calibration=None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_calibration_data_that_is_not_finite_is_an_error(bad: float) -> None:
    data = batches(2, 3, 16, 16)
    data[0][0][0, 0, 0, 0] = bad
    with pytest.raises(InputError, match="an input is not finite"):
        quantize(Residual(), calibration=data)


def test_zero_constant_and_huge_channels() -> None:
    model = Residual()
    with torch.no_grad():
        model.a.weight[0] = 0
        model.a.weight[1] = 3.0
        model.a.weight[2] *= 1e6
        model.b.weight.zero_()
    checked = quantize(model)
    assert checked.difference.cosine > 0.99


def test_a_signed_and_a_positive_value_use_all_integers() -> None:
    program = quantize(Residual()).program
    for node in calls(program, "quantize_per_tensor"):
        positive = ops.is_fused(node.args[0])  # type: ignore[arg-type]
        assert (ops.arguments(node)["zero_point"] == 0) == positive or ops.kind(node.args[0]) != "conv"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", ["activations=dynamic", "activations=none", "activations=none,weights=int4,group_size=4"]
)
def test_linears_without_calibration(options: str) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.Conv1d(4, 4, 1))
    checked = quantize(model, (torch.randn(2, 4, 8),), options, calibration=None)
    layers = quality(checked).layers
    assert [layer.mode for layer in layers] == [*["dynamic" if "dynamic" in options else "weight-only"] * 2, "float"]
    assert "for linears" in layers[-1].reason
    assert checked.difference.cosine > 0.98


class Fragile(nn.Module):
    """A layer whose outlier leaves nothing of its other inputs when quantized with one scale."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        spread = x * torch.tensor([1.0] * 7 + [3000.0])
        return self.fine(x) + self.coarse(spread) - 3000.0 * x[..., 7:] * self.coarse.weight[:, 7]


def test_too_much_loss_warns_and_names_the_layer() -> None:
    model, inputs = Fragile(), (torch.randn(2, 4, 8),)
    with pytest.warns(UserWarning, match=r"Worst layers: .*coarse .*smooth=true.*ada-round"):
        quantize(model, inputs)


def test_too_much_loss_can_be_an_error() -> None:
    with pytest.raises(VerifyError, match="insert-fake-quant lost more"):
        quantize(Fragile(), (torch.randn(2, 4, 8),), "scheme=torch,smooth=false,on_loss=raise")


def test_too_much_loss_can_be_repaired() -> None:
    checked = quantize(Fragile(), (torch.randn(2, 4, 8),), "scheme=torch,smooth=false,on_loss=repair")
    layers = {layer.weight: layer for layer in quality(checked).layers}
    assert layers["coarse.weight"].mode == "float"
    assert "put back" in layers["coarse.weight"].reason
    assert layers["fine.weight"].mode == "static"
    assert quality(checked).outputs[0].cosine >= 0.99


def test_the_whole_pipeline_leaves_integer_weights() -> None:
    torch.manual_seed(0)
    data = batches(2, 3, 16, 16)
    model = Residual().eval()
    compiled = fxopt.compile(
        model, example_inputs=IMAGE, passes="insert-fake-quant", calibration=data, backend="torch", verify=True
    )
    assert compiled.report.bytes[1] < 0.4 * compiled.report.bytes[0]
    assert not compiled.report.exact
    assert compiled.report.quantization.outputs[0].cosine > 0.995
    close = torch.nn.functional.cosine_similarity(compiled(*IMAGE).flatten(), model(*IMAGE).flatten(), 0)
    assert close > 0.995


@pytest.mark.parametrize(("engine", "parts"), [("onnxruntime", True), ("torch", False)])
def test_silu_is_taken_apart_where_its_parts_have_int8_kernels(engine: str, parts: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1))
    program = quantize(model, (torch.randn(2, 3, 8, 8),), f"scheme={engine}").program
    assert bool(calls(program, "sigmoid")) == bool(calls(program, "mul")) == parts
