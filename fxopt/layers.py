"""Each layer of a compiled graph in numbers: cost, size, bits, zeros, rank, noise, and how its values are spread.

Plain data, so that it outlives the tensors: the report keeps it, an artifact holds it, a page shows it.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxopt import cost, ops
from fxopt.errors import ArtifactError
from fxopt.program import Program, source_line
from fxopt.recording import pack, unpack
from fxopt.sparsity import matrix

if TYPE_CHECKING:
    from fxopt.report import PassRecord

_BINS = 48
_SAMPLE = 2**14  # values of a tensor that a histogram counts, at most
_GRID = (16, 32)  # cells of a map of zeros, at most: outputs, inputs
_SPARSE = 0.02  # zeros from which there is such a map


@dataclasses.dataclass(frozen=True)
class Spread:
    """How often values fall into bins of equal width.

    Attributes:
        low: smallest value; ``high``: largest.
        counts: of each bin from low to high. A large tensor is sampled.
        range: what the integers stand for; None where each channel has a range of its own, or nothing is quantized.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    range: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Layer:
    """One call that has a weight, or multiplies and adds.

    Attributes:
        node: its name in the graph; ``op``: what it calls; ``source``: ``file:line`` of the user's code, or "".
        weight: name of its weight, or ""; ``shape``: of it.
        macs: multiply-accumulates on the example inputs.
        bytes: of its weight, bias and scales.
        bits: of a number of its weight; None without one.
        zeros: share of its weight that is zero; None without one.
        rank: inner size where it is one of the thin layers that a weight was factorised into.
        mode: how it is quantized ("static", "dynamic", "weight-only", "float", "bf16"), or "".
        snr_db: signal-to-noise ratio of its result in decibels, as quantized; None where that was not measured.
        weights: spread of its weight; ``inputs``: of what it reads, where quantization looked at it.
        map: share of zeros in each part of the weight, rows of outputs by columns of inputs; () for a dense weight.
    """

    node: str
    op: str
    source: str
    weight: str
    shape: tuple[int, ...]
    macs: int
    bytes: int
    bits: int | None = None
    zeros: float | None = None
    rank: int | None = None
    mode: str = ""
    snr_db: float | None = None
    weights: Spread | None = None
    inputs: Spread | None = None
    map: tuple[tuple[float, ...], ...] = ()


def collect(program: Program, records: Sequence[PassRecord]) -> tuple[Layer, ...]:
    """The layers of *program*, in order, with what the passes found out about them."""
    known = next((r.details["quantization"] for r in reversed(records) if "quantization" in r.details), None)
    noise = {} if known is None else {one.name: one for one in known.layers}
    histograms: Mapping[str, Any] = {} if known is None else known.histograms
    seen: dict[str, tuple[float, Spread, tuple[tuple[float, ...], ...]]] = {}
    found = []
    for node in program.graph.nodes:
        if node.op != "call_function" or ops.namespace(node) == "quantized_decomposed":
            continue
        macs, holder = cost.node_macs(node), _weight(node)
        if not macs and holder is None:
            continue
        layer = Layer(node.name, ops.packet(node), source_line(node), "", (), macs, _bytes(node, program))
        tensor = None if holder is None else program.constants.get(str(holder[0].target))
        if holder is not None and isinstance(tensor, torch.Tensor) and _is_plain(tensor):
            layer = _with_weight(layer, str(holder[0].target), tensor, holder[1], seen)
        quality, drawn = noise.get(node.name), histograms.get(node.name)
        if quality is not None:
            snr = quality.snr_db if quality.snr_db is not None and math.isfinite(quality.snr_db) else None
            layer = dataclasses.replace(layer, mode=quality.mode, snr_db=snr)
        if drawn is not None:
            inputs = None if drawn.input is None else _thinned(drawn.input)
            layer = dataclasses.replace(layer, weights=_thinned(drawn.weight), inputs=inputs)
        found.append(layer)
    return tuple(found)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether its numbers can be counted: not sparse, not complex, not of eight-bit floats, and really there."""
    known = not tensor.is_floating_point() or tensor.element_size() > 1
    return known and tensor.layout == torch.strided and not tensor.is_complex() and tensor.device.type != "meta"


def _with_weight(layer: Layer, name: str, tensor: torch.Tensor, bits: int | None, seen: dict[str, Any]) -> Layer:
    if name not in seen:  # tied weights are looked at once
        zeros = 1 - int(torch.count_nonzero(tensor)) / max(1, tensor.numel())
        seen[name] = zeros, spread(tensor), zero_map(tensor) if zeros >= _SPARSE else ()
    zeros, weights, grid = seen[name]
    rank = None
    if ".low_rank_" in name and tensor.dim() >= 2:
        rank = min(tensor.shape[:2])
    return dataclasses.replace(
        layer,
        weight=name,
        shape=tuple(tensor.shape),
        bits=bits or tensor.element_size() * 8,
        zeros=zeros,
        rank=rank,
        weights=weights,
        map=grid,
    )


def _weight(node: fx.Node) -> tuple[fx.Node, int | None] | None:
    """The constant that *node* multiplies by, and its bits where it is quantized."""
    arguments = ops.arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {}
    value: Any = arguments.get("weight")
    bits: int | None = None
    while isinstance(value, fx.Node) and value.op == "call_function":
        inner = ops.arguments(value) if isinstance(value.target, torch._ops.OpOverload) else {}
        if "quant_min" in inner and bits is None:
            bits = math.ceil(math.log2(int(inner["quant_max"]) - int(inner["quant_min"]) + 1))
        value = value.args[0] if value.args else None
    return (value, bits) if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _bytes(node: fx.Node, program: Program) -> int:
    """Bytes of the constants that *node* reads, those behind a dequantized weight included."""
    pending, held = list(node.all_input_nodes), set[str]()
    while pending:
        one = pending.pop()
        if one.op == "get_attr":
            held.add(str(one.target))
        elif one.op == "call_function" and _of_constants(one):
            pending.extend(one.all_input_nodes)
    values = [program.constants.get(name) for name in held]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor) and value.layout == torch.strided)


def _of_constants(node: fx.Node) -> bool:
    """Whether *node* is a step of quantizing or dequantizing a constant."""
    chain: Any = node
    while isinstance(chain, fx.Node) and chain.op == "call_function":
        if ops.namespace(chain) != "quantized_decomposed" or not chain.args:
            return False
        chain = chain.args[0]
    return isinstance(chain, fx.Node) and chain.op == "get_attr"


def spread(tensor: torch.Tensor) -> Spread:
    """The :class:`Spread` of the finite values of *tensor*."""
    flat = tensor.detach().reshape(-1)
    flat = flat[:: _stride(flat.numel())].to(torch.float32).cpu()
    flat = flat[flat.isfinite()]
    low, high = (float(end) for end in torch.aminmax(flat)) if len(flat) else (0.0, 0.0)
    counts = torch.histc(flat, _BINS, low, high) if high > low else torch.tensor([float(len(flat))])
    return Spread(low, high, tuple(int(n) for n in counts.tolist()))


def _stride(numel: int) -> int:
    """An odd distance between counted values, so that even sizes do not make it count one column alone."""
    stride = max(1, -(-numel // _SAMPLE))
    return stride if stride == 1 else stride | 1


def _thinned(counts: Any) -> Spread:
    """The histogram that quantization drew, in fewer bins."""
    step = max(1, len(counts.counts) // _BINS)
    groups = [counts.counts[i : i + step] for i in range(0, len(counts.counts), step)]
    width = (counts.high - counts.low) / max(1, len(counts.counts))
    high = counts.low + width * step * len(groups)
    return Spread(counts.low, high, tuple(int(sum(group)) for group in groups), counts.range)


def zero_map(weight: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    """Share of zeros in each of at most 16×32 parts of *weight* as (outputs, inputs); () for a vector."""
    if weight.dim() < 2 or not weight.numel():
        return ()
    rows_seen = matrix(weight)
    zero = (rows_seen[:: max(1, len(rows_seen) // 256)] == 0).float()  # of a large one, some of its outputs
    rows, columns = min(_GRID[0], zero.shape[0]), min(_GRID[1], zero.shape[1])
    pooled = torch.nn.functional.adaptive_avg_pool2d(zero[None], (rows, columns))[0]
    return tuple(tuple(round(x, 3) for x in row) for row in pooled.tolist())


def encode_layers(layers: Sequence[Layer]) -> str:
    """*layers* as text for a file."""
    return base64.b64encode(pack([dataclasses.asdict(layer) for layer in layers])).decode()


def decode_layers(text: object) -> tuple[Layer, ...]:
    """What :func:`encode_layers` wrote; no layers of None.

    Raises:
        ArtifactError: it wrote no such thing.
    """
    if text is None:
        return ()
    try:
        return tuple(_layer(entry) for entry in unpack(base64.b64decode(str(text), validate=True)))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"its layers cannot be read: {error}") from error


def _layer(entry: Any) -> Layer:
    """The layer in *entry*, each field of its own type."""
    values: dict[str, Any] = {
        "node": str(entry["node"]),
        "op": str(entry["op"]),
        "source": str(entry["source"]),
        "weight": str(entry["weight"]),
        "shape": tuple(map(int, entry["shape"])),
        "macs": int(entry["macs"]),
        "bytes": int(entry["bytes"]),
        "mode": str(entry["mode"]),
        "map": tuple(tuple(map(float, row)) for row in entry["map"]),
        "weights": _spread(entry["weights"]),
        "inputs": _spread(entry["inputs"]),
    }
    for name, kind in (("bits", int), ("rank", int), ("zeros", float), ("snr_db", float)):
        values[name] = None if entry[name] is None else kind(entry[name])
    return Layer(**values)


def _spread(entry: Any) -> Spread | None:
    if entry is None:
        return None
    ends = entry["range"]
    given = None if ends is None else (float(ends[0]), float(ends[1]))
    return Spread(float(entry["low"]), float(entry["high"]), tuple(map(int, entry["counts"])), given)
