"""TVM for NVIDIA GPUs: the ONNX file as PTX, which any driver compiles for its own GPU, and the host code around it.

    ONNX file ──import──▶ Relax ──TVM's operators, fused──▶ loops ──TVM's rules for GPUs──▶ kernels ──LLVM──▶ PTX

The rules are those of TVM's dlight, which need no tuning: products and convolutions in tiles of shared memory,
reductions across the threads of a block, and a thread for each element of all else. Tensor cores are not used. Sums of
float16 are in float32, as PyTorch's are. An int8 model is computed in float32, from its rounded values.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import tvm
import tvm_ffi
from torch.utils.dlpack import from_dlpack
from tvm import relax, s_tir, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.s_tir import dlight

from fxopt import host
from fxopt.backends import _tvm_build, _tvm_graph, _tvm_ptx
from fxopt.backends._onnx_executable import FileExecutable
from fxopt.backends._onnx_file import OnnxFile
from fxopt.backends._tvm_import import from_onnx
from fxopt.backends._tvm_int8 import quantize
from fxopt.backends._tvm_target import Machine
from fxopt.backends._tvm_workloads import Tiles
from fxopt.errors import UnsupportedOp
from fxopt.target import Target

_RULES = (
    dlight.gpu.Matmul(),
    dlight.gpu.GEMV(),
    dlight.gpu.Reduction(),
    dlight.gpu.GeneralReduction(),
    dlight.gpu.Transpose(),
    dlight.gpu.Fallback(),
)
_LIMITS = {"max_threads_per_block": 1024, "max_shared_memory_per_block": 48 * 1024}
_HALF = ("float16", "bfloat16")
_SUMS = {
    f"relax.{name}"
    for name in (
        "sum", "mean", "prod", "variance", "std", "cumsum", "cumprod", "nn.softmax", "nn.log_softmax", "nn.layer_norm",
        "nn.group_norm", "nn.instance_norm", "nn.rms_norm", "nn.batch_norm", "nn.avg_pool1d", "nn.avg_pool2d",
        "nn.avg_pool3d", "nn.adaptive_avg_pool1d", "nn.adaptive_avg_pool2d", "nn.adaptive_avg_pool3d", "nn.attention",
        "nn.conv1d", "nn.conv3d", "nn.conv1d_transpose", "nn.conv2d_transpose", "nn.conv3d_transpose",
        "image.resize2d", "image.grid_sample",
    )
}  # fmt: skip


def build(file: OnnxFile, target: Target) -> CudaBuilt:
    """Compile *file* for the GPU *target*.

    Raises:
        UnsupportedOp: TVM does not import one of its operators, or has no code for it on a GPU.
    """
    import onnx

    model = onnx.load(file.path)
    _refuse_bf16(model)
    arch = target.llvm["mcpu"]
    cpu = {"kind": "llvm", "mtriple": f"{host.arch()}-linux-gnu"}
    # TVM's rules would use tensor cores through CUDA C++ from sm_70 on; LLVM has no such functions.
    gpu = tvm.target.Target({"kind": "cuda", "arch": "sm_60", **_LIMITS, "thread_warp_size": 32}, host=cpu)
    with _tvm_build.ONE_AT_A_TIME, _tvm_ptx.building(arch), gpu:
        module = from_onnx(model, file.origins)
        module, weights = _tvm_graph.lift_weights(_optimized(module, gpu))
        _check_host_calls(module)
        library = relax.build(module, gpu, relax_pipeline=_tvm_graph.lower(), tir_pipeline=_tvm_ptx.NAME)
    integers = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    notes = ["int8 is computed in float32, from its rounded values"] if integers else []
    return CudaBuilt(library, weights, Machine(cpu, 0, 0), notes)


def _refuse_bf16(model: Any) -> None:
    """Raises UnsupportedOp where *model* computes in bfloat16: TVM 0.27 ends the process over it on a GPU."""
    import onnx

    bf16 = onnx.TensorProto.BFLOAT16
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    names = {value.name for value in values if value.type.tensor_type.elem_type == bf16}
    names |= {tensor.name for tensor in graph.initializer if tensor.data_type == bf16}
    why = "TVM has no bf16 on a GPU: take fp16, or backend='torch' for bf16"
    nodes = {node.name: why for node in graph.node if names.intersection((*node.input, *node.output))}
    if names:
        raise UnsupportedOp(why, nodes)


def _optimized(module: Any, gpu: Any) -> Any:
    module = _tvm_graph.fold(relax.transform.DeadCodeElimination()(module))
    rules = {**_tvm_graph._EVALUATE, "relax.dequantize": (3, _tvm_graph._dequantize)}
    module = _tvm_graph._each_function(relax.transform.CanonicalizeBindings()(module), rules)
    passes = [
        relax.transform.CanonicalizeBindings(),
        relax.backend.DispatchSortScan(),
        relax.transform.LegalizeOps({"relax.quantize": quantize}),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.DeadCodeElimination(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.RewriteDataflowReshape(),
        relax.transform.DeadCodeElimination(),
    ]
    module = tvm.transform.Sequential(passes)(_sums_in_float32(module))
    for variable, function in list(module.functions_items()):
        if isinstance(function, tirx.PrimFunc):
            module.update_func(variable, _scheduled(variable.name_hint, function, gpu))
    return module


def _scheduled(name: str, function: Any, gpu: Any) -> Any:
    """*function* by the first rule that fits; one that has threads already (sorting, running sums) as it is."""
    if _has_threads(function):
        return function
    for rule in _RULES:
        with contextlib.suppress(Exception):  # a rule that was not made for such a function; the next one is
            found = rule.apply(function, gpu, False)
            if isinstance(found, s_tir.Schedule) and _is_launchable(found.mod["main"], gpu):
                return found.mod["main"].with_attr("tirx.is_scheduled", True)
    raise UnsupportedOp(f"TVM has no rule for {name} on a GPU: use another backend")


def _is_launchable(function: Any, gpu: Any) -> bool:
    """Whether *function* can be lowered, computes nothing outside of threads, and needs no more than a GPU has."""
    module = tirx.transform.BindTarget(gpu)(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}))
    lowered = tirx.get_tir_pipeline("s_tir")[0](module)
    kernels = [f for _, f in lowered.functions_items() if f.attrs["target"].kind.name == "cuda"]
    return all(_fits(_tvm_ptx.threads(kernel), _shared_bytes(kernel)) for kernel in kernels)


def _fits(threads: Sequence[int], shared: int) -> bool:
    within = math.prod(threads) <= _LIMITS["max_threads_per_block"] and threads[2] <= 64
    return within and shared <= _LIMITS["max_shared_memory_per_block"]


def _shared_bytes(kernel: Any) -> int:
    sizes: list[int] = []

    def look(allocation: Any) -> None:
        buffer = allocation.buffer
        if buffer.scope() == "shared":
            sizes.append(math.prod(int(extent) for extent in buffer.shape) * buffer.dtype.itemsize)

    tvm_ffi.structural_walk(kernel.body, (tirx.AllocBuffer, look))
    return sum(sizes)


def _has_threads(function: Any) -> bool:
    found = []

    def look(attribute: Any) -> None:
        found.extend([attribute] if attribute.attr_key == "thread_extent" else [])

    tvm_ffi.structural_walk(function.body, (tirx.AttrStmt, look))
    return bool(found)


def _sums_in_float32(module: Any) -> Any:
    pass_ = _Widen(module)
    pass_.builder_.update_func(module.get_global_var("main"), pass_.visit_expr(module["main"]))
    return pass_.builder_.get()


@mutator
class _Widen(PyExprMutator):  # type: ignore[misc]
    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        name, own = str(getattr(call.op, "name", "")), str(getattr(call.ty, "dtype", ""))
        if own not in _HALF:
            return call
        if name == "relax.matmul":
            wide = relax.op.matmul(*call.args, out_dtype="float32")
        elif name == "relax.nn.conv2d":
            a = call.attrs
            wide = relax.op.nn.conv2d(
                *call.args, a.strides, a.padding, a.dilation, a.groups, a.data_layout, a.kernel_layout, a.out_layout,
                "float32",
            )  # fmt: skip
        elif name in _SUMS:
            wide = tvm.ir.Call(call.op, [self._widened(arg) for arg in call.args], call.attrs)
        else:
            return call
        return relax.op.astype(self.builder_.emit(wide), own)

    def _widened(self, value: Any) -> Any:
        if str(getattr(value.ty, "dtype", "")) not in _HALF:
            return value
        return self.builder_.emit(relax.op.astype(value, "float32"))


def _check_host_calls(module: Any) -> None:
    """That nothing is computed by functions of TVM's library, which are for CPUs.

    Raises:
        UnsupportedOp: something is.
    """
    found: set[str] = set()

    def look(function: Any) -> None:
        if not str(function.global_symbol).startswith("vm.builtin."):
            found.add(str(function.global_symbol))

    tvm_ffi.structural_walk(module["main"], (relax.ExternFunc, look))
    if found:
        raise UnsupportedOp(f"TVM computes {', '.join(sorted(found))} on CPUs only: use another backend")


class CudaBuilt(_tvm_build.Built):
    """A library for a GPU and its parameters, which go there at the first call."""

    def __init__(self, library: Any, weights: Sequence[Any], machine: Machine, notes: Sequence[str]) -> None:
        super().__init__(library, weights, machine, Tiles())
        self.notes = tuple(notes)
        self._there: dict[int, list[Any]] = {}  # parameters by the number of the GPU

    def run(self, inputs: Sequence[torch.Tensor], threads: int) -> list[torch.Tensor]:
        """The outputs, on the GPU if an input is there, else on the CPU."""
        gpu = next((x.device for x in inputs if x.is_cuda), None)
        index = torch.cuda.current_device() if gpu is None else gpu.index
        device = tvm.cuda(index)
        with torch.cuda.device(index), tvm_ffi.use_torch_stream():
            if index not in self._there:
                self._there[index] = [weight.copyto(device) for weight in self.weights]
            try:
                main = self._idle.pop()
            except IndexError:
                main = relax.VirtualMachine(self.library, device)["main"]
            given = [_tvm_build._tensor(x.to(f"cuda:{index}")) for x in inputs]
            result = main(*given, *self._there[index])
            self._idle.append(main)
            results = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
            outputs = [from_dlpack(y) for y in results]
        return outputs if gpu is not None else [y.cpu() for y in outputs]


class CudaExecutable(FileExecutable):
    """PTX and its parameters."""

    engine: ClassVar[str] = "TVM"

    def __init__(self, file: OnnxFile, target: Target, built: CudaBuilt) -> None:
        missing = target.runs_here and not tvm.cuda(0).exist
        obstacle = "TVM's CUDA runtime cannot be loaded, which needs libcudart.so.13 of CUDA 13" if missing else ""
        super().__init__(file, target, runs_here=target.runs_here and not missing, obstacle=obstacle)
        self.notes = (f"PTX for {target.llvm['mcpu']} and later, without tensor cores", *built.notes)
        self._built = built

    @property
    def product(self) -> str:
        """The library, as it can be written here."""
        return self._built.product

    def _run(self, feed: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return self._built.run(list(feed.values()), 1)

    def save(self, path: Path) -> None:
        """Write the library, and its parameters beside it: ``model.so`` and ``model.params``.

        They load as those for CPUs do (``_tvm_build.Built.save``), with ``tvm.cuda()`` and parameters that are there.

        Raises:
            ArtifactError: another suffix than .so or .tar, no linker, or it cannot be written.
        """
        self._built.save(path)

    def nbytes(self) -> int:
        """Bytes of the parameters."""
        return self._built.nbytes()
