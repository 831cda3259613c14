"""The dense model with what a plan removes set to zero: what a pruned model must compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from fxopt import verify
from fxopt.capture import capture
from fxopt.passbase import PassContext
from fxopt.passes.prune_channels import find_groups, surgery
from fxopt.passes.prune_channels import plan as planning
from fxopt.passes.prune_channels.coupling import Coupling
from fxopt.passes.prune_channels.dims import Atom, Dim, Fixed, Product, factors, kept
from fxopt.pipeline import Pipeline
from fxopt.program import Program
from fxopt.registry import find_pass
from fxopt.rewriter import Rewriter
from fxopt.target import resolve_target


def cleaned(model: nn.Module, inputs: tuple[Any, ...], dynamic: Any = None) -> tuple[Program, list[Any]]:
    """The program as the pass sees it, and its inputs."""
    captured = capture(model.eval(), inputs, dynamic_shapes=dynamic)
    passes = [find_pass(name)() for name in ("canonicalize", "common-subexpressions", "fold-constants")]
    context = PassContext(resolve_target("x86"), captured.inputs)
    return Pipeline(context, captured.reference).run(captured.program, passes)[0], captured.inputs


def equals_masked(
    model: nn.Module,
    inputs: tuple[Any, ...],
    *,
    least: int = 1,
    norms: bool = False,
    dynamic: Any = None,
    others: Sequence[Any] = (),
) -> Program:
    """:func:`half_of` a model, captured with *dynamic* shapes; *others* are inputs of other sizes for these."""
    dense, flat = cleaned(model, inputs, dynamic)
    return half_of(dense, [flat, *others], least=least, norms=norms)


def half_of(dense: Program, inputs: Sequence[Any], *, least: int = 1, norms: bool = False) -> Program:
    """Without a random half of every group; equal to *dense* under a mask, for each of *inputs*.

    Groups that a norm mixes stay, or with *norms* go as well: then nothing is compared.
    """
    groups = find_groups(dense)
    chosen = [group for group in groups.prunable if norms or not group.atom.mixed]
    generator = torch.Generator().manual_seed(0)
    scores = {group.name: torch.rand(group.size, generator=generator) for group in chosen}
    plan = planning.choose(chosen, scores, 0.5, 1, together=False)
    assert len(plan.groups) >= least, str(groups)
    indices = plan.resolve(groups)
    fresh = find_groups(program := dense.copy())
    surgery.cut(Rewriter(program), fresh.coupling, plan.resolve(fresh))
    verify.check_graph(program)
    for given in [] if norms else inputs:
        difference = verify.compare(masked(dense, groups.coupling, indices, given), verify.run(program, given))
        assert difference.error < 1e-4, difference
    return program


def masked(program: Program, coupling: Coupling, plan: dict[Atom, torch.Tensor], inputs: Sequence[Any]) -> list[Any]:
    """Outputs of *program*; after every op, what the plan removes is zero."""
    values: dict[fx.Node, Any] = {}
    feed = iter(inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(feed)
        elif node.op == "get_attr":
            values[node] = program.constants[str(node.target)]
        elif node.op == "output":
            return list(fx.node.map_arg(node.args[0], values.__getitem__))
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = _mask(node.target(*args, **kwargs), coupling.axes.get(node, []), plan)
    raise AssertionError("the graph has no output")


def _mask(value: Any, axes: list[Any], plan: dict[Atom, torch.Tensor]) -> Any:
    if isinstance(value, (tuple, list)):
        several = axes if axes and isinstance(axes[0], list) else [[]] * len(value)
        return [_mask(one, own, plan) for one, own in zip(value, several, strict=True)]
    if not isinstance(value, torch.Tensor):
        return value
    for axis, dim in enumerate(axes):
        if len(kept(dim, plan)) < dim.size:
            gone = torch.ones(value.shape[axis], dtype=torch.bool)
            gone[kept(_sized(dim, value.shape[axis]), plan)] = False
            value = value.index_fill(axis, gone.nonzero().flatten(), 0)  # 0 / 0 among them, too
    return value


def _sized(dim: Dim, size: int) -> Dim:
    """*dim* for inputs of other sizes than those of capture."""
    if dim.size == size:
        return dim
    [dynamic] = [part for part in factors(dim) if isinstance(part, Fixed) and part.exact is not None]
    new = Fixed(size * dynamic.size // dim.size)
    return Product(tuple(new if part is dynamic else part for part in factors(dim)))
