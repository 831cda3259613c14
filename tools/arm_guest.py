"""Runs a saved model on the emulated machine, with nothing of fxopt or PyTorch: an ONNX file, or a library of TVM.

python3.11 arm_guest.py MODEL INPUTS.npz OUTPUTS.npz

Inputs are named 0, 1, ... in their order; outputs likewise.
"""

import pathlib
import sys
from typing import Any

import numpy


def main(model: str, inputs: str, outputs: str) -> None:
    """Read, run once, write."""
    loaded = numpy.load(inputs)
    given = [loaded[str(i)] for i in range(len(loaded))]
    results = _onnx(model, given) if model.endswith(".onnx") else _tvm(model, given)
    named: dict[str, Any] = {str(i): y for i, y in enumerate(results)}
    numpy.savez(outputs, **named)


def _onnx(model: str, given: list[numpy.ndarray]) -> list[numpy.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    results: list[numpy.ndarray] = session.run(None, dict(zip(names, given, strict=True)))
    return results


def _tvm(model: str, given: list[numpy.ndarray]) -> list[numpy.ndarray]:
    import tvm
    from tvm.runtime.vm import VirtualMachine

    library = tvm.runtime.load_module(model)
    weights = tvm.runtime.load_param_dict_from_file(str(pathlib.Path(model).with_suffix(".params")))
    main = VirtualMachine(library, tvm.cpu())["main"]
    values = [tvm.runtime.tensor(x) for x in given]
    result = main(*values, *(weights[str(i)] for i in range(len(weights))))
    return [y.numpy() for y in ([result] if isinstance(result, tvm.runtime.Tensor) else result)]


if __name__ == "__main__":
    main(*sys.argv[1:])
