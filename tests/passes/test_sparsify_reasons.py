"""What sparsify-2-4 leaves alone or refuses, and what it says of its use."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.errors import InputError, PreconditionError, SpecError
from fxopt.passes.insert_fake_quant import calibrate
from fxopt.sparsity import Pattern
from fxopt.testing import check_pass
from tests.passes.models import Model, chain
from tests.passes.sparse_models import METHODS, X, checked, small

pytestmark = pytest.mark.filterwarnings("ignore:sparsify-2-4. no speed-up:UserWarning")


def test_what_has_the_pattern_stays() -> None:
    model = small()
    with torch.no_grad():
        weight = model.get_parameter("8.weight")
        weight.mul_(Pattern().kept(weight.abs()))
        before = weight.clone()
    done = checked("sparsify-2-4{method=sparsegpt}", model)
    assert torch.equal(done.program.constants["8.weight"], before), "no channels that it reads were moved either"
    assert "8.weight" not in done.record.details["sparsity"]


def test_reasons() -> None:
    model = Model(
        lambda m, x: m.head(m.up(m.thin(m.wide(m.stem(x)))).flatten(1)) @ m.free,
        stem=nn.Conv2d(3, 8, 3),
        wide=nn.Conv2d(8, 8, 3, groups=8),
        thin=nn.Conv2d(8, 8, 1, groups=4),
        up=nn.ConvTranspose2d(8, 8, 2),
        head=nn.Linear(200, 12),
        free=torch.randn(12, 2),
    )
    done = checked("sparsify-2-4{keep=['head.*']}", model)
    for reason in (
        "its 3 inputs are no multiple of 4",
        "a depthwise convolution: each output reads one channel",
        "its 2 inputs are no multiple of 4",
        "a transposed convolution",
        "stays whole, as asked",
    ):
        assert reason in done.reasons(), done.reasons()


def test_a_module_that_is_used_twice() -> None:
    model = Model(lambda m, x: m.a(m.a(x).relu()), a=nn.Linear(16, 16))
    x = (torch.randn(4, 16),)
    assert Pattern().holds(checked("sparsify-2-4", model, x).program.constants["a.weight"])
    done = checked("sparsify-2-4{method=wanda}", model, x)
    assert "read by several layers, whose inputs differ" in done.reasons()
    assert done.record.edits == 0


def test_a_weight_that_something_else_reads() -> None:
    model = Model(lambda m, x: m.a(x) + m.a.weight.sum(), a=nn.Linear(16, 16))
    done = checked("sparsify-2-4", model, (torch.randn(4, 16),))
    assert "its weight is read by something else too (sum_1), which zeros would change as well" in done.reasons()
    tied = Model(
        lambda m, x: F.linear(m.b(m.table(x)), m.table.weight), table=nn.Embedding(32, 16), b=nn.Linear(16, 16)
    )
    for method in METHODS:
        done = checked(f"sparsify-2-4{{method={method}}}", tied, (torch.arange(8),))
        assert "its weight is read by something else too (embedding), which zeros would change" in done.reasons()
        assert Pattern().holds(done.program.constants["b.weight"])
        table, before = done.program.constants["table.weight"], tied.get_parameter("table.weight")
        assert torch.equal(table.sort(1).values, before.sort(1).values), "but for the order of channels"


def test_it_says_that_there_is_nothing_to_do() -> None:
    done = checked("sparsify-2-4{n=1,m=5}", small())
    assert done.record.notes == ("no weight can have 1:5",)
    assert done.record.edits == 0


def test_a_weight_that_is_computed() -> None:
    model = Model(lambda m, x: F.linear(x, m.a.weight * x.mean()), a=nn.Linear(16, 16))
    assert (
        "its weight is not a constant but computed" in checked("sparsify-2-4", model, (torch.randn(4, 16),)).reasons()
    )


def test_a_pattern_of_keep_that_fits_nothing_is_told_once() -> None:
    with pytest.warns(UserWarning, match="'nothing.*' fits no weight, such as '0.weight'"):
        checked("sparsify-2-4{keep=['nothing.*']}", small())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("n=0", "n must be at least 1"),
        ("n=4", "m must be above n = 4"),
        ("m=2000", "at most 256"),
        ("damping=0", "damping must be above 0"),
        ("damping=nan", "damping must be above 0"),
        ("decay=-1", "decay must be at least 0"),
        ("decay=inf", "decay must be at least 0"),
        ("block=0", "block must be at least 1"),
        ("method=best", "method"),
        ("straight_through=true,method=wanda", "chooses by magnitude in each step"),
    ],
)
def test_options_that_make_no_sense(options: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        fxopt.compile(small(), example_inputs=(X,), passes=f"sparsify-2-4{{{options}}}")


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_inputs_that_are_one_vector(method: str) -> None:
    torch.manual_seed(0)
    model, data = chain(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), [torch.randn(16) for _ in range(80)]
    spec = f"sparsify-2-4{{method={method},samples=4096}}"
    done = check_pass(spec, model, (data[0],), calibration=data)
    rows = torch.stack([x for i, x in enumerate(data) if not calibrate.is_kept(i)])
    same = check_pass(spec, model, (rows,), calibration=[rows])
    for name, value in done.program.tensors().items():
        torch.testing.assert_close(value, same.program.constants[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_missing_data(method: str) -> None:
    with pytest.raises(PreconditionError, match="sparsify-2-4 looks at data: pass calibration="):
        fxopt.compile(small(), example_inputs=(X,), passes=f"sparsify-2-4{{method={method}}}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_data_that_is_not_finite(method: str, value: float) -> None:
    with pytest.raises(InputError, match=r"calibration: what .* reads is not finite"):
        fxopt.compile(
            small(),
            example_inputs=(X,),
            passes=f"sparsify-2-4{{method={method}}}",
            calibration=[(X,), (X * value,)] * 8,
        )


def test_order() -> None:
    for wrong in ("insert-fake-quant,sparsify-2-4", "sparsify-2-4,prune-channels", "sparsify-2-4,prune-weights"):
        with pytest.raises(PreconditionError, match="cannot run before"):
            fxopt.compile(small(), example_inputs=(X,), passes=wrong, calibration=[(X,)])


@pytest.mark.parametrize("method", METHODS)
def test_the_same_weights_stay_after_merges(method: str) -> None:
    """What is merged or fused before is permuted through, and chooses by row as each layer does for itself."""
    torch.manual_seed(0)
    layers = {name: nn.Linear(32, 32) for name in ("q", "k", "v", "out", "up", "down")}

    def attention(m: Any, x: torch.Tensor) -> Any:
        x = x + m.out(torch.softmax(m.q(x) @ m.k(x).mT, -1) @ m.v(x))
        return x + m.down(m.up(x).relu())

    def residual(m: Any, x: torch.Tensor) -> Any:
        x = m.stem(x).relu()
        return (x + m.second(m.first(x).relu())).relu()

    convs = {name: nn.Conv2d(32, 32, 3, padding=1) for name in ("stem", "first", "second")}
    cases = [(Model(attention, **layers), (2, 8, 32)), (Model(residual, **convs), (2, 32, 6, 6))]
    for model, shape in cases:
        data = [(torch.randn(shape),) for _ in range(8)]
        found = []
        for first in ("", "fuse-conv-bn-relu,", "merge-linears,"):
            passes = f"{first}sparsify-2-4{{method={method}}}"
            compiled = fxopt.compile(model, example_inputs=data[0], passes=passes, calibration=data, backend="torch")
            record = next(one for one in compiled.report.passes if one.name == "sparsify-2-4")
            assert record.details["permuted"]
            assert not record.skips
            found.append(compiled(*data[0]))
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-4)


def test_merged_and_factorised_before_training() -> None:
    model = Model(lambda m, x: m.q(x) * m.k(x), q=nn.Linear(64, 64), k=nn.Linear(64, 64))
    x = torch.randn(4, 64)
    prepared = fxopt.prepare(model, (x,), passes="merge-linears,low-rank-linear,sparsify-2-4")
    held = {"q.weight.merged.low_rank_a", "q.weight.merged.low_rank_b"}
    assert prepared.masked.patterns.keys() == held
    compiled = prepared.eval().compile(backend="torch")
    torch.testing.assert_close(compiled(x), prepared(x), atol=1e-5, rtol=1e-4)
    assert all(Pattern().holds(compiled.graph.state_dict()[name]) for name in held)


def test_it_says_that_nothing_gets_faster() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = fxopt.compile(small(), example_inputs=(X,), passes="sparsify-2-4")
    assert [str(w.message) for w in caught if "no speed-up on this target" in str(w.message)].__len__() == 1
    text = str(model.report)
    assert "no speed-up on this target" in text.replace("\n", " ")
    assert "weights, packed" in text
    assert 0.5 < model.report.packed_bytes / model.report.bytes[1] < 0.65


def test_it_says_so_in_prepare_and_in_what_is_compiled_after_it(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepared = fxopt.prepare(small(), (X,), passes="low-rank-linear,sparsify-2-4")
        again = fxopt.prepare(prepared, passes="prune-weights{ratio=0.1}")
        compiled = again.compile(backend="torch")
    assert [str(w.message) for w in caught if "no speed-up on this target" in str(w.message)].__len__() == 1
    compiled.save(tmp_path / "m.fxopt")
    for report in (compiled.report, fxopt.load(tmp_path / "m.fxopt").report):
        text = str(report).replace("\n", " ")
        assert "before training, sparsify-2-4: no speed-up on this target" in text
        assert "before training, low-rank-linear: no latency was measured here" in text
        assert "before training, prune-weights:" in text


def test_it_says_that_nothing_gets_smaller_where_nothing_does() -> None:
    with pytest.warns(UserWarning, match="computes 15:16 weights faster than dense ones. Nor are they saved in less"):
        model = fxopt.compile(small(), example_inputs=(X,), passes="sparsify-2-4{n=15,m=16}")
    assert model.report.packed_bytes == model.report.bytes[1]


@pytest.mark.parametrize("target", ["x86", "arm"])
def test_it_is_in_no_default_pipeline(target: str) -> None:
    model = fxopt.compile(small(), target=target, example_inputs=(X,))
    assert "sparsify-2-4" not in [record.name for record in model.report.passes]
    assert model.report.packed_bytes == model.report.bytes[1]
