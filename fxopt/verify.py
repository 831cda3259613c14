"""What must hold after every pass: a well-formed functional graph with true metadata, and the same answers.

Numbers are compared relative to the range of each output. Where an exact pass seems to miss the tolerance, the graph
is run again in double precision: a model that amplifies rounding is then as far from that truth before the pass as
after it, a wrong rewrite is far from it only after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxopt import ops
from fxopt.errors import VerifyError
from fxopt.execute import evaluate
from fxopt.program import Program, source_line
from fxopt.rewriter import fake_mode, infer

# Largest error of an exact rewrite, relative to the range of the output, by the dtype it is computed in.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# How many times farther from the exact answer than the reference a correct computation may be.
_ROUNDING = 8.0


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far outputs are from a reference.

    Attributes:
        error: largest absolute difference over the range of the reference output; inf for another shape or dtype.
        cosine: smallest cosine similarity over the floating outputs (1 where there is none).
        mismatched: largest share of unequal elements over the integer and boolean outputs.
        where: index of the worst output.
        within: whether every output is within the tolerance of its dtype, and integer outputs are equal.
    """

    error: float = 0.0
    cosine: float = 1.0
    mismatched: float = 0.0
    where: int = 0
    within: bool = True

    def __str__(self) -> str:
        text = f"error {self.error:.1e} of range, cosine {self.cosine:.6f}"
        return text + (f", {self.mismatched:.1%} of discrete values differ" if self.mismatched else "")


def compare(reference: Sequence[Any], actual: Sequence[Any]) -> Difference:
    """The :class:`Difference` of two flat output lists; the worst output counts."""
    total = Difference()
    for i, (a, b) in enumerate(zip(reference, actual, strict=True)):
        one = _compare_one(a, b, i)
        total = Difference(
            max(total.error, one.error),
            min(total.cosine, one.cosine),
            max(total.mismatched, one.mismatched),
            i if not one.within or one.error > total.error else total.where,
            total.within and one.within,
        )
    return total


def _compare_one(a: Any, b: Any, index: int) -> Difference:
    wrong = Difference(float("inf"), 0.0, 1.0, index, within=False)
    if not isinstance(a, torch.Tensor):
        return Difference() if type(a) is type(b) and a == b else wrong
    if not isinstance(b, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return wrong
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    if not a.is_floating_point() or a.numel() == 0:
        share = 0.0 if a.numel() == 0 else float((a != b).sum()) / a.numel()
        return Difference(mismatched=share, where=index, within=share == 0)
    x, y = a.detach().double().flatten(), b.detach().double().flatten()
    finite = torch.isfinite(x)
    if not torch.equal(finite, torch.isfinite(y)) or not _same_specials(x[~finite], y[~finite]):
        return wrong
    x, y = x[finite], y[finite]
    if x.numel() == 0:
        return Difference()
    span = float(torch.maximum(x.max() - x.min(), x.abs().max()))
    worst = float((x - y).abs().max())
    error = worst / span if span > 0 else worst
    norms = float(x.norm() * y.norm())
    cosine = min(1.0, float(x @ y) / norms) if norms > 0 else float(worst == 0)
    return Difference(error, cosine, 0.0, index, error <= TOLERANCE.get(a.dtype, 1e-4))


def _same_specials(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x[~x.isnan()], y[~y.isnan()])


def check_graph(program: Program) -> None:
    """Structure: lint, functional, no dead node, every constant present, metadata as a fresh propagation gives it.

    Raises:
        VerifyError: naming the node and its source line.
    """
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise VerifyError(f"the graph is malformed: {error}") from error
    mode = fake_mode(program)
    for node in program.graph.nodes:
        problem = _node_problem(node, program)
        if not problem and not isinstance(program.constants.get(str(node.target)), fx.GraphModule):
            problem = _metadata_problem(node, mode)
        if problem:
            where = source_line(node)
            raise VerifyError(f"{node.format_node()} {problem}" + (f" ({where})" if where else ""))


def _node_problem(node: fx.Node, program: Program) -> str | None:
    if node.op == "get_attr" and str(node.target) not in program.constants:
        return "names a constant that does not exist"
    if node.op not in ("placeholder", "get_attr", "call_function", "output"):
        return f"is a {node.op}, which no fxopt graph holds"
    if ops.is_mutating(node):
        return "writes to its input: the graph is not functional"
    if not node.users and (node.op == "get_attr" or (node.op == "call_function" and ops.is_pure(node))):
        return "is dead: nobody uses it"
    return None


def _metadata_problem(node: fx.Node, mode: Any) -> str | None:
    if node.op == "output" or ops.kind(node) == "assert":
        return None
    if "val" not in node.meta:
        return "has no metadata"
    if node.op != "call_function" or not _inferable(node):
        return None
    stored = node.meta["val"]
    try:
        fresh = infer(node, mode)
    except RuntimeError:
        if _is_symbolic(node):  # some kernels (lstm) ask for sizes as numbers, which capture got around
            return None
        raise
    for a, b in zip(_tensors(stored), _tensors(fresh), strict=True):
        if a.dtype != b.dtype or a.dim() != b.dim() or not _same_sizes(a.shape, b.shape):
            return f"has stale metadata: {a.dtype} {list(a.shape)}, should be {b.dtype} {list(b.shape)}"
    return None


def _inferable(node: fx.Node) -> bool:
    """Ops with data-dependent sizes get fresh symbols at each propagation, and higher-order ops need their bodies."""
    symbols = [s for t in _tensors(node.meta["val"]) for d in t.shape if not isinstance(d, int) for s in _free(d)]
    tensor_op = isinstance(node.target, torch._ops.OpOverload) and isinstance(
        node.meta["val"], (torch.Tensor, tuple, list)
    )
    return tensor_op and not any(str(s).startswith("u") for s in symbols)


def _is_symbolic(node: fx.Node) -> bool:
    values = [node.meta.get("val"), *(n.meta.get("val") for n in node.all_input_nodes)]
    return any(not isinstance(d, int) for value in values for t in _tensors(value) for d in t.shape)


def _free(dim: Any) -> set[Any]:
    return set(dim.node.expr.free_symbols)


def _same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    plain = [(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, int) and isinstance(y, int)]
    return all(x == y for x, y in plain)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, (tuple, list)) else []


def run(program: Program, inputs: Sequence[Any]) -> list[Any]:
    """Flat outputs, with random ops seeded the same way each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return evaluate(program, inputs)


def check_exact(before: Program, after: Program, inputs: Sequence[Any], reference: Sequence[Any]) -> Difference:
    """That *after* computes what *before* did; *reference* holds what it did on *inputs*.

    Raises:
        VerifyError: it does not, and rounding does not explain it.
    """
    outputs = run(after, inputs)
    difference = compare(reference, outputs)
    if difference.within:
        return difference
    try:
        truth = run_double(before, inputs)
        rounding = is_rounding(truth, reference, outputs)
        if difference.mismatched:  # a discrete output: the same graph in double precision tells a tie from a mistake
            rounding = rounding and compare(truth, run_double(after, inputs)).mismatched == 0
    except RuntimeError as error:
        raise VerifyError(f"outputs changed: {difference}; a check in double precision failed: {error}") from error
    if not rounding:
        where = (*after.signature.outputs, *after.signature.writebacks)[difference.where]
        name = getattr(where, "name", where)
        raise VerifyError(f"output {name!r} changed: {difference}; rounding does not explain it")
    return difference


def is_rounding(truth: Sequence[Any], reference: Sequence[Any], outputs: Sequence[Any]) -> bool:
    """Whether *outputs* are about as near to the *truth* (the same graph in double precision) as *reference* is.

    A model that amplifies rounding parts two correct computations; it parts each of them from the truth as well.
    """
    own, new = compare(truth, _widen(reference)), compare(truth, _widen(outputs))
    if own.error == float("inf"):  # another shape or other infinities in double precision: that is no truth
        return False
    return new.error <= max(_ROUNDING * own.error, TOLERANCE[torch.float32])


def run_double(program: Program, inputs: Sequence[Any]) -> list[Any]:
    """Flat outputs of *program* computed in double precision."""
    return run(_to_double(program), _widen(inputs))


def _widen(values: Sequence[Any]) -> list[Any]:
    return [x.double() if _is_float(x) else x for x in values]


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _to_double(program: Program) -> Program:
    """*program* with every floating tensor and dtype argument widened to float64."""
    wide = program.copy()
    wide.constants = {k: v.double() if _is_float(v) else v for k, v in wide.constants.items()}
    narrow = (torch.float32, torch.float16, torch.bfloat16)

    def widen(value: Any) -> Any:
        return torch.float64 if value in narrow else value

    for node in wide.graph.nodes:
        if node.op == "call_function":
            node.args = tuple(widen(a) if isinstance(a, torch.dtype) else a for a in node.args)
            node.kwargs = {k: widen(a) if isinstance(a, torch.dtype) else a for k, a in node.kwargs.items()}
    return wide
