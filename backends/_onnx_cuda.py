"""onnxruntime on an NVIDIA GPU: through its CUDA provider, or TensorRT and the CUDA provider for what that leaves.

Where a provider cannot be loaded, onnxruntime runs on the CPU and says nothing. That is looked for here: such a session
is not used, and what is missing is said when the model is called. Nodes that the providers have no kernel for run on
the CPU; the report names them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from fxopt.backends._onnx_file import OnnxFile
from fxopt.errors import UnsupportedOp

PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
_CPU = "CPUExecutionProvider"
_SIZES = {"Shape", "Size"}  # sizes are known on the CPU; there they are computed with, too
_RECORD = "session.record_ep_graph_assignment_info"


@dataclasses.dataclass(frozen=True)
class Opened:
    """A session on a GPU, or what keeps onnxruntime from one.

    Attributes:
        session: of onnxruntime; None where there is an obstacle.
        obstacle: why there is none; "" where there is one.
        notes: what runs on the CPU.
    """

    session: Any = None
    obstacle: str = ""
    notes: tuple[str, ...] = ()


def opened(file: OnnxFile, provider: str, device: int) -> Opened:
    """A session over *file* on GPU *device* through *provider*, "cuda" or "tensorrt".

    Raises:
        UnsupportedOp: onnxruntime cannot run the model.
    """
    import onnxruntime

    wanted = PROVIDERS[provider]
    available = onnxruntime.get_available_providers()
    if wanted not in available:
        return Opened(obstacle=f"onnxruntime has no {wanted} here (pip install onnxruntime-gpu)")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised
    options.add_session_config_entry(_RECORD, "1")
    try:
        session = onnxruntime.InferenceSession(str(file.path), options, providers=_providers(file, provider, device))
    except Exception as error:
        raise UnsupportedOp(f"onnxruntime cannot run this model: {file.explain(error)}") from error
    loaded = session.get_providers()
    if wanted not in loaded:
        return Opened(obstacle=f"onnxruntime could not load {wanted} and would run on {loaded[0]}: see its versions of "
                               "CUDA, cuDNN and TensorRT")  # fmt: skip
    session.disable_fallback()  # to the CPU, after an error
    return Opened(session, notes=(f"{wanted} of onnxruntime", *_on_cpu(session, file)))


def _providers(file: OnnxFile, provider: str, device: int) -> list[Any]:
    cuda = (PROVIDERS["cuda"], {"device_id": str(device)})
    if provider == "cuda":
        return [cuda]
    import onnx

    graph = onnx.load(file.path, load_external_data=False).graph
    kinds = {tensor.data_type for tensor in graph.initializer}
    options = {"device_id": str(device)}
    for name, there in (
        ("fp16", onnx.TensorProto.FLOAT16 in kinds),
        ("bf16", onnx.TensorProto.BFLOAT16 in kinds),
        ("int8", any(node.op_type == "DequantizeLinear" for node in graph.node)),
    ):
        if there:
            options[f"trt_{name}_enable"] = "True"
    return [(PROVIDERS["tensorrt"], options), cuda]


def _on_cpu(session: Any, file: OnnxFile) -> list[str]:
    """A remark for the report where nodes run on the CPU that do more than ask for sizes."""
    if not hasattr(session, "get_provider_graph_assignment_info"):  # an older onnxruntime does not tell
        return []
    nodes = [
        n for part in session.get_provider_graph_assignment_info() if part.ep_name == _CPU for n in part.get_nodes()
    ]
    names = dict.fromkeys(
        f"{node.op_type} [{file.origins[node.name]}]" if node.name in file.origins else node.op_type
        for node in nodes
        if node.op_type not in _SIZES
    )
    return [f"on the CPU: {', '.join(names)}"] if names else []


def run(session: Any, names: Sequence[str], feed: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The outputs *names*, on the GPU, for tensors of which one is there: without a copy of those that are."""
    from torch.onnx._internal.exporter._core import torch_dtype_to_onnx_dtype

    device = next(x.device for x in feed.values() if x.is_cuda)
    binding = session.io_binding()
    there = {name: x.to(device) for name, x in feed.items()}
    for name, x in there.items():
        kind = int(torch_dtype_to_onnx_dtype(x.dtype))
        binding.bind_input(name, "cuda", device.index, kind, tuple(x.shape), x.data_ptr())
    for name in names:
        binding.bind_output(name, "cuda", device.index)
    torch.cuda.current_stream(device).synchronize()  # onnxruntime has a stream of its own
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    return [from_dlpack(y._get_c_value()) for y in binding.get_outputs()]
