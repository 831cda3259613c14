"""Calibration data: the user's iterable, seen as flat inputs of the captured graph."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from fxopt.errors import InputError
from fxopt.signature import Signature


class Calibration:
    """An iterable of batches. A one-shot iterator is kept for later passes; anything else is iterated anew each time.

    A batch is a tuple or list of positional inputs (surplus ones, such as a DataLoader's labels, are dropped), a
    mapping of keyword inputs, or one tensor.

    Raises:
        InputError: *data* is no iterable, or is empty.
    """

    def __init__(self, data: Iterable[Any], signature: Signature) -> None:
        if isinstance(data, torch.Tensor) or not isinstance(data, Iterable):
            raise InputError(f"calibration must be an iterable of input tuples, not {type(data).__name__}")
        self._data = list(data) if isinstance(data, Iterator) else data
        self._signature = signature
        first = next(iter(itertools.islice(self._data, 1)), None)
        if first is None:
            raise InputError("calibration is empty: it must give at least one batch of inputs")
        self._leaves(first)

    def batches(self) -> Iterator[list[Any]]:
        """Flat input leaves of each batch."""
        return (self._leaves(batch) for batch in self._data)

    def _leaves(self, batch: Any) -> list[Any]:
        if isinstance(batch, torch.Tensor):
            return self._signature.flatten((batch,), {})
        if isinstance(batch, Mapping):
            return self._signature.flatten((), batch)
        if not isinstance(batch, (tuple, list)):
            raise InputError(f"a calibration batch must be a tuple of inputs, a mapping or a tensor, not {type(batch)}")
        count = len(self._signature.in_spec.children()[0].children())
        return self._signature.flatten(tuple(batch[:count]), {})
