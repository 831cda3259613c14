"""What a prepared model tells: of its layers once compiled, of what stayed in float, of what it cannot do."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from torch import nn

import fxopt
from tests.digits import Residual, digits, trained


def test_a_trained_model_reports_its_layers() -> None:
    prepared = fxopt.prepare(trained(Residual), digits().example(), calibration=digits().calibration())
    options: dict[str, Any] = {"backend": "torch", "calibration": digits().calibration()}
    report = prepared.compile(**options).report.quantization
    assert [layer.mode for layer in report.layers].count("static") == 4
    assert all(layer.snr_db > 20 and layer.low < layer.high for layer in report.layers if layer.mode == "static")
    assert report.outputs[0].cosine > 0.99
    assert "as trained" in str(report)
    with pytest.warns(UserWarning, match="nothing is quantized; the graph has been already"):
        again = prepared.compile(**options, passes="insert-fake-quant").report.quantization
    assert [layer.mode for layer in again.layers] == [layer.mode for layer in report.layers]


def test_a_layer_that_is_not_rounded_has_its_reason() -> None:
    options = "insert-fake-quant{qat=true,overrides=['head=float']}"
    prepared = fxopt.prepare(trained(Residual), digits().example(), passes=options)
    assert any("as asked" in skip.reason for skip in prepared.skips)


def test_a_prepared_model_says_what_to_do_instead() -> None:
    prepared = fxopt.prepare(trained(Residual), digits().example())
    with pytest.raises(TypeError, match="save its state_dict"):
        pickle.dumps(prepared)
    assert isinstance(copy.deepcopy(prepared), fxopt.PreparedModel)
    for model in (prepared, nn.DataParallel(prepared)):
        with pytest.raises(fxopt.InputError, match=r"call its compile\(\)"):
            fxopt.compile(model)
