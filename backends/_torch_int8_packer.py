"""Int8 weights of a program: what they are in the graph, and how oneDNN wants them packed.

    conv(·, dequantize_per_channel(w int8, scales), b)    →    onednn.qconv_pointwise(q, packed w, scales, b')

The zero point of the activation moves into the bias, exactly:  Σ w·s_w·(q − z)·s  =  s_w·s·Σ w·q  −  s_w·s·z·Σ w.
oneDNN's own compensation for it is made anew in each call and cost 45 to 690 µs on Zen 4.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import fx

from fxopt import ops
from fxopt.backends._torch_int8_kernels import PackedLinear
from fxopt.backends._torch_packer import Packer
from fxopt.program import Program
from fxopt.quantized import DEQUANTIZE, DEQUANTIZE_CHANNEL, parameters

onednn = torch.ops.onednn


@dataclasses.dataclass(frozen=True)
class Weight:
    """An int8 weight.

    Attributes:
        holder: the get_attr node of the integers.
        values: the integers, [out, in / groups, ...].
        scales: float32, one for each output channel.
        source: what the graph says the scales are.
    """

    holder: fx.Node
    values: torch.Tensor
    scales: torch.Tensor
    source: object


def through_casts(node: fx.Node) -> fx.Node:
    """What *node* is a floating-point cast of, or *node* itself."""
    while node.op == "call_function" and ops.kind(node) == "cast" and len(node.all_input_nodes) == 1:
        value, source = node.meta.get("val"), node.all_input_nodes[0]
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            break
        node = source
    return node


class Int8Packer(Packer):
    """Packs int8 weights that lie on *device*, and makes the constants that go with them."""

    def __init__(self, program: Program, device: str = "cpu") -> None:
        super().__init__(program)
        self._device = device
        self._added: dict[tuple[object, ...], fx.Node] = {}

    def weight(self, node: fx.Node) -> Weight | None:
        """The int8 weight behind the float one that *node* is: symmetric, scaled by output channel or as a whole."""
        node = through_casts(node)
        if node.target not in (DEQUANTIZE, DEQUANTIZE_CHANNEL):
            return None
        holder, p = node.all_input_nodes[0], parameters(node)
        values = self.tensor(holder)
        if values is None or values.dtype != torch.int8 or values.device.type != self._device or 0 in values.shape:
            return None
        if node.target is DEQUANTIZE:
            scales = torch.full((values.shape[0],), float(p.scale))  # type: ignore[arg-type]
            return Weight(holder, values, scales, p.scale) if p.zero_point == 0 else None
        assert isinstance(p.scale, fx.Node)
        by_channel = self.tensor(p.scale)
        if by_channel is None or p.axis != 0 or not self._is_zero(p.zero_point):
            return None
        return Weight(holder, values, by_channel.float(), p.scale)

    def _is_zero(self, zero_point: object) -> bool:
        if not isinstance(zero_point, fx.Node):
            return not zero_point
        value = self.tensor(zero_point)
        return value is not None and not bool(value.any())

    def add(self, hint: str, value: torch.Tensor | PackedLinear) -> fx.Node:
        """A get_attr node for a new constant."""
        name = f"{hint}_int8_{len(self.program.constants)}"
        self.program.constants[name] = value
        first = next(n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr"))
        with self.graph.inserting_before(first):
            node = self.graph.get_attr(name)
        if isinstance(value, torch.Tensor):
            node.meta["val"] = value
        return node

    def scales(self, weight: Weight) -> fx.Node:
        """A node for the scales of *weight*."""
        key = ("scales", weight.holder, weight.source)
        if key not in self._added:
            self._added[key] = self.add(f"{weight.holder.target}_scales", weight.scales.contiguous())
        return self._added[key]

    def zeros(self) -> fx.Node:
        """A node for the zero points of all weights."""
        if ("zeros",) not in self._added:
            self._added["zeros",] = self.add("zero_points", torch.zeros(1, dtype=torch.int64))
        return self._added["zeros",]

    def folded_bias(self, weight: Weight, bias: fx.Node | None, scale: float, zero_point: int) -> fx.Node | None:
        """The float32 bias that also takes the activation's zero point; None for none. *bias* is a constant."""
        source = None if bias is None else through_casts(bias)
        value = None if source is None else self.tensor(source)
        if source is None or value is None:
            if zero_point == 0:
                return None
            total = torch.zeros(weight.values.shape[0], dtype=torch.float64)
        elif zero_point == 0 and value.dtype == torch.float32:
            return source
        else:
            total = value.double()
            self.originals[str(source.target)] = value.detach().clone().clone
        sums = weight.values.flatten(1).sum(1).double()
        folded = total - sums * weight.scales.double() * (scale * zero_point)
        return self.add(f"{weight.holder.target}_bias", folded.float())

    def convolution(
        self,
        weight: Weight,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        sizes: tuple[int, ...] | None,
    ) -> fx.Node:
        """A node for the packed weight of a 2-D or 3-D convolution. A 1-D one is packed as 2-D."""
        spatial = (tuple(stride), tuple(padding), tuple(dilation), groups)

        def pack(w: torch.Tensor) -> torch.Tensor:
            w = w.unsqueeze(2) if w.dim() == 3 else w
            packed: torch.Tensor = onednn.qconv_prepack(w.contiguous(), weight.scales, 1.0, 0, *spatial, sizes)
            return packed

        return self.constant(weight.holder, ("qconv", *spatial, sizes), pack)

    def linear(self, weight: Weight, sizes: tuple[int, ...] | None) -> fx.Node:
        """A node for the packed weight of a linear; the weight may be that of a convolution of one pixel."""

        def pack(w: torch.Tensor) -> torch.Tensor:
            packed: torch.Tensor = onednn.qlinear_prepack(w.flatten(1).contiguous(), sizes)
            return packed

        node = self.constant(weight.holder, ("qlinear", sizes), pack)
        packed = self.program.constants[str(node.target)]
        self.originals[str(weight.holder.target)] = functools.partial(_untransposed, packed, weight.values.shape)
        return node

    def dynamic_linear(self, weight: Weight, bias: torch.Tensor | None) -> fx.Node:
        """A node for weight and bias as ATen's dynamic linears want them."""
        packed = PackedLinear(weight.values.contiguous(), weight.scales, None if bias is None else bias.float())
        self.originals[str(weight.holder.target)] = packed.unpacked
        return self.add(f"{weight.holder.target}", packed)

    def dequantized(self, node: fx.Node) -> None:
        """Compute a dequantize node of a constant for good."""
        values = self.tensor(node.all_input_nodes[0])
        args = fx.node.map_arg(node.args, self.tensor)
        if values is None or any(isinstance(a, fx.Node) and args[i] is None for i, a in enumerate(node.args)):
            return
        assert callable(node.target)
        self.originals[str(node.all_input_nodes[0].target)] = values.clone
        constant = self.add(f"{node.all_input_nodes[0].target}", node.target(*args, **node.kwargs))
        node.replace_all_uses_with(constant)

    def drop_unused(self) -> None:
        """Erase dequantize nodes and constants that nobody reads any more."""
        self.program.remove_dead()


def _untransposed(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    dense = packed.to_dense() if packed.is_mkldnn else packed
    return dense.t().reshape(shape)
