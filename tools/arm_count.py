"""How many instructions of a library an emulated run executes, by name: a count, and no measure of time.

QEMU tells each block that it runs (``-d exec``) and the instructions of each block that it translates (``-d in_asm``),
here for the addresses of one library alone. A library lies at the same place in every run of the same command.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tools.arm_sysroot import Machine

# Runs a script, then prints the executable addresses of the library that it loaded.
_SHOW = """
import runpy, sys
name, sys.argv = sys.argv[1], sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
lines = [line.split() for line in open("/proc/self/maps")]
print("addresses", *(line[0] for line in lines if line[-1].endswith("/" + name) and "x" in line[1]))
"""
_INSTRUCTION = re.compile(r"0x([0-9a-f]+):  ([0-9a-f]{8})  (\S+)")
# QEMU's disassembler is older than these: mask, value and name, from the Arm Architecture Reference Manual.
_NEWER = (
    (0xBFE0FC00, 0x0E809400, "sdot"),
    (0xBFE0FC00, 0x2E809400, "udot"),
    (0xBFE0FC00, 0x0E809C00, "usdot"),
    (0xBFC0F400, 0x0F80E000, "sdot"),
    (0xBFC0F400, 0x2F80E000, "udot"),
    (0xFFE0FC00, 0x4E80A400, "smmla"),
    (0xFFE0FC00, 0x6E80A400, "ummla"),
)
_BLOCK = re.compile(r"Trace \d+: \S+ \[[0-9a-f]+/([0-9a-f]+)/")


def executed(emulated: Machine, script: Sequence[str], library: str, *, cpu: str = "max") -> Counter[str]:
    """Instructions of *library* that *script* executes, by their names.

    Args:
        emulated: the machine.
        script: path and arguments of a Python script that loads the library.
        library: its file name.
        cpu: QEMU's model.

    Raises:
        RuntimeError: the script fails, or loads no such library.
    """
    command = ["-c", _SHOW, library, *script]
    where = _addresses(emulated.python(command, cpu=cpu), library)
    with tempfile.TemporaryDirectory(prefix="fxopt-arm-") as folder:
        pipe = Path(folder) / "log"
        os.mkfifo(pipe)  # the log of a small network has gigabytes
        found: list[Counter[str]] = []
        reader = threading.Thread(target=lambda: found.append(_read(pipe)))
        reader.start()
        logging = ["-d", "in_asm,exec,nochain", "-D", str(pipe), "-dfilter", f"0x{where[0]}..0x{where[1]}"]
        done = emulated.python(command, cpu=cpu, qemu=logging)
        _release(pipe, reader)
    if _addresses(done, library) != where:
        raise RuntimeError(
            f"{library} was loaded at another place in the second run: its instructions were not counted"
        )
    return found[0]


def _addresses(done: subprocess.CompletedProcess[str], library: str) -> tuple[str, str]:
    last = (done.stdout.splitlines() or [""])[-1].split()
    if done.returncode or last[:1] != ["addresses"]:
        raise RuntimeError(f"the script fails: {done.stderr.strip()[-1000:]}")
    if not last[1:]:
        raise RuntimeError(f"the script loads no {library}")
    return last[1].split("-")[0], last[-1].split("-")[1]


def _read(pipe: Path) -> Counter[str]:
    with pipe.open() as lines:
        return counted(lines)


def _release(pipe: Path, reader: threading.Thread) -> None:
    """Let the reader end, also where QEMU never opened the log."""
    while reader.is_alive():
        os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))
        reader.join(timeout=0.5)


def _name(word: int, shown: str) -> str:
    """The name of the instruction *word*, for which QEMU shows *shown*."""
    return next((name for mask, value, name in _NEWER if word & mask == value), shown)


def counted(lines: Iterable[str]) -> Counter[str]:
    """Instructions by name in a log of QEMU: each block's, as often as it ran."""
    blocks: dict[int, list[str]] = {}
    runs: Counter[int] = Counter()
    current: list[str] | None = None
    for line in lines:
        if line.startswith("Trace"):
            ran = _BLOCK.match(line)
            if ran is not None:
                runs[int(ran[1], 16)] += 1
        elif line.startswith("IN:"):
            current = []
        elif line.startswith("0x") and current is not None:
            instruction = _INSTRUCTION.match(line)
            if instruction is not None:
                if not current:
                    blocks[int(instruction[1], 16)] = current
                current.append(_name(int(instruction[2], 16), instruction[3]))
    total: Counter[str] = Counter()
    for address, times in runs.items():
        for name in blocks.get(address, ()):
            total[name] += times
    return total
