"""Calibration data in other batch sizes than the model was captured for, and in an order of their own."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.errors import InputError


def calibration(data: Any, *inputs: torch.Tensor, dynamic: Any = None) -> list[list[torch.Tensor]]:
    return list(
        Calibration(
            data,
            capture(
                nn.Bilinear(4, 4, 2) if len(inputs) > 1 else nn.Linear(4, 2), inputs, None, dynamic
            ).program.signature,
        ).batches()
    )


def test_larger_batches_are_cut_and_a_short_rest_is_left_out() -> None:
    x = torch.arange(28.0).reshape(7, 4)
    pieces = calibration([(x,)], torch.randn(3, 4))
    assert [p.tolist() for [p] in pieces] == [x[:3].tolist(), x[3:6].tolist()]


def test_all_inputs_are_cut_alike() -> None:
    pieces = calibration([(torch.randn(4, 4), torch.randn(4, 4))], torch.randn(2, 4), torch.randn(2, 4))
    assert [[len(x) for x in piece] for piece in pieces] == [[2, 2], [2, 2]]


def test_a_dynamic_batch_is_not_cut() -> None:
    pieces = calibration([(torch.randn(7, 4),)], torch.randn(3, 4), dynamic=({0: torch.export.Dim("n")},))
    assert [len(x) for [x] in pieces] == [7]


def test_batches_that_are_all_too_small_are_an_error() -> None:
    with pytest.raises(InputError, match="as many rows"):
        calibration([(torch.randn(2, 4),)], torch.randn(3, 4))


def test_another_shape_is_an_error_that_names_the_batch() -> None:
    with pytest.raises(InputError, match=r"calibration batch 1: input 'input'"):
        calibration([(torch.randn(3, 4),), (torch.randn(3, 5),)], torch.randn(3, 4))


class Shuffled:
    """Iterable data in another order each time, by each of the sources of randomness that people use."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __iter__(self) -> Iterator[torch.Tensor]:
        rows = torch.arange(20.0).reshape(10, 2).tolist()
        if self.source == "python":
            random.shuffle(rows)
        elif self.source == "numpy":
            numpy.random.shuffle(rows)
        elif self.source == "os":
            random.SystemRandom().shuffle(rows)
        yield from torch.tensor(rows)


def rows() -> TensorDataset:
    return TensorDataset(torch.arange(400.0).reshape(100, 4), torch.arange(100))


@pytest.mark.parametrize(
    "data",
    [
        DataLoader(rows(), 5, shuffle=True),
        DataLoader(rows(), 5, shuffle=True, generator=torch.Generator().manual_seed(1)),
        DataLoader(rows(), 5, sampler=RandomSampler(rows(), generator=torch.Generator().manual_seed(2))),
        Shuffled("python"),
        Shuffled("numpy"),
    ],
)
def test_shuffled_data_come_in_one_order_and_the_users_random_numbers_are_left_alone(data: Any) -> None:
    width = 2 if isinstance(data, Shuffled) else 4
    x = torch.zeros((2,)) if width == 2 else torch.zeros(5, 4)
    given = Calibration(data, capture(nn.Linear(width, 2), (x,), None, None).program.signature)
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()  # type: ignore[index]
    first, second = ([x for [x] in given.batches()] for _ in range(2))
    assert len(first) == len(second) > 1
    assert all(map(torch.equal, first, second))
    assert not torch.equal(torch.cat(first).flatten(), torch.cat(first).flatten().sort().values), "shuffled at all"
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), numpy.random.get_state()[1].tolist())  # type: ignore[index]


def test_data_that_change_are_warned_of() -> None:
    given = Calibration(Shuffled("os"), capture(nn.Linear(2, 2), (torch.zeros(2),), None, None).program.signature)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(given.batches())
    with pytest.warns(UserWarning, match="other batches each time"):
        [list(given.batches()) for _ in range(5)]
