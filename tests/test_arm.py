"""What is compiled for ARM runs on an emulated ARM processor, and gives there what it should."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from tools import arm, arm_count, arm_sysroot, digits
from tools.arm_sysroot import CannotSetUp, Machine
from tools.calibration import Inputs

INT8 = "insert-fake-quant"
WITH_TVM = pytest.mark.skipif(importlib.util.find_spec("tvm") is None, reason="TVM is not installed")


@pytest.fixture(scope="session")
def emulated() -> Machine:
    try:
        return arm_sysroot.machine()
    except CannotSetUp as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"no emulated ARM machine: {error}")


@pytest.fixture(scope="session")
def network() -> tuple[nn.Module, Inputs, list[Inputs]]:
    """A trained network, images that it has not seen, and batches to calibrate it with."""
    data = digits.load()
    model = digits.trained("residual", data, 0, steps=60)
    return model, (data.held_images[:16],), [(data.images[i : i + 32],) for i in range(0, 256, 32)]


Network = tuple[nn.Module, Inputs, list[Inputs]]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnx", pytest.param("tvm", marks=WITH_TVM)])
def test_a_network_in_fp32(emulated: Machine, network: Network, backend: str) -> None:
    model, inputs, _ = network
    result = arm.compiled_and_run(emulated, model, inputs, target="cortex-a76", backend=backend)
    assert result.error <= arm.TOLERANCE
    assert result.top1 == 1
    if backend == "tvm":
        assert result.instructions["fmla"] > 100
        assert not result.instructions["sdot"] + result.instructions["udot"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnx", pytest.param("tvm", marks=WITH_TVM)])
def test_a_network_in_int8(emulated: Machine, network: Network, backend: str) -> None:
    model, inputs, batches = network
    how: dict[str, Any] = {"target": "cortex-a76", "backend": backend, "passes": INT8}
    result = arm.compiled_and_run(emulated, model, inputs, calibration=batches, **how)
    assert result.top1 == 1
    assert result.error <= 0.02, "a few steps of 1/255 of the range"
    if backend == "tvm":
        assert result.instructions["sdot"] + result.instructions["udot"] > 100


@pytest.mark.slow
@pytest.mark.parametrize("passes", [None, INT8])
@WITH_TVM
def test_an_old_processor_gets_no_instruction_that_it_does_not_have(
    emulated: Machine, network: Network, passes: str | None
) -> None:
    """QEMU's cortex-a72 stops at instructions that came after ARMv8.0."""
    model, inputs, batches = network
    data = batches if passes else None
    how: dict[str, Any] = {"target": "cortex-a72", "cpu": "cortex-a72", "backend": "tvm"}
    result = arm.compiled_and_run(emulated, model, inputs, passes=passes, calibration=data, **how)
    assert result.top1 == 1
    assert result.error <= (arm.TOLERANCE if passes is None else 0.02)
    assert sum(result.instructions.values()) > 1000
    assert not {"sdot", "udot", "usdot", "smmla", "ummla", "usmmla", "bfmmla"} & set(result.instructions)


@pytest.mark.slow
def test_a_transformer(emulated: Machine) -> None:
    model, inputs, _ = arm.subject("bert")
    result = arm.compiled_and_run(emulated, model, inputs, backend="onnx")
    assert result.error <= arm.TOLERANCE


def _dot(emulated: Machine, folder: Path) -> Path:
    """A library whose function ``dot`` computes 1 + 4 · 3² with one instruction of ARMv8.2."""
    source, library = folder / "dot.c", folder / "dot.so"
    source.write_text(
        "#include <arm_neon.h>\n"
        "int dot(void) { int8x16_t x = vdupq_n_s8(3); return vgetq_lane_s32(vdotq_s32(vdupq_n_s32(1), x, x), 0); }\n"
    )
    command = [emulated.tool("gcc"), "-O1", "-march=armv8.2-a+dotprod", "-shared", "-fPIC", "-o"]
    subprocess.run([*command, str(library), str(source)], check=True, capture_output=True)
    return library


@pytest.mark.slow
def test_the_emulator_has_the_features_of_its_processor_alone(emulated: Machine, tmp_path: Path) -> None:
    library = _dot(emulated, tmp_path)
    assert arm.instructions(emulated, library)["sdot"] == 1
    call = ["-c", f"import ctypes; print(ctypes.CDLL({str(library)!r}).dot())"]
    assert emulated.python(call, cpu="cortex-a76").stdout == "37\n"
    assert emulated.python(call, cpu="cortex-a72").returncode != 0


@pytest.mark.slow
def test_instructions_that_are_executed_are_counted(emulated: Machine, tmp_path: Path) -> None:
    (tmp_path / "sum.c").write_text(
        "float sum(const float *x, int n) { float s = 1; for (int i = 0; i < n; i++) s = s * 0.5f + x[i]; return s; }\n"
    )
    command = [emulated.tool("gcc"), "-O2", "-shared", "-fPIC", "-o", str(tmp_path / "sum.so"), str(tmp_path / "sum.c")]
    subprocess.run(command, check=True, capture_output=True)
    script = tmp_path / "call.py"
    script.write_text(
        f"import ctypes, sys\nctypes.CDLL({str(tmp_path / 'sum.so')!r}).sum((ctypes.c_float * 300)(), 300)\n"
    )
    executed = arm_count.executed(emulated, [str(script)], "sum.so")
    assert executed["fmadd"] == 300
    assert 1200 < executed.total() < 2400
    script.write_text(f"import ctypes\nctypes.CDLL({str(_dot(emulated, tmp_path))!r}).dot()\n")
    assert arm_count.executed(emulated, [str(script)], "dot.so")["sdot"] == 1
    with pytest.raises(RuntimeError, match=r"the script loads no other\.so"):
        arm_count.executed(emulated, [str(script)], "other.so")
    script.write_text("raise SystemExit('no')")
    with pytest.raises(RuntimeError, match="the script fails: no"):
        arm_count.executed(emulated, [str(script)], "sum.so")


@pytest.mark.slow
@WITH_TVM
def test_a_library_multiplies_in_vectors(emulated: Machine) -> None:
    """Of four numbers each: no more multiplications than there are to do, padding of the tiles aside."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(64, 64).eval(), (torch.randn(8, 64),)
    result = arm.compiled_and_run(emulated, model, inputs, target="cortex-a76", backend="tvm", count=True)
    assert result.error <= arm.TOLERANCE
    needed = 8 * 64 * 64 // 4
    assert needed <= result.executed["fmla"] <= 1.5 * needed
    assert result.executed.total() < 4 * needed


@pytest.mark.slow
def test_a_failure_there_is_told(emulated: Machine, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no ONNX file")
    with pytest.raises(RuntimeError, match=r"(?s)model\.onnx does not run on max: .*Protobuf"):
        arm.run(emulated, tmp_path / "model.onnx", [])


# --- without the machine


def test_where_it_cannot_be_set_up_the_reason_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(arm_sysroot.shutil, "which", lambda name: None)  # type: ignore[attr-defined]
    with pytest.raises(CannotSetUp, match=r"there is no apt-get here|made for x86-64 Linux"):
        arm_sysroot.machine()
    assert not (tmp_path / "fxopt" / "arm").exists()


def test_a_model_for_arm_says_that_it_cannot_run_here() -> None:
    if fxopt.Target.from_string("cortex-a76").runs_here:
        pytest.skip("it can be called here")
    model = fxopt.compile(nn.Linear(4, 4), target="cortex-a76", example_inputs=(torch.ones(2, 4),))
    assert model.backend == "onnx"
    with pytest.raises(fxopt.BackendUnavailable, match=r"compiled for target 'cortex-a76'.*save it with \.save"):
        model(torch.ones(2, 4))


def test_what_differs_there_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = nn.Linear(4, 3).eval(), (torch.randn(5, 4),)
    expected = model(*inputs).detach().numpy()
    for outputs, error, same in ((expected, 0.0, 1.0), (expected[:, ::-1].copy(), 0.1, 0.9)):
        monkeypatch.setattr(arm, "run", lambda *args, outputs=outputs, **options: [outputs])
        result = arm.compiled_and_run(Machine(Path("/nowhere")), model, inputs)
        assert result.error >= error
        assert result.top1 <= same
    assert result.error > 0.1
    monkeypatch.setattr(arm, "run", lambda *args, **options: [expected.astype("float64")])
    assert arm.compiled_and_run(Machine(Path("/nowhere")), model, inputs).error == float("inf")


def test_blocks_count_as_often_as_they_run() -> None:
    log = """----------------
IN: sum
0x5500a25e80:  d0000841  fmadd    s0, s0, s1, s2
0x5500a25e84:  54000040  b.eq     #0x5500a25ea4

Trace 0: 0x7fcb32e83ac0 [0000000001009b31/0000005500a25e80/00000001/00000200] sum
Trace 0: 0x7fcb32e83ac0 [0000000001009b31/0000005500a25e80/00000001/00000200] sum
----------------
IN:
0x5500a25ea0:  d65f03c0  ret
Trace 0: 0x7fcb32e83cc0 [0000000001009331/0000005500a25ea0/00000001/00000200]
"""
    assert arm_count.counted(log.splitlines()) == {"fmadd": 2, "b.eq": 2, "ret": 1}


def test_top1_compares_rows() -> None:
    wanted = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    assert arm.top1(wanted, wanted * 2) == 1
    assert arm.top1(wanted, torch.tensor([[1.0, 2.0], [3.0, 4.0]])) == 0.5
