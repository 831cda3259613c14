"""What tools/accuracy compares: fp32, fxopt's int8 with and without fine-tuning, and the other engines' own int8.

A contestant is built from a case and gives a call that takes inputs, and the bytes its weights are stored in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxopt
from tools import digits, quantizers
from tools.calibration import Inputs

FINE_TUNING_STEPS = 120
RATE = 2e-5  # small: the networks have converged, and even in float fine-tuning moves a sample or two


@dataclass
class Case:
    """One model, and the data that every contestant gets.

    Attributes:
        name: of the model.
        model: eager, trained, in eval mode.
        calibration: batches of inputs, all of one shape.
        held: batches of the same shape that nobody has seen.
        labels: i64[N] of all held-out samples; None where there is no task.
        data: what to fine-tune on; None where there is no task.
        folder: for files.
        threads: of every engine.
        steps: of fine-tuning.
    """

    name: str
    model: nn.Module
    calibration: list[Inputs]
    held: list[Inputs]
    labels: torch.Tensor | None
    data: digits.Digits | None
    folder: Path
    threads: int = 2
    steps: int = FINE_TUNING_STEPS
    _plain: Path | None = field(default=None, init=False)

    @property
    def inputs(self) -> Inputs:
        """Example inputs."""
        return self.calibration[0]

    @property
    def plain(self) -> Path:
        """The plain ONNX export of the model, made at the first use."""
        if self._plain is None:
            path = self.folder / "plain.onnx"
            torch.onnx.export(self.model, self.inputs, path, dynamo=True, verbose=False)
            self._plain = path
        return self._plain


@dataclass(frozen=True)
class Runner:
    """A model that stands: *call* takes positional inputs; *size* is bytes of its weights as stored."""

    call: Callable[..., Any]
    size: int


def eager(case: Case) -> Runner:
    """The model as it is."""
    return Runner(case.model, quantizers.weight_bytes(case.model))


def with_fxopt(case: Case, backend: str) -> Runner:
    """Quantized after training."""
    compiled = fxopt.compile(
        case.model,
        example_inputs=case.inputs,
        passes="insert-fake-quant",
        calibration=case.calibration,
        backend=backend,
    )
    return Runner(compiled, compiled.report.bytes[1])


def fine_tuned(case: Case, backend: str) -> Runner:
    """Quantized, then fine-tuned with the rounding in place by an ordinary loop (QAT)."""
    if case.data is None:
        raise ValueError("there is no task to fine-tune on")
    torch.manual_seed(0)
    prepared = fxopt.prepare(
        case.model,
        case.inputs,
        passes="insert-fake-quant{qat=true}",
        calibration=case.calibration,
        backend=backend,
    )
    prepared.freeze_batch_norm()  # its statistics are settled, and batches are small
    digits.fit(prepared, case.data, steps=case.steps, rate=RATE, batch=len(case.inputs[0]))
    prepared.eval()
    compiled = prepared.compile(backend=backend)
    return Runner(compiled, compiled.report.bytes[1])


def _onnxruntime(case: Case, path: Path) -> Runner:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = case.threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = quantizers.input_names(case.plain)

    def call(*inputs: torch.Tensor) -> Any:
        return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})

    return Runner(call, quantizers.weight_bytes(path))


def onnxruntime_static(case: Case) -> Runner:
    """What quantize_static of onnxruntime makes of the plain file."""
    return _onnxruntime(case, quantizers.onnxruntime_static(case.plain, case.calibration, case.folder))


def onnxruntime_dynamic(case: Case) -> Runner:
    """What quantize_dynamic of onnxruntime makes of the plain file; only matrix products are quantized."""
    return _onnxruntime(case, quantizers.onnxruntime_dynamic(case.plain, case.folder))


def nncf(case: Case) -> Runner:
    """NNCF's post-training quantization, run by OpenVINO; what it leaves in float stays fp32."""
    import openvino as ov

    model = quantizers.nncf(case.plain, case.calibration, case.model)
    options = {"INFERENCE_NUM_THREADS": case.threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(model, "CPU", options)

    def call(*inputs: torch.Tensor) -> Any:
        return list(compiled([x.numpy() for x in inputs]).values())

    return Runner(call, quantizers.weight_bytes(model))


def torchao(case: Case, *, inductor: bool) -> Runner:
    """PT2E of torchao with the x86 quantizer: its graph in eager mode, or compiled by Inductor."""
    model = quantizers.torchao_pt2e(case.model, case.inputs, case.calibration)
    size = quantizers.weight_bytes(model)
    if not inductor:
        return Runner(model, size)
    import torch._inductor.config as config

    with config.patch(freezing=True), torch.no_grad():
        compiled = torch.compile(model)
        compiled(*case.inputs)
    return Runner(compiled, size)


CONTESTANTS: dict[str, Callable[[Case], Runner]] = {
    "eager fp32": eager,
    "fxopt torch": lambda case: with_fxopt(case, "torch"),
    "fxopt onnx": lambda case: with_fxopt(case, "onnx"),
    "fxopt openvino": lambda case: with_fxopt(case, "openvino"),
    "fxopt torch QAT": lambda case: fine_tuned(case, "torch"),
    "fxopt onnx QAT": lambda case: fine_tuned(case, "onnx"),
    "fxopt openvino QAT": lambda case: fine_tuned(case, "openvino"),
    "NNCF + OpenVINO": nncf,
    "onnxruntime static": onnxruntime_static,
    "onnxruntime dynamic": onnxruntime_dynamic,
    "torchao reference": lambda case: torchao(case, inductor=False),
    "torchao + Inductor": lambda case: torchao(case, inductor=True),
}
NEEDS_TASK = ("fxopt torch QAT", "fxopt onnx QAT", "fxopt openvino QAT")
"""Contestants that train, and are left out where there is nothing to train for."""
