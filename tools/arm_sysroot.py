"""An aarch64 machine to try compiled models on, without one at hand: QEMU's user-mode emulator and what it runs.

    ~/.cache/fxopt/arm/host      from Debian, for this machine: qemu-aarch64-static, the cross compiler, objdump
    ~/.cache/fxopt/arm/sysroot   from Debian, for aarch64: Python 3.11 and its libraries
    ~/.cache/fxopt/arm/site      from PyPI, for aarch64: numpy, onnxruntime, TVM, in the versions installed here

Nothing is installed into this machine, and root is not needed: apt-get resolves and downloads packages from where this
machine has its own (Debian 12), with a state folder apart, and dpkg-deb unpacks them. Models compute there what they
would compute on an ARM processor; how long they take says nothing about one.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TRIPLE = "aarch64-linux-gnu"

_HOST = ("qemu-user-static", f"gcc-{TRIPLE}", f"binutils-{TRIPLE}", "libc6-dev-arm64-cross")
_GUEST = ("python3.11-minimal", "libpython3.11-stdlib", "libstdc++6")
_ALWAYS, _WITH_TVM = ("numpy", "onnxruntime"), ("apache-tvm", "apache-tvm-ffi", "ml_dtypes", "typing_extensions")
_PYTHON = "3.11"  # bookworm's

# onnxruntime reads it to find out which kernels it may use, and fails where it finds an x86 one.
_CPUINFO = """processor\t: 0
BogoMIPS\t: 100.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1
"""


class CannotSetUp(RuntimeError):
    """What keeps the emulated machine from being set up here."""


@dataclass(frozen=True)
class Machine:
    """The emulated machine.

    Attributes:
        root: folder that holds it.
    """

    root: Path

    def python(
        self, arguments: Sequence[str], *, cpu: str = "max", qemu: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """What aarch64 Python gives for *arguments*, on QEMU's *cpu*: "max" has all features, "cortex-a72" its own.

        *qemu*: further options of the emulator.
        """
        sysroot = self.root / "sysroot"
        libraries = f"{sysroot}/usr/lib/{TRIPLE}:{sysroot}/lib/{TRIPLE}:{self.root}/site/tvm_ffi/lib"
        environment = {
            "PYTHONHOME": f"{sysroot}/usr",
            "PYTHONPATH": str(self.root / "site"),
            "LD_LIBRARY_PATH": libraries,
            "OMP_NUM_THREADS": "1",
            "TVM_NUM_THREADS": "1",
            "TVM_USE_RUNTIME_LIB": "1",  # what runs there is compiled already
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        settings = [part for name, value in environment.items() for part in ("-E", f"{name}={value}")]
        emulator = [str(self.root / "host/usr/bin/qemu-aarch64-static"), "-L", str(sysroot), "-cpu", cpu, *qemu]
        command = [*emulator, *settings, str(sysroot / "usr/bin/python3.11"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def tool(self, name: str) -> str:
        """Path of a cross tool that runs here: "gcc", "objdump"..."""
        return str(self.root / "bin" / f"{TRIPLE}-{name}")

    def disassembly(self, library: Path) -> str:
        """The instructions of an aarch64 *library*, a line each."""
        done = subprocess.run(
            [self.tool("objdump"), "-d", "--no-show-raw-insn", str(library)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"objdump failed: {done.stderr}")
        return done.stdout


def machine() -> Machine:
    """The emulated machine, set up now if it is not there yet.

    Raises:
        CannotSetUp: it cannot be, with the reason.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxopt" / "arm"
    wanted = _versions()
    stamp = hashlib.sha256(f"{Path(__file__).read_text()}{sorted(wanted.items())}".encode()).hexdigest()
    root.parent.mkdir(parents=True, exist_ok=True)
    with _alone(root.with_suffix(".lock")):
        if not (root / "stamp").exists() or (root / "stamp").read_text() != stamp:
            _check_host()
            print(f"setting up an emulated aarch64 machine in {root} (once)", file=sys.stderr)
            shutil.rmtree(root, ignore_errors=True)
            _set_up(root, wanted)
            (root / "stamp").write_text(stamp)
    return Machine(root)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _versions() -> dict[str, str]:
    """What is wanted from PyPI: the versions that this host compiles and compares with."""
    names = list(_ALWAYS)
    try:
        importlib.metadata.version("apache-tvm")
        names += _WITH_TVM
    except importlib.metadata.PackageNotFoundError:
        pass
    return {name: importlib.metadata.version(name) for name in names}


def _check_host() -> None:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise CannotSetUp(f"it is made for x86-64 Linux, and this is {platform.machine()} {platform.system()}")
    missing = [name for name in ("apt-get", "dpkg-deb") if shutil.which(name) is None]
    if missing:
        raise CannotSetUp(f"it takes packages from Debian with apt-get and dpkg-deb, and there is no {missing[0]} here")


def _set_up(root: Path, wanted: Mapping[str, str]) -> None:
    _unpack("amd64", _HOST, root / "host")
    _unpack("arm64", _GUEST, root / "sysroot")
    _write_tools(root)
    cpuinfo = root / "sysroot/proc/cpuinfo"
    cpuinfo.parent.mkdir(exist_ok=True)
    cpuinfo.write_text(_CPUINFO)
    pins = [f"{name}=={version}" for name, version in wanted.items()]
    platforms = [
        part for old in ("2_28", "2_27", "2_24", "2_17") for part in ("--platform", f"manylinux_{old}_aarch64")
    ]
    kind = ["--python-version", _PYTHON, "--implementation", "cp", "--only-binary=:all:", "--no-deps"]
    target = ["--target", str(root / "site"), "--no-compile"]
    _run([sys.executable, "-m", "pip", "install", "--quiet", *platforms, *kind, *target, *pins])
    done = Machine(root).python(["-c", "import numpy, onnxruntime; print(numpy.arange(3).sum())"])
    if done.stdout.strip() != "3":
        raise CannotSetUp(f"aarch64 Python does not run: {done.stderr.strip()[-500:]}")


def _unpack(architecture: str, packages: Sequence[str], target: Path) -> None:
    """Debian's *packages* for *architecture*, with all that they depend on, unpacked into *target*."""
    apt = target.parent / f"apt-{architecture}"
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True)
    (apt / "state/status").touch()  # nothing is installed: all dependencies are wanted
    user = 'APT::Sandbox::User "root";\n' if os.geteuid() == 0 else ""
    (apt / "apt.conf").write_text(
        f'{user}APT::Architecture "{architecture}";\nAPT::Architectures {{ "{architecture}"; }};\n'
        f'Dir::State "{apt}/state";\nDir::State::status "{apt}/state/status";\nDir::Cache "{apt}/cache";\n'
    )
    settings = {"APT_CONFIG": str(apt / "apt.conf")}
    _run(["apt-get", "-qq", "update"], settings)
    _run(["apt-get", "-qq", "install", "--download-only", "-y", "--no-install-recommends", *packages], settings)
    target.mkdir()
    for archive in sorted((apt / "cache/archives").glob("*.deb")):
        _run(["dpkg-deb", "-x", str(archive), str(target)])
    shutil.rmtree(apt)


def _write_tools(root: Path) -> None:
    """Cross tools that find their own libraries and files wherever they have been unpacked."""
    (root / "bin").mkdir()
    for name in ("gcc", "g++", "ld", "objdump"):
        found = next(iter(sorted((root / "host/usr/bin").glob(f"{TRIPLE}-{name}"))), None)
        if found is None:
            continue
        own = f"--sysroot={root}/host" if name in ("gcc", "g++") else ""
        script = root / "bin" / f"{TRIPLE}-{name}"
        script.write_text(
            f"#!/bin/sh\nexport LD_LIBRARY_PATH={root}/host/usr/lib/x86_64-linux-gnu\n"
            f'export PATH={root}/host/usr/bin:"$PATH"\nexec {found} {own} "$@"\n'
        )
        script.chmod(0o755)


def _run(command: Sequence[str], settings: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(command, env={**os.environ, **(settings or {})}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotSetUp(f"{' '.join(command[:4])} … failed: {(done.stderr or done.stdout).strip()[-1000:]}")
