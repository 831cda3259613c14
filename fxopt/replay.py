"""The same batches in the same order each time data are iterated, though a loader shuffles or augments them."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch

_SEED = 0
_END = object()


class Replay:
    """*data*, iterated with random numbers of its own: PyTorch's, Python's, NumPy's and the DataLoader's generator.

    The random state of the user's program is as it was whenever a batch is given. Generators that the data bring along
    start anew from where they were.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data
        self._starts = [(generator, generator.get_state()) for generator in _generators(data)]

    def __iter__(self) -> Iterator[Any]:
        for generator, state in self._starts:
            generator.set_state(state)
        numbers = _Numbers()
        with numbers.current():
            batches = iter(self._data)
        while True:
            with numbers.current():
                batch = next(batches, _END)
            if batch is _END:
                return
            yield batch


def _generators(data: Any) -> list[torch.Generator]:
    """Those of a DataLoader and its samplers."""
    owners = [data, getattr(data, "sampler", None), getattr(getattr(data, "batch_sampler", None), "sampler", None)]
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


class _Numbers:
    """A random state that is in force for a while, goes on from there the next time, and leaves the user's alone."""

    def __init__(self) -> None:
        own = _states()
        torch.manual_seed(_SEED)
        random.seed(_SEED)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(_SEED)
        self._states = _states()
        _restore(own)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        own = _states()
        _restore(self._states)
        try:
            yield
        finally:
            self._states = _states()
            _restore(own)


def _states() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy else None


def _restore(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    numpy = sys.modules.get("numpy")
    if numpy and states[2] is not None:
        numpy.random.set_state(states[2])
