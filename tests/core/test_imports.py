"""What an import brings in: nothing heavy before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "torch._dynamo torch._inductor onnx onnxscript onnxruntime openvino rich transformers torchvision timm tvm networkx"
)


def modules_after(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter holds after *code*."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(' '.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_importing_fxopt_is_light() -> None:
    loaded = modules_after("import fxopt; fxopt.__version__; dir(fxopt)")
    assert "fxopt" in loaded
    assert not loaded & {*HEAVY.split(), "torch"}


@pytest.mark.parametrize("code", ["import fxopt; fxopt.Target, fxopt.InputError, fxopt.Pass, fxopt.Backend"])
def test_the_contracts_are_light(code: str) -> None:
    assert not modules_after(code) & set(HEAVY.split())


def test_listing_passes_and_backends_loads_none() -> None:
    loaded = modules_after("import fxopt; fxopt.passes.available(), fxopt.backends.available()")
    assert not loaded & {"fxopt.passes.canonicalize", "fxopt.backends.torch", "fxopt.backends.onnx"}
    assert not loaded & set(HEAVY.split())


def test_compiling_for_torch_loads_no_other_engine() -> None:
    code = (
        "import torch, fxopt\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())\n"
        "fxopt.compile(model, example_inputs=(torch.ones(1, 3, 5, 5),), backend='torch')"
    )
    loaded = modules_after(code)
    assert not loaded & set("onnx onnxscript onnxruntime openvino transformers torchvision".split())
