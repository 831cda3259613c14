"""The option ``tune`` of the tvm backend, read without TVM."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxopt.errors import SpecError, near_miss
from fxopt.notice import cache_folder


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How long to search for faster kernels, and where.

    Attributes:
        trials: how many tiles to measure for this model, those that the database has already included; 0 to use what it
            has. None for as many as there is time for.
        seconds: after which no measurement begins any more; None for no limit.
        database: file of measurements; "" for tuning.jsonl in the cache folder.
        tracker: "host:port" of a tracker of TVM's RPC, whose devices measure; "" for this machine.
        key: under which these devices are known to the tracker.
    """

    trials: int | None = None
    seconds: float | None = None
    database: str = ""
    tracker: str = ""
    key: str = ""

    def __post_init__(self) -> None:
        if self.trials is None and self.seconds is None:
            raise SpecError('tune needs an end: {"trials": 512}, {"seconds": 600} or both')
        if self.trials is not None and (type(self.trials) is not int or self.trials < 0):
            raise SpecError(f"tune: trials must be a whole number, not {self.trials!r}")
        timed = isinstance(self.seconds, (int, float)) and not isinstance(self.seconds, bool)
        if self.seconds is not None and not (timed and self.seconds > 0):
            raise SpecError(f"tune: seconds must be a positive number, not {self.seconds!r}")
        for name in ("database", "tracker", "key"):
            if not isinstance(getattr(self, name), str):
                raise SpecError(f"tune: {name} must be text, not {getattr(self, name)!r}")
        if self.key and not self.tracker:
            raise SpecError("tune: key is for the devices of a tracker, and there is no tracker")
        if self.tracker:
            self.address()
            if not self.key:
                raise SpecError("tune: tracker needs a key too, under which the devices are known to it")

    @staticmethod
    def of(said: object) -> Tuning | None:
        """The option as it was given.

        Raises:
            SpecError: it is none.
        """
        if said is None or isinstance(said, Tuning):
            return said
        if not isinstance(said, Mapping):
            raise SpecError(f'tune must be like {{"trials": 512}} or {{"seconds": 600}}, not {said!r:.80}')
        values: dict[str, Any] = dict(said)
        known = [field.name for field in dataclasses.fields(Tuning)]
        for name in values:
            if name not in known:
                raise SpecError(f"tune has no option {name!r:.80}.{near_miss(str(name), known)}")
        if isinstance(values.get("database"), Path):
            values["database"] = str(values["database"])
        return Tuning(**values)

    def address(self) -> tuple[str, int] | None:
        """Host and port of the tracker.

        Raises:
            SpecError: it is not written so.
        """
        if not self.tracker:
            return None
        host, _, port = self.tracker.rpartition(":")
        if not host or not port.isdecimal():
            raise SpecError(f"tune: tracker must be host:port, such as 127.0.0.1:9190, not {self.tracker!r:.80}")
        return host, int(port)

    def path(self) -> Path:
        """The file of measurements."""
        home = cache_folder(True)
        assert home is not None
        return Path(self.database) if self.database else home / "tuning.jsonl"
