"""Targets: the machine that a model is compiled for, as a frozen set of facts.

A pass or a backend asks the target (``target.has("avx512_bf16")``), never the host, so that compiling for a
foreign machine gives the same graph as compiling on it.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
from pathlib import Path

import torch

from fxopt.errors import InputError, SpecError, near_miss


@dataclasses.dataclass(frozen=True)
class Target:
    """Facts about the machine a model will run on.

    Attributes:
        name: the short name the user gives: ``"x86"``, ``"arm"``, ``"cuda"``.
        arch: machine architecture as ``platform.machine()`` spells it (``"x86_64"``, ``"aarch64"``).
        features: ISA features with a bearing on speed (``"avx512_bf16"``, ``"amx_bf16"``, ...).
        native_dtypes: floating dtypes with fast matmul kernels on this machine.
        backends: backend names in the order of preference; ``backend="auto"`` tries them.
        channel_multiple: how many channels its kernels compute at once: other counts are padded to it.
        fast_2_4: whether its matmul kernels compute weights with two zeros in each four faster than dense ones.
    """

    name: str
    arch: str
    features: frozenset[str] = frozenset()
    native_dtypes: frozenset[torch.dtype] = frozenset({torch.float32})
    backends: tuple[str, ...] = ("torch", "onnx")
    channel_multiple: int = 8
    fast_2_4: bool = False

    def has(self, feature: str) -> bool:
        """Whether the machine has the ISA *feature*."""
        return feature in self.features

    @property
    def runs_here(self) -> bool:
        """Whether code for this target can run on this host."""
        if self.name == "cuda":
            return torch.cuda.is_available()
        return _host_arch() == self.arch

    def __str__(self) -> str:
        return self.name


_X86_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
_X86_BF16 = frozenset({"avx512_bf16", "amx_bf16"})
_X86_FP16 = frozenset({"avx512_fp16"})


def _host_arch() -> str:
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


@functools.cache
def _host_features() -> frozenset[str]:
    """x86 features of this host; empty where the operating system does not list them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    return frozenset(flags) & frozenset(_X86_FEATURES)


def _x86() -> Target:
    """The host's own features on an x86 host; plain AVX2 otherwise."""
    features = _host_features() if _host_arch() == "x86_64" else frozenset({"avx2"})
    dtypes = {torch.float32}
    if features & _X86_BF16:
        dtypes.add(torch.bfloat16)
    if features & _X86_FP16:
        dtypes.add(torch.float16)
    lanes = 16 if "avx512f" in features else 8  # float32 numbers in a register
    return Target("x86", "x86_64", features, frozenset(dtypes), ("torch", "onnx", "openvino"), lanes)


def _arm() -> Target:
    return Target("arm", "aarch64", frozenset({"neon"}), frozenset({torch.float32}), ("onnx", "torch"))


def _cuda() -> Target:
    dtypes = frozenset({torch.float32, torch.float16, torch.bfloat16})
    return Target("cuda", _host_arch(), frozenset(), dtypes, ("torch", "onnx"), fast_2_4=True)


_TARGETS = {"x86": _x86, "arm": _arm, "cuda": _cuda}


def resolve_target(target: str | Target) -> Target:
    """The :class:`Target` that the user named.

    Raises:
        SpecError: the name is unknown.
        InputError: neither a name nor a Target.
    """
    if isinstance(target, Target):
        return target
    if not isinstance(target, str):
        raise InputError(f"target must be a name or an fxopt.Target, not {type(target).__name__}")
    if target not in _TARGETS:
        raise SpecError(f"unknown target {target!r}.{near_miss(target, _TARGETS)}")
    return _TARGETS[target]()
