"""Calibration data: the user's iterable, seen as flat inputs of the captured graph."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from fxopt.errors import InputError
from fxopt.notice import warn
from fxopt.replay import Replay
from fxopt.signature import Signature


class Calibration:
    """An iterable of batches, in the same order for every pass. A one-shot iterator is kept for later passes.

    A batch is a tuple or list of positional inputs (surplus ones, such as a DataLoader's labels, are dropped), a
    mapping of keyword inputs, or one tensor. It may have more rows than the example inputs: where the graph is fixed to
    theirs, it is cut.

    Raises:
        InputError: *data* is no iterable, or is empty.
    """

    def __init__(self, data: Iterable[Any], signature: Signature) -> None:
        if isinstance(data, torch.Tensor) or not isinstance(data, Iterable):
            raise InputError(f"calibration must be an iterable of input tuples, not {type(data).__name__}")
        self._data = list(data) if isinstance(data, Iterator) else Replay(data)
        self._first: list[Any] | None = None
        self.signature = signature
        first = next(iter(itertools.islice(self._data, 1)), None)
        if first is None:
            raise InputError("calibration is empty: it must give at least one batch of inputs")
        self._leaves(first)

    def batches(self) -> Iterator[list[Any]]:
        """Flat input leaves of each batch, in pieces of the size that the graph was captured for where that is fixed.

        Raises:
            InputError: a batch does not fit the captured inputs; the message says which, and how.
        """
        yield from (leaves for leaves, _ in self.labelled())

    def labelled(self) -> Iterator[tuple[list[Any], tuple[Any, ...]]]:
        """As :meth:`batches`, each with what the batch holds besides the inputs of the model, such as labels."""
        fitting = 0
        for index, batch in enumerate(self._data):
            for leaves, rest in self._pieces(self._leaves(batch), self._rest(batch)):
                try:
                    self.signature.check(leaves)
                except InputError as error:
                    raise InputError(f"calibration batch {index}: {error}") from error
                if not fitting:
                    self._warn_of_other_order(leaves)
                fitting += 1
                yield leaves, rest
        if not fitting:
            raise InputError(
                "no calibration batch has as many rows as the example inputs, for which the model is fixed"
            )

    def _warn_of_other_order(self, leaves: list[Any]) -> None:
        """Warn where data are not what they were: samples kept back to check a result may then have been seen."""
        if self._first is None:
            self._first = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]
        elif not all(map(_same, self._first, leaves)):
            warn(
                "calibration gives other batches each time it is iterated, so a result may be checked on samples that "
                "it was made from: give a list, or seed what shuffles"
            )

    def _pieces(self, leaves: list[Any], rest: tuple[Any, ...]) -> Iterator[tuple[list[Any], tuple[Any, ...]]]:
        """All cut along the first dimension, where that is fixed at another size; too few rows are left out."""
        cut: dict[int, tuple[int, int]] = {}
        for i, (leaf, value) in enumerate(zip(self.signature.inputs, leaves, strict=True)):
            if leaf.shape and isinstance(value, torch.Tensor) and value.dim() == len(leaf.shape):
                rows = leaf.shape[0]
                if isinstance(rows, int) and rows != value.shape[0]:
                    cut[i] = (rows, value.shape[0])
        if len(set(cut.values())) != 1 or 0 in next(iter(cut.values())):
            yield leaves, rest
            return
        [(rows, given)] = set(cut.values())
        for start in range(0, given - rows + 1, rows):
            piece = slice(start, start + rows)
            alike = (x[piece] if isinstance(x, torch.Tensor) and x.dim() and len(x) == given else x for x in rest)
            yield [x[piece] if i in cut else x for i, x in enumerate(leaves)], tuple(alike)

    def _leaves(self, batch: Any) -> list[Any]:
        if isinstance(batch, torch.Tensor):
            return self.signature.flatten((batch,), {})
        if isinstance(batch, Mapping):
            return self.signature.flatten((), batch)
        if not isinstance(batch, (tuple, list)):
            raise InputError(f"a calibration batch must be a tuple of inputs, a mapping or a tensor, not {type(batch)}")
        return self.signature.flatten(tuple(batch[: self._positional]), {})

    def _rest(self, batch: Any) -> tuple[Any, ...]:
        return tuple(batch[self._positional :]) if isinstance(batch, (tuple, list)) else ()

    @property
    def _positional(self) -> int:
        """How many positional inputs the model takes."""
        return len(self.signature.in_spec.children()[0].children())


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        dense = a.layout is b.layout is torch.strided
        return not dense or (a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()))
    return bool(a == b)
