"""How the other engines' own tools quantize a model to int8, the way each of them documents it.

onnxruntime and NNCF start from the plain ONNX file, torchao from the eager model. All take the same calibration data.
"""

from __future__ import annotations

import contextlib
import io
import logging
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tools.calibration import Inputs

Arrays = dict[str, np.ndarray[Any, Any]]


def input_names(path: Path) -> list[str]:
    """Names of the inputs of the ONNX file at *path*."""
    import onnx

    return [value.name for value in onnx.load(path, load_external_data=False).graph.input]


def arrays(path: Path, batches: Sequence[Inputs]) -> list[Arrays]:
    """*batches* by the names that the inputs have in the ONNX file at *path*."""
    names = input_names(path)
    return [{name: x.numpy() for name, x in zip(names, batch, strict=True)} for batch in batches]


class _Reader:
    """onnxruntime asks for one batch after the other, and for None at the end."""

    def __init__(self, batches: list[Arrays]) -> None:
        self._rest: Iterator[Arrays] = iter(batches)

    def get_next(self) -> Arrays | None:
        return next(self._rest, None)


def onnxruntime_static(plain: Path, batches: Sequence[Inputs], folder: Path) -> Path:
    """A Q/DQ file: preprocessed (shapes, fusions), u8 activations, s8 weights with a scale for each channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    CalibrationDataReader.register(_Reader)
    prepared, path = folder / "preprocessed.onnx", folder / "static.onnx"
    quant_pre_process(plain, prepared, auto_merge=True)
    quantize_static(
        prepared,
        path,
        _Reader(arrays(plain, batches)),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return path


def onnxruntime_dynamic(plain: Path, folder: Path) -> Path:
    """A file whose matrix products take their ranges at each call; everything else stays in float."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, path = folder / "preprocessed.onnx", folder / "dynamic.onnx"
    quant_pre_process(plain, prepared, auto_merge=True)
    quantize_dynamic(
        prepared, path, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8
    )
    return path


def nncf(plain: Path, batches: Sequence[Inputs], model: nn.Module) -> Any:
    """An OpenVINO model quantized by NNCF; transformers get the settings that NNCF has for them.

    Args:
        plain: the ONNX file to start from.
        batches: calibration data; all of it is used.
        model: the eager model, which says whether it is a transformer: it has layer norms and no batch norm.
    """
    import nncf
    import openvino as ov

    nncf.set_log_level(logging.ERROR)
    data = nncf.Dataset(arrays(plain, batches))
    kind = nncf.ModelType.TRANSFORMER if is_transformer(model) else None
    source = ov.Core().read_model(str(plain))
    with contextlib.redirect_stdout(io.StringIO()):  # progress bars
        return nncf.quantize(source, data, subset_size=len(batches), model_type=kind)


def is_transformer(model: nn.Module) -> bool:
    """Whether *model* has layer norms or RMS norms, and no batch norm."""
    kinds = {type(module).__name__ for module in model.modules()}
    return any("LayerNorm" in kind or "RMSNorm" in kind for kind in kinds) and "BatchNorm2d" not in kinds


def torchao_pt2e(model: nn.Module, inputs: Inputs, batches: Sequence[Inputs]) -> torch.fx.GraphModule:
    """PT2E with the x86 quantizer: a graph with quantize and dequantize ops, for Inductor with frozen weights."""
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config())
    prepared: Any = prepare_pt2e(torch.export.export(model, inputs).module(), quantizer)
    with torch.no_grad():
        for batch in batches:
            prepared(*batch)
    converted: torch.fx.GraphModule = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    return converted


def weight_bytes(stored: object) -> int:
    """Bytes of the weights as an ONNX file, an OpenVINO model or a module stores them; int64 is shapes and indices."""
    if isinstance(stored, Path):
        import onnx

        values = [onnx.numpy_helper.to_array(value) for value in onnx.load(stored).graph.initializer]
        return sum(value.nbytes for value in values if value.dtype != np.int64)
    if isinstance(stored, torch.fx.GraphModule):  # what its graph reads; float originals may be left over beside it
        targets = {str(node.target) for node in stored.graph.nodes if node.op == "get_attr"}
        read = [operator.attrgetter(target)(stored) for target in targets]
        return sum(x.nbytes for x in read if isinstance(x, torch.Tensor))
    if isinstance(stored, nn.Module):
        tensors = {id(x): x for x in [*stored.parameters(), *stored.buffers()]}
        return sum(x.nbytes for x in tensors.values())
    nodes = [node for node in stored.get_ops() if node.get_type_name() == "Constant"]  # type: ignore[attr-defined]
    return sum(node.get_byte_size() for node in nodes if node.get_element_type().get_type_name() != "i64")
