"""What this host is: its architecture, the features of its CPU, its GPU. Asked when a target is made, never later."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

from fxopt.machines import FAMILIES, closure


def arch() -> str:
    """Architecture of this host, by one name on every system."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


@functools.cache
def cpu(name: str) -> str:
    """What the family *name* stands for here; "" for this host's own CPU, whose features are read."""
    family = FAMILIES[name]
    if name == "cuda":
        return _gpu() or family.default
    if arch() != family.arch:
        return family.default
    return "apple-m1" if name == "arm" and platform.system() == "Darwin" else ""


def _gpu() -> str:
    """The newest capability of the table that this host's GPU has; "" without a GPU."""
    if not torch.cuda.is_available():
        return ""
    own = torch.cuda.get_device_capability()
    return max((sm for sm in FAMILIES["cuda"].cpus if capability(sm) <= own), key=capability, default="")


def capability(sm: str) -> tuple[int, int]:
    """(8, 9) of "sm_89"."""
    return divmod(int(sm.removeprefix("sm_")), 10)


@functools.cache
def features(name: str) -> frozenset[str]:
    """Features of this host's CPU, one of the family *name*."""
    family = FAMILIES[name]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # another system: what torch found, and what every CPU has
        level = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "")
        host = family.cpus.get(level or cpu(name))
        return host.features if host is not None else family.always
    flags = next(
        (set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))), set()
    )
    here = {feature for feature, one in family.features.items() if one.flags <= flags}
    return frozenset(feature for feature in here if closure(family, feature) <= here) | family.always
