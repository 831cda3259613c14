"""Models that cannot be captured whatever their inputs, each refused with the reason and with what to do."""

from __future__ import annotations

import operator

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxopt.errors import CaptureError, InputError

_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")


def refuse_unusable(model: nn.Module) -> None:
    """Refuse what is no plain nn.Module with its weights.

    Raises:
        CaptureError: a part of *model* is compiled or quantized already. InputError: it has no weights yet.
    """
    for name, module in model.named_modules():
        what = f"{type(module).__name__} {name!r}" if name else type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(f"{what} is TorchScript, which cannot be captured: pass the nn.Module it was made from")
        if type(module).__module__.startswith(_QUANTIZED):
            raise CaptureError(
                f"{what} is quantized already (torch.ao), in a form that cannot be captured: pass the float model, "
                "and let a pass of fxopt quantize it (fxopt.passes.available())"
            )
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if is_traceable_wrapper_subclass(x):
            raise CaptureError(
                f"{name!r} is a {type(x).__name__}, which is no plain tensor and computes in its own way: pass the "
                "model with plain weights (if it was quantized, as it was before, and let a pass of fxopt quantize it)"
            )
        if is_lazy(x):
            raise InputError(f"{name!r} has no shape yet, it belongs to a lazy module: call the model once first")
        if x.is_meta:
            raise InputError(
                f"{name!r} is on the meta device and has no values: load the weights first, e.g. with "
                "model.to_empty(device='cpu') and load_state_dict"
            )


def refuse_nan(model: nn.Module) -> None:
    """Raises InputError naming the parameters and buffers that hold NaN."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    bad = [name for name, t in tensors if t.is_floating_point() and bool(torch.isnan(_wide(t).sum()))]
    bad = [name for name in bad if bool(torch.isnan(_wide(_by_name(model, name))).any())]
    if bad:
        raise InputError(
            f"the model holds NaN in {', '.join(bad[:3])}{' and others' if len(bad) > 3 else ''}; "
            "a compiled model could not be verified against it. Repair the weights first."
        )


def _wide(x: torch.Tensor) -> torch.Tensor:
    """*x* in a dtype and layout that every op knows."""
    x = x.detach().to_dense() if x.layout is not torch.strided else x.detach()
    return x.float() if x.element_size() == 1 else x


def _by_name(model: nn.Module, name: str) -> torch.Tensor:
    found = operator.attrgetter(name)(model)
    assert isinstance(found, torch.Tensor)
    return found
