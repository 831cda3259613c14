"""canonicalize: what is removed, what is respelled, and what has to stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt import testing, verify
from tests.passes.models import CONVS, Model, chain, image

PASS = "canonicalize"


def check(model: nn.Module, *inputs: Any, **options: Any) -> testing.Checked:
    checked = testing.check_pass(PASS, model, inputs, before="", **options)
    assert checked.difference.error <= 1e-6
    return checked


def ops_of(function: Callable[..., Any], *inputs: Any, **parts: Any) -> list[str]:
    return check(Model(lambda m, *xs: function(*xs), **parts), *inputs).ops()


@pytest.mark.parametrize(
    "nothing",
    [
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: F.dropout1d(x, 0.5, training=False),
        lambda x: F.alpha_dropout(x, 0.5, training=False),
        lambda x: F.feature_alpha_dropout(x, 0.5, training=False),
        lambda x: x.clone(),
        lambda x: x.contiguous(),
        lambda x: x.detach(),
        lambda x: x.to(torch.float32),
        lambda x: x.float(),
        lambda x: x.type_as(x.abs()),
        lambda x: x.to(torch.float32, copy=True),
        lambda x: x.view(2, 3, 4),
        lambda x: x.expand(2, 3, 4),
        lambda x: x.squeeze(0),
        lambda x: x.permute(0, 1, 2),
        lambda x: x.permute(0, -2, -1),
        lambda x: x.transpose(1, 1),
        lambda x: x + 0,
        lambda x: x - 0.0,
        lambda x: x * 1,
        lambda x: x / 1,
        lambda x: x**1,
    ],
)
def test_what_does_nothing_goes(nothing: Callable[[torch.Tensor], torch.Tensor]) -> None:
    kept = ops_of(lambda x: nothing(x.cos()).sin(), torch.randn(2, 3, 4))
    assert [op for op in kept if op != "aten.abs"] == ["aten.cos", "aten.sin"]


@pytest.mark.parametrize(
    "something",
    [
        lambda x: x + 1e-8,
        lambda x: x * 2,
        lambda x: x + torch.zeros_like(x),
        lambda x: 1 - x,
        lambda x: 1 / x,
        lambda x: torch.div(x, 1, rounding_mode="floor"),
        lambda x: x + 0j,
        lambda x: x.double(),
        lambda x: x.transpose(0, 1),
        lambda x: x.expand(2, 3, 3),
        lambda x: x + torch.zeros(2, 1, 1),
    ],
)
def test_what_does_something_stays(something: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert len(ops_of(lambda x: something(x.cos()).sin(), torch.randn(3, 3) + 3)) >= 3


def test_an_integer_division_by_one_stays_a_float() -> None:
    checked = check(Model(lambda m, x: (x * 2 / 1).sin()), torch.arange(4))
    assert checked.ops() == ["aten.mul", "aten.div", "aten.sin"]


def test_a_dropout_module_goes() -> None:
    assert check(chain(nn.Linear(4, 4), nn.Dropout(0.5), nn.ReLU()), torch.randn(2, 4)).ops() == [
        "aten.linear",
        "aten.relu",
    ]


def test_a_dropout_that_is_always_active_stays() -> None:
    """F.dropout defaults to training=True: the model is random in eval mode, too."""
    checked = testing.check_pass(PASS, Model(lambda m, x: F.dropout(x.cos()).sin()), (torch.randn(8),), before="")
    assert checked.ops() == ["aten.cos", "aten.dropout", "aten.sin"]


def test_casts_there_and_back_are_kept() -> None:
    """Half precision in between rounds: not a no-op."""
    checked = check(Model(lambda m, x: x.cos().half().float().sin()), torch.randn(8))
    assert len(checked.ops()) == 4


# --- shapes


def test_only_the_last_of_several_reshapes_counts() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.cos().view(6, 4).reshape(2, 12).flatten(0).unsqueeze(0).view(4, 6).sin()

    assert ops_of(forward, torch.randn(2, 3, 4)) == ["aten.cos", "aten.reshape", "aten.sin"]


def test_a_view_as_another_dtype_is_no_reshape() -> None:
    for there in (lambda x: x.view(torch.int32).view(12, 2), lambda x: x.view(12, 2).view(torch.int32)):
        assert "aten.view" in ops_of(lambda x, there=there: there(x.cos()) + 1, torch.randn(2, 3, 4))


def test_permutes_merge() -> None:
    kept = check(Model(lambda m, x: x.cos().permute(2, 0, 1).transpose(0, 1).sin()), torch.randn(2, 3, 4))
    assert kept.ops() == ["aten.cos", "aten.permute", "aten.sin"]
    assert "dims=[0,2,1]" in kept.text


@pytest.mark.parametrize(
    "there_and_back",
    [
        lambda x: x.permute(1, 2, 0).permute(2, 0, 1),
        lambda x: x.transpose(0, 2).transpose(-1, 0),
        lambda x: x[0].t().t(),
    ],
)
def test_permutes_that_cancel_go(there_and_back: Callable[[torch.Tensor], torch.Tensor]) -> None:
    kept = ops_of(lambda x: there_and_back(x.cos()).sin(), torch.randn(2, 3, 4))
    assert [op for op in kept if op not in ("aten.select",)] == ["aten.cos", "aten.sin"]


def test_dynamic_reshapes_merge() -> None:
    model = Model(lambda m, x: x.cos().view(x.shape[0], -1).view(x.shape[0], 2, 6).sin())
    checked = check(model, torch.randn(3, 3, 4), dynamic_shapes=(None, ({0: "b"},))[1:])
    assert checked.ops().count("aten.reshape") == 1
    x = torch.randn(5, 3, 4)
    assert torch.equal(verify.run(checked.program, [x])[0], model(x))


# --- convs


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_same_padding_in_numbers(dims: int, kernel: int, dilation: int) -> None:
    conv = CONVS[dims](2, 3, kernel, padding="same", dilation=dilation)
    checked = check(Model(lambda m, x: m.conv(x), conv=conv), image(dims, channels=2))
    odd = (kernel - 1) * dilation % 2 == 1
    assert checked.ops() == ["aten.constant_pad_nd"] * odd + [f"aten.conv{dims}d"]
    assert "same" not in checked.text


def test_same_padding_with_an_uneven_kernel() -> None:
    conv = nn.Conv2d(2, 3, (2, 5), padding="same", dilation=(1, 2), groups=1)
    assert check(chain(conv), image(channels=2)).ops() == ["aten.constant_pad_nd", "aten.conv2d"]


def test_valid_padding_in_numbers() -> None:
    checked = check(chain(nn.Conv2d(2, 3, 3, padding="valid")), image(channels=2))
    assert checked.ops() == ["aten.conv2d"]
    assert "valid" not in checked.text


# --- matmuls


def test_a_product_with_a_constant_matrix_is_a_linear() -> None:
    model = Model(lambda m, x: x @ m.w, w=torch.randn(4, 5))
    for x in (torch.randn(3, 4), torch.randn(2, 3, 4)):
        assert check(model, x).ops() == ["aten.linear"]


def test_addmm_is_a_linear() -> None:
    model = Model(lambda m, x: torch.addmm(m.b, x, m.w), w=torch.randn(4, 5), b=torch.randn(5))
    assert check(model, torch.randn(3, 4)).ops() == ["aten.linear"]


@pytest.mark.parametrize("shape", [(1,), (3, 5), (1, 5), ()])
def test_addmm_with_another_addend_is_right(shape: tuple[int, ...]) -> None:
    model = Model(lambda m, x: torch.addmm(m.b, x, m.w), w=torch.randn(4, 5), b=torch.randn(shape))
    checked = check(model, torch.randn(3, 4))
    bias = next(n for n in checked.program.graph.nodes if n.op == "call_function").args[-1]
    assert checked.ops() == ["aten.addmm"] or bias.meta["val"].shape == (5,)


@pytest.mark.parametrize("factors", [{"beta": 2}, {"alpha": 0.5}])
def test_a_scaled_addmm_stays(factors: dict[str, Any]) -> None:
    model = Model(lambda m, x: torch.addmm(m.b, x, m.w, **factors), w=torch.randn(4, 5), b=torch.randn(5))
    assert check(model, torch.randn(3, 4)).ops() == ["aten.addmm"]


def test_other_products_stay() -> None:
    assert ops_of(lambda x, y: x @ y, torch.randn(3, 4), torch.randn(4, 5)) == ["aten.matmul"]
    vector = Model(lambda m, x: x @ m.w, w=torch.randn(4, 5))
    assert check(vector, torch.randn(4)).ops() == ["aten.matmul"]
    left = Model(lambda m, x: m.w @ x, w=torch.randn(5, 4))
    assert check(left, torch.randn(4, 3)).ops() == ["aten.matmul"]
    batched = Model(lambda m, x: x @ m.w, w=torch.randn(2, 4, 5))
    assert check(batched, torch.randn(2, 3, 4)).ops() == ["aten.matmul"]


def test_the_transposed_weight_is_no_copy() -> None:
    weight = nn.Parameter(torch.randn(4, 5))
    checked = check(Model(lambda m, x: x @ m.w, w=weight), torch.randn(3, 4))
    assert checked.program.constants["w.t"].data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("first", [True, False])
def test_an_added_vector_is_the_linears_bias(first: bool) -> None:
    layer = nn.Linear(4, 5, bias=False)
    model = Model(lambda m, x: m.layer(x) + m.b if first else m.b + m.layer(x), layer=layer, b=torch.randn(5))
    assert check(model, torch.randn(2, 3, 4)).ops() == ["aten.linear"]


def test_an_added_vector_that_is_no_bias_stays() -> None:
    def adds(layer: nn.Module, vector: torch.Tensor) -> list[str]:
        return check(Model(lambda m, x: m.layer(x) + m.b, layer=layer, b=vector), torch.randn(3, 4)).ops()

    assert adds(nn.Linear(4, 5), torch.randn(5)) == ["aten.linear", "aten.add"]
    bare = nn.Linear(4, 5, bias=False)
    assert adds(bare, torch.randn(1)) == ["aten.linear", "aten.add"]
    assert adds(bare, torch.randn(3, 5)) == ["aten.linear", "aten.add"]
    assert adds(bare, torch.randn(5).double()) == ["aten.linear", "aten.add"]
    assert adds(bare, torch.arange(5)) == ["aten.linear", "aten.add"]
    scaled = Model(lambda m, x: torch.add(m.layer(x), m.b, alpha=2), layer=bare, b=torch.randn(5))
    assert check(scaled, torch.randn(3, 4)).ops() == ["aten.linear", "aten.add"]


def test_a_linear_with_two_users_takes_no_bias() -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.layer(x)
        return y + m.b, y.sin()

    checked = check(Model(forward, layer=nn.Linear(4, 5, bias=False), b=torch.randn(5)), torch.randn(3, 4))
    assert checked.ops() == ["aten.linear", "aten.add", "aten.sin"]


# --- memory


def shares_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


COPIES: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: x.clone(),
    lambda x: x + 0,
    lambda x: x * 1,
    lambda x: x.clone().view(-1),
    lambda x: (x + 0).view(-1).unsqueeze(0),
    lambda x: x.to(torch.float32, copy=True).flatten(),
    lambda x: x.t().contiguous().view(-1),
    lambda x: x.clone().t().t(),
    lambda x: (x * 1)[0],
    lambda x: (x * 1).chunk(2)[1],
]


@pytest.mark.parametrize("copy", COPIES)
def test_an_output_shares_no_memory_with_an_input_or_a_weight(copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x, w = torch.randn(4, 3), nn.Parameter(torch.randn(4, 3))
    program = check(Model(lambda m, x: (copy(x), copy(m.w)), w=w), x).program
    of_input, of_weight = verify.run(program, [x])
    assert not shares_memory(of_input, x)
    assert not shares_memory(of_weight, w)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.as_strided((2, 4), (12, 1)),
        lambda x: x.view(2, 12).as_strided((2, 4), (12, 1)),
        lambda x: x.view(torch.int64),
        lambda x: torch.view_as_complex(x.view(2, 3, 2, 2)).real,
    ],
)
def test_a_copy_before_an_op_that_reads_strides_stays(read: Callable[[torch.Tensor], torch.Tensor]) -> None:
    kept = ops_of(lambda x: read(x.transpose(1, 2).contiguous()) * 2, torch.randn(2, 4, 3))
    assert "aten.contiguous" in kept


def test_strides_of_an_output_stay() -> None:
    x = torch.randn(2, 3, 4)
    program = check(Model(lambda m, x: x.cos().transpose(1, 2).contiguous()), x).program
    (y,) = verify.run(program, [x])
    assert y.is_contiguous()


def test_assertions_of_the_exporter_go() -> None:
    checked = check(Model(lambda m, x: x.to(torch.float64) * 2), torch.randn(4))
    assert "_assert_tensor_metadata" not in checked.text


def test_an_assignment_is_no_copy() -> None:
    def write(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[:, :2] = x[:, 2:4] + 1
        y[:, 1] = x[:, 0, :1].double()
        return y

    checked = testing.check_pass("canonicalize", Model(write), (torch.randn(2, 4, 3),))
    assert not any("copy.default" in op and "_copy" not in op for op in checked.ops())
    given = testing.check_pass("canonicalize", Model(lambda m, x: torch.empty(2, 3).copy_(x)), (torch.randn(2, 3),))
    assert any("clone" in op or "copy" in op for op in given.ops()), "the caller may write to what it gets"
