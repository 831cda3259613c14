"""Linears with 2:4 weights on the sparse tensor cores of NVIDIA GPUs (Ampere and later), by torch.sparse.

    linear(x, w, b)   →   semi_structured_linear(x, compressed w, b)      where the kernels take its dtype and sizes

All others stay dense, and the remarks say why. Convolutions have no such kernel in PyTorch.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from fxopt import ops, quantized
from fxopt.backends._torch_packer import Fused, Packer, read
from fxopt.program import Program
from fxopt.sparsity import Pattern
from fxopt.target import Target

Compress = Callable[[torch.Tensor], Any]
_LOW = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True, eq=False)
class Compressed:
    """A weight as the kernels want it.

    Attributes:
        weight: a SparseSemiStructuredTensor.
        home: the device of the weight that it was made from.
    """

    weight: Any
    home: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata."""
        parts = [getattr(self.weight, name, None) for name in ("packed", "meta")]
        return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))

    def to_dense(self) -> torch.Tensor:
        """The weight itself, on the device that it came from."""
        dense: torch.Tensor = self.weight.to_dense()
        return dense.to(self.home)


def semi_structured_linear(x: torch.Tensor, weight: Compressed, bias: torch.Tensor | None) -> torch.Tensor:
    """A linear with a compressed weight."""
    return torch.nn.functional.linear(x, weight.weight, bias)


semi_structured_linear.gives_new_memory = True  # type: ignore[attr-defined]


def compressor(target: Target) -> Compress | None:
    """What compresses weights for *target* here; None where it is another machine, which has its weights dense."""
    if not target.fast_2_4 or not target.runs_here:
        return None
    return lambda weight: torch.sparse.to_sparse_semi_structured(weight.cuda())


def lower(
    program: Program, target: Target, compress: Compress | None
) -> tuple[dict[str, Callable[[], torch.Tensor]], list[str]]:
    """Rewrite the linears of *program* that qualify, by *compress*; without it nothing is rewritten.

    Returns:
        For each weight that is gone, what gets it back; and remarks on what runs how.
    """
    if not target.fast_2_4:
        return {}, []
    packer, fast, dense = Packer(program), 0, Counter[str]()
    compressed = dict[str, fx.Node]()
    for node in list(program.graph.nodes):
        if ops.kind(node) not in ("linear", "conv") or not _is_2_4(packer, ops.arguments(node)["weight"]):
            continue
        fused = read(node)
        reason = refusal(packer, fused) if fused is not None else "of a form that only ATen knows"
        if reason:
            dense[reason] += 1
            continue
        fast += 1
        if compress is not None and fused is not None:
            _replace(packer, fused, compress, compressed)
    held = {name: program.constants[str(node.target)].to_dense for name, node in compressed.items()}
    return held, _remarks(fast, dense, here=compress is not None)


def refusal(packer: Packer, fused: Fused) -> str:
    """Why the kernels do not take *fused*, whose weight is 2:4; "" where they do."""
    if ops.kind(fused.node) != "linear":
        return "a convolution: PyTorch has sparse kernels for linears alone"
    if quantized.is_dequantize(fused.weight):
        return "its weight is quantized"
    weight = packer.tensor(fused.weight)
    assert weight is not None
    x = fused.x.meta["val"]
    if weight.dtype not in _LOW or x.dtype != weight.dtype:
        return f"{str(weight.dtype)[6:]}: the kernels take fp16 and bf16, see cast-precision"
    rows, columns = _multiples(weight.dtype)
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"{weight.shape[0]} × {weight.shape[1]}: sizes must be multiples of {rows} × {columns}"
    return ""


def _is_2_4(packer: Packer, weight: fx.Node) -> bool:
    if quantized.is_dequantize(weight):
        source = weight.args[0]
        weight = source.args[0] if quantized.is_quantize(source) else source  # type: ignore[assignment,union-attr]
    value = packer.tensor(weight) if isinstance(weight, fx.Node) else None
    return value is not None and Pattern().holds(value)


def _multiples(dtype: torch.dtype) -> tuple[int, int]:
    """Of which both sizes have to be multiples, for both libraries that torch.sparse drives."""
    classes = (SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS)
    limits = [one._DTYPE_SHAPE_CONSTRAINTS[dtype] for one in classes]
    return max(one.sparse_min_rows for one in limits), max(one.sparse_min_cols for one in limits)


def _replace(packer: Packer, fused: Fused, compress: Compress, compressed: dict[str, fx.Node]) -> None:
    """Let *fused* be computed from its compressed weight; those there are already are in *compressed*."""
    weight, name = fused.weight, str(fused.weight.target)
    if name not in compressed:
        dense = packer.program.constants[name].contiguous()
        packer.program.constants[f"{name}_2_4"] = Compressed(compress(dense), dense.device)
        with packer.graph.inserting_after(weight):
            compressed[name] = packer.graph.get_attr(f"{name}_2_4")
    y = packer.call(semi_structured_linear, (fused.x, compressed[name], fused.bias), fused.node)
    packer.finish(fused, y, add=fused.residual is not None, activate=True)
    packer.release(weight)


def _remarks(fast: int, dense: Counter[str], *, here: bool) -> list[str]:
    if not fast and not dense:
        return []
    how = "" if here else ", once it is compiled on such a machine"
    notes = [f"2:4: {fast} linears on sparse tensor cores{how}; {dense.total()} layers with 2:4 weights stay dense"]
    return notes + [f"2:4: dense, {count} ×: {reason}" for reason, count in dense.items()]
