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
    mapping of keyword inputs, or one tensor. It may have more rows than the example inputs: where the graph is fixed to
    theirs, it is cut.

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
        """Flat input leaves of each batch, in pieces of the size that the graph was captured for where that is fixed.

        Raises:
            InputError: a batch does not fit the captured inputs; the message says which, and how.
        """
        fitting = 0
        for index, batch in enumerate(self._data):
            for leaves in self._pieces(self._leaves(batch)):
                try:
                    self._signature.check(leaves)
                except InputError as error:
                    raise InputError(f"calibration batch {index}: {error}") from error
                fitting += 1
                yield leaves
        if not fitting:
            raise InputError(
                "no calibration batch has as many rows as the example inputs, for which the model is fixed"
            )

    def _pieces(self, leaves: list[Any]) -> Iterator[list[Any]]:
        """*leaves* cut along the first dimension, where that is fixed at another size; a short rest is left out."""
        cut: dict[int, tuple[int, int]] = {}
        for i, (leaf, value) in enumerate(zip(self._signature.inputs, leaves, strict=True)):
            if leaf.shape and isinstance(value, torch.Tensor) and value.dim() == len(leaf.shape):
                rows = leaf.shape[0]
                if isinstance(rows, int) and rows != value.shape[0]:
                    cut[i] = (rows, value.shape[0])
        if len(set(cut.values())) != 1 or 0 in next(iter(cut.values())):
            yield leaves
            return
        [(rows, given)] = set(cut.values())
        for start in range(0, given - rows + 1, rows):
            yield [x[start : start + rows] if i in cut else x for i, x in enumerate(leaves)]

    def _leaves(self, batch: Any) -> list[Any]:
        if isinstance(batch, torch.Tensor):
            return self._signature.flatten((batch,), {})
        if isinstance(batch, Mapping):
            return self._signature.flatten((), batch)
        if not isinstance(batch, (tuple, list)):
            raise InputError(f"a calibration batch must be a tuple of inputs, a mapping or a tensor, not {type(batch)}")
        count = len(self._signature.in_spec.children()[0].children())
        return self._signature.flatten(tuple(batch[:count]), {})
