"""Tuning on the tvm backend: every tile computes the same; the search finds, keeps and shares what it measured."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt

pytest.importorskip("tvm")

from fxopt.backends import _tvm_measure, _tvm_tuning
from fxopt.backends._tvm_records import Record, Records
from fxopt.backends._tvm_target import machine
from fxopt.backends._tvm_tiles import Space, Tile
from fxopt.backends._tvm_workloads import Tiles, Workload
from fxopt.backends.tvm import TvmBackend
from fxopt.capture import capture
from fxopt.target import resolve_target

X = torch.randn(1, 3, 10, 11, generator=torch.Generator().manual_seed(0))
LINEAR = Workload("linear", "float32", (("x", (4, 8)), ("weights", (8, 5))))
Clock = Callable[[Workload, Tile], float]


def model() -> nn.Sequential:
    """Two convolutions and a matrix product, none of a size that divides into vectors."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 37, 3, padding=1), nn.ReLU(), nn.Conv2d(37, 19, 3), nn.Flatten(), nn.Linear(19 * 8 * 9, 10)
    ).eval()


def compiled(tune: object, one: nn.Module | None = None, **arguments: Any) -> fxopt.CompiledModel:
    options = {"tune": tune, "threads": 1}
    return fxopt.compile(one or model(), example_inputs=(X,), backend="tvm", backend_options=options, **arguments)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A bench that answers what ``said["seconds"]`` says, and notes what was asked."""
    said: dict[str, Any] = {"seconds": lambda workload, tile: 1.0, "asked": [], "devices": 1}

    def seconds(bench: Any, workload: Workload, tiles: Sequence[Tile]) -> list[float]:
        said["asked"].append((workload, list(tiles)))
        return [said["seconds"](workload, tile) for tile in tiles]

    monkeypatch.setattr(_tvm_measure.Bench, "seconds", seconds)
    monkeypatch.setattr(_tvm_measure.Bench, "devices", lambda bench: said["devices"])
    return said


def facts(result: fxopt.CompiledModel) -> Any:
    assert result._fixed is not None
    payload = result._fixed.executable.payload()
    assert payload is not None
    return payload.facts


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Tiles ----------------------------------------------------------------------------------------------------------------


SHAPES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(5, 37, 3, padding=1), (1, 5, 9, 11)),
    "pointwise": (lambda: nn.Conv2d(10, 21, 1), (2, 10, 5, 7)),
    "strided": (lambda: nn.Conv2d(3, 16, 5, stride=2, padding=2, dilation=2), (1, 3, 23, 21)),
    "grouped": (lambda: nn.Conv2d(12, 24, 3, groups=3), (1, 12, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(41, 41, 3, padding=1, groups=41), (1, 41, 6, 13)),
    "linear": (lambda: nn.Linear(23, 45), (3, 7, 23)),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_every_tile_computes_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    make, shape = SHAPES[kind]
    captured = capture(make().eval(), (torch.randn(shape),))
    asked: list[Space] = []
    wanted: list[Tile] = []

    def of(tiles: Tiles, workload: Workload, space: Space) -> Tile:
        asked.append(space)
        return wanted[-1] if wanted else space.rule()

    def run() -> Any:
        return TvmBackend().lower(captured.program.copy(), resolve_target("x86"), captured.inputs)(captured.inputs)[0]

    monkeypatch.setattr(Tiles, "of", of)
    run()
    tiles = asked[0].tiles()
    for tile in [tiles[1], tiles[2], tiles[5], tiles[len(tiles) // 2], tiles[-1]]:
        wanted.append(tile)
        torch.testing.assert_close(run(), captured.reference[0], rtol=1e-4, atol=1e-5, msg=str(tile))


def test_every_tile_of_bytes_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    one, data = model(), [(torch.randn(1, 3, 10, 11),) for _ in range(4)]
    at: list[int] = []
    monkeypatch.setattr(Tiles, "of", lambda tiles, workload, space: space.tiles()[at[-1] % len(space.tiles())])
    results = []
    for number in (0, 5, 23, 40):
        at.append(number)
        made = fxopt.compile(
            one, example_inputs=(X,), backend="tvm", passes="insert-fake-quant", calibration=data, verify=False
        )
        results.append(made(X))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


def test_the_rule_is_the_cheapest_of_the_tiles_and_all_fit_the_registers() -> None:
    space = Space(128, 768, 16, 32)
    tiles = space.tiles()
    assert len(set(tiles)) == len(tiles)
    assert (tiles[0].vectors, tiles[0].rows) == (space.rule().vectors, space.rule().rows)
    assert all(tile.rows * tile.vectors + tile.vectors <= 32 for tile in tiles)
    assert all(48 % (tile.vectors * 8) == 0 for tile in Space(9, 48, 8, 32, divides=True).tiles())


# Records --------------------------------------------------------------------------------------------------------------


def record(rows: int, ratio: float, workload: str = "w") -> Record:
    return Record(workload, Tile(16, 1, rows, 1, "rows"), ratio, ratio * 2.0)


def test_the_best_tile_is_that_of_the_lowest_median(tmp_path: Path) -> None:
    records = Records(tmp_path / "a" / "r.jsonl", "m", "v")
    records.add([record(1, 0.5), record(2, 0.9), record(2, 0.8), record(3, 0.1)])  # once is not enough
    records.add([record(1, 1.1), record(1, 1.0)])  # it was luck
    for known in (records, Records(tmp_path / "a" / "r.jsonl", "m", "v")):
        assert known.best("w") == Tile(16, 1, 2, 1, "rows")
        assert known.tried("w")[Tile(16, 1, 1, 1, "rows")] == 1.0
        assert known.seconds("w") == pytest.approx(2.0)
        assert known.best("another") is None


def test_what_is_hardly_faster_than_the_rule_is_not_taken() -> None:
    records = Records(None, "m", "v")
    records.add([record(1, 0.99), record(1, 0.99), record(2, 1.0)])
    assert records.best("w") is None


def test_measurements_of_other_machines_and_versions_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Records(path, "m", "v").add([record(1, 0.5)] * 2)
    assert Records(path, "m", "v").best("w") is not None
    assert Records(path, "other", "v").best("w") is None
    assert Records(path, "m", "other").best("w") is None


def test_lines_that_are_no_measurements_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "r.jsonl"
    Records(path, "m", "v").add([record(1, 0.5)])
    good = json.loads(path.read_text())
    bad = [
        {**good, "tile": [16, 1, 2]},
        {**good, "ratio": 0.0},
        {**good, "ratio": None},
        {**good, "seconds": float("nan")},
        {"machine": "m"},
        7,
        [],
    ]
    with path.open("a") as file:
        file.write("".join(json.dumps(one) + "\n" for one in bad) + '{"workload": "w", "mach')  # cut off by a kill
    records = Records(path, "m", "v")
    assert f"{len(bad) + 1} of {len(bad) + 2} lines are no measurements" in caplog.text
    assert list(records.tried("w")) == [Tile(16, 1, 1, 1, "rows")]
    records.add([record(3, 0.4)] * 2)
    assert Records(path, "m", "v").best("w") == Tile(16, 1, 3, 1, "rows")


def _write(path: Path, first: int) -> None:
    records = Records(path, "m", "v")
    for rows in range(first, first + 100):
        records.add([record(rows, 0.5)])


def test_two_processes_write_into_one_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    spawn = multiprocessing.get_context("fork")
    writers = [spawn.Process(target=_write, args=(path, first)) for first in (1, 101)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(one["tile"][2] for one in lines(path)) == list(range(1, 201))


def test_nothing_is_measured_that_cannot_be_written(clock: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(fxopt.ArtifactError, match="cannot write the measurements"):
        compiled({"trials": 6, "database": tmp_path / "file" / "r.jsonl"})
    assert not clock["asked"]


def test_files_are_merged_by_writing_one_after_the_other(tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    Records(a, "m", "v").add([record(1, 0.7)] * 2)
    Records(b, "m", "v").add([record(2, 0.6)] * 2)
    for first, second in ((a, b), (b, a)):
        merged = tmp_path / "merged.jsonl"
        merged.write_text(first.read_text() + second.read_text())
        assert Records(merged, "m", "v").best("w") == Tile(16, 1, 2, 1, "rows")


def test_a_database_that_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(fxopt.ArtifactError, match=r"cannot read the measurements in .*binary"):
        Records(tmp_path / "binary", "m", "v")
    (tmp_path / "file").write_text("")
    with pytest.raises(fxopt.ArtifactError, match="cannot write the measurements"):
        Records(tmp_path / "file" / "r.jsonl", "m", "v").add([record(1, 0.5)])


# The search -----------------------------------------------------------------------------------------------------------


def test_tuning_for_real(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    one = model()
    result = compiled({"trials": 14, "database": path}, one)
    torch.testing.assert_close(result(X), one(X), rtol=1e-4, atol=1e-5)
    assert "14 trials of 3 kernels" in " ".join(str(result.report).split())
    assert len({(said["workload"], tuple(said["tile"])) for said in lines(path)}) == 14
    assert all(said["seconds"] > 0 for said in lines(path))


def test_the_search_finds_a_tile_and_the_model_is_built_with_it(clock: dict[str, Any], tmp_path: Path) -> None:
    clock["seconds"] = lambda workload, tile: abs(tile.rows - 3) + 4 * abs(tile.vectors - 2) + tile.unrolled + 9.0
    one = model()
    result = compiled({"trials": 90, "database": tmp_path / "r.jsonl"}, one)
    best = {name: Tile.read(tile) for name, tile in facts(result)["tiles"].items()}
    assert len(best) == 2  # the linear has one row, and no better tile than the rule's
    assert {(tile.rows, tile.vectors, tile.unrolled) for tile in best.values()} == {(3, 2, 1)}
    torch.testing.assert_close(result(X), one(X), rtol=1e-4, atol=1e-5)


def test_a_lucky_measurement_is_found_out(clock: dict[str, Any], tmp_path: Path) -> None:
    seen: set[Tile] = set()

    def lucky(workload: Workload, tile: Tile) -> float:
        first = tile not in seen and bool(tile.outer)
        seen.add(tile)
        return 0.5 if first else 1.0

    clock["seconds"] = lucky
    result = compiled({"trials": 6, "database": tmp_path / "r.jsonl"}, nn.Conv2d(3, 5, 3).eval())
    assert facts(result)["tiles"] == {}
    assert len(lines(tmp_path / "r.jsonl")) == 8


def test_equal_tiles_leave_the_rule(clock: dict[str, Any], tmp_path: Path) -> None:
    result = compiled({"trials": 30, "database": tmp_path / "r.jsonl"})
    assert facts(result)["tiles"] == {}


def test_the_same_call_measures_nothing_and_a_larger_one_goes_on(clock: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for trials, new in ((12, 12), (12, 0), (20, 8), (0, 0)):
        before = len(lines(path)) if path.exists() else 0
        compiled({"trials": trials, "database": path})
        assert len(lines(path)) - before == new
    tiles = [(said["workload"], tuple(said["tile"])) for said in lines(path)]
    assert len(set(tiles)) == len(tiles)


def test_an_interrupt_loses_nothing(clock: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "r.jsonl"

    def interrupted(workload: Workload, tile: Tile) -> float:
        if len(clock["asked"]) == 3:
            raise KeyboardInterrupt
        return 1.0

    clock["seconds"] = interrupted
    with pytest.raises(KeyboardInterrupt):
        compiled({"trials": 60, "database": path})
    assert "tuning interrupted: 12 trials of 3 kernels" in caplog.text
    assert "The same call goes on from there" in caplog.text
    clock["seconds"] = lambda workload, tile: 1.0
    compiled({"trials": 24, "database": path})
    assert len(lines(path)) == 24


def test_time_ends_the_search(clock: dict[str, Any], tmp_path: Path) -> None:
    def slow(workload: Workload, tile: Tile) -> float:
        time.sleep(0.02)
        return 1.0

    clock["seconds"] = slow
    compiled({"seconds": 0.3, "database": tmp_path / "r.jsonl"})
    assert 1 <= len(clock["asked"]) <= 4


def test_without_an_end_all_tiles_are_tried(clock: dict[str, Any], tmp_path: Path) -> None:
    one = nn.Conv2d(3, 5, 3).eval()
    compiled({"seconds": 60, "database": tmp_path / "r.jsonl"}, one)
    facts_of = machine(resolve_target("x86"))
    space = Space(9, 5, facts_of.lanes, facts_of.registers)
    assert len(lines(tmp_path / "r.jsonl")) == len(space.tiles())


def test_models_share_the_records_of_their_layers(clock: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    compiled({"trials": 18, "database": path})
    asked = len(clock["asked"])
    with_sigmoid = nn.Sequential(
        *list(model())[:3], nn.Sigmoid()
    ).eval()  # what follows a kernel is no part of its name
    known = sum(1 for said in lines(path) if said["workload"].startswith("conv2d"))
    compiled({"trials": known, "database": path}, with_sigmoid)
    assert len(clock["asked"]) == asked


def test_most_time_goes_to_what_costs_most(clock: dict[str, Any], tmp_path: Path) -> None:
    clock["seconds"] = lambda workload, tile: 1.0 if "37,3,3,3" in str(workload) else 1e-3
    compiled({"trials": 120, "database": tmp_path / "r.jsonl"})
    counts = [str(workload).count("37,3,3,3") for workload, _ in clock["asked"]]
    assert sum(counts) > len(counts) / 2


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tune", "said"),
    [
        ({}, "tune needs an end"),
        (512, "tune must be like"),
        ({"trials": -1}, "trials must be a whole number"),
        ({"trials": True}, "trials must be a whole number"),
        ({"seconds": 0}, "seconds must be a positive number"),
        ({"trial": 5}, "no option 'trial'. Did you mean 'trials'"),
        ({"trials": 5, "tracker": "here"}, "tracker must be host:port"),
        ({"trials": 5, "tracker": "here:1"}, "tracker needs a key too"),
        ({"trials": 5, "database": 7}, "database must be text"),
        ({"trials": 5, "key": "board"}, "there is no tracker"),
    ],
)
def test_options_that_make_no_sense(tune: object, said: str) -> None:
    with pytest.raises(fxopt.SpecError, match=said):
        compiled(tune)


def test_another_machine_needs_devices(tmp_path: Path) -> None:
    tune = {"trials": 5, "database": tmp_path / "r.jsonl"}
    with pytest.raises(fxopt.BackendUnavailable, match="start a tracker and servers of TVM's RPC"):
        compiled(tune, target="cortex-a76")
    compiled({**tune, "trials": 0}, target="cortex-a76")  # with what is known of them


def test_no_tracker(tmp_path: Path) -> None:
    tune = {"trials": 5, "database": tmp_path / "r.jsonl", "tracker": f"127.0.0.1:{_free_port()}", "key": "board"}
    with pytest.raises(fxopt.BackendUnavailable, match="no tracker answers at"):
        compiled(tune)


def test_devices_that_fail_are_given_up(clock: dict[str, Any], tmp_path: Path) -> None:
    def fails(workload: Workload, tile: Tile) -> float:
        raise RuntimeError("the board is on fire")

    clock.update(seconds=fails, devices=2)
    tune = {"trials": 60, "database": tmp_path / "r.jsonl", "tracker": "127.0.0.1:1", "key": "board"}
    with pytest.raises(fxopt.BackendUnavailable, match="the board is on fire"):
        compiled(tune)
    assert 3 <= len(clock["asked"]) <= 4


def test_a_device_that_fails_once_is_asked_again(clock: dict[str, Any], tmp_path: Path) -> None:
    def fails_first(workload: Workload, tile: Tile) -> float:
        if len(clock["asked"]) == 1:
            raise RuntimeError("timeout")
        return 1.0

    clock["seconds"] = fails_first
    tune = {"trials": 12, "database": tmp_path / "r.jsonl", "tracker": "127.0.0.1:1", "key": "board"}
    compiled(tune)
    assert len(lines(tmp_path / "r.jsonl")) == 12


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def unusual(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that finds a tile that the rule would never choose."""

    def found(search: Any) -> dict[str, Tile]:
        return {str(workload): Tile(16, 1, 1, 4, "columns") for workload in search._asked.asked}

    monkeypatch.setattr(_tvm_tuning._Search, "found", found)


@pytest.mark.skipif(fxopt.Target.from_string("x86").vector_bits != 512, reason="the tile is one of AVX-512")
def test_an_artifact_keeps_its_tiles(unusual: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxopt.backends import _tvm_build

    result = compiled({"trials": 0, "database": tmp_path / "r.jsonl"})
    expected = result(X)
    result.save(tmp_path / "m.fxopt")
    assert torch.equal(fxopt.load(tmp_path / "m.fxopt", allow_code=True)(X), expected)
    monkeypatch.setattr(_tvm_build, "versions", lambda: "other")  # then it is compiled again
    again = fxopt.load(tmp_path / "m.fxopt", allow_code=True)
    assert torch.equal(again(X), expected)
    assert facts(again)["tiles"] == facts(result)["tiles"]


@pytest.mark.parametrize("tiles", [7, {"w": [1]}, {"w": [16, 1, 1, 1, "sideways"]}, {"w": "text"}])
def test_tiles_of_a_file_that_are_none(tiles: object) -> None:
    with pytest.raises(fxopt.ArtifactError, match="the sizes of its kernels are not sound"):
        Tiles.restored(tiles)


def test_a_tile_that_a_kernel_does_not_have_is_not_taken() -> None:
    space = Space(4, 5, 16, 32)
    huge = Tile(16, 1000, 100000, 1, "rows")
    assert Tiles({str(LINEAR): huge}).of(LINEAR, space) == space.rule()


# Devices --------------------------------------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _start(program: str, port: int, *arguments: str) -> subprocess.Popen[bytes]:
    at = ["--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1)]
    return subprocess.Popen(
        [sys.executable, "-m", program, *at, *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


@pytest.fixture
def tracker() -> Iterator[str]:
    """A tracker with two servers of the key "board"."""
    port = _free_port()
    where = f"127.0.0.1:{port}"
    bench = _tvm_measure.Bench(None, 1, ("127.0.0.1", port), "board")  # type: ignore[arg-type]
    started = [_start("tvm.exec.rpc_tracker", port)]
    try:
        _until(lambda: _answers(port))
        started += [_start("tvm.exec.rpc_server", _free_port(), "--tracker", where, "--key", "board") for _ in range(2)]
        _until(lambda: bench.devices() == 2)
        yield where
    finally:
        for one in started:
            os.killpg(one.pid, signal.SIGKILL)
            one.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _until(ready: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if ready():
                return
        except fxopt.BackendUnavailable:
            pass
        assert time.monotonic() < end, "the servers did not start"
        time.sleep(0.2)


@pytest.mark.slow
def test_two_devices_behind_a_tracker(tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[int] = [0, 0]
    original = _tvm_measure.Bench.seconds

    def seconds(bench: Any, *arguments: Any) -> list[float]:
        running[0] += 1
        running[1] = max(running)
        try:
            return original(bench, *arguments)
        finally:
            running[0] -= 1

    monkeypatch.setattr(_tvm_measure.Bench, "seconds", seconds)
    tune = {"trials": 24, "database": tmp_path / "r.jsonl", "tracker": tracker, "key": "board"}
    one = model()
    result = compiled(tune, one)
    assert running[1] == 2
    assert len(lines(tmp_path / "r.jsonl")) >= 24
    torch.testing.assert_close(result(X), one(X), rtol=1e-4, atol=1e-5)
    with pytest.raises(fxopt.BackendUnavailable, match="knows no device of the key 'phone'"):
        compiled({**tune, "key": "phone", "trials": 30})
