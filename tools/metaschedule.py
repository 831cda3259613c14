"""MetaSchedule, the tuner that TVM has, on an ONNX file, as its documentation says for CPUs: with weights packed by it.

It runs in a process of its own, without torch: the parser of TVM's scripts walks through all modules that are loaded,
at each of its intrinsics, which takes minutes where torch is among them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def tuned(path: Path, folder: Path, trials: int, threads: int) -> Callable[[Sequence[Any]], list[Any]]:
    """What MetaSchedule makes of the ONNX file *path* in *trials* measurements, for this machine.

    Args:
        path: of the model.
        folder: for logs, library and parameters; what was there goes.
        trials: measurements, of all functions together.
        threads: of the measurements, and of a call.

    Raises:
        subprocess.CalledProcessError: it failed; folder/output.txt says why.
    """
    import tvm
    from tvm import relax

    from fxopt.backends._tvm_target import machine
    from fxopt.target import resolve_target

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    target = json.dumps({**machine(resolve_target("x86")).llvm, "num-cores": threads})
    command = [sys.executable, "-m", "tools.metaschedule", str(path), str(folder), str(trials), target]
    with (folder / "output.txt").open("w") as output:
        subprocess.run(command, check=True, stdout=output, stderr=output)
    functions = relax.VirtualMachine(tvm.runtime.load_module(str(folder / "model.so")), tvm.cpu())
    values = tvm.runtime.load_param_dict_from_file(str(folder / "model.params"))
    weights = functions["main_transform_params"]([values[str(i)] for i in range(len(values))])
    main = functions["main"]
    tvm.get_global_func("runtime.config_threadpool")(-1, threads)

    def call(inputs: Sequence[Any]) -> list[Any]:
        result = main(*map(tvm.runtime.tensor, inputs), *weights)
        return [y.numpy() for y in ([result] if isinstance(result, tvm.runtime.Tensor) else result)]

    return call


def main(path: str, folder: str, trials: str, target: str) -> None:
    """Tune, compile and write folder/model.so and folder/model.params."""
    import onnx
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    machine = tvm.target.Target(json.loads(target))
    module, params = relax.frontend.detach_params(from_onnx(onnx.load(path), keep_params_in_input=True))
    each = max(1, int(trials) // _tasks(module, machine))
    pipeline = relax.pipeline.static_shape_tuning_pipeline(
        int(trials), machine, f"{folder}/logs", cpu_weight_prepack=True, max_trials_per_task=each
    )
    with machine:
        tvm.compile(pipeline(module), target=machine).export_library(f"{folder}/model.so")
    values = {str(i): value for i, value in enumerate(params["main"])}
    tvm.runtime.save_param_dict_to_file(values, f"{folder}/model.params")


def _tasks(module: Any, machine: Any) -> int:
    """How many functions there are to tune: trials are shared by them, or the first few would take them all."""
    import tvm
    from tvm import relax
    from tvm.s_tir.meta_schedule.relax_integration import extract_tasks

    before = [relax.transform.DecomposeOpsForInference(), relax.transform.CanonicalizeBindings()]
    with machine:
        fused = tvm.transform.Sequential([*before, relax.get_pipeline("zero")])(module)
    return len(extract_tasks(fused, machine))


if __name__ == "__main__":
    main(*sys.argv[1:])
