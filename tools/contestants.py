"""The engines that tools/bench sets side by side, fxopt on each of its backends among them.

A contestant is built from an eager model and its inputs and gives a call without arguments. All of them get the same
number of threads. The plain ONNX file, exported once from the untouched model, serves onnxruntime and OpenVINO.
Those that compute in int8 (``INT8``) are calibrated with the same random data.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxopt
from tools import calibration, quantizers

Call = Callable[[], Any]
BF16 = "cast-precision{dtype=bf16}"
QUANTIZED = "insert-fake-quant"
BY_LATENCY = "insert-fake-quant{objective=latency}"
BATCHES = 8
"""Calibration batches of the int8 contestants."""


@dataclass
class Subject:
    """The model under test.

    Attributes:
        model: eager, in eval mode.
        inputs: positional inputs.
        threads: number of threads of every engine.
        folder: for files.
        trials: measurements of those that tune.
    """

    model: nn.Module
    inputs: tuple[torch.Tensor, ...]
    threads: int
    folder: Path
    trials: int = 128
    _onnx: Path | None = field(default=None, init=False)

    @property
    def onnx(self) -> Path:
        """The plain ONNX export of the model, made at the first use."""
        if self._onnx is None:
            path = self.folder / "plain.onnx"
            torch.onnx.export(self.model, self.inputs, path, dynamo=True, verbose=False)
            self._onnx = path
        return self._onnx

    @property
    def calibration(self) -> list[calibration.Inputs]:
        """The inputs, and random batches shaped like them."""
        return [self.inputs, *calibration.samples(self.inputs, BATCHES - 1)]

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """The inputs by their names in the ONNX file."""
        return quantizers.arrays(self.onnx, [self.inputs])[0]


def eager(subject: Subject) -> Call:
    """The model as it is."""

    def call() -> Any:
        with torch.inference_mode():
            return subject.model(*subject.inputs)

    return call


def inductor(subject: Subject, *, bf16: bool = False, int8: bool = False) -> Call:
    """torch.compile with frozen weights; in bf16 under autocast. Caches are off, so that compile time is honest."""
    import torch._inductor.config as config

    config.force_disable_caches = True
    config.freezing = True
    model = quantizers.torchao_pt2e(subject.model, subject.inputs, subject.calibration) if int8 else subject.model
    compiled = torch.compile(model)

    def call() -> Any:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return compiled(*subject.inputs)

    return call


def onnxruntime(subject: Subject, *, int8: str = "") -> Call:
    """The plain file, or what *int8* ("static" or "dynamic") makes of it, with onnxruntime's own optimizations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = subject.threads
    path = subject.onnx
    if int8 == "static":
        path = quantizers.onnxruntime_static(path, subject.calibration, subject.folder)
    elif int8 == "dynamic":
        path = quantizers.onnxruntime_dynamic(path, subject.folder)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = subject.arrays()
    return lambda: session.run(None, feed)


def openvino(subject: Subject, *, precision: str = "f32", int8: bool = False) -> Call:
    """The plain file, or what NNCF makes of it, with OpenVINO's own optimizations.

    Args:
        subject: the model.
        precision: of what is not int8; "auto" is OpenVINO's choice, bf16 where the machine has it.
        int8: quantize with NNCF.
    """
    import openvino as ov

    options = {"INFERENCE_NUM_THREADS": subject.threads, "PERFORMANCE_HINT": "LATENCY"}
    if precision != "auto":
        options["INFERENCE_PRECISION_HINT"] = precision
    model = quantizers.nncf(subject.onnx, subject.calibration, subject.model) if int8 else str(subject.onnx)
    compiled = ov.Core().compile_model(model, "CPU", options)
    feed = list(subject.arrays().values())

    def call() -> Any:
        return list(compiled(feed, share_inputs=True, share_outputs=True).values())

    return call


def with_fxopt(subject: Subject, *, backend: str, passes: str | None = None, **options: Any) -> Call:
    """What fxopt makes of the model for *backend*, with everything it does by default, verification included."""
    if backend in ("onnx", "openvino", "tvm"):
        options["threads"] = subject.threads
    compiled = fxopt.compile(
        subject.model,
        example_inputs=subject.inputs,
        passes=passes,
        calibration=subject.calibration if passes in (QUANTIZED, BY_LATENCY) else None,
        backend=backend,
        backend_options=options or None,
    )
    return lambda: compiled(*subject.inputs)


def tuned(subject: Subject) -> Call:
    """Fxopt on TVM after as many trials as the subject says, from nothing."""
    database = subject.folder / "tuning.jsonl"
    database.unlink(missing_ok=True)
    return with_fxopt(subject, backend="tvm", tune={"trials": subject.trials, "database": database})


def metaschedule(subject: Subject) -> Call:
    """TVM's importer, operators and tuner."""
    from tools import metaschedule

    run = metaschedule.tuned(subject.onnx, subject.folder / "metaschedule", subject.trials, subject.threads)
    inputs = list(subject.arrays().values())
    return lambda: run(inputs)


CONTESTANTS: dict[str, Callable[[Subject], Call]] = {
    "eager": eager,
    "inductor": inductor,
    "inductor bf16": lambda s: inductor(s, bf16=True),
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "openvino bf16": lambda s: openvino(s, precision="bf16"),
    "fxopt torch": lambda s: with_fxopt(s, backend="torch"),
    "fxopt torch bf16": lambda s: with_fxopt(s, backend="torch", passes=BF16),
    "fxopt onnx": lambda s: with_fxopt(s, backend="onnx"),
    "fxopt openvino": lambda s: with_fxopt(s, backend="openvino"),
    "fxopt openvino bf16": lambda s: with_fxopt(s, backend="openvino", passes=BF16),
    "fxopt tvm": lambda s: with_fxopt(s, backend="tvm"),
    "fxopt auto": lambda s: with_fxopt(s, backend="auto"),
}

INT8: dict[str, Callable[[Subject], Call]] = {
    "eager": eager,
    "torchao inductor int8": lambda s: inductor(s, int8=True),
    "onnxruntime int8": lambda s: onnxruntime(s, int8="static"),
    "onnxruntime int8 dynamic": lambda s: onnxruntime(s, int8="dynamic"),
    "nncf openvino int8": lambda s: openvino(s, precision="auto", int8=True),
    "fxopt torch int8": lambda s: with_fxopt(s, backend="torch", passes=QUANTIZED),
    "fxopt onnx int8": lambda s: with_fxopt(s, backend="onnx", passes=QUANTIZED),
    "fxopt openvino int8": lambda s: with_fxopt(s, backend="openvino", passes=QUANTIZED),
    "fxopt tvm int8": lambda s: with_fxopt(s, backend="tvm", passes=QUANTIZED),
    "fxopt auto int8": lambda s: with_fxopt(s, backend="auto", passes=QUANTIZED),
}
CHOSEN: dict[str, Callable[[Subject], Call]] = {
    f"fxopt {backend} by latency": functools.partial(with_fxopt, backend=backend, passes=BY_LATENCY)
    for backend in ("torch", "onnx", "openvino")
}
TUNED: dict[str, Callable[[Subject], Call]] = {"fxopt tvm tuned": tuned, "tvm metaschedule": metaschedule}
ALL = {**CONTESTANTS, **INT8, **CHOSEN, **TUNED}
"""Those of CHOSEN and TUNED measure while they build, for minutes, and run only where they are named."""

PEERS: dict[str, tuple[str, ...]] = {
    "fxopt torch": ("inductor",),
    "fxopt torch bf16": ("inductor bf16",),
    "fxopt onnx": ("onnxruntime",),
    "fxopt openvino": ("openvino",),
    "fxopt openvino bf16": ("openvino bf16",),
    "fxopt tvm": ("onnxruntime",),
    "fxopt tvm tuned": ("onnxruntime",),
    "fxopt auto": ("inductor", "onnxruntime", "openvino"),
    "fxopt torch int8": ("torchao inductor int8", "onnxruntime int8", "onnxruntime int8 dynamic"),
    "fxopt onnx int8": ("onnxruntime int8", "onnxruntime int8 dynamic"),
    "fxopt openvino int8": ("nncf openvino int8",),
    "fxopt tvm int8": ("onnxruntime int8", "onnxruntime int8 dynamic"),
    **{name: (name.replace("by latency", "int8"),) for name in CHOSEN},
    "fxopt auto int8": ("nncf openvino int8", "onnxruntime int8", "onnxruntime int8 dynamic", "torchao inductor int8"),
}
"""What each fxopt contestant is held against: the fastest of these, in the same run."""


@dataclass
class Built:
    """A contestant that stands, or the reason why it does not.

    Attributes:
        call: runs the model once; None after a failure.
        seconds: building it, its first call included (the ONNX export too where it is used).
        error: largest difference from eager relative to eager's range.
        failure: the engine's error, or "".
    """

    call: Call | None
    seconds: float = 0.0
    error: float = float("nan")
    failure: str = ""


def build(name: str, subject: Subject, *, limit_s: float = 300.0) -> Built:
    """Builds the contestant *name* and calls it once; a failure is an answer, too."""
    start = time.perf_counter()
    try:
        subject._onnx = None  # every contestant pays for its own export
        with time_limit(limit_s):
            call = ALL[name](subject)
            result = call()
        seconds = time.perf_counter() - start
        return Built(call, seconds, difference(result, eager(subject)()))
    except Exception as error:
        return Built(None, time.perf_counter() - start, failure=one_line(error))


def one_line(error: Exception) -> str:
    """Kind and first line of *error*, at most 200 characters of it."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the main thread after *seconds*."""

    def expired(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def difference(result: Any, expected: Any) -> float:
    """Largest difference of a tensor from eager's, relative to the range of eager's."""
    pairs = zip(leaves(result), leaves(expected), strict=True)
    return max(float((a - b).abs().max() / (b.max() - b.min())) for a, b in pairs)


def leaves(value: Any) -> list[torch.Tensor]:
    """The tensors and arrays in *value* as f64 tensors, in order."""
    found = [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor | np.ndarray)]
    return [torch.as_tensor(x).detach().double() for x in found]


def warm_up(names: list[str], threads: int) -> None:
    """Builds every contestant for a tiny model once: imports and one-off checks of an engine are not compile time."""
    torch.set_num_threads(threads)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(model, (torch.randn(1, 3, 8, 8),), threads, Path(folder), trials=0)
        for name in names:
            build(name, subject)
