"""The quality of what training rounded: each layer's integers against floats, as for quantization after training.

Weights come out of training as they are, so the reference has them rounded too, and activations in float: what is
measured is what rounding the activations costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fxopt import ops, quantized
from fxopt.passes.insert_fake_quant import pictures, quality
from fxopt.passes.insert_fake_quant.insert import Range
from fxopt.program import Program, source_line

_UNITS = ("conv", "conv_transpose", "linear")
_FLOAT = "not rounded in training; PreparedModel.skips has the reason"


def measure(exact: Program, converted: Program, batches: Sequence[Sequence[Any]]) -> quality.Quality:
    """Compare *converted*, which quantizes, with *exact*, the same graph without, on flat input *batches*."""
    units = {node.name: node for node in converted.graph.nodes if ops.kind(node) in _UNITS}
    inputs = {name: _range(unit.all_input_nodes[0]) for name, unit in units.items()}
    done = [name for name, found in inputs.items() if found is not None]
    noise = quality.layers(exact, converted, done, batches[0])
    nodes = {node.name: node for node in exact.graph.nodes}
    ranges = {nodes[name].all_input_nodes[0].name: found for name, found in inputs.items() if found is not None}
    shown = pictures.collect(exact, done, ranges, batches[0])
    layers = []
    for name, unit in units.items():
        given, weight = inputs[name], ops.arguments(nodes[name])["weight"]
        seen = shown[name].input if name in shown else None
        layers.append(
            quality.LayerQuality(
                name,
                ops.kind(unit),
                str(weight.target) if weight.op == "get_attr" else "",
                "static" if given else "float",
                noise[name].snr_db if name in noise else None,
                given.low if given else None,
                given.high if given else None,
                seen.clipped if seen else None,
                "" if given else _FLOAT,
                source_line(unit),
            )
        )
    return quality.Quality("as trained", tuple(quality.outputs(exact, converted, batches)), tuple(layers), shown)


def _range(value: fx.Node) -> Range | None:
    """What the integers that *value* is made of stand for."""
    if value.target is not quantized.DEQUANTIZE:
        return None
    how = quantized.parameters(value)
    assert isinstance(how.scale, float)
    assert isinstance(how.zero_point, int)
    return Range((how.qmin - how.zero_point) * how.scale, (how.qmax - how.zero_point) * how.scale)
