"""OpenVINO computes integers in 32 bits, and clips narrow ones instead of wrapping around. Which inputs are safe then?

    ids: |ids| ≤ L   →   ids * 1000 + 7: at most 1000·L + 7   →   L = 2,147,483

Sums, extremes, comparisons and divisions it computes in float32, which is exact to 2^24. The largest absolute
value of every integer is bounded from those of its operands. Where one may not fit, the inputs
that it is made of are limited further, down to `_FEWEST`; the limits are checked at each call. What fits with none is
declined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxopt import ops
from fxopt.backends._onnx_bounds import Bound, is_integer
from fxopt.backends._onnx_graph import located
from fxopt.errors import UnsupportedOp
from fxopt.program import Program

_LARGEST = 2**31 - 1
_LARGEST_IN_FLOAT = 2**24
_FEWEST = 2**12  # no input is limited to less
_SIZE = 2**15  # what a dynamic size, and a position along a dimension, is taken to be at most

_MOVES = {"shape", "permute", "identity", "copy", "cat", "pad", "dropout"}
_VALUES = set(
    "where masked_fill clamp clamp_min clamp_max minimum maximum min max amin amax abs neg flip roll repeat "
    "cummax cummin repeat_interleave sort topk tril triu full full_like fill new_full scalar_tensor scatter sign "
    "median".split()
)
_SCALARS = ("value", "other", "min", "max", "fill_value", "s")  # arguments of _VALUES and _MOVES that are values
_SUMS, _BITS = {"add", "sub", "rsub"}, {"bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__"}
_REMAINDERS = {"remainder", "fmod", "floor_divide", "div"}
_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}
_IN_FLOAT = _REMAINDERS | _COMPARISONS | {"sum", "prod", "max", "min", "amax", "amin", "argmax", "argmin"}
_POSITIONS = set("argmax argmin argsort nonzero searchsorted bucketize one_hot count_nonzero".split())
_ONES = set("eye ones zeros ones_like zeros_like new_ones new_zeros".split())


def integer_bounds(program: Program) -> dict[int, Bound]:
    """For each integer input, by its position among the flat ones, the values that nothing overflows for.

    Raises:
        UnsupportedOp: something may overflow whatever the inputs are; with its source line.
    """
    for value in program.constants.values():
        if isinstance(value, fx.GraphModule):
            for module in value.modules():
                if isinstance(module, fx.GraphModule):
                    _limits(Program(module.graph, dict(module.named_buffers(recurse=False)), program.signature), {})
    start = {p: min(_LARGEST, torch.iinfo(p.meta["val"].dtype).max) for p in program.placeholders if is_integer(p)}
    limits = _limits(program, start)
    bounds = dict[int, Bound]()
    for position, node in enumerate(program.placeholders):
        if node in limits and (limits[node] < start[node] or node.meta["val"].dtype is torch.int64):
            limit = limits[node]
            reason = f"OpenVINO computes integers in 32 bits, enough for this model up to {limit}: use another backend"
            bounds[position] = Bound(-limit, limit, reason)
    return bounds


def _limits(program: Program, limits: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """*limits* of the inputs, lowered until everything fits."""
    while (found := _Magnitudes(program, limits).overflow()) is not None:
        node, inputs = found
        wide = [i for i in inputs if limits[i] // 2 >= _FEWEST]
        if not wide:
            raise UnsupportedOp(
                f"OpenVINO computes integers in 32 bits, which {located(node)} may exceed: use another backend"
            )
        limits = limits | {i: limits[i] // 2 for i in wide}
    return limits


class _Magnitudes:
    """The largest absolute value of every integer node, for inputs up to *limits*."""

    def __init__(self, program: Program, limits: Mapping[fx.Node, int]) -> None:
        self.program = program
        self.limits = limits
        self.largest: dict[fx.Node, float] = {}
        self.inputs: dict[fx.Node, frozenset[fx.Node]] = {}  # the integer inputs that a node is made of
        self.data: set[fx.Node] = set()  # nodes made of values of inputs, not of their sizes alone

    def overflow(self) -> tuple[fx.Node, frozenset[fx.Node]] | None:
        """The first node that may not fit, and the inputs to blame."""
        for node in self.program.graph.nodes:
            if node.op == "output" or isinstance(node.meta.get("val"), int | torch.SymInt):
                continue
            sources = node.all_input_nodes
            if node.op == "placeholder" or any(source in self.data for source in sources):
                self.data.add(node)
            blamed = {i for source in sources for i in self.inputs.get(source, ())}
            self.inputs[node] = frozenset(blamed | ({node} if node in self.limits else set()))
            self.largest[node] = self._largest(node)
            if self._read(node) > _LARGEST_IN_FLOAT or (is_integer(node) and self.largest[node] > self._most(node)):
                return node, self.inputs[node]
        return None

    def _read(self, node: fx.Node) -> float:
        """The largest integer that *node* reads as a float."""
        if ops.packet(node) not in _IN_FLOAT or not any(is_integer(source) for source in node.all_input_nodes):
            return 0
        numbers = [x for x in node.args if isinstance(x, int | float)] if ops.packet(node) in _COMPARISONS else []
        return max(self._of(x) for x in (*node.all_input_nodes, *numbers))

    @staticmethod
    def _most(node: fx.Node) -> int:
        """What OpenVINO holds exactly at *node*."""
        most = _LARGEST_IN_FLOAT if ops.packet(node) in _IN_FLOAT else _LARGEST
        return min(most, int(torch.iinfo(node.meta["val"].dtype).max))

    def _largest(self, node: fx.Node) -> float:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and not is_integer(node):
            return 1 if value.dtype is torch.bool else 0
        if node.op == "placeholder":
            return self.limits.get(node, _LARGEST)
        if node.op == "get_attr":
            return self._constant(node)
        if ops.namespace(node) == "quantized_decomposed":
            return float(torch.iinfo(value.dtype).max) if isinstance(value, torch.Tensor) else 0
        if ops.kind(node) == "getitem":  # of a split, or of a sort: values or positions
            return max(self._of(node.args[0]), _SIZE)
        found = self._computed(node) if isinstance(node.target, torch._ops.OpOverload) else None
        return found if found is not None else (math.inf if node in self.data else _SIZE)

    def _computed(self, node: fx.Node) -> float | None:
        """The rule of the op; None where there is none."""
        packet, kind, a = ops.packet(node), ops.kind(node), ops.arguments(node)
        if packet in _SUMS:
            return (self._of(a["self"]) + self._of(a["other"])) * max(1.0, self._of(a["alpha"]))
        if packet == "mul":
            return self._of(a["self"]) * self._of(a["other"])
        if packet in _BITS:
            most = min(_LARGEST, torch.iinfo(node.meta["val"].dtype).max)
            return min(most, 2 * max(self._of(a["self"]), self._of(a["other"])))
        if packet in _REMAINDERS:
            return max(self._of(a["self"]), self._of(a["other"]))
        if packet in ("sum", "cumsum", "diff"):
            return self._of(a["self"]) * self._terms(packet, a)
        if packet == "arange":
            return max((self._of(x) for x in (a.get("start"), a.get("end")) if x is not None), default=_SIZE)
        if packet in _POSITIONS:
            return _SIZE
        if packet in _ONES:
            return 1
        if kind in ("select", "embedding"):
            return self._of(node.args[0])
        if kind == "cast" and not _is_discrete(node.args[0]):
            return None  # from a float
        if kind in _MOVES or kind == "cast" or packet in _VALUES:
            return max(self._of(x) for x in (*node.all_input_nodes, *(a.get(key) for key in _SCALARS)))
        return None

    def _of(self, x: Any) -> float:
        if isinstance(x, fx.Node):
            return self.largest.get(x, _SIZE)  # what is not in the table is a size
        return float(abs(x)) if isinstance(x, int | float) else 0

    def _constant(self, node: fx.Node) -> float:
        held = self.program.constants.get(str(node.target))
        if not isinstance(held, torch.Tensor) or held.numel() == 0:
            return 0
        if all(ops.namespace(user) == "quantized_decomposed" for user in node.users):
            return 0
        return float(held.double().abs().max())

    @staticmethod
    def _terms(packet: str, a: dict[str, Any]) -> int:
        """How many elements one element of the result is the sum of."""
        shape = a["self"].meta["val"].shape
        dims = a.get("dim")
        dims = range(len(shape)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        if packet == "diff":
            return int(2 ** a["n"])
        return math.prod(size if isinstance(size, int) else _SIZE for size in (shape[d] for d in dims)) if shape else 1


def _is_discrete(x: Any) -> bool:
    return isinstance(x, fx.Node) and (is_integer(x) or x.meta["val"].dtype is torch.bool)
