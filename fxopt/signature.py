"""How a call ``model(*args, **kwargs)`` becomes flat tensors and back: structure, names, shapes, dtypes, writebacks.

``bind`` is on the path of every call of a compiled model: plain positional tensors take a short cut, everything
else goes through pytree, and a call that spells the same arguments otherwise (by keyword, with a default left out)
is re-spelled as it was at capture.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from torch.utils import _pytree as pytree

from fxopt.errors import InputError
from fxopt.guards import Guard
from fxopt.memory import Layout, fits, overlap
from fxopt.spelling import children, describe_difference, respell
from fxopt.structures import fingerprint, reordered

Dim: TypeAlias = int | sympy.Expr

# The highest size of a dimension without a limit.
UNLIMITED = 2**63 - 1
_STRIDED = torch.strided


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the inputs or outputs.

    Attributes:
        name: a valid identifier, unique among the inputs (or outputs).
        shape: sizes; a sympy expression stands for a dynamic one. None for a leaf that is no tensor.
        dtype: torch dtype of a tensor leaf.
        value: the value of a leaf that is no tensor; the graph was captured for this value alone.
    """

    name: str
    shape: tuple[Dim, ...] | None = None
    dtype: torch.dtype | None = None
    value: Any = None
    device: str = "cpu"

    @property
    def is_tensor(self) -> bool:
        """Whether the leaf is a tensor."""
        return self.shape is not None

    def __str__(self) -> str:
        if self.shape is None:
            return repr(self.value)
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(str(d) for d in self.shape)}]"


@dataclasses.dataclass(frozen=True)
class Writeback:
    """An extra output that is copied into a buffer or an input after the call: the model mutates it.

    Attributes:
        constant: name of the mutated buffer in ``Program.constants``, or None.
        input: index of the mutated input leaf, or None.
    """

    constant: str | None = None
    input: int | None = None


@dataclasses.dataclass(frozen=True)
class Signature:
    """Structure of a model's inputs and outputs.

    Attributes:
        in_spec: tree of ``(args, kwargs)``.
        out_spec: tree of the outputs.
        inputs: leaves of the inputs, in order; ``outputs`` likewise.
        forward: Python signature of the model's forward, where known; lets keyword spellings vary.
        ranges: (lowest, highest) size for each dynamic symbol.
        writebacks: what the model mutates.
        dim_names: the user's names of dynamic sizes, where ``dynamic_shapes`` gave any.
        guards: conditions on dynamic sizes that the graph was captured under.
        layouts: how each input must lie in memory, for a model that answers by strides; else empty.
        ordered: whether the model answers by the order of keys in dicts and keywords.
        limits: why the lowest size of a symbol is not lower, where that is more than the user's choice.
    """

    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    inputs: tuple[Leaf, ...]
    outputs: tuple[Leaf, ...]
    forward: inspect.Signature | None = None
    ranges: Mapping[sympy.Symbol, tuple[int, int]] = dataclasses.field(default_factory=dict)
    writebacks: tuple[Writeback, ...] = ()
    dim_names: Mapping[sympy.Symbol, str] = dataclasses.field(default_factory=dict)
    guards: tuple[Guard, ...] = ()
    layouts: tuple[Layout | None, ...] = ()
    ordered: bool = False
    limits: Mapping[sympy.Symbol, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        args, kwargs = children(self.in_spec)
        written = [back.input for back in self.writebacks if back.input is not None]
        anyhow = not (written or kwargs or self.layouts or self.guards)
        plain = anyhow and all(c.is_leaf() for c in args) and all(leaf.is_tensor for leaf in self.inputs)
        static = all(isinstance(d, int) for leaf in self.inputs for d in leaf.shape or ())
        checks = [(torch.Size(leaf.shape or ()), leaf.dtype) for leaf in self.inputs] if plain and static else None
        object.__setattr__(self, "_quick", checks)
        object.__setattr__(self, "_written", written)
        object.__setattr__(self, "_sizes", _has_size(self.out_spec))

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The flat input leaves of a call (constants included, in their place).

        Raises:
            InputError: structure, shape, dtype, device or constant differs from the captured one.
        """
        quick: list[tuple[torch.Size, torch.dtype]] | None = self._quick  # type: ignore[attr-defined]
        if quick is not None and not kwargs and len(args) == len(quick):
            for x, (shape, dtype) in zip(args, quick, strict=True):
                if (
                    type(x) is not torch.Tensor
                    or x.shape != shape
                    or x.dtype is not dtype
                    or not x.is_cpu
                    or x.layout is not _STRIDED
                ):
                    break
            else:
                return list(args)
        leaves = self.flatten(args, kwargs)
        self.check(leaves)
        return leaves

    def accepts(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call fits: its structure, and sizes within what was kept open."""
        try:
            self.bind(args, kwargs)
        except InputError:
            return False
        return True

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Leaves of the call, re-spelled as it was captured; shapes and dtypes are not checked.

        Raises:
            InputError: the structure differs from the captured one.
        """
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        if spec == self.in_spec:
            return leaves
        respelled = None if self.ordered else respell(self.in_spec, self.forward, args, kwargs)
        if respelled is not None:
            leaves, spec = pytree.tree_flatten(reordered(respelled, self.in_spec))
            if spec == self.in_spec:
                return leaves
        raise InputError(
            f"inputs have another structure than at capture: {describe_difference(self.in_spec, spec)}; the model was "
            f"captured for {self.describe()}"
        )

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The user's output structure from the flat outputs (without writebacks)."""
        if self.out_spec.is_leaf():
            return outputs[0]
        if self._sizes:  # type: ignore[attr-defined]
            return _with_sizes(self.out_spec, iter(outputs))
        return pytree.tree_unflatten(list(outputs), self.out_spec)

    def describe(self) -> str:
        """Inputs in one line: ``x: float32[1, 3, 224, 224]``."""
        return ", ".join(f"{leaf.name}: {leaf}" for leaf in self.inputs) or "no inputs"

    @property
    def dynamic(self) -> bool:
        """Whether any input size is dynamic."""
        return any(not isinstance(d, int) for leaf in self.inputs for d in leaf.shape or ())

    def sizes(self, leaves: Sequence[Any]) -> dict[sympy.Symbol, int]:
        """The value that each dynamic symbol has for these input leaves."""
        symbols: dict[sympy.Symbol, int] = {}
        for leaf, x in zip(self.inputs, leaves, strict=True):
            for size, expected in zip(x.shape if leaf.is_tensor else (), leaf.shape or (), strict=True):
                if not isinstance(expected, int):
                    _settle(expected, size, symbols)
        return symbols

    def check(self, leaves: Sequence[Any]) -> None:
        """Whether flat input leaves fit what was captured.

        Raises:
            InputError: shape, dtype, device or constant of one of them differs.
        """
        symbols: dict[sympy.Symbol, int] = {}
        for leaf, x in zip(self.inputs, leaves, strict=True):
            problem = _mismatch(leaf, x) or (self._dims_mismatch(leaf, x, symbols) if leaf.is_tensor else None)
            if problem:
                raise InputError(f"input {leaf.name!r} {problem}; the model was captured for {self.describe()}")
        for leaf, x, layout in zip(self.inputs, leaves, self.layouts, strict=False):
            if layout is not None and not fits(x, layout):
                raise InputError(
                    f"input {leaf.name!r} has strides {x.stride()}; the model answers by the strides of its inputs "
                    f"(is_contiguous, stride or as_strided), and it was captured for {' '.join(map(str, layout))}"
                )
        shared = overlap(leaves, self._written)  # type: ignore[attr-defined]
        if shared:
            written, other = (self.inputs[i].name for i in shared)
            raise InputError(
                f"the model writes to its input {written!r}, which shares memory with "
                f"{'itself' if other == written else f'input {other!r}'}: pass a clone of one of them"
            )
        for guard in self.guards:
            if not guard.holds(leaves):
                raise InputError(
                    f"the sizes of the inputs must satisfy {guard.text}, or the model takes another path than the "
                    f"captured one; it was captured for {self.describe()}. Compile it again with inputs of this size."
                )

    def _dims_mismatch(self, leaf: Leaf, x: torch.Tensor, symbols: dict[sympy.Symbol, int]) -> str | None:
        for i, (size, expected) in enumerate(zip(x.shape, leaf.shape or (), strict=True)):
            where = f"has size {size} in dimension {i}, expected"
            if isinstance(expected, int):
                if size != expected:
                    return f"{where} {expected}"
                continue
            value = _settle(expected, size, symbols)
            if value is None:
                return f"{where} {expected}"
            if value != size:
                return f"{where} {expected} = {value}"
            for symbol in expected.free_symbols:
                low, high = self.ranges.get(symbol, (0, UNLIMITED))
                if not low <= symbols.get(symbol, low) <= high:
                    return f"{where} {self._allowed(expected, symbol)}"
        return None

    def _allowed(self, expected: sympy.Expr, symbol: sympy.Symbol) -> str:
        """``3 to 8``, or ``2*n with n at least 2``, with the reason of the lower limit."""
        low, high = self.ranges[symbol]
        text = f"at least {low}" if high >= UNLIMITED - 1 else f"{low} to {high}"
        if expected != symbol:
            text = f"{expected} with {symbol} {text}"
        return text + (f" ({self.limits[symbol]})" if symbol in self.limits else "")


def _has_size(spec: pytree.TreeSpec) -> bool:
    return spec.type is torch.Size or any(map(_has_size, spec.children()))


def _with_sizes(spec: pytree.TreeSpec, leaves: Iterator[Any]) -> Any:
    """As ``tree_unflatten``, which makes a tuple of each torch.Size."""
    if spec.is_leaf():
        return next(leaves)
    parts = [_with_sizes(child, leaves) for child in spec.children()]
    if spec.type is torch.Size:
        return torch.Size(parts)
    return pytree.SUPPORTED_NODES[spec.type].unflatten_fn(parts, spec.context)


def _settle(expected: sympy.Expr, size: int, symbols: dict[sympy.Symbol, int]) -> int | None:
    """The size that *expected* stands for; the first *size* seen settles an open symbol. None where none fits."""
    if isinstance(expected, sympy.Symbol):
        return symbols.setdefault(expected, size)
    value = expected.subs(symbols)
    if len(value.free_symbols) == 1:
        (symbol,) = value.free_symbols
        fitting = [s for s in sympy.solve(value - size, symbol) if s.is_Integer]
        if not fitting:
            return None
        symbols[symbol] = int(fitting[0])
        value = value.subs(symbols)
    return int(value) if value.is_number else size


def _mismatch(leaf: Leaf, x: object) -> str | None:
    if not leaf.is_tensor:
        same = x is leaf.value or fingerprint(x) == fingerprint(leaf.value)
        return None if same else f"is {x!r}, expected {leaf.value!r}"
    if not isinstance(x, torch.Tensor):
        return f"is {type(x).__name__}, expected a tensor"
    if x.layout is not torch.strided:
        return f"has layout {x.layout}, expected a dense tensor: pass x.to_dense()"
    if x.dtype != leaf.dtype:
        return f"has dtype {x.dtype}, expected {leaf.dtype}"
    if x.device.type != leaf.device:
        return f"is on {x.device}, expected {leaf.device}"
    if x.dim() != len(leaf.shape or ()):
        return f"has {x.dim()} dimensions, expected {len(leaf.shape or ())}"
    return None
