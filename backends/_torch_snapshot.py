"""A lowered program is a snapshot: it keeps no tensor that somebody else may write to.

Weights that are packed are copies already. What is left (biases, embeddings, small matrices) would otherwise follow
the next optimizer step of the model it came from, and the packed ones would not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._prims_common import is_non_overlapping_and_dense_or_false


def own(constants: dict[str, Any]) -> None:
    """Replace every dense tensor of *constants* by a copy with the same strides, one by one.

    Of a view with gaps or repeated elements (a slice, an expanded row) all the memory behind it is copied, once.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    for name, value in constants.items():
        if not isinstance(value, torch.Tensor) or value.layout == torch._mkldnn:  # type: ignore[attr-defined]
            continue
        if value.layout != torch.strided or is_non_overlapping_and_dense_or_false(value):
            constants[name] = value.clone()
            continue
        whole = value.untyped_storage()
        if whole.data_ptr() not in storages:
            storages[whole.data_ptr()] = whole.clone()
        place = (value.storage_offset(), value.shape, value.stride())
        constants[name] = value.new_empty(0).set_(storages[whole.data_ptr()], *place)
