"""A rewritten model that trains: as the model itself does, with its names, its modes and its state."""

from __future__ import annotations

import copy
import dataclasses
import socket
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.spawn import spawn

import fxopt
from fxopt.errors import InputError, PreconditionError, SpecError
from fxopt.passbase import Pass, PassContext
from fxopt.rewriter import Rewriter
from tests.digits import Mobile, Residual, Vision, answers, digits, fit, top1, trained

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def step(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    """One training step; the outputs of its forward."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(7)
    outputs: torch.Tensor = model(x)
    F.cross_entropy(outputs, torch.arange(len(x))).backward()
    optimizer.step()
    return outputs.detach()


@pytest.mark.parametrize("kind", [Residual, Mobile, Vision])
@pytest.mark.filterwarnings("ignore:fxopt.prepare")
def test_training_is_that_of_the_model_itself(kind: type[nn.Module]) -> None:
    """Outputs, gradients, statistics: with dropout from the same random numbers, and without it."""
    model = kind().train()
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):  # the fast path of eval mode draws other numbers
            module.dropout.p = module.dropout1.p = module.dropout2.p = module.self_attn.dropout = 0.0
    prepared = fxopt.prepare(model, (X,), passes="")
    for _ in range(3):
        assert torch.allclose(step(prepared), step(model), atol=1e-4)
    theirs = model.state_dict()
    assert prepared.state_dict().keys() == theirs.keys()
    for name, value in prepared.state_dict().items():
        assert torch.allclose(value.float(), theirs[name].float(), atol=1e-3), name
    assert torch.allclose(prepared.eval()(X), model.eval()(X), atol=1e-4)


def test_the_model_is_left_as_it_is() -> None:
    model = Residual().train()
    before = copy.deepcopy(model.state_dict())
    prepared = fxopt.prepare(model, (X,), calibration=[(X,)])
    step(prepared)
    prepared.compile(backend="torch")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_names_and_flags_of_parameters_are_kept() -> None:
    model = Residual()
    model.stem.requires_grad_(False)
    prepared = fxopt.prepare(model, (X,), passes="")
    own = {name: p.requires_grad for name, p in prepared.named_parameters()}
    assert own == {name: p.requires_grad for name, p in model.named_parameters()}
    prepared.load_state_dict(Residual().state_dict())


def test_names_that_are_taken() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.compile_, self.fake_quant = nn.Linear(3, 3), nn.Linear(3, 3)
            self.inner = nn.ModuleDict({"train_": nn.Linear(3, 3)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.inner["train_"](self.fake_quant(self.compile_(x)))
            return result

    model, x = Odd(), torch.randn(2, 3)
    prepared = fxopt.prepare(model, (x,), passes="").eval()
    assert torch.allclose(prepared(x), model(x), atol=1e-6)
    assert "fake_quant_.weight" in prepared.state_dict()


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.out = nn.Linear(4, 10, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.out(self.embed(x))
            return result

    ids = torch.arange(4)[None]
    prepared = fxopt.prepare(Tied(), (ids,), calibration=[(ids,)])
    assert len([p for p in prepared.parameters() if p.requires_grad]) == 1
    prepared.eval()
    compiled = prepared.compile(backend="torch")
    assert F.cosine_similarity(compiled(ids).flatten(), prepared(ids).flatten(), 0) > 0.999


def test_structures_of_inputs_and_outputs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, *, scale: dict[str, torch.Tensor]) -> dict[str, Any]:
            return {"y": self.linear(x), "both": (x, scale["by"] * 2)}

    x, scale = torch.randn(2, 4), {"by": torch.ones(1)}
    model = Net()
    prepared = fxopt.prepare(model, (x,), example_kwargs={"scale": scale}, passes="")
    outputs = prepared(x=x, scale=scale)
    assert outputs.keys() == {"y", "both"}
    assert torch.allclose(outputs["y"], model.linear(x))
    with pytest.raises(InputError, match="size 3"):
        prepared(torch.randn(3, 4), scale=scale)


def test_an_open_batch() -> None:
    prepared = fxopt.prepare(Residual(), (X,), dynamic_shapes={"x": {0: "batch"}}, calibration=[(X,)])
    step(prepared, torch.randn(7, 1, 8, 8))
    compiled = prepared.compile(backend="torch")
    fixed = prepared.compile(backend="torch", example_inputs=(X[:1],))
    prepared.eval()
    for rows in (1, 5):
        assert torch.allclose(compiled(X[:1].expand(rows, -1, -1, -1)), prepared(X[:1]).expand(rows, -1), atol=0.1)
    assert torch.allclose(fixed(X[:1]), prepared(X[:1]), atol=0.1)
    assert "batch" not in repr(fixed)


def test_batch_norm_in_training_in_eval_and_frozen() -> None:
    prepared = fxopt.prepare(Residual(), (X,), passes="")
    before = prepared.norm0.running_mean.clone()  # type: ignore[union-attr,operator]
    prepared.eval()(X)
    assert torch.equal(prepared.norm0.running_mean, before)  # type: ignore[arg-type,union-attr]
    prepared.train()
    prepared.freeze_batch_norm()
    prepared(X)
    assert torch.equal(prepared.norm0.running_mean, before)  # type: ignore[arg-type,union-attr]
    prepared.freeze_batch_norm(False)
    prepared.get_submodule("norm1").eval()
    prepared(X)
    assert not torch.equal(prepared.norm0.running_mean, before)  # type: ignore[arg-type,union-attr]
    assert torch.equal(prepared.norm1.running_mean, before)  # type: ignore[arg-type,union-attr]


def test_a_batch_norm_without_momentum_averages_over_all_batches() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=None))
    prepared = fxopt.prepare(model, (X,), passes="")
    for _ in range(3):
        x = torch.randn(4, 1, 8, 8)
        model(x), prepared(x)
    name = "1.running_mean"
    assert torch.allclose(prepared.state_dict()[name], model.state_dict()[name], atol=1e-6)


def test_dropout_follows_the_mode() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 4))
    x = torch.randn(2, 16)
    prepared = fxopt.prepare(model, (x,), passes="")
    assert not torch.equal(prepared(x), prepared(x))
    prepared.eval()
    assert torch.equal(prepared(x), prepared(x))


def test_attention_drops_out_in_training() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.attention(x, x, x, need_weights=False)[0]
            return result

    x = torch.randn(2, 5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = fxopt.prepare(Net(), (x,), passes="")
    assert not torch.equal(prepared(x), prepared(x))
    prepared.eval()
    assert torch.equal(prepared(x), prepared(x))


def test_dropout_that_is_not_in_the_graph_is_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.drop = nn.Linear(4, 4), nn.Dropout(0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.linear(x)
            return self.drop(y) if self.training else y

    with pytest.warns(UserWarning, match="drop will not drop out"):
        fxopt.prepare(Net(), (torch.randn(2, 4),), passes="")


def test_buffers_that_the_model_writes() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.calls = nn.Buffer(torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1)
            result: torch.Tensor = self.linear(x) + self.calls
            return result

    prepared = fxopt.prepare(Counter(), (torch.randn(2, 4),), passes="")
    prepared(torch.randn(2, 4)), prepared(torch.randn(2, 4))
    assert float(prepared.state_dict()["calls"]) == 2


@pytest.mark.parametrize(
    "options", ["", "insert-fake-quant{qat=true}", "insert-fake-quant{qat=true,learnable_step=true}"]
)
def test_state_is_saved_and_loaded(options: str, tmp_path: Path) -> None:
    model = Residual()
    prepared, other = (fxopt.prepare(model, (X,), passes=options) for _ in range(2))
    step(prepared)
    torch.save(prepared.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other.eval()(X), prepared.eval()(X))
    assert torch.equal(other.compile(backend="torch")(X), prepared.compile(backend="torch")(X))


def test_a_deep_copy_is_its_own() -> None:
    prepared = fxopt.prepare(Residual(), (X,), calibration=[(X,)]).eval()
    before = prepared(X)
    twin = copy.deepcopy(prepared)
    step(twin.train())
    assert torch.equal(prepared(X), before)
    assert not torch.equal(twin.eval()(X), before)


def test_exact_without_passes() -> None:
    prepared = fxopt.prepare(trained(Residual), digits().example(), passes="")
    losses = fit(prepared, 1, 0.005)
    assert losses[-1] < 1
    compiled = prepared.compile(backend="torch")
    assert compiled.report.exact
    assert (answers(compiled) - answers(prepared)).abs().max() < 1e-3


@dataclasses.dataclass(frozen=True)
class HalfRank(Pass):
    """linear(x, W) → linear(linear(x, V), U) with half the rank."""

    name: ClassVar[str] = "half-rank"
    exact: ClassVar[bool] = False

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        for node in rewriter.nodes():
            weight = rewriter.tensor(node.args[1]) if node.target is torch.ops.aten.linear.default else None
            if weight is None or min(weight.shape) < 4:
                continue
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            rank = len(s) // 2
            first = rewriter.constant("first", s[:rank, None] * v[:rank])
            second = rewriter.constant("second", u[:, :rank])
            inner = rewriter.call(node.target, (node.args[0], first), before=node)  # type: ignore[arg-type]
            rewriter.replace(node, rewriter.call(node.target, (inner, second, node.args[2]), before=node))  # type: ignore[arg-type]


@pytest.mark.parametrize("quantize", [False, True])
def test_a_rewritten_model_is_fine_tuned(quantize: bool) -> None:
    passes: list[Pass | str] = [HalfRank()]
    if quantize:
        passes.append("insert-fake-quant{qat=true}")
    data = digits().calibration() if quantize else None
    prepared = fxopt.prepare(trained(Residual), digits().example(), passes=passes, calibration=data).eval()
    assert {"first", "second"} <= dict(prepared.named_parameters()).keys()
    before = top1(answers(prepared))
    losses = fit(prepared, 2, 0.01)
    assert sum(losses[-10:]) < sum(losses[:10])
    after = answers(prepared)
    assert top1(after) > before
    lowered = answers(prepared.compile(backend="torch"))
    assert F.cosine_similarity(lowered.flatten(), after.flatten(), 0) > 0.9999


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "lossy": ({"passes": "cast-precision"}, PreconditionError, "low precision lose small updates"),
    "folding": ({"passes": "fuse-conv-bn-relu"}, PreconditionError, "folds batch_norm"),
    "integers": ({"passes": "insert-fake-quant"}, PreconditionError, "qat=true"),
    "dynamic": ({"passes": "insert-fake-quant{qat=true,activations=dynamic}"}, SpecError, "static or float"),
    "step": ({"passes": "insert-fake-quant{learnable_step=true}"}, SpecError, "qat=true"),
    "no inputs": ({"example_inputs": None}, InputError, "give example_inputs"),
    "backend": ({"backend": "tensorflow"}, SpecError, "tensorflow"),
    "backend type": ({"backend": 3}, InputError, "backend must be"),
    "target": ({"target": "x68"}, SpecError, "x86"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    options, error, text = ERRORS[case]
    with pytest.raises(error, match=text):
        fxopt.prepare(Residual(), **{"example_inputs": (X,)} | options)


def test_ranges_must_be_known() -> None:
    prepared = fxopt.prepare(Residual(), (X,))
    with pytest.raises(PreconditionError, match="neither calibrated nor trained"):
        prepared.compile(backend="torch")
    with pytest.raises(PreconditionError, match="not known yet"):
        prepared.eval()(X)
    prepared.train()(X)
    prepared.compile(backend="torch")


def test_training_options_are_for_prepare() -> None:
    with pytest.raises(PreconditionError, match=r"fxopt\.prepare"):
        fxopt.compile(Residual(), example_inputs=(X,), passes="insert-fake-quant{qat=true}", backend="torch")


def _train_distributed(rank: int, port: int, options: str, folder: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    prepared = fxopt.prepare(Residual(), (X,), passes=options)
    parallel = nn.parallel.DistributedDataParallel(prepared)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.01)
    torch.manual_seed(rank)  # other data in each process
    for _ in range(3):
        optimizer.zero_grad()
        parallel(torch.randn(4, 1, 8, 8)).square().mean().backward()
        optimizer.step()
    parallel(torch.randn(4, 1, 8, 8))  # brings the buffers of the first process
    torch.save(dict(prepared.named_parameters()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("learned", ["false", "true"])
def test_two_processes_train_one_model(learned: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"insert-fake-quant{{qat=true,learnable_step={learned}}}"
    spawn(_train_distributed, (port, options, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, value in first.items():
        if "fake_quant" not in name or learned == "true":
            assert torch.allclose(value, second[name], atol=1e-6), name


@pytest.mark.slow
def test_a_pruned_model_is_fine_tuned_compiled_and_quantized() -> None:
    dense = trained(Residual)
    prepared = fxopt.prepare(dense, digits().example(), passes="prune-channels{macs=0.5}")
    assert sum(p.numel() for p in prepared.parameters()) < 0.6 * sum(p.numel() for p in dense.parameters())
    fit(prepared, 4, 0.02)
    compiled = prepared.compile(backend="torch")
    assert (answers(compiled) - answers(prepared)).abs().max() < 1e-3
    assert top1(answers(compiled)) >= top1(answers(dense)) - 0.005
    int8 = prepared.compile(backend="torch", passes="insert-fake-quant", calibration=digits().calibration())
    assert top1(answers(int8)) >= top1(answers(dense)) - 0.008
