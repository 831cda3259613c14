"""PTX of scheduled functions, by LLVM alone: no CUDA toolkit is needed, and a driver compiles it for its GPU.

    scheduled functions ──TVM's passes──▶ host code, and kernels ──intrinsics of LLVM──▶ LLVM's text ──▶ PTX ──▶ library

TVM 0.27 was made for an older LLVM than the one it is built with, and three things have to be done for it:

- Barriers and exchanges between the threads of a warp are written here as the intrinsics that this LLVM has.
- It marks kernels in a way that this LLVM understands only where it reads them from a text. So kernels are written as
  text and read again, with the number of their threads, by which registers are shared out.
- What comes of that has to get into the module that TVM makes of functions itself. It is linked in as inline assembly,
  beside empty functions that stand for the kernels. Their names begin with ``__nv``, since TVM takes such functions for
  those of NVIDIA's mathematical library, and does not emit them.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import Call, StringImm
from tvm.target import codegen

from fxopt.backends import _tvm_device_math
from fxopt.backends._tvm_loops import Expr, name_of
from fxopt.errors import UnsupportedOp

NAME = "fxopt-ptx"
PREFIX = "__nv_"  # of kernels

_LIBRARY = "tvm_callback_libdevice_path"  # TVM asks it for LLVM code to link with kernels
_INSTRUCTIONS = {"fabs", "sqrt", "floor", "ceil", "trunc", "rint", "nearbyint", "round", "fma", "fmuladd", "ctpop"}
_building = threading.RLock()  # what TVM calls back is one for the whole process


@contextlib.contextmanager
def building(arch: str) -> Iterator[None]:
    """While this is open, the pipeline :data:`NAME` makes PTX for *arch*, such as sm_80."""
    with _building, tempfile.TemporaryDirectory(prefix="fxopt-") as folder:
        before = tvm.get_global_func(_LIBRARY)
        work = _Work(arch, Path(folder))
        tvm_ffi.register_global_func(_LIBRARY, lambda _version: work.linked, override=True)
        tirx.compilation_pipeline.register_tir_pipeline(NAME, work.pipeline)
        try:
            yield
        finally:
            tvm_ffi.register_global_func(_LIBRARY, before, override=True)


class _Work:
    """The passes for one library.

    Attributes:
        linked: file of LLVM code that TVM links with what it compiles next; "" for none.
    """

    def __init__(self, arch: str, folder: Path) -> None:
        self.target = tvm.target.Target({"kind": "nvptx", "mcpu": arch})
        self.folder = folder
        self.linked = ""

    def pipeline(self) -> tuple[Any, Any, Any]:
        before, host, _ = tirx.get_tir_pipeline("s_tir")
        return tvm.transform.Sequential([before, _module_pass(self._named)]), host, lambda: _module_pass(self._embedded)

    def _named(self, module: Any) -> Any:
        """*module* with its kernels for LLVM, and the names that their host code calls."""
        kernels = {_symbol(f) for _, f in module.functions_items() if _is_kernel(f)}

        def name(text: Any) -> Any:
            return StringImm(PREFIX + text.value) if text.value in kernels else text

        for variable, function in list(module.functions_items()):
            if _is_kernel(function):
                module.update_func(variable, function.with_attr("target", self.target))
            else:
                body = tvm_ffi.structural_map(function.body, (StringImm, name))
                module.update_func(variable, function.with_body(body))
        return module

    def _embedded(self, module: Any) -> Any:
        """Empty functions for the kernels of *module*; their code is in the file that is linked with them."""
        self.linked = ""
        ptx = self._ptx(module)
        text = ptx.partition(".address_size 64")[2].replace("\\", r"\5C").replace('"', r"\22")
        lines = "".join(f'module asm "{line}"\n' for line in text.splitlines())
        file = self.folder / "linked.ll"
        file.write_text(f'target triple = "nvptx64-nvidia-cuda"\n{lines}')
        self.linked = str(file)
        nothing = tirx.Evaluate(tirx.IntImm("int32", 0))
        for variable, function in list(module.functions_items()):
            empty = function.with_body(nothing).with_attr("global_symbol", PREFIX + _symbol(function))
            module.update_func(variable, empty)
        return module

    def _ptx(self, module: Any) -> str:
        """The kernels of *module* in PTX."""
        counted = {_symbol(f): threads(f) for _, f in module.functions_items()}
        passes = [
            _module_pass(_with_intrinsics),
            _module_pass(_with_narrow_threads),
            tirx.transform.LowerWarpMemory(),
            tirx.transform.StmtSimplify(),
            _on(tvm.target.Target("llvm")),  # of LLVM's own functions; for nvptx TVM would call NVIDIA's library
            tirx.transform.LowerIntrin(),
            _on(self.target),
        ]
        lowered = tvm.transform.Sequential(passes)(module.clone())
        text = _translated(lowered, self.target)
        for kernel, counts in counted.items():
            text = re.sub(rf"@{kernel}\b", f"@{PREFIX}{kernel}", text)
            limits = "".join(f', !"maxntid{axis}", i32 {count}' for axis, count in zip("xyz", counts, strict=True))
            mark = f'ptr @{PREFIX}{kernel}, !"kernel", i32 1'
            if mark not in text:
                raise UnsupportedOp(f"TVM did not mark {kernel} as a kernel: use another version of TVM")
            text = text.replace(mark, mark + limits)
        text = re.sub(r"^define weak ", "define available_externally ", text, flags=re.M)  # of the CPU, unused
        file = self.folder / "kernels.ll"
        file.write_text(text + _target_mark(self.target))
        return str(tvm.runtime.load_module(str(file)).inspect_source("asm"))


def _symbol(function: Any) -> str:
    return str(function.attrs["global_symbol"])


def _is_kernel(function: Any) -> bool:
    return function.attrs["target"].kind.name in ("cuda", "nvptx")


def _module_pass(edit: Callable[[Any], Any]) -> Any:
    return tvm.transform.module_pass(lambda module, _context: edit(module), opt_level=0)


def _on(target: Any) -> Any:
    """All functions for *target*."""
    return tirx.transform.prim_func_pass(lambda f, _module, _context: f.with_attr("target", target), opt_level=0)


def _target_mark(target: Any) -> str:
    """By what TVM knows the processor of a text of LLVM."""
    quoted = f'{{"kind":"nvptx","mcpu":"{target.attrs["mcpu"]}"}}'.replace('"', r"\22")
    return f'\n!llvm.module.flags = !{{!99999999}}\n!99999999 = !{{i32 2, !"tvm_target", !"{quoted}"}}\n'


def _translated(module: Any, target: Any) -> str:
    """*module* as a text of LLVM.

    Raises:
        UnsupportedOp: it calls functions that no instruction of the hardware computes; LLVM would end the process.
    """
    _check_calls(module)
    return str(tvm.get_global_func("target.build.nvptx")(module, target).inspect_source("ll"))


def _check_calls(module: Any) -> None:
    def look(call: Any) -> None:
        name = name_of(call)
        if name in ("call_extern", "call_pure_extern"):
            called = str(call.args[0].value)
        elif name in ("call_llvm_intrin", "call_llvm_pure_intrin"):
            called = str(codegen.llvm_get_intrinsic_name(int(call.args[0]))).removeprefix("llvm.")
            if called.startswith("nvvm.") or called.split(".")[0] in _INSTRUCTIONS:
                return
        else:
            return
        raise UnsupportedOp(f"the tvm backend has no code for {called!r} of {call.ty} on a GPU: use another backend")

    for _, function in module.functions_items():
        tvm_ffi.structural_walk(function.body, (Call, look))


def threads(function: Any) -> list[int]:
    """How many threads a block of *function* has along x, y and z."""
    counts = {"x": 1, "y": 1, "z": 1}

    def look(attribute: Any) -> None:
        tag = str(attribute.node.thread_tag) if attribute.attr_key == "thread_extent" else ""
        if tag.startswith("threadIdx."):
            counts[tag[-1]] = int(attribute.value)

    tvm_ffi.structural_walk(function.body, (tirx.AttrStmt, look))
    return list(counts.values())


# Barriers and exchanges -----------------------------------------------------------------------------------------------


def _with_intrinsics(module: Any) -> Any:
    rewrites = [(Call, _intrinsic), ((tirx.EQ, tirx.NE), _of_bools)]
    for variable, function in list(module.functions_items()):
        module.update_func(variable, function.with_body(tvm_ffi.structural_map(function.body, rewrites)))
    return module


def _of_bools(comparison: Any) -> Any:
    """*comparison* of integers, where TVM would compare bools as floats."""
    a, b = comparison.a, comparison.b
    dtype = str(a.ty.dtype)
    if not dtype.startswith("bool"):
        return comparison
    return type(comparison)(*(tirx.Cast(dtype.replace("bool", "int8"), x) for x in (a, b)))


def _intrinsic(call: Any) -> Any:
    name = name_of(call)
    if name == "tvm_storage_sync":
        if str(call.args[0].value) == "warp":
            return tirx.call_llvm_intrin("void", "llvm.nvvm.bar.warp.sync", _activemask())
        return tirx.call_llvm_intrin("void", "llvm.nvvm.barrier.cta.sync.aligned.all", tirx.IntImm("int32", 0))
    if name == "tvm_warp_activemask":
        return _activemask()
    if name in _EXCHANGES:
        return _exchange(_EXCHANGES[name], *call.args)
    return _tvm_device_math.write(call)


def _with_narrow_threads(module: Any) -> Any:
    """*module* with thread numbers of 32 bits, which is what TVM makes of them where sizes are dynamic, too."""
    for variable, function in list(module.functions_items()):
        body = tvm_ffi.structural_map(function.body, (tirx.AttrStmt, _narrow_thread))
        module.update_func(variable, function.with_body(body))
    return module


def _narrow_thread(attribute: Any) -> Any:
    if attribute.attr_key != "thread_extent" or str(attribute.node.var.ty.dtype) == "int32":
        return attribute
    wide = attribute.node.var
    narrow = tirx.Var(str(wide.name), "int32")

    def use(variable: Any) -> Any:
        return tirx.Cast(str(wide.ty.dtype), narrow) if variable.same_as(wide) else variable

    own = tirx.IterVar(None, narrow, attribute.node.iter_type, attribute.node.thread_tag)
    body = tvm_ffi.structural_map(attribute.body, (tirx.Var, use))
    return tirx.AttrStmt(own, attribute.attr_key, attribute.value, body)


_EXCHANGES = {"tvm_warp_shuffle": "idx", "tvm_warp_shuffle_up": "up", "tvm_warp_shuffle_down": "down"}


def _activemask() -> Expr:
    return tirx.call_llvm_intrin("uint32", "llvm.nvvm.activemask")


def _exchange(kind: str, mask: Expr, value: Expr, lane: Expr, width: Expr, _warp: Expr) -> Expr:
    """*value* of another thread, in words of 32 bits."""
    dtype = str(value.ty.dtype)
    bits = int(re.findall(r"\d+", dtype)[0])
    clamp = (32 - int(width)) << 8 | (0 if kind == "up" else 31)
    rest = [tirx.Cast("int32", lane), tirx.IntImm("int32", clamp)]

    def word(part: Expr) -> Expr:
        return tirx.call_llvm_intrin("int32", f"llvm.nvvm.shfl.sync.{kind}.i32", mask, part, *rest)

    if bits == 32:
        return tirx.reinterpret(dtype, word(tirx.reinterpret("int32", value)))
    if bits == 64:
        whole = tirx.reinterpret("uint64", value)
        low, high = (tirx.Cast("int32", whole >> tirx.IntImm("uint64", shift)) for shift in (0, 32))
        parts = [tirx.Cast("uint64", tirx.Cast("uint32", word(part))) for part in (low, high)]
        return tirx.reinterpret(dtype, parts[0] | (parts[1] << tirx.IntImm("uint64", 32)))
    small = tirx.Cast("int32", tirx.reinterpret(f"uint{bits}", value) if "float" in dtype else value)
    got = word(small)
    return tirx.reinterpret(dtype, tirx.Cast(f"uint{bits}", got)) if "float" in dtype else tirx.Cast(dtype, got)
