"""prune-channels: what remains equals the dense model with the removed channels set to zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt import cost
from fxopt.errors import PassError, PreconditionError, SpecError
from fxopt.passes.prune_channels import PruningPlan, find_groups
from fxopt.program import Program
from fxopt.report import PassRecord
from fxopt.testing import check_pass
from tests.passes.models import Model, chain
from tests.passes.pruned_models import cleaned, equals_masked
from tools import models

IMAGE = (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.squeeze, self.excite = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.project = nn.Conv2d(32, 16, 1)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.bn(self.stem(x)).relu()
        y = F.hardswish(self.grouped(self.depthwise(x).relu()))
        y = y * self.excite(self.squeeze(F.adaptive_avg_pool2d(y, 1)).relu()).sigmoid()
        x = F.relu(self.project(y) + x)
        return self.head(F.adaptive_avg_pool2d(self.up(x), 4).flatten(1))


class Attention(nn.Module):
    """Heads and their channels, in the ways that models spell them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.gate, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.bias = nn.Parameter(torch.randn(4, 6, 6))
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> Any:
        if self.kind == "chunk":
            q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        elif self.kind == "unbind":
            q, k, v = self.qkv(x).view(x.shape[0], 6, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (self.qkv(x)[..., i * 32 : i * 32 + 32].view(-1, 6, 4, 8).transpose(1, 2) for i in range(3))
        if self.kind == "slice":
            y = ((q @ k.transpose(-2, -1)) * 8**-0.5 + self.bias).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape[0], 6, 32))
        return self.head(self.down(F.silu(self.gate(x)) * self.up(x)))


MODELS: dict[str, Any] = {
    "residual": (Residual, IMAGE),
    "cat and split": (
        lambda: Model(
            lambda m, x: m.last(torch.cat([m.a(x), *m.b(m.a(x)).split([4, 8], 1)], 1).relu()),
            a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 12, 1), last=nn.Conv2d(20, 4, 1),
        ),
        IMAGE,
    ),
    "cat meets add": (
        lambda: Model(
            lambda m, x: m.last(torch.cat([m.a(x), m.b(x)], 1) + m.c(x)),
            a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(3, 12, 1), c=nn.Conv2d(3, 20, 1), last=nn.Conv2d(20, 4, 1),
        ),
        IMAGE,
    ),
    "channel shuffle": (
        lambda: Model(
            lambda m, x: m.b(m.a(x).view(2, 4, 6, 16, 16).transpose(1, 2).flatten(1, 2).relu()),
            a=nn.Conv2d(3, 24, 1), b=nn.Conv2d(24, 4, 1),
        ),
        IMAGE,
    ),
    "pixel shuffle": (
        lambda: Model(lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)), a=nn.Conv2d(3, 24, 1), b=nn.Conv2d(6, 4, 1)),
        IMAGE,
    ),
    "parameter without a module": (
        lambda: Model(lambda m, x: m.b((m.a(x) * m.scale).tanh()), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 4, 1),
                      scale=torch.randn(1, 8, 1, 1)),
        IMAGE,
    ),
    "flattened image": (
        lambda: chain(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 12), nn.ReLU(), nn.Linear(12, 3)),
        IMAGE,
    ),
    "einsum": (
        lambda: Model(lambda m, x: torch.einsum("bnc,oc->bno", m.a(x), m.w), a=nn.Linear(4, 16), w=torch.randn(3, 16)),
        (torch.randn(2, 5, 4),),
    ),
    **{f"attention, {kind}": ((lambda kind=kind: Attention(kind)), (torch.randn(2, 6, 32),))
       for kind in ("chunk", "unbind", "slice")},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_dense_model_under_a_mask(name: str) -> None:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    equals_masked(make(), inputs)


FAST = ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "bert", "gpt2", "llama", "t5-encoder"]
SLOW = ["densenet121", "regnet_y_400mf", "resnext50_32x4d", "inception_v3", "convnext_tiny", "maxvit_t", "swin_t"]
SLOW += ["swin_v2_t", "vit_b_16", "googlenet", "efficientnet_b0", "hf-vit", "hf-swin", "whisper-encoder"]


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_architectures_without_hints(name: str) -> None:
    model, inputs = models.load(name, small=True)
    equals_masked(model, inputs)
    equals_masked(model, inputs, norms=True)


def pruned(model: nn.Module, options: str = "", inputs: Any = IMAGE) -> tuple[Program, PassRecord]:
    before = "canonicalize,common-subexpressions,fold-constants"
    checked = check_pass(f"prune-channels{{{options}}}", model.eval(), inputs, before=before)
    return checked.program, checked.record


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn-scale", "fpgm", "random"])
def test_every_criterion_halves_the_model(criterion: str) -> None:
    program, record = pruned(Residual(), f"criterion={criterion}")
    shapes = {name: tuple(value.shape) for name, value in program.tensors().items()}
    assert shapes["stem.weight"] == (8, 3, 3, 3)
    assert shapes["head.weight"] == (10, (8 if criterion == "bn-scale" else 4) * 16), "it has no batch norm before it"
    assert record.details["pruning"].groups


def test_small_weights_go_first() -> None:
    model = chain(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        model.get_parameter("0.weight")[[1, 4, 6]] *= 0.01
        model.get_parameter("2.weight")[:, [1, 4, 6]] *= 0.01
    _, record = pruned(model, "ratio=0.375")
    [group] = record.details["pruning"].groups
    assert group.kept == (0, 2, 3, 5, 7)
    _, record = pruned(model, "ratio=0.375,scope=global")
    assert record.details["pruning"].groups[0].kept == (0, 2, 3, 5, 7)


def test_multiples_patterns_and_what_stays() -> None:
    program, record = pruned(Residual(), "ratio=0.9,multiple=4,keep=['project*']")
    assert program.tensors()["stem.weight"].shape[0] == 16, "project adds to it"
    assert program.tensors()["up.weight"].shape[1] == 4
    text = str(record.details["groups"])
    assert "an output of the model" in text
    assert "stem.weight:0" in text


@pytest.mark.parametrize("scope", ["group", "global"])
@pytest.mark.parametrize("budget", ["macs=0.5", "params=0.3"])
def test_a_budget_is_reached_and_not_wasted(budget: str, scope: str) -> None:
    model, inputs = models.load("resnet18", small=True)
    program, _ = pruned(model, f"{budget},scope={scope}", inputs)
    name, _, text = budget.partition("=")
    dense, _ = cleaned(model, inputs)
    count = cost.macs if name == "macs" else Program.numel
    assert float(text) * 0.93 < count(program) / count(dense) <= float(text) + 1e-3


def test_a_budget_out_of_reach() -> None:
    with pytest.raises(PassError, match=r"macs=0.001 cannot be reached: what may be removed leaves 0"):
        pruned(Residual(), "macs=0.001")


def test_heads_or_their_channels() -> None:
    model, x = Attention("unbind"), (torch.randn(2, 6, 32),)
    heads, _ = pruned(model, "keep=['out.weight']", x)
    assert heads.tensors()["qkv.weight"].shape == (96, 32), "out.weight keeps the heads too"
    outer, _ = pruned(model, "nested=outer", x)
    inner, _ = pruned(model, "nested=inner", x)
    assert outer.tensors()["bias"].shape == (2, 6, 6)
    assert inner.tensors()["bias"].shape == (4, 6, 6)
    assert outer.tensors()["qkv.weight"].shape[0] == inner.tensors()["qkv.weight"].shape[0] == 48


def test_a_plan_can_be_saved_and_carried_out_again() -> None:
    model = Residual()
    _, record = pruned(model)
    plan = record.details["pruning"]
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert "channels stay" in str(plan)
    dense, _ = cleaned(model, IMAGE)
    assert plan.resolve(find_groups(dense))
    other, _ = cleaned(chain(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)), IMAGE)
    with pytest.raises(PreconditionError, match="of another model"):
        plan.resolve(find_groups(other))
    with pytest.raises(PreconditionError, match="no pruning plan"):
        PruningPlan.from_json("[1]")


def test_unknown_ops_freeze_what_they_read() -> None:
    model = Model(lambda m, x: m.b(m.a(x).sort(1).values), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 4, 1))
    _, record = pruned(model)
    assert record.edits == 0
    assert "cannot be followed" in str(record.details["groups"])


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_a_pruned_model_fuses_quantizes_and_runs(backend: str) -> None:
    torch.manual_seed(0)
    data = [(torch.randn(2, 3, 16, 16),) for _ in range(4)]
    compiled = fxopt.compile(
        Residual().eval(), example_inputs=IMAGE, passes="prune-channels,insert-fake-quant", calibration=data,
        backend=backend,
    )  # fmt: skip
    plain = fxopt.compile(Residual().eval(), example_inputs=IMAGE, passes="prune-channels", backend=backend)
    assert plain.report.macs[1] < 0.45 * plain.report.macs[0]
    assert compiled(*IMAGE).shape == (2, 10)


def test_dynamic_batch() -> None:
    model = Attention("chunk").eval()
    compiled = fxopt.compile(
        model, example_inputs=(torch.randn(2, 6, 32),), passes="prune-channels", backend="torch",
        dynamic_shapes={"x": {0: "batch"}},
    )  # fmt: skip
    assert compiled(torch.randn(5, 6, 32)).shape == (5, 6, 5)


@pytest.mark.parametrize("options", ["ratio=1.0", "ratio=-0.1", "multiple=0", "macs=2.0", "macs=0.5,params=0.5"])
def test_bad_options(options: str) -> None:
    with pytest.raises(SpecError, match="prune-channels"):
        check_pass(f"prune-channels{{{options}}}", Residual(), IMAGE)


def test_quantization_before_pruning_is_refused() -> None:
    with pytest.raises(PreconditionError, match="prune-channels"):
        fxopt.compile(Residual(), example_inputs=IMAGE, passes="insert-fake-quant,prune-channels")


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.b(F.adaptive_avg_pool1d(m.a(x), 8)),
        lambda m, x: m.b(F.interpolate(m.a(x), size=8)),
        lambda m, x: m.b(torch.max(m.a(x), -m.a(x))[..., :8]),
        lambda m, x: m.b(torch.cat([m.a(x), m.a(x)[..., 16:]], -1)[..., :8]),
    ],
)
def test_what_mixes_channels_in_its_own_way_is_left_alone_or_followed(function: Any) -> None:
    torch.manual_seed(0)
    model = Model(function, a=nn.Linear(32, 16), b=nn.Linear(8, 5))
    equals_masked(model, (torch.randn(2, 6, 32),), least=0)
