"""cast-precision: what runs in low precision, what stays in fp32, and that users see their own dtypes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt import ops, quantized, testing, verify
from fxopt.target import resolve_target
from tests.passes.models import Model, chain, image

pytestmark = pytest.mark.filterwarnings("ignore:cast-precision")
COARSE = {"bf16": 3e-2, "fp16": 4e-3}
"""Largest error of tiny models, relative to the range: about four times the rounding of the dtype."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check(model: nn.Module, *inputs: Any, dtype: str = "bf16", **options: Any) -> testing.Checked:
    checked = testing.check_pass(f"cast-precision{{dtype={dtype}}}", model, inputs, **options)
    assert checked.difference.error <= COARSE[dtype]
    return checked


def dtypes(checked: testing.Checked) -> dict[str, torch.dtype]:
    """The dtype of each call's result by node name, casts left out."""
    calls = [n for n in checked.program.graph.nodes if n.op == "call_function" and "to_copy" not in n.name]
    return {n.name: n.meta["val"].dtype for n in calls if isinstance(n.meta["val"], torch.Tensor)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_convs_and_linears_run_low_and_the_output_is_fp32(dtype: str) -> None:
    model = chain(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    checked = check(model, image(), dtype=dtype)
    assert set(dtypes(checked).values()) == {DTYPES[dtype]}
    assert checked.ops().count("aten._to_copy") == 2
    assert verify.run(checked.program, [image()])[0].dtype is torch.float32
    assert all(t.dtype is DTYPES[dtype] for t in checked.program.tensors().values())


@pytest.mark.parametrize(
    "sensitive",
    [
        lambda x: x.softmax(-1),
        lambda x: F.layer_norm(x, (4,)),
        lambda x: F.log_softmax(x, -1),
        lambda x: x.exp(),
        lambda x: x.abs().log(),
        lambda x: x.sum(-1),
        lambda x: x.mean(-1),
        lambda x: x.cumsum(-1),
        lambda x: F.normalize(x, dim=-1),
        lambda x: x.var(-1),
    ],
)
def test_sensitive_ops_stay_in_fp32(sensitive: Callable[[torch.Tensor], torch.Tensor]) -> None:
    checked = check(Model(lambda m, x: sensitive(m.layer(x)), layer=nn.Linear(4, 4)), torch.randn(2, 4))
    found = dtypes(checked)
    assert found.pop("linear") is torch.bfloat16
    assert torch.bfloat16 not in {d for name, d in found.items() if name != "abs_1"}


def test_batch_norm_that_could_not_be_folded_stays_in_fp32() -> None:
    checked = check(chain(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)), image())
    assert dtypes(checked)["batch_norm"] is torch.float32


def test_attention_runs_low() -> None:
    model = Model(lambda m, x: F.scaled_dot_product_attention(m.q(x), m.k(x), x), q=nn.Linear(4, 4), k=nn.Linear(4, 4))
    assert set(dtypes(check(model, torch.randn(2, 3, 4))).values()) == {torch.bfloat16}


def test_a_sum_with_an_fp32_value_is_fp32() -> None:
    checked = check(Model(lambda m, x: m.layer(x) + x.exp(), layer=nn.Linear(4, 4)), torch.randn(2, 4))
    assert dtypes(checked)["add"] is torch.float32


RIDERS: dict[str, Callable[..., torch.Tensor]] = {
    "linear": lambda m, x, r: m.linear(x) + r,
    "gelu": lambda m, x, r: F.gelu(m.linear(x) + r, approximate="tanh"),
    "clamp": lambda m, x, r: (m.linear(x) + r).clamp(-0.5, 0.5),
    "conv1d": lambda m, x, r: (m.conv(x) + r).relu(),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rider", RIDERS)
def test_a_residual_in_fp32_is_added_in_fp32(rider: str, dtype: str) -> None:
    """Else a transformer rounds its residual stream in each layer; autocast does not."""
    model = Model(
        lambda m, x: RIDERS[rider](m, F.layer_norm(x, (4,)), x),
        linear=nn.Linear(4, 4),
        conv=nn.Conv1d(4, 4, 3, padding=2, dilation=2, groups=2),
    )
    before = ("canonicalize", "fold-constants", "fuse-conv-bn-relu")
    checked = check(model, torch.randn(2, 4, 4), dtype=dtype, before=before)
    norm, product, *sums = dtypes(checked).values()
    assert (norm, product, {*sums}) == (torch.float32, DTYPES[dtype], {torch.float32})
    assert not any(op.startswith("fxopt.") for op in checked.ops())


def test_a_residual_in_low_precision_rides_on() -> None:
    model = Model(lambda m, x: (m.b(x) + m.a(x)).relu(), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1))
    before = ("canonicalize", "fold-constants", "fuse-conv-bn-relu")
    assert check(model, image(), before=before).ops().count("fxopt.conv2d") == 1


def test_a_sum_with_a_matrix_of_the_model_is_fp32() -> None:
    model = Model(lambda m, x: m.layer(x) + m.place, layer=nn.Linear(4, 4), place=torch.randn(2, 4))
    assert dtypes(check(model, torch.randn(2, 4)))["add"] is torch.float32


def test_one_cast_serves_all_users() -> None:
    model = Model(lambda m, x: m.a(x).exp() + m.b(x).exp(), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    checked = check(model, torch.randn(2, 4))
    (x,) = checked.program.placeholders
    assert len(x.users) == 1


def test_a_constant_is_cast_once_and_has_no_cast_in_the_graph() -> None:
    layer = nn.Linear(4, 4)
    checked = check(Model(lambda m, x: m.layer(m.layer(x)), layer=layer), torch.randn(2, 4))
    assert len(checked.program.constants) == 2
    assert checked.ops() == ["aten._to_copy", "aten.linear", "aten.linear", "aten._to_copy"]


def test_integers_and_masks_are_untouched() -> None:
    def forward(m: Any, tokens: torch.Tensor, mask: torch.Tensor) -> Any:
        y = m.layer(m.table(tokens)).masked_fill(mask, 0.0)
        return y, y.argmax(-1), tokens + 1, mask

    model = Model(forward, table=nn.Embedding(7, 4), layer=nn.Linear(4, 4))
    tokens, mask = torch.tensor([[1, 2, 6]]), torch.tensor([[[True], [False], [False]]])
    program = check(model, tokens, mask).program
    outputs = verify.run(program, [tokens, mask])
    assert [y.dtype for y in outputs] == [torch.float32, torch.int64, torch.int64, torch.bool]
    assert [p.meta["val"].dtype for p in program.placeholders] == [torch.int64, torch.bool]


def test_fp64_is_left_alone() -> None:
    model = chain(nn.Linear(4, 4), nn.ReLU()).double()
    assert check(model, torch.randn(2, 4).double()).record.edits == 0


def test_a_model_in_bf16_keeps_its_outputs_in_bf16() -> None:
    model = chain(nn.Linear(4, 4), nn.Softmax(-1), nn.Linear(4, 4)).bfloat16()
    checked = check(model, torch.randn(2, 4).bfloat16())
    assert dtypes(checked)["softmax"] is torch.float32
    assert verify.run(checked.program, [torch.randn(2, 4).bfloat16()])[0].dtype is torch.bfloat16


@pytest.mark.parametrize(
    "large",
    [lambda x: x.clamp(-1e6, 1e6), lambda x: x * 1_000_000 / 1e6, lambda x: (x + 1e6) - 1e6, lambda x: x * 1e-3],
)
def test_numbers_beyond_fp16_keep_their_op_in_fp32(large: Callable[[torch.Tensor], torch.Tensor]) -> None:
    checked = testing.check_pass(
        "cast-precision{dtype=fp16}",
        Model(lambda m, x: large(m.layer(x)), layer=nn.Linear(4, 4)),
        (torch.randn(2, 4),),
    )
    assert checked.difference.error <= 3e-2  # (x + 1e6) - 1e6 is coarse in fp32, too
    assert verify.run(checked.program, [torch.randn(2, 4)])[0].isfinite().all()


def test_weights_beyond_fp16_saturate() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[1e6, 0.0], [float("inf"), 1.0]])
    checked = testing.check_pass("cast-precision{dtype=fp16}", chain(layer), (torch.randn(1, 2),))
    weight = next(t for t in checked.program.tensors().values() if t.dim() == 2)
    assert weight.tolist() == [[65504.0, 0.0], [float("inf"), 1.0]]


def test_mutated_buffers_keep_their_dtype() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.cache[:, 0] = m.layer(x)
        result: torch.Tensor = m.layer(m.cache.t())
        return result

    checked = check(Model(forward, cache=torch.zeros(4, 4), layer=nn.Linear(4, 4)), torch.randn(4, 4)[0])
    outputs = verify.run(checked.program, [torch.randn(4)])
    assert [y.dtype for y in outputs] == [torch.float32, torch.float32]
    assert checked.program.constants["cache"].dtype is torch.float32


def test_both_branches_of_a_cond_keep_their_dtype() -> None:
    model = Model(
        lambda m, x: torch.cond(x.sum() > 0, lambda y: m.layer(y).relu(), lambda y: y * 2, (m.layer(x),)),
        layer=nn.Linear(4, 4),
    )
    checked = check(model, torch.randn(2, 4))
    assert torch.bfloat16 in dtypes(checked).values()
    for x in (torch.ones(2, 4), -torch.ones(2, 4)):
        assert verify.compare([model(x)], verify.run(checked.program, [x])).error <= COARSE["bf16"]


def test_dynamic_shapes() -> None:
    model = Sums()
    checked = check(model, torch.randn(3, 4), dynamic_shapes=({0: "batch"},))
    x = torch.randn(7, 4)
    assert verify.compare([model(x)], verify.run(checked.program, [x])).error <= COARSE["bf16"]


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x).softmax(-1) + self.layer(x)
        return result


def test_a_target_without_the_dtype_warns() -> None:
    x86 = resolve_target("x86")
    old = fxopt.Target("x86", x86.arch, frozenset({"avx2"}), frozenset({torch.float32}))
    with pytest.warns(UserWarning, match="no native fp16"):
        checked = check(chain(nn.Linear(4, 4)), torch.randn(2, 4), dtype="fp16", target=old)
    assert "no native fp16" in checked.record.notes[0]


def test_a_target_with_the_dtype_does_not() -> None:
    new = fxopt.Target("x86", "x86_64", frozenset({"amx_bf16"}), frozenset({torch.float32, torch.bfloat16}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check(chain(nn.Linear(4, 4)), torch.randn(2, 4), target=new).record.notes == ()


def test_it_is_lossy_and_says_how_much() -> None:
    checked = check(chain(nn.Linear(4, 4)), torch.randn(2, 4))
    assert not checked.record.exact
    assert checked.record.difference is not None
    assert 0 < checked.record.difference.error <= COARSE["bf16"]
    assert checked.record.spec == "cast-precision"


def test_an_unknown_dtype_is_refused_with_the_choices() -> None:
    with pytest.raises(fxopt.SpecError, match=r"'fp8' is not a choice.*bf16, fp16"):
        check(chain(nn.Linear(4, 4)), torch.randn(2, 4), dtype="fp8")


# --- ops that look at the dtype of their inputs


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_reinterpreted_in_the_captured_dtype(dtype: str) -> None:
    sign = Model(lambda m, x: m.layer(x).view(torch.int32) < 0, layer=nn.Linear(4, 4))
    checked = check(sign, torch.randn(2, 4), dtype=dtype)
    assert dtypes(checked)["linear"] is DTYPES[dtype]
    halves = Model(lambda m, x: m.layer(x).view(torch.int16)[..., 1::2] < 0, layer=nn.Linear(4, 4))
    check(halves, torch.randn(2, 4), dtype=dtype)
    check(halves.bfloat16(), torch.randn(2, 4).bfloat16(), dtype=dtype)


def test_type_as_gives_the_captured_dtype() -> None:
    model = Model(lambda m, x, i: i.type_as(m.layer(x)) - 1000.0, layer=nn.Linear(4, 4))
    checked = check(model, torch.randn(2, 4), torch.arange(1000, 1010))
    assert torch.equal(
        verify.run(checked.program, [torch.randn(2, 4), torch.arange(1000, 1010)])[0], torch.arange(10.0)
    )


def test_an_unknown_op_sees_the_dtype_of_capture() -> None:
    model = Model(lambda m, x: torch.fft.fft(m.layer(x)).real.cumsum(-1), layer=nn.Linear(4, 4))
    check(model, torch.randn(2, 4))
    low = Model(lambda m, x: m.layer(x).cumsum(-1), layer=nn.Linear(4, 4)).bfloat16()
    assert set(dtypes(check(low, torch.randn(2, 4).bfloat16())).values()) == {torch.bfloat16}


def test_what_insert_fake_quant_left_stays_integer() -> None:
    torch.manual_seed(0)
    model = chain(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Hardswish(), nn.Conv2d(16, 8, 1))
    data = [(torch.randn(1, 8, 8, 8),) for _ in range(4)]
    quantize = "canonicalize,fuse-conv-bn-relu,insert-fake-quant{scheme=torch,smooth=false,overrides=['2=float']}"
    checked = testing.check_pass("cast-precision", model, data[0], before=quantize, calibration=data)
    convs = [node for node in checked.program.graph.nodes if ops.kind(node) == "conv"]
    weights = [quantized.is_dequantize(ops.arguments(conv)["weight"]) for conv in convs]
    assert weights[0]
    assert not weights[1]
    low = [conv.meta["val"].dtype is torch.bfloat16 for conv in convs]
    assert low == [not one for one in weights]


def test_what_is_kept_stays_in_fp32() -> None:
    model = chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    checked = testing.check_pass("cast-precision{keep=['1.*']}", model, (image(),))
    convs = [node.meta["val"].dtype for node in checked.program.graph.nodes if ops.kind(node) == "conv"]
    assert convs == [torch.bfloat16, torch.float32, torch.bfloat16]
    with pytest.warns(UserWarning, match="'typo' fits no matmul or conv"):
        testing.check_pass("cast-precision{keep=[typo]}", model, (image(),))


def test_a_conv_with_a_residual_in_fp32_and_an_input_in_bf16() -> None:
    """The parts of the fused op are made from values that differ in dtype."""
    model = Model(lambda m, x: m.b(m.a(x)) + x, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1)).eval()
    check(model, image(), before="canonicalize,fuse-conv-bn-relu")
