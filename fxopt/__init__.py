"""fxopt: compile a trained PyTorch model for the machine it must run on.

    compiled = fxopt.compile(model, target="x86", example_inputs=(x,))
    y = compiled(x)
    print(compiled.report)

Everything public is listed in ``__all__`` and imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import fxopt.conformance as conformance
    import fxopt.testing as testing
    from fxopt.artifact import load
    from fxopt.backend import Backend, Executable
    from fxopt.compiled import CompiledModel
    from fxopt.compiler import compile
    from fxopt.errors import (
        ArtifactError,
        BackendUnavailable,
        CaptureError,
        FxoptError,
        InputError,
        PassError,
        PreconditionError,
        SpecError,
        UnsupportedOp,
        VerifyError,
    )
    from fxopt.minify import minify
    from fxopt.passbase import Pass, PassContext
    from fxopt.program import Program
    from fxopt.report import Report
    from fxopt.rewriter import Rewriter
    from fxopt.signature import Signature
    from fxopt.stepwise import waterfall
    from fxopt.sweep import sensitivity
    from fxopt.target import Target
    from fxopt.target_list import targets
    from fxopt.training import PreparedModel, prepare

_HOME = {
    "compile": "compiler",
    "CompiledModel": "compiled",
    "load": "artifact",
    "minify": "minify",
    "prepare": "training",
    "PreparedModel": "prepared",
    "sensitivity": "sweep",
    "waterfall": "stepwise",
    "Report": "report",
    "Target": "target",
    "targets": "target_list",
    "Pass": "passbase",
    "PassContext": "passbase",
    "Rewriter": "rewriter",
    "Program": "program",
    "Signature": "signature",
    "Backend": "backend",
    "Executable": "backend",
    "FxoptError": "errors",
    "InputError": "errors",
    "SpecError": "errors",
    "CaptureError": "errors",
    "PassError": "errors",
    "PreconditionError": "errors",
    "VerifyError": "errors",
    "UnsupportedOp": "errors",
    "BackendUnavailable": "errors",
    "ArtifactError": "errors",
}
_MODULES = ("conformance", "report_html", "testing", "passes", "backends")

__all__ = [
    "ArtifactError",
    "Backend",
    "BackendUnavailable",
    "CaptureError",
    "CompiledModel",
    "Executable",
    "FxoptError",
    "InputError",
    "Pass",
    "PassContext",
    "PassError",
    "PreconditionError",
    "PreparedModel",
    "Program",
    "Report",
    "Rewriter",
    "Signature",
    "SpecError",
    "Target",
    "UnsupportedOp",
    "VerifyError",
    "__version__",
    "compile",
    "conformance",
    "load",
    "minify",
    "prepare",
    "report_html",
    "sensitivity",
    "targets",
    "testing",
    "waterfall",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fxopt")
    if name in _HOME:
        value = getattr(importlib.import_module(f"fxopt.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"fxopt.{name}")
    else:
        raise AttributeError(f"module 'fxopt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
