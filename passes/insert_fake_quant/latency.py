"""``objective=latency``: each conv and linear in int8, half precision or float, as the whole model is fastest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import fx

from fxopt import fastest, ops, registry
from fxopt.program import Program
from fxopt.rewriter import Rewriter

if TYPE_CHECKING:
    from fxopt.passes.insert_fake_quant.quantization import Quantization


def choose_by_latency(one: Quantization, exact: Program) -> None:
    """Take layers out of ``one.modes``, into ``one.halves`` or to float, as the engine runs *exact* fastest.

    Raises:
        PreconditionError: nothing can be measured.
    """
    build, modes, half = one.ctx.build, dict(one.modes), one.scheme.half
    one.ctx.require_measuring("objective=latency", "use objective=coverage")
    assert build is not None
    finish = registry.find_pass("freeze-quantized-weights")()
    native = half and torch.bfloat16 in one.ctx.target.native_dtypes
    names = [n.name for n in exact.graph.nodes if n.name in modes or (native and _is_free(n, one.reasons))]

    def follow(plan: fastest.Plan) -> None:
        one.modes = {name: mode for name, mode in modes.items() if plan[name] == "int8"}  # some have no int8 kernel
        one.halves = {name for name, variant in plan.items() if variant == half}
        one.observe(exact)

    def finished(plan: fastest.Plan) -> Callable[[], object]:
        follow(plan)
        trial = one.trial(exact)
        finish.run(Rewriter(trial), one.ctx)
        trial.remove_dead()
        return build(trial)

    variants = ["int8", *([half] if native else []), "float"]
    plan = fastest.choose(names, variants, finished, _alike(exact, names))
    follow(plan)
    one.reasons |= {
        name: f"the model is faster with it in {variant}, as measured on this engine"
        for name, variant in plan.items()
        if variant == half or (variant == "float" and name in modes)
    }


def _is_free(node: fx.Node, reasons: Mapping[str, str]) -> bool:
    """Whether *node* is a conv or linear without an int8 kernel, and nobody asked for it to be in float."""
    known = ops.kind(node) in ("conv", "conv_transpose", "linear") and node.name in reasons
    return known and not reasons[node.name].endswith("as asked") and node.meta["val"].dtype is torch.float32


def _alike(program: Program, names: Collection[str]) -> list[list[str]]:
    """Layers of *names* that are of one kind.

    Linears with weights of one shape; convolutions with one kernel, depthwise or not, that give images or single pixels
    (as those of squeeze and excitation).
    """
    groups: dict[object, list[str]] = {}
    for node in program.graph.nodes:
        if node.name in names:
            weight, places = ops.arguments(node)["weight"].meta["val"].shape, node.meta["val"].shape[2:]
            image = (tuple(weight[2:]), weight[1] == 1, all(size == 1 for size in places))
            groups.setdefault((ops.kind(node), image if len(weight) > 2 else tuple(weight)), []).append(node.name)
    return [group for group in groups.values() if 1 < len(group) < len(names)]
