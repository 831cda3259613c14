"""prune-blocks: residual branches go, the least important first, and the rest is the model without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.errors import PassError, PreconditionError, SpecError
from fxopt.passes.prune_blocks import Block
from fxopt.testing import Checked, check_pass
from tests.digits import Residual, Vision, answers, digits, fit, top1, trained
from tests.passes.models import Model
from tools import models

BEFORE = "canonicalize,common-subexpressions,recognize-activations,fold-constants"
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Three branches around a stem; those in *without* are left out."""

    def __init__(self, *without: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.without = without
        self.stem = nn.Conv2d(4, 8, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
            for _ in range(3)
        )
        with torch.no_grad():
            for block, factor in zip(self.blocks, (0.5, 0.01, 2.0), strict=True):
                for parameter in block.parameters():
                    parameter.mul_(factor)
        self.head = nn.Linear(8, 5)
        self.eval()

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = F.relu(x if i in self.without else x + block(x))
        return self.head(x.mean((2, 3)))


def check(options: str, model: nn.Module, *inputs: torch.Tensor, **more: Any) -> Checked:
    return check_pass(f"prune-blocks{{{options}}}", model, inputs, before=BEFORE, calibration=[inputs], **more)


def removed(checked: Checked) -> list[str]:
    blocks: tuple[Block, ...] = checked.record.details["blocks"]
    return sorted(block.name for block in blocks if block.removed)


def calls(checked: Checked, op: str) -> int:
    return sum(name.rpartition(".")[2] == op for name in checked.ops())


# What goes.


@pytest.mark.parametrize("criterion", ["similarity", "l1"])
@pytest.mark.parametrize(("count", "gone"), [(1, (1,)), (2, (0, 1)), (9, (0, 1, 2))])
def test_equals_the_model_without_the_branches(count: int, gone: tuple[int, ...], criterion: str) -> None:
    model = Net()
    checked = check(f"count={count},criterion={criterion}", model, X)
    assert removed(checked) == [f"blocks.{i}" for i in gone]
    answer = checked.program.to_module()(X)[0]
    assert torch.allclose(answer, Net(*gone)(X), atol=1e-5)
    left = {name.split(".")[1] for name in checked.program.constants if name.startswith("blocks.")}
    assert left == {str(i) for i in range(3) if i not in gone}, "parameters of removed blocks vanish"


def test_the_influence_of_a_block() -> None:
    model = Net()
    blocks: tuple[Block, ...] = check("count=1", model, X).record.details["blocks"]
    with torch.no_grad():
        x = model.stem(X)
        for i, block in enumerate(model.blocks):
            y = F.relu(x + block(x))
            away = 1 - F.cosine_similarity(x, y, 1)
            away[(x == y).all(1)] = 0
            [score] = [one.score for one in blocks if one.name == f"blocks.{i}"]
            assert score == pytest.approx(float(away.mean()), abs=1e-5)
            x = y


def test_a_share_of_the_branches() -> None:
    assert removed(check("ratio=0.67,criterion=l1", Net(), X)) == ["blocks.0", "blocks.1"]


def test_the_report_names_them() -> None:
    compiled = fxopt.compile(
        Net(), example_inputs=(X,), passes="prune-blocks{count=2}", calibration=[(X,)], backend="torch"
    )
    [record] = [one for one in compiled.report.passes if one.name == "prune-blocks"]
    assert "removed 2 of 3 residual branches: blocks.1 (" in record.notes[0]
    assert torch.allclose(compiled(X), Net(0, 1)(X), atol=1e-5)
    assert not compiled.report.exact


def test_branches_in_a_branch() -> None:
    """Where the outer one goes the inner one is gone with it, and does not count."""
    model = Model(
        lambda m, x: m.head((z := m.stem(x)) + m.a((y := m.b(z)) + m.c(y))),
        stem=nn.Linear(4, 4), head=nn.Linear(4, 4), a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4),
    )  # fmt: skip
    with torch.no_grad():
        model.get_parameter("c.weight").mul_(10)
    checked = check("count=2,criterion=l1", model, torch.randn(3, 4))
    assert calls(checked, "linear") == 2


def test_all_that_is_between_belongs_to_the_branch() -> None:
    """Layer scale, squeeze and excite, dropout, two ways that meet again."""

    def forward(m: Any, x: torch.Tensor) -> Any:
        x = m.stem(x)
        y = m.a(x)
        y = F.dropout(y * torch.sigmoid(m.b(y.mean((2, 3), keepdim=True))) + m.c(x), 0.1, m.training)
        return m.head(y * m.scale + x)

    layers = {name: nn.Conv2d(4, 4, 1) for name in ("stem", "a", "b", "c", "head")}
    model = Model(forward, **layers, scale=nn.Parameter(torch.randn(4, 1, 1)))
    checked = check("criterion=l1", model, X)
    assert calls(checked, "conv2d") == 2
    assert "scale" not in checked.program.constants


class Parallel(nn.Module):
    """Attention and MLP side by side, as in GPT-J; what is not in *parts* is left out."""

    def __init__(self, parts: str, order: str = "first") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts, self.order = parts, order
        self.stem, self.norm, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        nn.init.normal_(self.b.weight)
        self.eval()

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        y = self.norm(x)
        added = [part for part, name in ((self.a(y).relu(), "a"), (self.b(y).tanh(), "b")) if name in self.parts]
        terms = [x, *added] if self.order == "first" else [*added, x]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return self.head(total.relu())


@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("criterion", ["similarity", "l1"])
@pytest.mark.parametrize(("count", "left"), [(1, "b"), (2, "")])
def test_branches_side_by_side(order: str, criterion: str, count: int, left: str) -> None:
    x = torch.randn(2, 5, 4)
    checked = check(f"count={count},criterion={criterion}", Parallel("ab", order), x)
    assert removed(checked) == ["a", "b"][:count]
    assert torch.allclose(checked.program.to_module()(x)[0], Parallel(left, order)(x), atol=1e-5)


def test_the_influence_of_a_branch_beside_another() -> None:
    x = torch.randn(2, 5, 4)
    model = Parallel("ab")
    blocks: tuple[Block, ...] = check("count=1", model, x).record.details["blocks"]
    with torch.no_grad():
        z = model.stem(x)
        a, b = model.a(model.norm(z)).relu(), model.b(model.norm(z)).tanh()
        expected = [float((1 - F.cosine_similarity(z + rest, (z + a + b).relu(), -1)).mean()) for rest in (b, a)]
    assert {block.name: block.score for block in blocks} == pytest.approx(dict(zip("ab", expected, strict=True)), 1e-4)


# What stays.


def linear(**more: Any) -> dict[str, Any]:
    return {name: nn.Linear(4, 4) for name in ("stem", "a", "b", "head")} | more


STAYS: dict[str, tuple[Any, str]] = {
    "another value comes in": (lambda m, x: m.head((z := m.stem(x)) + m.a(z + m.b(x))), "the branch reads linear"),
    "another value comes out": (lambda m, x: (m.head((z := m.stem(x)) + (y := m.a(z))), y), "output reads what the"),
    "the shortcut has a layer": (lambda m, x: m.head(m.a(z := m.stem(x)) + m.b(z)), "neither side"),
    "broadcasting": (lambda m, x: m.head((z := m.stem(x)[:1]) + m.a(torch.cat([z, z]))), "another shape"),
    "a weighted sum": (lambda m, x: m.head(torch.add(m.a(z := m.stem(x)), z, alpha=0.5)), "a multiple"),
    "one branch goes on in another": (
        lambda m, x: m.head((z := m.stem(x)) + (y := m.a(z)) + m.b(y)),
        "the branch reads linear_1 too",
    ),
    "branches that are read outside": (
        lambda m, x: m.head((z := m.stem(x)) + (y := m.a(z)) + (w := m.b(z))) + y.sum() + w.sum(),
        "reads what the branch computes inside",
    ),
    "an input": (lambda m, x, mask: m.head((z := m.stem(x)) + m.a(z) * mask), "would not depend on the input args_1"),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_stays(case: str) -> None:
    forward, reason = STAYS[case]
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4)] + [torch.rand(2, 4)] * (case == "an input")
    checked = check("criterion=l1", Model(forward, **linear()), *inputs)
    assert checked.record.edits == 0
    assert reason in checked.reasons()
    assert "models.py:" in checked.reasons(), "where the code of the model is"


def test_what_is_no_block_at_all() -> None:
    model = Model(lambda m, x: m.head(0.5 * (z := m.stem(x)) * (1 + torch.tanh(z + 0.04 * z**3)) + 1), **linear())
    checked = check("criterion=l1,count=9", model, torch.randn(2, 4))
    assert (checked.record.edits, checked.record.details["blocks"]) == (0, ())


def test_the_sum_starts_from_a_parameter() -> None:
    model = Model(lambda m, x: (m.a(m.token) + m.token) @ m.head(x).T, **linear(token=torch.randn(2, 4)))
    assert check_pass("prune-blocks{criterion=l1}", model, (torch.randn(2, 4),)).record.edits == 0


def test_a_mask_may_be_read_by_others() -> None:
    def forward(m: Any, x: torch.Tensor, mask: torch.Tensor) -> Any:
        x = m.stem(x)
        x = x + m.a(x) * mask
        return m.head(x + m.b(x) * mask)

    checked = check("count=2,criterion=l1", Model(forward, **linear()), torch.randn(2, 4), torch.rand(2, 4))
    assert calls(checked, "linear") == 3, "one of the two has to stay: it reads the mask"


def test_keep() -> None:
    checked = check("count=2,criterion=l1,keep=['blocks.1.*']", Net(), X)
    assert removed(checked) == ["blocks.0", "blocks.2"]
    assert "blocks.1 stays, as asked" in checked.reasons()
    with pytest.warns(UserWarning, match="fits no parameter"):
        check("keep=['nothing']", Net(), X)


def test_outputs_do_not_share_memory() -> None:
    model = Model(lambda m, x: ((z := m.stem(x)), z + m.a(z)), **linear())
    x = torch.randn(2, 4)
    compiled = fxopt.compile(model, example_inputs=(x,), passes="prune-blocks{criterion=l1}", backend="torch")
    first, second = compiled(x)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    alone = Model(lambda m, x: x + m.a(x), **linear())
    compiled = fxopt.compile(alone, example_inputs=(x,), passes="prune-blocks{criterion=l1}", backend="torch")
    assert compiled(x).data_ptr() != x.data_ptr()


def test_data_is_needed() -> None:
    with pytest.raises(PreconditionError, match="prune-blocks looks at data"):
        fxopt.compile(Net(), example_inputs=(X,), passes="prune-blocks", backend="torch")


def test_options_that_make_no_sense() -> None:
    for options in ("count=0", "count=-1", "ratio=1.5", "criterion=none"):
        with pytest.raises((SpecError, PassError)):
            fxopt.compile(Net(), example_inputs=(X,), passes=f"prune-blocks{{{options}}}")
    with pytest.raises(PreconditionError, match="prune-blocks"):
        fxopt.compile(Net(), example_inputs=(X,), passes="prune-channels,prune-blocks")


# What comes after.


@pytest.mark.slow
def test_pruned_fused_and_quantized_like_any_other() -> None:
    passes = "prune-blocks{count=1},prune-channels{ratio=0.5},prune-weights{ratio=0.5},insert-fake-quant{cosine=-1}"
    compiled = fxopt.compile(Net(), example_inputs=(X,), passes=passes, calibration=[(X,)], backend="torch")
    assert compiled(X).shape == (2, 5)
    by_name = {record.name: record for record in compiled.report.passes}
    assert by_name["prune-channels"].edits
    assert "static" in {layer.mode for layer in compiled.report.quantization.layers}


def test_training_without_the_branches() -> None:
    prepared = fxopt.prepare(Net(), (X,), passes="prune-blocks{count=2},prune-channels", calibration=[(X,)])
    names = {name for name, _ in prepared.named_parameters()}
    assert {name.split(".")[1] for name in names if name.startswith("blocks.")} == {"2"}
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    F.cross_entropy(prepared(X), torch.tensor([0, 1])).backward()
    optimizer.step()
    compiled = prepared.eval().compile(backend="torch")
    assert torch.allclose(compiled(X), prepared(X), atol=1e-5)


def test_each_round_removes_more() -> None:
    first = fxopt.prepare(Net(), (X,), passes="prune-blocks{criterion=l1}")
    second = fxopt.prepare(first, passes="prune-blocks{criterion=l1}")
    assert torch.allclose(second.eval()(X), Net(0, 1)(X), atol=1e-5)


def test_dynamic_shapes() -> None:
    compiled = fxopt.compile(
        Net(), example_inputs=(X,), passes="prune-blocks{count=2}", calibration=[(X,)], backend="torch",
        dynamic_shapes={"x": {0: "batch"}},
    )  # fmt: skip
    more = torch.randn(5, 4, 6, 6)
    assert torch.allclose(compiled(more), Net(0, 1)(more), atol=1e-5)


# Models of others: how many branches they have.

FOUND = {
    "resnet18": 5,
    "resnet50": 12,
    "mobilenet_v2": 10,
    "mobilenet_v3_small": 6,
    "efficientnet_b0": 9,
    "convnext_tiny": 18,
    "swin_t": 24,
    "vit_b_16": 24,
    "regnet_y_400mf": 12,
    "maxvit_t": 51,
    "bert": 4,
    "gpt2": 4,
    "llama": 4,
    "t5-encoder": 4,
    "hf-vit": 4,
    "hf-swin": 8,
    "whisper-encoder": 4,
}
FAST = ("gpt2",)


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in FOUND])
def test_models_of_others(name: str) -> None:
    model, inputs = models.load(name, small=True)
    count = FOUND[name] // 2
    checked = check(f"count={count}", model, *inputs)
    blocks: tuple[Block, ...] = checked.record.details["blocks"]
    assert len(blocks) == FOUND[name], checked.reasons()
    assert sum(block.removed for block in blocks) == count
    assert all(0 <= block.score <= 2 for block in blocks)
    assert max(b.score for b in blocks if b.removed) <= min(b.score for b in blocks if not b.removed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "convnext_tiny", "swin_t", "bert", "llama"])
def test_models_of_others_with_all_that_follows(name: str) -> None:
    model, inputs = models.load(name, small=True)
    passes = "prune-blocks{count=2},prune-channels{ratio=0.25}"
    compiled = fxopt.compile(model, example_inputs=inputs, passes=passes, calibration=[inputs], backend="torch")
    assert compiled.report.macs[1] < compiled.report.macs[0]
    prepared = fxopt.prepare(model, inputs, passes=passes, calibration=[inputs])
    outputs = prepared(*inputs)
    first: torch.Tensor = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    first.square().mean().backward()
    prepared.eval().compile(backend="torch")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Residual, Vision])
def test_fine_tuned_on_real_digits(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    dense: nn.Module = trained(kind)  # type: ignore[arg-type]
    prepared = fxopt.prepare(
        dense, digits().example(), passes="prune-blocks{count=1}", calibration=digits().calibration()
    )
    fit(prepared, 3, 1e-2)
    compiled = prepared.compile(backend="torch")
    assert top1(answers(compiled)) >= top1(answers(dense)) - 0.03
