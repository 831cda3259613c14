"""fxopt's targets as TVM's: what LLVM generates code for, and the register file that the kernels are sized by."""

from __future__ import annotations

import dataclasses
from typing import Any

from fxopt.errors import UnsupportedOp
from fxopt.target import Target


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the kernels have to know.

    Attributes:
        llvm: options of a ``tvm.target.Target``.
        lanes: float32 numbers in a vector.
        registers: how many vector registers there are.
        dot: how bytes are multiplied: "vnni", "maddubs" (weights of seven bits), "sdot", or "" for one by one.
    """

    llvm: dict[str, Any]
    lanes: int
    registers: int
    dot: str = ""


def machine(target: Target) -> Machine:
    """The code generator's options and the register file for *target*.

    Raises:
        UnsupportedOp: there are no kernels here for the target.
    """
    if target.name == "cuda":
        raise UnsupportedOp(f"the tvm backend has no kernels for target {str(target)!r} yet: use another backend")
    options: dict[str, Any] = {"kind": "llvm", **{key: value for key, value in target.llvm.items() if value}}
    lanes = target.vector_bits // 32
    attributes = [one for one in target.llvm["mattr"].split(",") if one]
    if target.arch == "x86_64" and lanes == 16:
        attributes.append("-prefer-256-bit")  # LLVM would split vectors of 512 bits, for the sake of older processors
    if attributes:
        options["mattr"] = attributes
    return Machine(options, lanes, 32 if lanes == 16 or target.arch == "aarch64" else 16, _dot(target, lanes))


def _dot(target: Target, lanes: int) -> str:
    if target.arch == "aarch64":
        return "sdot" if target.has("dotprod") else ""
    if target.has("avx512_vnni") or (target.has("avx_vnni") and lanes == 8):
        return "vnni"
    return "maddubs" if lanes >= 8 else ""
