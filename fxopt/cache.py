"""Compiled models on disk, by what they were made from: the same compile a second time is a load.

    key = SHA-256(graph and signature as captured, every weight, calibration data, passes, target, backend, versions)
    folder/key.fxopt        an artifact (fxopt.artifact), written in one step, touched when it is used

``fxopt.compile(..., cache=True)``, or FXOPT_CACHE=1 for all; another value is the folder (``$XDG_CACHE_HOME/fxopt``).
The folder is the user's own and its files are loaded as trusted ones. It is kept below FXOPT_CACHE_GB (8): the files
that were not used for longest go first, under a lock, so that several processes can share it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from fxopt import artifact, spec
from fxopt.artifact.container import PARTIAL
from fxopt.artifact.graphs import encode_graph
from fxopt.artifact.signatures import encode_signature
from fxopt.artifact.values import encode
from fxopt.backend import Backend
from fxopt.capture import Captured
from fxopt.compiled import Variant
from fxopt.errors import ArtifactError, FxoptError, InputError
from fxopt.notice import LOG, warn
from fxopt.passbase import Pass
from fxopt.progress import Stages
from fxopt.registry import available, find_pass
from fxopt.target import Target

_ENGINES = ("fxopt", "torch", "onnx", "onnxruntime", "openvino", "apache-tvm")
_GB = 2**30
_ABANDONED = 3600.0  # seconds; whoever began to write a file then does so no more


@dataclasses.dataclass
class Cache:
    """A folder of compiled models.

    Attributes:
        folder: made when something is first put into it, for its owner alone.
        most: bytes of all files together.
    """

    folder: Path
    most: int

    @staticmethod
    def at(place: Path) -> Cache:
        """The cache in *place*, as large as FXOPT_CACHE_GB says.

        Raises:
            InputError: that is no number.
        """
        text = os.environ.get("FXOPT_CACHE_GB", "8")
        try:
            return Cache(place, int(float(text) * _GB))
        except (ValueError, OverflowError) as error:
            raise InputError(f"FXOPT_CACHE_GB={text!r} is no number") from error

    def files(self) -> list[Path]:
        """What is in it, the latest used last."""
        return [path for path, _, _ in self._known()]

    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size, _ in self._known())

    def _known(self) -> list[tuple[Path, int, float]]:
        """Path, bytes and time of each file, the latest used last; another process may remove any at any moment."""
        found = []
        for path in self.folder.glob("*.fxopt") if self.folder.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((path, status.st_size, status.st_mtime))
        return sorted(found, key=lambda one: (one[2], one[0].name))

    def get(self, key: str) -> Variant | None:
        """What was put in under *key*; a file that cannot be read any more goes."""
        path = self.folder / f"{key}.fxopt"
        if not path.is_file():
            return None
        try:
            found = artifact.load(path, allow_code=True, allow_ops=_AnyLibrary())
            with contextlib.suppress(FileNotFoundError):  # somebody else has just made room
                os.utime(path)
        except FxoptError as error:
            if not path.is_file():  # somebody else has just made room
                return None
            LOG.warning("cache: %s is of no use and goes: %s", path.name, error)
            path.unlink(missing_ok=True)
            return None
        LOG.info("cache: %s", path)
        return found._fixed

    def put(self, key: str, variant: Variant, target: Target) -> None:
        """Keep *variant* under *key*, where it can be written down, and make room for it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            artifact.save(variant, target, self.folder / f"{key}.fxopt")
            self._trim()
        except OSError as error:
            warn(f"fxopt: the compiled model is not kept in the cache: {error}")
        except ArtifactError as error:
            if isinstance(error.__cause__, OSError):
                warn(f"fxopt: the compiled model is not kept in the cache: {error}")
            LOG.info("cache: not kept: %s", error)

    def clear(self) -> int:
        """Remove everything; gives how many files there were."""
        if not self.folder.is_dir():
            return 0
        with self._lock():
            files = self.files()
            for path in [*files, *self._left_behind(0)]:
                path.unlink(missing_ok=True)
        return len(files)

    def _trim(self) -> None:
        with self._lock():
            known = self._known()
            left = sum(size for _, size, _ in known)
            for path, size, _ in known[:-1]:  # what was just put in stays
                if left <= self.most:
                    break
                left -= size
                path.unlink(missing_ok=True)
            for path in self._left_behind(_ABANDONED):
                path.unlink(missing_ok=True)

    def _left_behind(self, age: float) -> list[Path]:
        """Files that somebody began to write and did not finish, at least *age* seconds old."""
        found = []
        for path in self.folder.glob(f".*{PARTIAL}"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime >= age:
                    found.append(path)
        return found

    def _lock(self) -> FileLock:
        return FileLock(self.folder / ".lock")


@dataclasses.dataclass
class Entry:
    """The place of one compile in a cache."""

    cache: Cache
    key: str
    target: Target

    def get(self, stages: Stages) -> Variant | None:
        """What is there, its report with the times of today."""
        with stages.stage("cache"):
            found = self.cache.get(self.key)
        if found is not None:
            found.report.seconds = stages.seconds
        return found

    def put(self, variant: Variant) -> None:
        """Keep *variant*."""
        self.cache.put(self.key, variant, self.target)


class _AnyLibrary(frozenset[str]):
    """The model that is being compiled has called these operators already: they are the user's own."""

    def __contains__(self, name: object) -> bool:
        return True


def key_of(
    captured: Captured,
    passes: Sequence[Pass],
    target: Target,
    backend: str | Backend,
    verify: bool,
    calibration: Iterable[Any] | None,
) -> str | None:
    """What a compile depends on, as one word; None where part of it cannot be told by its value (a Python function)."""
    text = spec.format(passes)
    try:
        if spec.parse(text, find_pass) != list(passes):
            return None
        program = captured.program
        sizes = program.signature.sizes(captured.inputs)
        graph = [encode_graph(program.graph, program.constants), encode_signature(program.signature, sizes)]
        engine = backend if isinstance(backend, str) else [backend.name, encode(dataclasses.asdict(backend))]
    except FxoptError:
        return None
    digest = hashlib.sha256()
    said = [graph, text, _facts(target), engine, verify, _versions(), available("fxopt.backends"), platform.processor()]
    threads = torch.get_num_threads()
    digest.update(json.dumps([*said, threads], default=str, sort_keys=True).encode())
    for name, value in sorted(program.constants.items()):
        _add(digest, name, value)
    for x in captured.inputs:
        _add(digest, "input", x)  # passes and engines are checked and measured on them
    for batch in calibration or ():
        for x in torch.utils._pytree.tree_leaves(batch):
            _add(digest, "batch", x)
    return digest.hexdigest()


def _facts(target: Target) -> list[str]:
    """The fields of *target*; the order of a set is another one in every process."""
    values = (getattr(target, field.name) for field in dataclasses.fields(target))
    return [repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value) for value in values]


def _add(digest: Any, name: str, value: Any) -> None:
    digest.update(name.encode())
    if not isinstance(value, torch.Tensor):
        digest.update(repr(value).encode() if isinstance(value, (int, float, str, bool, type(None))) else b"?")
        return
    digest.update(f"{value.dtype}{list(value.shape)}{value.layout}".encode())
    dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
    flat = dense.cpu().contiguous().flatten()
    data: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    digest.update(data)


def _versions() -> Mapping[str, str]:
    found = {}
    for name in _ENGINES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
