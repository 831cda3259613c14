"""Ranges of values over calibration data: the float graph runs once over each batch, observers look on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.errors import InputError
from fxopt.execute import evaluate
from fxopt.passes.insert_fake_quant import observers
from fxopt.passes.insert_fake_quant.grid import Grid
from fxopt.passes.insert_fake_quant.insert import Range
from fxopt.program import Program, source_line

# Batches kept from calibration to check the result on: the second, then each eighth after it, at most so many.
_KEPT_EVERY, _MOST_KEPT = 8, 4


def is_kept(index: int) -> bool:
    """Whether batch number *index* is kept back from calibration."""
    return index % _KEPT_EVERY == 1 and index // _KEPT_EVERY < _MOST_KEPT


def kept_back(batches: Iterable[Sequence[Any]]) -> list[Sequence[Any]]:
    """The batches that no observer has seen; where there is one batch only, that one."""
    first = list(itertools.islice(batches, _KEPT_EVERY * _MOST_KEPT))
    return [batch for i, batch in enumerate(first) if is_kept(i)] or first


def observe(
    program: Program, batches: Iterator[Sequence[Any]], names: set[str], calibrator: str, grid: Grid
) -> dict[str, Range]:
    """The range of each value in *names*, over all batches that are not kept back.

    Raises:
        InputError: a value is NaN or infinite on some batch; the message names the op and its source line.
    """
    watched = {name: observers.create(calibrator) for name in sorted(names)}

    def look(node: fx.Node, value: Any) -> None:
        if node.name in watched:
            _update(watched[node.name], node, value)

    def check(node: fx.Node, value: Any) -> None:
        if node.name in watched and value.numel():
            _update(observers.create("minmax"), node, value)

    for index, batch in enumerate(batches):
        evaluate(program, batch, observe=check if is_kept(index) else look)
    return {name: Range(*observer.range(grid)) for name, observer in watched.items()}


def _update(observer: observers.Observer, node: fx.Node, value: torch.Tensor) -> None:
    try:
        observer.update(value)
    except InputError as error:
        where = source_line(node)
        place = "an input" if node.op == "placeholder" else f"{node.name}{f' ({where})' if where else ''}"
        raise InputError(f"calibration: {place} is not finite: {error}") from error
