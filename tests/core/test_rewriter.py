"""The rewriter counts what is edited, keeps metadata true, and refuses calls that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxopt
from fxopt import verify
from fxopt.capture import capture
from fxopt.program import Program
from fxopt.rewriter import Rewriter
from tests.passes.models import Model, chain

aten = torch.ops.aten
X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(x)).cos()


def rewriter() -> Rewriter:
    return Rewriter(capture(Net(), (X,)).program)


def find(one: Rewriter, packet: object) -> torch.fx.Node:
    return next(n for n in one.nodes() if n.target is packet)


def test_nothing_done_is_no_edit() -> None:
    one = rewriter()
    assert (one.edits, one.skips, one.notes) == (0, [], [])


def test_a_call_has_metadata_and_an_origin() -> None:
    one = rewriter()
    cos = find(one, aten.cos.default)
    new = one.call(aten.sum.dim_IntList, (cos.args[0], [1]), {"keepdim": True}, before=cos)
    assert tuple(new.meta["val"].shape) == (2, 1)
    assert new.meta["stack_trace"] == cos.meta["stack_trace"]
    assert one.edits == 1
    other = one.call(aten.neg.default, (new,), before=cos, origin=find(one, aten.linear.default))
    assert other.meta["nn_module_stack"] == find(one, aten.linear.default).meta["nn_module_stack"]


def test_a_call_that_does_not_fit_leaves_nothing_behind() -> None:
    one = rewriter()
    cos, before = find(one, aten.cos.default), len(one.nodes())
    with pytest.raises(fxopt.PassError, match=r"cannot call aten\.mm\.default in place of cos"):
        one.call(aten.mm.default, (cos.args[0], cos.args[0]), before=cos)
    assert (len(one.nodes()), one.edits) == (before, 0)


def test_replace_erases_what_nobody_needs() -> None:
    one = rewriter()
    cos, (x,) = find(one, aten.cos.default), one.program.placeholders
    one.replace(cos, one.call(aten.sin.default, (x,), before=cos))
    calls = [n.target for n in one.nodes() if n.op == "call_function"]
    assert calls == [aten.sin.default]
    assert one.edits == 5  # the new call, the replacement, three erased calls
    one.program.remove_dead()
    assert one.program.constants == {}
    verify.check_graph(one.program)


def test_replace_by_a_node_that_reads_the_old_one() -> None:
    one = rewriter()
    relu = find(one, aten.relu.default)
    one.replace(relu, one.call(aten.neg.default, (relu,), before=find(one, aten.cos.default)))
    verify.check_graph(one.program)
    assert [n.target for n in one.nodes() if n.op == "call_function"][1:] == [
        aten.relu.default,
        aten.neg.default,
        aten.cos.default,
    ]


def test_rewire_changes_one_user_only() -> None:
    program = capture(Model(lambda m, x: (lambda y: (y.sin(), y.cos()))(x.relu())), (X,)).program
    one = Rewriter(program)
    relu, cos, (x,) = find(one, aten.relu.default), find(one, aten.cos.default), program.placeholders
    one.rewire(cos, relu, x)
    assert cos.args == (x,)
    assert list(relu.users) == [find(one, aten.sin.default)]
    assert one.edits == 1


def test_erase_keeps_what_is_used_and_what_is_an_input() -> None:
    one = rewriter()
    one.erase(find(one, aten.relu.default))
    for node in one.program.placeholders:
        one.erase(node)
    assert one.edits == 0


def test_nodes_may_be_erased_during_the_walk() -> None:
    one = rewriter()
    (x,) = one.program.placeholders
    for node in one.nodes():
        if not node._erased and node.target is aten.relu.default:
            one.replace(node, x)
    assert [n.target for n in one.nodes() if n.op == "call_function"] == [aten.cos.default]


def test_constants_stand_first_under_names_of_their_own() -> None:
    one = rewriter()
    nodes = [one.constant(hint, torch.ones(3)) for hint in ("layer.weight", "layer.weight", "a b/c", "...")]
    assert [n.target for n in nodes] == ["layer.weight_1", "layer.weight_2", "a_b_c", "constant"]
    order = one.nodes()
    first = next(i for i, n in enumerate(order) if n.op == "call_function")
    assert all(order.index(n) < first for n in nodes)
    assert one.edits == 4
    assert not any(t.requires_grad for t in one.program.tensors().values())


def test_a_constant_made_before_the_first_call_is_replaced_can_be_read_by_it() -> None:
    one = rewriter()
    linear = find(one, aten.linear.default)
    one.constant("a", torch.ones(4))
    new = one.call(aten.linear.default, linear.args, before=linear)
    late = one.constant("b", torch.ones(4, 4))
    newer = one.call(aten.linear.default, (new.args[0], late), before=new)
    one.replace(new, newer)
    one.replace(linear, newer)
    one.program.remove_dead()
    verify.check_graph(one.program)


def test_tensor_tells_constants_from_anything_else() -> None:
    one = rewriter()
    linear = find(one, aten.linear.default)
    x, weight, _ = linear.args
    assert one.tensor(x) is None
    assert one.tensor(linear) is None
    assert one.tensor(3) is None
    assert one.tensor(None) is None
    found = one.tensor(weight)
    assert found is not None
    assert found.shape == (4, 4)


def test_a_mutated_buffer_is_no_constant() -> None:
    model = Model(lambda m, x: x * m.count.add_(1) + m.fixed, count=torch.zeros(()), fixed=torch.ones(()))
    one = Rewriter(capture(model, (X,)).program)
    found = {str(n.target): one.tensor(n) for n in one.program.graph.find_nodes(op="get_attr")}
    assert found["count"] is None
    assert found["fixed"] is not None


def test_skips_say_where() -> None:
    one = rewriter()
    one.skip(find(one, aten.relu.default), "too lazy")
    assert str(one.skips[0]).startswith("relu: too lazy (")
    assert "test_rewriter.py:" in one.skips[0].source


# --- programs


def test_a_copy_is_independent_and_shares_tensors() -> None:
    program = capture(chain(nn.Linear(4, 4), nn.ReLU()), (X,)).program
    twin = program.copy()
    (relu,) = twin.graph.find_nodes(op="call_function", target=aten.relu.default)
    relu.replace_all_uses_with(relu.args[0])
    twin.graph.erase_node(relu)
    twin.constants["0.bias"] = torch.zeros(4)
    assert len(program.graph.find_nodes(op="call_function", target=aten.relu.default)) == 1
    assert program.constants["0.weight"] is twin.constants["0.weight"]
    assert not torch.equal(program.constants["0.bias"], twin.constants["0.bias"])


def test_sizes_count_shared_storage_once() -> None:
    table, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = nn.Parameter(table.weight.detach().view(5, 4))  # another object over the same memory
    program = capture(Model(lambda m, i: m.head(m.table(i)), table=table, head=head), (torch.tensor([1]),)).program
    assert program.nbytes() == 5 * 4 * 4


def test_a_program_is_a_module() -> None:
    program: Program = capture(Net(), (X,)).program
    (result,) = program.to_module()(X)
    assert torch.equal(result, verify.run(program, [X])[0])
