"""Calibration data in other batch sizes than the model was captured for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

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
