"""The private copy of the model that is captured, and what it answers: the user's own object is never touched."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt import structures
from fxopt.errors import CaptureError, FxoptError, InputError
from fxopt.memory import clusters, own_copy


def private_copy(model: nn.Module) -> nn.Module:
    """An eval-mode copy of *model*: parameters shared, buffers and everything else its own."""
    held = [x for module in model.modules() for x in pytree.tree_leaves(list(module.__dict__.values()))]
    memo: dict[int, Any] = {}
    for cluster in clusters([x for x in held if isinstance(x, torch.Tensor)]):
        memo |= _copied(cluster)
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({error}), and fxopt never works on your own object. "
            "Make copy.deepcopy(model) work, or pass torch.export.export(model, inputs) instead."
        ) from error
    return twin.eval()


def _copied(cluster: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    """What stands for each of some tensors that share memory, by id: copies that share memory in the same way."""
    if all(isinstance(x, nn.Parameter) for x in cluster):
        return {id(x): _ordinary(x) for x in cluster if isinstance(x, nn.Parameter)}
    if len(cluster) == 1:
        return {id(x): x.detach().clone() for x in cluster}
    storage, copies = cluster[0].untyped_storage().clone(), {}
    for x in cluster:
        twin = torch.empty(0, dtype=x.dtype, device=x.device).set_(storage, x.storage_offset(), x.shape, x.stride())
        copies[id(x)] = nn.Parameter(twin, requires_grad=False) if isinstance(x, nn.Parameter) else twin
    return copies


def _ordinary(parameter: nn.Parameter) -> nn.Parameter:
    """*parameter* itself, or a copy of one that was made under inference_mode and cannot be traced."""
    return nn.Parameter(parameter.clone(), requires_grad=False) if parameter.is_inference() else parameter


def run_eager(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Flat eager outputs, without gradients. Buffers and inputs that the run mutates are put back."""
    structures.register((args, kwargs))
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    leaves, spec = pytree.tree_flatten((args, kwargs))
    own = [own_copy(x) if isinstance(x, torch.Tensor) else x for x in leaves]
    before = [(b, b.clone()) for b in model.buffers()]
    own_args, own_kwargs = pytree.tree_unflatten(own, spec)
    try:
        with torch.no_grad():
            result = model(*own_args, **own_kwargs)
            structures.register(result)
            outputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in pytree.tree_leaves(result)]
            for module, named in buffers:  # a model may also assign a new tensor to a buffer
                module._buffers.update(named)
            for buffer, old in before:
                buffer.copy_(old)
    except FxoptError:
        raise
    except Exception as error:
        raise InputError(f"the model itself fails on the example inputs: {type(error).__name__}: {error}") from error
    return outputs
