"""The file around an artifact: a zip of members as they are, each with its SHA-256 in the manifest.

    m.fxopt = zip(manifest.json, graph.json, weights.safetensors, payload/…), comment: its SHA-256

Nothing is compressed, so that no small file can unfold into a large one, and weights can be mapped from where they lie:
each member begins at a multiple of 64 bytes. Writing is atomic: a reader of the path sees the old file or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from fxopt.errors import ArtifactError

MANIFEST = "manifest.json"
PARTIAL = ".fxopt-partial"  # how names of files end that are being written
_COMMENT = b"fxopt sha256 "
_NAME = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)?(\.[a-z0-9]+)?")
_ALIGNMENT = 64
_CHUNK = 1 << 20
_LARGEST_TEXT = 1 << 28  # bytes of a JSON member
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same model gives the same bytes


def write(path: Path, manifest: Mapping[str, Any], members: Mapping[str, bytes | Path]) -> None:
    """Write an artifact; an older one at *path* is replaced at the end, in one step. A link at *path* stays one.

    Args:
        path: of the file.
        manifest: what :data:`MANIFEST` holds; ``members``, with size and SHA-256 of each, is added.
        members: contents by name, bytes or a file.

    Raises:
        ArtifactError: it cannot be written; *path* is as it was.
    """
    place = Path(os.path.realpath(path))
    partial = place.parent / f".{secrets.token_hex(8)}{PARTIAL}"
    try:
        with partial.open("xb") as file:
            _write_zip(file, manifest, members)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(place)
        _sync_folder(place.parent)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _write_zip(file: BinaryIO, manifest: Mapping[str, Any], members: Mapping[str, bytes | Path]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        entries = {name: _add(archive, name, content) for name, content in members.items()}
        text = json.dumps({**manifest, "members": entries}, indent=1, allow_nan=False).encode()
        _add(archive, MANIFEST, text)
        archive.comment = _COMMENT + hashlib.sha256(text).hexdigest().encode()


def _add(archive: zipfile.ZipFile, name: str, content: bytes | Path) -> dict[str, Any]:
    """Write one member; gives its size and checksum."""
    info = zipfile.ZipInfo(name, _EPOCH)
    info.external_attr = 0o644 << 16
    assert archive.fp is not None
    header = archive.fp.tell() + 30 + len(name) + 20  # 20: sizes in 64 bits, which zipfile writes into the extra field
    gap = -header % _ALIGNMENT
    info.extra = struct.pack("<HH", 0xFFFF, gap - 4) + bytes(gap - 4) if gap >= 4 else _wide_gap(gap)
    digest, size = hashlib.sha256(), 0
    with archive.open(info, "w", force_zip64=True) as target, contextlib.ExitStack() as stack:
        chunks = [content] if isinstance(content, bytes) else _chunks(stack.enter_context(content.open("rb")))
        for chunk in chunks:
            target.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _wide_gap(gap: int) -> bytes:
    """An extra field that fills *gap* bytes too few for its own head, and one alignment more."""
    return b"" if gap == 0 else struct.pack("<HH", 0xFFFF, gap + _ALIGNMENT - 4) + bytes(gap + _ALIGNMENT - 4)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a loss of power, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Container:
    """An artifact that is open for reading, every member checked against the manifest.

    Attributes:
        path: of the file.
        manifest: the parsed :data:`MANIFEST`.
    """

    def __init__(self, path: Path) -> None:
        """Open *path* and check all of it.

        Raises:
            ArtifactError: it is no artifact, truncated, altered, or has members that none may have.
        """
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self._size = path.stat().st_size
                self._places = self._members(archive)
                self.manifest = self._manifest(archive.comment)
        except FileNotFoundError:
            raise ArtifactError(f"there is no file {path}") from None
        except IsADirectoryError:
            raise ArtifactError(f"{path} is a folder, not a file") from None
        except (zipfile.BadZipFile, EOFError, NotImplementedError, UnicodeError) as error:
            raise ArtifactError(f"{path} is no fxopt artifact, or is cut off: {error}") from error
        except OSError as error:
            raise ArtifactError(f"cannot read {path}: {error}") from error

    def check(self) -> None:
        """Compare every member with its checksum.

        Raises:
            ArtifactError: one is missing, too many, or not what was written.
        """
        entries = self.manifest.get("members")
        if not isinstance(entries, dict) or set(entries) != set(self._places) - {MANIFEST}:
            raise ArtifactError(f"{self.path}: its manifest does not list what it holds")
        for name, entry in entries.items():
            if entry != {"bytes": self._places[name][1], "sha256": self._digest(name)}:
                raise ArtifactError(f"{self.path}: {name} is not what was written: the file is damaged or was altered")

    def names(self, folder: str = "") -> list[str]:
        """Members whose names begin with *folder*."""
        return sorted(name for name in self._places if name.startswith(folder))

    def place(self, name: str) -> tuple[int, int]:
        """Offset and size of a member's bytes in the file.

        Raises:
            ArtifactError: there is no such member.
        """
        if name not in self._places:
            raise ArtifactError(f"{self.path} holds no {name}")
        return self._places[name]

    def json(self, name: str) -> Any:
        """A member as JSON.

        Raises:
            ArtifactError: there is none, or it is not JSON.
        """
        offset, size = self.place(name)
        if size > _LARGEST_TEXT:
            raise ArtifactError(f"{self.path}: {name} has {size} bytes, more than any model needs")
        with self.path.open("rb") as file:
            file.seek(offset)
            text = file.read(size)
        try:
            return json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{self.path}: {name} is not JSON: {error}") from error

    def extract(self, folder: str, target: Path) -> None:
        """Copy the members of *folder* into the existing folder *target*, under their last names.

        Raises:
            ArtifactError: they cannot be written.
        """
        try:
            for name in self.names(f"{folder}/"):
                with (target / name.rpartition("/")[2]).open("xb") as file:
                    for chunk in self._read(name):
                        file.write(chunk)
        except OSError as error:
            raise ArtifactError(f"cannot unpack {self.path} into {target}: {error}") from error

    def _members(self, archive: zipfile.ZipFile) -> dict[str, tuple[int, int]]:
        places: dict[str, tuple[int, int]] = {}
        for info in archive.infolist():
            if not _NAME.fullmatch(info.filename) or info.filename in places:
                raise ArtifactError(f"{self.path} has a member named {info.filename!r:.80}, which no artifact has")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
                raise ArtifactError(f"{self.path}: {info.filename} is compressed or encrypted, which no artifact is")
            places[info.filename] = (self._data(info), info.file_size)
        if sum(size for _, size in places.values()) > self._size:
            raise ArtifactError(f"{self.path} claims to hold more bytes than it has")
        if MANIFEST not in places:
            raise ArtifactError(f"{self.path} is no fxopt artifact: it has no {MANIFEST}")
        return places

    def _data(self, info: zipfile.ZipInfo) -> int:
        """Where the bytes of a member begin."""
        with self.path.open("rb") as file:
            file.seek(info.header_offset)
            head = file.read(30)
        if len(head) != 30 or head[:4] != b"PK\3\4":
            raise ArtifactError(f"{self.path}: {info.filename} is not where it should be: the file is damaged")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", head[26:]))
        if start + info.file_size > self._size:
            raise ArtifactError(f"{self.path} is cut off within {info.filename}")
        return int(start)

    def _manifest(self, comment: bytes) -> dict[str, Any]:
        if comment != _COMMENT + self._digest(MANIFEST).encode():
            raise ArtifactError(f"{self.path} is no fxopt artifact, or its {MANIFEST} was altered")
        if not self._ends_with(comment):
            raise ArtifactError(f"{self.path} goes on after its end: the file is damaged or was altered")
        manifest = self.json(MANIFEST)
        if not isinstance(manifest, dict):
            raise ArtifactError(f"{self.path}: {MANIFEST} is no JSON object")
        return manifest

    def _ends_with(self, comment: bytes) -> bool:
        with self.path.open("rb") as file:
            file.seek(-len(comment), os.SEEK_END)
            return file.read() == comment

    def _read(self, name: str) -> Iterator[bytes]:
        offset, left = self.place(name)
        with self.path.open("rb") as file:
            file.seek(offset)
            while left and (chunk := file.read(min(_CHUNK, left))):
                left -= len(chunk)
                yield chunk

    def _digest(self, name: str) -> str:
        digest = hashlib.sha256()
        for chunk in self._read(name):
            digest.update(chunk)
        return digest.hexdigest()


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")
