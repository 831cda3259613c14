"""Which convs and linears int8 makes faster in this backend, as measured: facts that a quantization scheme can ask for.

Zen 4 with VNNI, two threads, one image, µs of a call with integers in and out against float32 in and out:

    3×3, 64 channels, 56²            302  against 1031        1×1, 256 → 64, 56²               158  against  487
    3×3, 512 channels, 7²            260  against  876        1×1, 960 → 240, one pixel         35  against   41
    3×3, 32 groups of 8, 14²          55  against   78        linear 128 × 768 → 3072          744  against 2708
    depthwise 3×3, 96 channels, 56²   85  against   68        linear 1 × 768 → 768              35  against   45
    depthwise 5×5, 960 channels, 7²   45  against   45        linear 1 × 72 → 24                27  against    5

A depthwise convolution gains nothing by itself, but between integers it saves 10 to 30 µs of conversions; so it stays.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from fxopt import ops
from fxopt.backends._torch_int8_plan import is_pixelwise
from fxopt.backends._torch_packer import Fused, hints, read

_FLOATS = (torch.float32, torch.bfloat16)
_TINY = 2**17


def worth(node: fx.Node) -> str | None:
    """Why *node*, a conv or linear of floats, would not be faster in int8; None where it is, or may be."""
    if ops.kind(node) == "conv_transpose":
        return "PyTorch has no int8 kernel for transposed convolutions"
    fused = read(node) if ops.kind(node) in ("conv", "linear") else None
    if fused is None:
        return "the int8 kernels take padding in numbers"
    if node.meta["val"].dtype not in _FLOATS:
        return f"the int8 kernels give no {node.meta['val'].dtype}"
    if fused.x.meta["val"].dim() < (fused.weight.meta["val"].dim() if fused.stride else 2):
        return "the int8 kernels want a batch"
    if is_tiny(fused):
        return f"fewer than {_TINY:,} multiplications: in float it is done before an int8 call has found its kernel"
    return None


def is_tiny(fused: Fused) -> bool:
    """Whether plain ATen is done with the unit in floats before oneDNN has found its int8 kernel."""
    if fused.stride and not is_pixelwise(fused):
        return False
    sizes = hints(fused.x)
    if sizes is None:
        return False
    rows = math.prod(sizes) // max(sizes[1 if fused.stride else -1], 1)
    return bool(rows * fused.weight.meta["val"].numel() <= _TINY)
