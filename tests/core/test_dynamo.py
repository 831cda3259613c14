"""``torch.compile(model, backend="fxopt")``: right answers whatever changes between calls, or the graph as it is."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._export.db.examples import all_examples
from torch.testing._internal import common_quantization
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils import _pytree as pytree

import fxopt
from fxopt import dynamo
from tools import models, zoo

EXAMPLES = all_examples()


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    dynamo._say_once.cache_clear()


def same(a: Any, b: Any) -> bool:
    (leaves, spec), (others, other) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    pairs = zip(leaves, others, strict=True)
    return spec == other and all(
        torch.allclose(x, y, atol=1e-5, rtol=1e-4) if isinstance(x, torch.Tensor) else x == y for x, y in pairs
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        result: torch.Tensor = self.last(self.norm(self.first(x)).relu()) * scale
        return result


class Pair:
    """A model and its compiled twin; a call compares them."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model = model.eval()
        self.twin = copy.deepcopy(model)
        self.compiled = torch.compile(self.twin, backend="fxopt", **options)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            expected = self.model(*copy.deepcopy(args), **kwargs)
            assert same(self.compiled(*copy.deepcopy(args), **kwargs), expected)

    def both(self, change: Callable[[Any], object]) -> None:
        with torch.no_grad():
            change(self.model)
            change(self.twin)


def newest() -> fxopt.CompiledModel:
    return dynamo.compiled_models()[-1]


def test_weights_are_constants_and_lines_are_the_users() -> None:
    pair = Pair(Net(), fullgraph=True)
    pair(torch.randn(2, 4))
    assert newest().backend == "torch"
    graph = newest().graph
    assert [node.target for node in graph.graph.nodes if node.op == "placeholder"] == ["x"]
    assert "first.weight" in newest().report.__str__() or "fuse-conv-bn-relu" in str(newest().report)
    line = inspect.getsourcelines(Net.forward)[1] + 1
    assert any(f'test_dynamo.py", line {line}' in node.meta.get("stack_trace", "") for node in graph.graph.nodes)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.first.weight.mul_(2),
        lambda m: m.norm.running_mean.add_(1),
        lambda m: setattr(m.first, "weight", nn.Parameter(torch.ones(8, 4))),
        lambda m: setattr(m.last.bias, "data", torch.ones(3)),
        lambda m: m.first.weight.data.mul_(2),
        lambda m: m.first.weight.data.copy_(torch.ones(8, 4)),
        lambda m: m.last.bias.detach().numpy().fill(3),
        lambda m: m.load_state_dict({k: v * 3 for k, v in m.state_dict().items()}),
        lambda m: m.load_state_dict({k: v * 3 for k, v in m.state_dict().items()}, assign=True),
    ],
)
def test_a_changed_weight_is_noticed(change: Callable[[Any], object]) -> None:
    pair, x = Pair(Net()), torch.randn(2, 4)
    pair(x)
    pair.both(change)
    pair(x)
    pair(x)


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}])
def test_training_between_calls(how: dict[str, bool]) -> None:
    pair, x = Pair(Net()), torch.randn(5, 4)
    for step in range(3):
        pair(x)
        for one in (pair.model, pair.twin):
            torch.manual_seed(step)
            one.train()
            optimizer = torch.optim.SGD(one.parameters(), lr=0.1, **how)
            one(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            one.eval()
    pair(x)


def test_weights_that_never_rest_run_as_they_are() -> None:
    pair, x = Pair(Net()), torch.randn(2, 4)

    def go() -> None:
        for _ in range(10):
            pair(x)
            pair.both(lambda m: m.first.weight.mul_(1.1))

    with pytest.warns(UserWarning, match="runs as it is, not compiled: its weights, numbers or sizes have changed 8"):
        go()
    pair(x)


def test_buffers_that_the_model_writes_to() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("n", torch.zeros(1))
            self.n: torch.Tensor
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.n += x.shape[0]
            result: torch.Tensor = self.linear(x) + self.n
            return result

    pair = Pair(Counter())
    for rows in (2, 2, 3, 4):
        pair(torch.randn(rows, 4))
    assert torch.equal(pair.twin.get_buffer("n"), torch.tensor([11.0]))
    assert newest().graph.graph.find_nodes(op="get_attr")


def test_open_sizes_and_numbers() -> None:
    pair = Pair(Net())
    for rows in (2, 3, 7, 1, 2):
        pair(torch.randn(rows, 4))
    for scale in (2.0, 3.0, 4.0, 3.0):
        pair(torch.randn(2, 4), scale)
        pair(torch.randn(2, 4), scale=scale)
    marked = Pair(Net())
    x = torch.randn(6, 4)
    torch._dynamo.mark_dynamic(x, 0)
    marked(x)
    before = len(dynamo.compiled_models())
    marked(torch.randn(9, 4))
    assert len(dynamo.compiled_models()) == before


def test_dynamic_shapes_of_everything() -> None:
    class Sizes(nn.Module):
        def forward(self, x: torch.Tensor, count: int) -> Any:
            return x.reshape(-1)[:count] * x.shape[0], count + 1, x.shape[1] // 2

    pair = Pair(Sizes(), dynamic=True)
    for rows, columns, count in ((4, 6, 3), (5, 6, 4), (5, 8, 4)):
        pair(torch.randn(rows, columns), count)


def test_graph_breaks_hooks_keywords_and_outputs() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: torch.Tensor, *, flag: bool = False) -> dict[str, Any]:
            y = self.net(x)
            torch._dynamo.graph_break()
            return {"y": y + 1 if flag else y - 1, "rest": [x, None, "text"]}

    model = Broken()
    model.net.register_forward_hook(lambda module, args, output: output * 2)
    pair, before = Pair(model), len(dynamo.compiled_models())
    pair(torch.randn(2, 4), flag=True)
    pair(torch.randn(2, 4))
    assert len(dynamo.compiled_models()) >= before + 2


def test_sizes_of_torchs_own_modules() -> None:
    pair = Pair(nn.Sequential(nn.Conv1d(4, 4, 3), nn.Flatten(), nn.LazyLinear(2)))
    pair.model(torch.randn(1, 4, 9))
    pair.twin.load_state_dict(pair.model.state_dict())
    for rows in (3, 5, 1, 0, 7):
        pair(torch.randn(rows, 4, 9))
    single = Pair(nn.Linear(4, 4))
    for rows in (3, 5, 7):
        single(torch.randn(rows, 4))
    x = torch.randn(5, 4)
    torch._dynamo.maybe_mark_dynamic(x, 0)
    Pair(nn.Linear(4, 4), fullgraph=True)(x)


class Views(nn.Module):
    """What one graph gives out, the next one writes to."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> Any:
        made = x * 2
        view = {
            "row": lambda: x[0].zero_(),
            "whole": lambda: x.view(-1),
            "columns": lambda: x.t()[1:],
            "weight": lambda: self.weight.view(2, 3),
            "made": lambda: made.view(-1)[2:],
        }[self.kind]()
        torch._dynamo.graph_break()
        view.add_(1)
        return x + 1, made + 1, self.weight + x.sum()


@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize("kind", ["row", "whole", "columns", "weight", "made"])
def test_views_share_memory_with_what_they_are_views_of(kind: str, backend: str) -> None:
    pair = Pair(Views(kind), options={"backend": backend})
    for columns in (3, 3, 4, 5):
        a, b = torch.ones(3, columns), torch.ones(3, columns)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert same(pair.compiled(a), pair.model(b))
        assert same(a, b)


def test_autocast_around_and_inside() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not torch.is_autocast_enabled("cpu")):
                inside = self.first(x)
            return inside, self.last(x)

    model, x = Casts().eval(), torch.randn(2, 4)
    compiled = torch.compile(model, backend="fxopt")
    for around in (False, True, False):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
            for got, wanted in zip(compiled(x), model(x), strict=True):
                assert got.dtype == wanted.dtype
                assert torch.allclose(got.float(), wanted.float(), atol=2e-2)


def test_gradients_that_the_model_turns_on() -> None:
    class On(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                return super().forward(x)

    model, x = On(4, 4), torch.randn(2, 4)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.compile(model, backend="fxopt")(x).requires_grad


def test_what_no_pass_can_take_runs_as_it_is() -> None:
    model, x = Net().eval(), torch.randn(3, 4)
    mapped = torch.compile(lambda x: torch.vmap(lambda row: model(row[None])[0])(x), backend="fxopt")
    with torch.no_grad(), pytest.warns(UserWarning, match="runs as it is, not compiled: pass "):
        assert same(mapped(x), model(x))
    odd: Any = nn.Linear(4, 4)
    odd.weight = nn.Parameter(TwoTensor(torch.ones(4, 4), torch.ones(4, 4)))
    twice: Any = torch.compile(odd, backend="fxopt")
    with torch.no_grad(), pytest.warns(UserWarning, match="runs as it is, not compiled: .* is a TwoTensor"):
        assert same(twice(x).a, x.sum(1, keepdim=True) + odd.bias)
    empty = torch.compile(Net().eval().to("meta"), backend="fxopt")
    with torch.no_grad(), pytest.warns(UserWarning, match="runs as it is, not compiled: .* is on the meta device"):
        assert empty(x.to("meta")).shape == (3, 3)


def test_calibration_that_does_not_fit_is_an_error() -> None:
    options: dict[str, Any] = {"passes": "insert-fake-quant", "calibration": [(torch.zeros(2, 9),)]}
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="calibration"):
        torch.compile(Net().eval(), backend="fxopt", options=options)(torch.randn(2, 4))


def test_inference_mode() -> None:
    model = Net().eval()
    compiled, x = torch.compile(model, backend="fxopt"), torch.randn(2, 4)
    with torch.inference_mode():
        assert same(compiled(x), model(x))
        assert same(compiled(x), model(x))
        inside = Net().eval()  # weights without a version
        compiled = torch.compile(inside, backend="fxopt")
        assert same(compiled(x), inside(x))
        inside.first.weight.mul_(2)
        assert same(compiled(x), inside(x))


def test_gradients_run_as_they_are_and_say_so_once() -> None:
    model = Net()
    compiled, x = torch.compile(model, backend="fxopt"), torch.randn(5, 4)
    with pytest.warns(UserWarning, match="gradients are on .* call it under torch.no_grad"):
        compiled(x).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(x).sum().backward()
    assert all(same(p.grad, expected[name]) for name, p in model.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(Net(), backend="fxopt")(x)


def test_passes_and_calibration() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    data = [(torch.randn(8, 64),) for _ in range(4)]
    options: dict[str, Any] = {"passes": "insert-fake-quant", "calibration": data, "backend": "onnx"}
    compiled = torch.compile(model, backend="fxopt", options=options)
    with torch.no_grad():
        difference = (compiled(data[0][0]) - model(data[0][0])).abs().max()
    assert 0 < difference < 0.2
    assert newest().report.quantization is not None
    assert newest().backend == "onnx"


def test_the_cache(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    for kept in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Net().eval()
        with torch.no_grad():
            assert same(torch.compile(model, backend="fxopt", options={"cache": str(tmp_path)})(x), model(x))
        assert ("lower" not in newest().report.seconds) == kept


def test_what_cannot_be_compiled_runs_as_it_is_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    compiled = torch.compile(model, backend="fxopt", options={"backend": "openvino"})
    model.double()
    x = torch.randn(2, 4, dtype=torch.float64)
    with torch.no_grad(), pytest.warns(UserWarning, match="runs as it is, not compiled: OpenVINO computes float64"):
        assert same(compiled(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"target_": "x86"}}, "no option 'target_'. Did you mean 'target'"),
        ({"options": {"target": "x68"}}, "unknown target 'x68'"),
        ({"options": {"passes": "prune"}}, "unknown pass 'prune'"),
        ({"options": {"passes": "insert-fake-quant"}}, "pass calibration="),
        ({"mode": "max-autotune"}, "no mode 'max-autotune'"),
        ({"options": "cast-precision"}, "options of backend 'fxopt' are a mapping"),
    ],
)
def test_wrong_options_are_errors(arguments: dict[str, Any], message: str) -> None:
    compiled = torch.compile(Net().eval(), backend="fxopt", **arguments)
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
        compiled(torch.randn(2, 4))


def test_nothing_has_to_be_imported() -> None:
    code = (
        "import torch; model = torch.nn.Linear(2, 2); x = torch.ones(1, 2)\n"
        "with torch.no_grad():\n"
        "    assert torch.allclose(torch.compile(model, backend='fxopt')(x), model(x))\n"
        "assert 'fxopt' in torch.compiler.list_backends()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_torch_export(name: str) -> None:
    case = EXAMPLES[name]
    args, kwargs = case.example_args, case.example_kwargs
    expected = copy.deepcopy(case.model)(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    compiled = torch.compile(copy.deepcopy(case.model), backend="fxopt")
    with torch.no_grad():
        assert same(compiled(*copy.deepcopy(args), **copy.deepcopy(kwargs)), expected)  # type: ignore[no-untyped-call]


def _quantization_models() -> dict[str, type[nn.Module]]:
    """PyTorch's own models that say what inputs they take, and can be made without arguments."""
    found = {}
    for name, kind in vars(common_quantization).items():
        if not (inspect.isclass(kind) and issubclass(kind, nn.Module) and hasattr(kind, "get_example_inputs")):
            continue
        needed = [p for p in list(inspect.signature(kind.__init__).parameters.values())[1:] if p.default is p.empty]
        if not [p for p in needed if p.kind is p.POSITIONAL_OR_KEYWORD]:
            found[name] = kind
    return found


QUANTIZATION = _quantization_models()


@pytest.mark.parametrize("name", QUANTIZATION)
def test_quantization_models_of_torch(name: str) -> None:
    torch.manual_seed(0)
    make: Any = QUANTIZATION[name]
    model = make().eval()
    pair = Pair(model)
    pair(*model.get_example_inputs())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(one, marks=() if one in ("gpt2", "llama") else pytest.mark.slow)
        for one in models.transformers_names()
    ],
)
def test_transformers(name: str) -> None:
    model, inputs = models.load(name, small=True)
    compiled = torch.compile(model, backend="fxopt")
    with torch.no_grad():
        assert zoo.relative_error(compiled(*inputs), model(*inputs)) <= zoo.TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_torchvision(name: str) -> None:
    model, inputs = models.load(name, small=True)
    compiled = torch.compile(model, backend="fxopt")
    with torch.no_grad():
        assert zoo.relative_error(compiled(*inputs), model(*inputs)) <= zoo.TOLERANCE
    zoo.free_memory()
