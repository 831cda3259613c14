"""What was measured of kernels, in a file that several processes write and several models read.

    {"workload": "linear float32 x=128,768 weights=768,3072", "machine": "…", "versions": "…",
     "tile": [16, 3, 8, 1, "rows"], "ratio": 0.93, "seconds": 0.0041}

One line for each measurement, only ever appended, under a lock. So two files are merged by writing one after the other,
their order means nothing, and a line that a kill cut off is skipped. A tile counts by the median (of two, the worse) of
its ratios to the tile of the rule, taken side by side: that holds on another day, and on another machine of its kind.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

from filelock import FileLock

from fxopt.backends._tvm_tiles import Tile
from fxopt.errors import ArtifactError
from fxopt.notice import LOG

WORTHWHILE = 0.98  # of the time of the rule's own tile; less of a gain is within what measurements differ by


@dataclasses.dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        workload: its name.
        tile: that was measured.
        ratio: its time over that of the rule's tile.
        seconds: its time.
    """

    workload: str
    tile: Tile
    ratio: float
    seconds: float


class Records:
    """The measurements of one kind of machine and of one version of the kernels.

    Attributes:
        path: of the file; None to keep nothing.
    """

    def __init__(self, path: Path | None, machine: str, versions: str) -> None:
        """Read *path*, where it is.

        Raises:
            ArtifactError: it cannot be read.
        """
        self.path, self._machine, self._versions = path, machine, versions
        self._found: dict[str, dict[Tile, list[Record]]] = {}
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(f"cannot read the measurements in {path}: {error}") from error
        unusable = 0
        for line in lines:
            try:
                said = json.loads(line)
                if (said["machine"], said["versions"]) == (self._machine, self._versions):
                    self._keep(_record(said))
            except (ValueError, TypeError, KeyError):
                unusable += 1
        if unusable:
            LOG.warning("%s: %d of %d lines are no measurements and are skipped", path, unusable, len(lines))

    def _keep(self, record: Record) -> None:
        self._found.setdefault(record.workload, {}).setdefault(record.tile, []).append(record)

    def add(self, records: Iterable[Record]) -> None:
        """Keep *records*, in the file too.

        Raises:
            ArtifactError: it cannot be written.
        """
        lines = []
        for record in records:
            self._keep(record)
            said = {**vars(record), "tile": dataclasses.astuple(record.tile)}
            lines.append(json.dumps({**said, "machine": self._machine, "versions": self._versions}) + "\n")
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock"), self.path.open("a+b") as file:
                if file.tell():
                    file.seek(-1, 2)
                    if file.read(1) != b"\n":  # the last line was cut off
                        file.write(b"\n")
                file.write("".join(lines).encode())
        except OSError as error:
            raise ArtifactError(f"cannot write the measurements to {self.path}: {error}") from error

    def tried(self, workload: str) -> Mapping[Tile, float]:
        """The ratio of each tile that was measured of *workload*."""
        known = self._found.get(workload, {})
        return {tile: statistics.median_high(r.ratio for r in records) for tile, records in known.items()}

    def best(self, workload: str) -> Tile | None:
        """The fastest of those, where that is worth to leave the rule for, and was seen more than once."""
        known = self._found.get(workload, {})
        tried = {tile: ratio for tile, ratio in self.tried(workload).items() if len(known[tile]) > 1}
        found = min(tried, key=lambda tile: tried[tile], default=None)
        return found if found is not None and tried[found] < WORTHWHILE else None

    def seconds(self, workload: str) -> float | None:
        """What the rule's tile of *workload* takes; None where nothing is known of it."""
        known = [record for records in self._found.get(workload, {}).values() for record in records]
        return statistics.median(record.seconds / record.ratio for record in known) if known else None


def _record(said: Mapping[str, object]) -> Record:
    """Raises: ValueError or KeyError where *said* is none."""
    tile, ratio, seconds = Tile.read(said["tile"]), said["ratio"], said["seconds"]
    if not isinstance(ratio, float) or not isinstance(seconds, float):
        raise ValueError("no time")
    if not (math.isfinite(ratio) and math.isfinite(seconds) and min(ratio, seconds) > 0):
        raise ValueError("no time")
    return Record(str(said["workload"]), tile, ratio, seconds)
