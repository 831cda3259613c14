"""Tuning: the tiles of a model's kernels, chosen by measuring instead of by the rule.

    workloads of the model ──by what they cost──▶ a few tiles of one: near the best so far, and promising by the rule
        ──built and timed beside the rule's──▶ records on disk ──the best of each──▶ the model is built with them

Only kernels are tuned, since all else is bound by memory. What is compared is always measured side by side, and a tile
that is not clearly faster than the rule's is not taken, so that no noise makes a model slower. Measurements go into a
file as they are made: an interrupt loses none of them, the same call goes on from there, and models that share layers
share their records.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import tvm

from fxopt.backends._onnx_file import OnnxFile
from fxopt.backends._tuning import Tuning
from fxopt.backends._tvm_build import prepare
from fxopt.backends._tvm_measure import Bench
from fxopt.backends._tvm_records import WORTHWHILE, Record, Records
from fxopt.backends._tvm_target import Machine
from fxopt.backends._tvm_tiles import KERNELS, Tile
from fxopt.backends._tvm_workloads import Tiles, Workload
from fxopt.errors import BackendUnavailable
from fxopt.notice import LOG
from fxopt.progress import say

_BATCH = 6  # tiles that are measured side by side
_CONFIRMED = 2  # of the tiles of a batch are measured twice, where they are faster than the rule's
_FAILURES = 3  # in a row, after which the devices are given up


def tuned(file: OnnxFile, machine: Machine, threads: int | None, tuning: Tuning) -> tuple[Tiles, str]:
    """Tiles for the kernels of *file*, searched for as *tuning* says, and a remark on them for the report.

    Args:
        file: the model.
        machine: that it is compiled for.
        threads: for one call; None for as many as a device has.
        tuning: where to measure, and for how long.

    Raises:
        BackendUnavailable: the tracker or its devices do not answer.
        ArtifactError: the file of measurements cannot be read or written, or a device needs a linker that is not here.
        UnsupportedOp: TVM does not import an operator of the model.
    """
    asked = Tiles()
    with tvm.target.Target(machine.llvm):
        prepare(file, machine, asked)
    kind = {**machine.llvm, "lanes": machine.lanes, "registers": machine.registers, "dot": machine.dot}
    described = json.dumps({**kind, "threads": threads}, sort_keys=True, default=list)
    records = Records(tuning.path(), described, f"tvm {tvm.__version__} kernels {KERNELS}")
    search = _Search(asked, records, Bench(machine, threads, tuning.address(), tuning.key), tuning)
    if tuning.trials is None or search.trials() < tuning.trials:
        records.add(())  # where it cannot be written, nothing need be measured
        try:
            search.run()
        except KeyboardInterrupt:
            LOG.warning("tuning interrupted: %s. The same call goes on from there", search.state())
            raise
    return Tiles(search.found()), search.state()


class _Search:
    """One search, over the workloads of one model."""

    def __init__(self, asked: Tiles, records: Records, bench: Bench, tuning: Tuning) -> None:
        self._asked, self._records, self._bench, self._tuning = asked, records, bench, tuning
        self._batches = dict.fromkeys(asked.asked, 0)
        self._failed = 0
        self._start = time.monotonic()

    def trials(self) -> int:
        """How many tiles were measured of the workloads of this model, ever."""
        return sum(len(self._records.tried(str(workload))) for workload in self._asked.asked)

    def found(self) -> dict[str, Tile]:
        """The tiles that are faster than the rule's, by the names of workloads."""
        best = {str(workload): self._records.best(str(workload)) for workload in self._asked.asked}
        return {name: tile for name, tile in best.items() if tile is not None}

    def state(self) -> str:
        """How far it has come, in words."""
        before, now = self._latency()
        known = f"{_ms(before)} → {_ms(now)} ms in kernels, estimated" if before else "nothing measured yet"
        return f"{self.trials()} trials of {len(self._asked.asked)} kernels in {self._records.path}: {known}"

    def run(self) -> None:
        """Measure until there is no time, no trial, or nothing more to be tried.

        Raises:
            BackendUnavailable: the devices fail, one time after the other.
        """
        devices = self._bench.devices()
        running: dict[Future[list[Record]], Workload] = {}
        with ThreadPoolExecutor(devices, "fxopt-tuning") as pool:
            while True:
                while len(running) < devices and (job := self._next(running)) is not None:
                    running[pool.submit(self._measure, *job)] = job[0]
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    self._take(running.pop(done), done)

    def _next(self, running: dict[Any, Workload]) -> tuple[Workload, list[Tile]] | None:
        """The workload from which most can be expected, and tiles of it to be measured."""
        left = math.inf if self._tuning.trials is None else self._tuning.trials - self.trials() - _BATCH * len(running)
        if left <= 0 or (self._tuning.seconds is not None and self._elapsed() >= self._tuning.seconds):
            return None
        busy = set(running.values())
        for workload in sorted(self._batches, key=self._promise, reverse=True):
            tiles = [] if workload in busy else self._candidates(workload)
            if tiles:
                return workload, tiles[: int(min(left, _BATCH))]
        return None

    def _promise(self, workload: Workload) -> float:
        """What it costs a call of the model, less by each time that it was searched."""
        name = str(workload)
        best = min(self._records.tried(name).values(), default=1.0)
        seconds = self._records.seconds(name) or workload.products() * self._pace()
        return self._asked.asked[workload] * seconds * min(best, 1.0) / (1 + self._batches[workload])

    def _pace(self) -> float:
        """Seconds for a multiplication, as far as that is known; for what was not measured yet."""
        known = [(workload, self._records.seconds(str(workload))) for workload in self._batches]
        return statistics.median([s / w.products() for w, s in known if s is not None] or [1.0])

    def _candidates(self, workload: Workload) -> list[Tile]:
        """Tiles that were not measured yet: by turns near the best, and next in the order of the rule."""
        tried = self._records.tried(str(workload))
        left = [tile for tile in self._asked.spaces[workload].tiles() if tile not in tried]
        if not tried:
            return left[:_BATCH]
        best = min(tried, key=lambda tile: tried[tile])
        near = sorted(left, key=lambda tile: _distance(tile, best))[: _BATCH // 2]
        return near + [tile for tile in left if tile not in near][: _BATCH - len(near)]

    def _measure(self, workload: Workload, candidates: list[Tile]) -> list[Record]:
        """Records of *candidates*; a second time of those that seem worth it, with the best so far: it may be luck."""
        best = self._records.best(str(workload))
        found = self._beside_the_rule(workload, candidates)
        good = sorted((one for one in found if one.ratio < WORTHWHILE), key=lambda one: one.ratio)
        again = [one.tile for one in good[:_CONFIRMED]] + ([best] if best is not None else [])
        return found + (self._beside_the_rule(workload, again) if good else [])

    def _beside_the_rule(self, workload: Workload, tiles: list[Tile]) -> list[Record]:
        rule, *seconds = self._bench.seconds(workload, [self._asked.spaces[workload].rule(), *tiles])
        return [Record(str(workload), tile, s / rule, s) for tile, s in zip(tiles, seconds, strict=True)]

    def _take(self, workload: Workload, done: Future[list[Record]]) -> None:
        try:
            self._records.add(done.result())
            self._failed = 0
        except (RuntimeError, OSError) as error:  # of a device, by TVM
            self._failed += 1
            reason = str(error).strip().splitlines()
            LOG.warning("tuning: a measurement of %s failed: %s", workload, reason[-1] if reason else repr(error))
            if self._failed == _FAILURES or not self._bench.tracker:
                raise BackendUnavailable(f"no kernel can be measured: {error}. So far: {self.state()}") from error
        self._batches[workload] += 1
        trials, asked = self.trials(), self._tuning
        parts = [trials / asked.trials if asked.trials else 0.0, self._elapsed() / (asked.seconds or math.inf)]
        before, now = self._latency()
        of = "" if asked.trials is None else f" of {asked.trials}"
        say(f"tuning, {trials}{of} trials, kernels {_ms(before)} → {_ms(now)} ms", min(max(parts), 1.0))
        LOG.info("tuning: %s", self.state())

    def _latency(self) -> tuple[float, float]:
        """Seconds in the kernels of a call, with the tiles of the rule and with the best, as far as they are known."""
        before = now = 0.0
        for workload, count in self._asked.asked.items():
            seconds = count * (self._records.seconds(str(workload)) or 0.0)
            best = self._records.best(str(workload))
            before += seconds
            now += seconds * (self._records.tried(str(workload))[best] if best is not None else 1.0)
        return before, now

    def _elapsed(self) -> float:
        return time.monotonic() - self._start


def _ms(seconds: float) -> str:
    """Milliseconds with three digits."""
    return f"{seconds * 1e3:.{max(0, 2 - math.floor(math.log10(seconds * 1e3)))}f}" if seconds else "0"


def _distance(a: Tile, b: Tile) -> float:
    """How many small steps lie between two tiles."""
    other = abs(math.log2(a.unrolled / b.unrolled)) + (a.outer != b.outer)
    return abs(a.rows - b.rows) + 3 * abs(a.vectors - b.vectors) + other
