"""Facts about machines, as data: what each family and each CPU or GPU has, and which defaults follow from it.

``fxopt.target`` makes a :class:`~fxopt.target.Target` of a line of these tables. A feature is listed where a pass or a
backend decides by it, or a code generator (TVM, through LLVM) has to know it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch


@dataclasses.dataclass(frozen=True)
class Feature:
    """Something that some CPUs of a family have and others do not.

    Attributes:
        needs: features without which it cannot be: switching it on switches these on, too.
        llvm: its names in LLVM, as in ``-mattr``.
        dtype: the floating dtype that matmuls compute fast with it, or None.
        vector_bits: width of its registers, where it brings wider ones.
        flags: what ``/proc/cpuinfo`` of a Linux host lists where it is there.
    """

    needs: frozenset[str] = frozenset()
    llvm: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    vector_bits: int = 128
    flags: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Cpu:
    """One CPU or GPU, or one level that many CPUs have.

    Attributes:
        features: names of its features; ``llvm`` its name in LLVM; ``triple`` where it is not that of its family.
    """

    features: frozenset[str] = frozenset()
    llvm: str = ""
    triple: str = ""


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of machine.

    Attributes:
        arch: as ``platform.machine()`` spells it; "" for the host's, as a GPU has.
        triple: LLVM's name of architecture and operating system.
        features: all that its machines may have; ``always`` those that each has.
        cpus: its machines by name; ``default`` the one that the name of the family alone stands for on another machine.
        backends: engines in the order of preference, for ``backend="auto"``.
        dtypes: floating dtypes with fast matmuls on every machine of it.
        channel_multiple: how many channels kernels compute at once, at least.
        schemes: int8 scheme by engine, where it is not the engine's own.
    """

    arch: str
    triple: str
    features: Mapping[str, Feature]
    cpus: Mapping[str, Cpu]
    default: str
    backends: tuple[str, ...]
    dtypes: frozenset[torch.dtype]
    channel_multiple: int = 8
    always: frozenset[str] = frozenset()
    schemes: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _with(cpu: Cpu, features: str, llvm: str) -> Cpu:
    return Cpu(cpu.features | _words(features), llvm, cpu.triple)


# ---- x86: levels rather than products, as the psABI has them (x86-64-v2, -v3, -v4) and what came after.

_X86_FEATURES = {
    "sse4_2": Feature(llvm=("sse4.2",), flags=_words("sse4_2 ssse3 popcnt cx16")),
    "avx2": Feature(
        _words("sse4_2"), ("avx2", "fma", "f16c"), vector_bits=256, flags=_words("avx2 fma f16c bmi1 bmi2 movbe abm")
    ),
    "avx_vnni": Feature(_words("avx2"), ("avxvnni",), flags=_words("avx_vnni")),
    "avx512f": Feature(  # with bw, cd, dq and vl: engines use all five or none
        _words("avx2"),
        ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
        vector_bits=512,
        flags=_words("avx512f avx512bw avx512cd avx512dq avx512vl"),
    ),
    "avx512_vnni": Feature(_words("avx512f"), ("avx512vnni",), flags=_words("avx512_vnni")),
    "avx512_bf16": Feature(_words("avx512f"), ("avx512bf16",), torch.bfloat16, flags=_words("avx512_bf16")),
    "avx512_fp16": Feature(_words("avx512f"), ("avx512fp16",), torch.float16, flags=_words("avx512_fp16")),
    "amx_tile": Feature(_words("avx512f"), ("amx-tile",), flags=_words("amx_tile")),
    "amx_bf16": Feature(_words("amx_tile"), ("amx-bf16",), torch.bfloat16, flags=_words("amx_bf16")),
    "amx_int8": Feature(_words("amx_tile"), ("amx-int8",), flags=_words("amx_int8")),
}
_SSE = Cpu(_words("sse4_2"), "x86-64-v2")
_AVX2 = _with(_SSE, "avx2", "x86-64-v3")
_AVX512 = _with(_AVX2, "avx512f", "x86-64-v4")
# LLVM's name stays that of the psABI level: products such as cascadelake have more than these features say.
_VNNI = _with(_AVX512, "avx512_vnni", "x86-64-v4")
_AMX = _with(_VNNI, "avx512_bf16 avx512_fp16 amx_tile amx_bf16 amx_int8", "x86-64-v4")

X86 = Family(
    arch="x86_64",
    triple="x86_64-linux-gnu",
    features=_X86_FEATURES,
    cpus={"sse4.2": _SSE, "avx2": _AVX2, "avx512": _AVX512, "avx512-vnni": _VNNI, "amx": _AMX},
    default="avx2",  # what nearly every x86 server and desktop since 2015 has
    # All are measured there, so the order decides ties alone: the engine that needs nothing else installed comes first.
    backends=("torch", "onnx", "openvino", "tvm"),
    dtypes=frozenset({torch.float32}),  # bf16 and fp16 only by a feature: without one they are emulated, and slower
    channel_multiple=8,  # the blocks of oneDNN's layouts (nChw8c, nChw16c with AVX-512); never fewer than a register
)

# ---- arm: all have NEON (128 bits). A preset's name is that of its core, as gcc and LLVM know it, or of a board.

_ARM_FEATURES = {
    "neon": Feature(llvm=("neon",), flags=_words("asimd")),
    "dotprod": Feature(_words("neon"), ("dotprod",), flags=_words("asimddp")),  # sdot, udot: int8 four at a time
    "fp16": Feature(_words("neon"), ("fullfp16",), torch.float16, flags=_words("fphp asimdhp")),
    "bf16": Feature(_words("neon"), ("bf16",), torch.bfloat16, flags=_words("bf16")),  # bfmmla
    "i8mm": Feature(_words("neon"), ("i8mm",), flags=_words("i8mm")),  # smmla: int8 matrices of 2 × 8
    # Its registers may be wider, but how wide is not known when code is generated: vectors stay NEON's.
    "sve": Feature(_words("fp16"), ("sve",), flags=_words("sve")),
}
_V8_2 = "neon dotprod fp16"
_A53 = Cpu(_words("neon"), "cortex-a53")
_A72 = Cpu(_words("neon"), "cortex-a72")
_A76 = Cpu(_words(_V8_2), "cortex-a76")
_M1 = Cpu(_words(_V8_2), "apple-m1", "arm64-apple-macosx")

ARM = Family(
    arch="aarch64",
    triple="aarch64-linux-gnu",
    features=_ARM_FEATURES,
    cpus={
        "armv8-a": Cpu(_words("neon"), "generic"),
        "cortex-a53": _A53,
        "cortex-a55": Cpu(_words(_V8_2), "cortex-a55"),
        "cortex-a72": _A72,
        "cortex-a76": _A76,
        "cortex-a78": Cpu(_words(_V8_2), "cortex-a78"),
        "neoverse-n1": Cpu(_words(_V8_2), "neoverse-n1"),
        "neoverse-v1": Cpu(_words(f"{_V8_2} bf16 i8mm sve"), "neoverse-v1"),
        "neoverse-n2": Cpu(_words(f"{_V8_2} bf16 i8mm sve"), "neoverse-n2"),
        "neoverse-v2": Cpu(_words(f"{_V8_2} bf16 i8mm sve"), "neoverse-v2"),
        "raspberry-pi-3": _A53,
        "raspberry-pi-4": _A72,
        "raspberry-pi-5": _A76,
        "apple-m1": _M1,
        "apple-m2": _with(_M1, "bf16 i8mm", "apple-m2"),
    },
    default="armv8-a",  # runs on each of them
    # A file is what can be taken there; torch has no kernels to prepare for it from here.
    backends=("onnx", "torch", "tvm"),
    dtypes=frozenset({torch.float32}),
    channel_multiple=8,  # two registers of four floats, or the eight outputs that one int8 kernel has at a time
    always=_words("neon"),
)

# ---- cuda: compute capabilities. What differs between them, as far as anything here decides by it, are two features.

_CUDA_FEATURES = {
    "bf16": Feature(dtype=torch.bfloat16),
    "sparse": Feature(),  # tensor cores that skip two of each four weights
}
_TURING, _AMPERE = frozenset[str](), _words("bf16 sparse")

CUDA = Family(
    arch="",
    triple="nvptx64-nvidia-cuda",
    features=_CUDA_FEATURES,
    cpus={
        "sm_75": Cpu(_TURING, "sm_75"),
        **{name: Cpu(_AMPERE, name) for name in ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120")},
    },
    default="sm_80",  # the first with bf16 and 2:4; later ones run what was made for it
    backends=("torch", "onnx", "tvm"),  # tensor cores through torch and TensorRT; TVM has none of them
    dtypes=frozenset({torch.float32, torch.float16}),  # tensor cores took fp16 before bf16
    channel_multiple=8,  # tensor cores read rows of 16 bytes: 8 channels of fp16 or bf16
    # TensorRT, which runs that file, wants s8, symmetric, where onnxruntime's kernels for CPUs want u8; and s8 by s8 is
    # what torch._int_mm multiplies on a GPU.
    schemes={"onnx": "tensorrt", "torch": "cuda"},
)

FAMILIES = {"x86": X86, "arm": ARM, "cuda": CUDA}
"""Every kind of machine by the name that the user gives."""


def closure(family: Family, feature: str) -> set[str]:
    """*feature* and all that it needs."""
    needs = (closure(family, one) for one in family.features[feature].needs)
    return {feature}.union(*needs)
