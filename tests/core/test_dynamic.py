"""Dynamic sizes: open dimensions stay open, and every call is checked against what was captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import fxopt
from fxopt import verify
from fxopt.capture import Captured, capture
from tests.passes.models import Model, chain, image


class Matrix(nn.Module):
    """A linear over sequences: batch and length are free."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x).softmax(-1)
        return result


class Two(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x[: y.shape[0]] + y


def run(captured: Captured, *args: Any, **kwargs: Any) -> torch.Tensor:
    (result,) = verify.run(captured.program, captured.program.signature.bind(args, kwargs))
    assert isinstance(result, torch.Tensor)
    return result


@pytest.mark.parametrize("example", [1, 2, 3])
def test_any_batch_after_any_example_batch(example: int) -> None:
    model = chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    captured = capture(model, (image(batch=example),), None, ({0: "batch"},))
    assert len(captured.inputs[0]) == example
    for batch in (1, 2, 5):
        x = image(batch=batch)
        assert torch.allclose(run(captured, x), model(x), atol=1e-6)


def test_batch_and_length() -> None:
    model = Matrix().eval()
    captured = capture(model, (torch.randn(1, 1, 4),), None, {"x": {0: "batch", 1: "length"}})
    for shape in ((1, 1, 4), (3, 7, 4), (2, 1, 4)):
        x = torch.randn(shape)
        assert torch.allclose(run(captured, x), model(x), atol=1e-6)


def test_the_fixed_dimensions_are_checked() -> None:
    captured = capture(Matrix(), (torch.randn(2, 3, 4),), None, {"x": {0: "batch"}})
    with pytest.raises(fxopt.InputError, match="'x' has size 5 in dimension 1, expected 3"):
        run(captured, torch.randn(2, 5, 4))


def test_one_name_is_one_size() -> None:
    captured = capture(Two(), (torch.ones(3, 2), torch.ones(3, 2)), None, {"x": {0: "n"}, "y": {0: "n"}})
    assert run(captured, torch.ones(5, 2), torch.ones(5, 2)).shape == (5, 2)
    with pytest.raises(fxopt.InputError, match=r"'y' has size 4 in dimension 0, expected .* = 5"):
        run(captured, torch.ones(5, 2), torch.ones(4, 2))


def test_derived_sizes() -> None:
    n = Dim("n")
    captured = capture(Two(), (torch.ones(6, 2), torch.ones(3, 2)), None, {"x": {0: 2 * n}, "y": {0: n}})
    assert run(captured, torch.ones(10, 2), torch.ones(5, 2)).shape == (5, 2)
    for x, y, message in [(7, 3, "'x' has size 7 in dimension 0, expected 2"), (6, 4, "'y' has size 4")]:
        with pytest.raises(fxopt.InputError, match=message):
            run(captured, torch.ones(x, 2), torch.ones(y, 2))


def test_ranges() -> None:
    captured = capture(Matrix(), (torch.randn(4, 3, 4),), None, {"x": {0: Dim("batch", min=3, max=8)}})
    for batch in (3, 8):
        assert len(run(captured, torch.randn(batch, 3, 4))) == batch
    for batch in (2, 9, 0):
        with pytest.raises(fxopt.InputError, match=f"has size {batch} in dimension 0, expected 3 to 8"):
            run(captured, torch.randn(batch, 3, 4))


def test_an_empty_batch_is_refused() -> None:
    captured = capture(Matrix(), (torch.randn(4, 3, 4),), None, {"x": {0: "batch"}})
    with pytest.raises(fxopt.InputError, match="has size 0 in dimension 0, expected at least 1"):
        run(captured, torch.randn(0, 3, 4))


def test_automatic_dimensions() -> None:
    captured = capture(Matrix(), (torch.randn(2, 3, 4),), None, {"x": {0: Dim.AUTO, 1: Dim.STATIC}})
    assert len(run(captured, torch.randn(6, 3, 4))) == 6


def test_nested_inputs() -> None:
    class Nested(nn.Module):
        def forward(self, batch: dict[str, torch.Tensor], *, scale: torch.Tensor) -> torch.Tensor:
            return batch["a"] + batch["b"] * scale

    shapes = {"batch": {"a": {0: "n"}, "b": {0: "n"}}, "scale": None}
    inputs = {"a": torch.ones(1, 2), "b": torch.ones(1, 2)}
    captured = capture(Nested(), (inputs,), {"scale": torch.ones(2)}, shapes)
    bigger = {"a": torch.ones(4, 2), "b": torch.ones(4, 2)}
    assert run(captured, bigger, scale=torch.ones(2)).shape == (4, 2)


def test_a_size_that_the_model_fixes_is_refused() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.ones(3, 1)

    with pytest.raises(fxopt.CaptureError, match=r"dynamic shapes do not hold for this model: .*\bbatch\b") as caught:
        capture(Fixed(), (torch.ones(3, 2),), None, {"x": {0: "batch"}})
    assert "batch = 3" in str(caught.value)
    assert "TORCH_LOGS" not in str(caught.value)


@pytest.mark.parametrize("shapes", [{"y": {0: "batch"}}, ({0: "a"}, {0: "b"}), {"x": {7: "batch"}}])
def test_shapes_that_do_not_fit_the_inputs_are_refused(shapes: Any) -> None:
    with pytest.raises(fxopt.InputError, match="dynamic_shapes does not fit the inputs"):
        capture(Matrix(), (torch.ones(1, 3, 4),), None, shapes)


def test_the_signature_reads_well() -> None:
    compiled = fxopt.compile(
        Matrix(), example_inputs=(torch.randn(1, 3, 4),), dynamic_shapes=({0: "batch"},), backend="torch"
    )
    assert "x: float32[" in repr(compiled)
    assert ", 3, 4]" in repr(compiled)
    assert compiled(torch.randn(9, 3, 4)).shape == (9, 3, 5)


# --- a size of 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x * 2).squeeze(),
        lambda x: (x * 2).squeeze(0) + 1,
        lambda x: x * 3 if x.shape[0] == 1 else x * 2,
        lambda x: x * 2 if x.shape[0] >= 2 else x * 3,
    ],
)
@pytest.mark.parametrize("dim", ["batch", Dim.AUTO])
def test_a_size_of_one_that_is_another_graph_is_refused(function: Any, dim: Any) -> None:
    compiled = fxopt.compile(
        Model(lambda m, x: function(x)), example_inputs=image(), dynamic_shapes=(({0: dim},),), backend="torch"
    )
    assert compiled(image(batch=5)).shape == (5, 4, 6, 6)
    with pytest.raises(fxopt.InputError, match=r"has size 1 .* at least 2 \(at size 1 the model computes otherwise"):
        compiled(image(batch=1))


def test_an_example_of_size_one_where_it_is_another_graph_is_refused() -> None:
    with pytest.raises(fxopt.InputError, match="at size 1 the model computes otherwise"):
        capture(Model(lambda m, x: (x * 2).squeeze()), (image(batch=1),), None, (({0: "batch"},),))


def test_a_size_of_one_where_the_model_itself_fails_is_refused() -> None:
    captured = capture(Model(lambda m, x: x[1] * 2), (image(),), None, (({0: "batch"},),))
    with pytest.raises(fxopt.InputError, match=r"expected at least 2 \(at size 1 the model itself fails"):
        run(captured, image(batch=1))


def test_each_size_is_tried_on_its_own() -> None:
    captured = capture(
        Model(lambda m, x: x * 2 if x.shape[1] != 1 else x * 3), (image(),), None, (({0: "batch", 1: "channels"},),)
    )
    assert run(captured, image(batch=1)).shape == (1, 4, 6, 6)
    with pytest.raises(fxopt.InputError, match="in dimension 1, expected at least 2"):
        run(captured, image(channels=1))


def test_a_view_holds_at_a_size_of_one() -> None:
    captured = capture(Model(lambda m, x: x.view(-1, 4) * 2), (torch.ones(2, 3, 4),), None, (({1: "length"},),))
    assert run(captured, torch.ones(2, 1, 4)).shape == (2, 4)


def test_a_lowest_size_of_the_user_holds() -> None:
    n = Dim("n", min=2)
    captured = capture(Matrix(), (torch.randn(4, 3, 4),), None, {"x": {0: n}})
    with pytest.raises(fxopt.InputError, match=r"has size 1 in dimension 0, expected at least 2;"):
        run(captured, torch.randn(1, 3, 4))
    captured = capture(Two(), (torch.ones(6, 2), torch.ones(3, 2)), None, {"x": {0: 2 * n}, "y": {0: n}})
    with pytest.raises(fxopt.InputError, match=r"has size 2 in dimension 0, expected .* at least 2"):
        run(captured, torch.ones(2, 2), torch.ones(1, 2))


# --- branches on sizes


def test_a_branch_between_two_sizes_is_checked() -> None:
    model = Model(lambda m, x: x * 2 if x.shape[0] > x.shape[1] else x * 3)
    for shapes in ({0: Dim("rows", min=3), 1: "columns"}, {0: Dim.AUTO, 1: Dim.AUTO}):
        captured = capture(model, (torch.ones(5, 4),), None, ((shapes,),))
        assert torch.equal(run(captured, torch.ones(9, 8)), torch.full((9, 8), 2.0))
        with pytest.raises(fxopt.InputError, match=r"must satisfy (rows > columns|args_0\.shape\[0\] > args_0\.shape)"):
            run(captured, torch.ones(4, 5))


@pytest.mark.parametrize("kind", [Dim.AUTO, Dim.DYNAMIC])
def test_a_branch_on_a_remainder_is_checked(kind: Any) -> None:
    class Branch(nn.Module):
        def forward(self, table: dict[str, torch.Tensor], *, y: torch.Tensor) -> torch.Tensor:
            return table["x"] * y if table["x"].shape[1] % 4 == 0 else table["x"]

    shapes = {"table": {"x": {0: Dim.AUTO, 1: kind}}, "y": None}
    captured = capture(Branch(), ({"x": torch.ones(5, 4)},), {"y": torch.ones(1)}, shapes)
    assert run(captured, {"x": torch.ones(3, 8)}, y=torch.ones(1)).shape == (3, 8)
    with pytest.raises(fxopt.InputError, match=r"must satisfy table_x\.shape\[1\] % 4 == 0"):
        run(captured, {"x": torch.ones(3, 7)}, y=torch.ones(1))


def test_a_reshape_that_does_not_divide_is_an_input_error() -> None:
    captured = capture(Model(lambda m, x: x.reshape(-1, 4) * 2), (torch.ones(6, 6),), None, (({0: Dim.AUTO},),))
    assert run(captured, torch.ones(8, 6)).shape == (12, 4)
    for rows in (7, 1, 0):
        with pytest.raises(fxopt.InputError):
            run(captured, torch.ones(rows, 6))


def test_the_conditions_of_an_exported_program_are_checked() -> None:
    model = Model(lambda m, x, y: x[:2] * 2 + y if x.shape[0] > y.shape[1] else x[:2] * 3 + y)
    exported = torch.export.export(
        model, (torch.ones(5, 1), torch.ones(2, 4)), dynamic_shapes=(({0: Dim.AUTO}, {1: Dim.AUTO}),)
    )
    captured = capture(exported, ())
    assert run(captured, torch.ones(9, 1), torch.ones(2, 8)).shape == (2, 8)
    with pytest.raises(fxopt.InputError, match=r"must satisfy .*shape\[0\] > .*shape\[1\]"):
        run(captured, torch.ones(5, 1), torch.ones(2, 8))


def test_another_side_of_a_branch_is_captured_anew_without_example_inputs() -> None:
    model = Model(lambda m, x: x * 2 if x.shape[0] > x.shape[1] else x * 3)
    compiled = fxopt.compile(model, dynamic_shapes=(({0: Dim.AUTO, 1: Dim.AUTO},),), backend="torch")
    assert torch.equal(compiled(torch.ones(5, 4)), torch.full((5, 4), 2.0))
    with pytest.warns(UserWarning, match="captured again"):
        assert torch.equal(compiled(torch.ones(4, 5)), torch.full((4, 5), 3.0))


# --- what dynamic_shapes cannot say


def test_a_name_that_is_no_identifier_is_refused() -> None:
    with pytest.raises(fxopt.InputError, match="names a size 'batch size': a name has letters, digits and _ only"):
        capture(Matrix(), (torch.ones(2, 3, 4),), None, {"x": {0: "batch size"}})


@pytest.mark.parametrize("dim", [Dim.AUTO, Dim.DYNAMIC])
def test_a_number_among_the_inputs_cannot_be_kept_open(dim: Any) -> None:
    with pytest.raises(fxopt.InputError, match="dynamic_shapes keeps the number 'args_1' open"):
        capture(Model(lambda m, x, n: x * n), (torch.ones(2), 5), None, (({}, dim),))


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_an_lstm_takes_any_batch(backend: str) -> None:
    """Its kernel asks for sizes as numbers, so its shapes cannot be propagated anew."""
    model = nn.LSTM(4, 6, batch_first=True).eval()
    shapes = ({0: "b"},)
    result = fxopt.compile(model, example_inputs=(torch.randn(2, 5, 4),), dynamic_shapes=shapes, backend=backend)
    for rows in (1, 2, 7):
        x = torch.randn(rows, 5, 4)
        with torch.no_grad():
            torch.testing.assert_close(result(x), model(x), atol=1e-5, rtol=1e-5)
