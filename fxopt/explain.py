"""Why torch.export refused a model, in the words of the person who wrote the model."""

from __future__ import annotations

import inspect
import types
from typing import cast

from torch import nn

from fxopt.memory import clusters


def _shared(model: nn.Module) -> str:
    """Names of the tensors that share memory with each other, a buffer among them."""
    names: dict[int, list[str]] = {}
    for name, x in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names.setdefault(id(x), []).append(name)
    held = [*model.parameters(), *model.buffers()]
    groups = [[name for x in cluster for name in names[id(x)]] for cluster in clusters(held)]
    return "; ".join(" and ".join(group) for group in groups if len(group) > 1) or "one that is not registered"


def explain(error: Exception, model: nn.Module) -> str:
    """What went wrong in an export, where in the user's code, and what to do about it."""
    text = str(error)
    where = text.partition("The following call raised this error:")[2].strip().split("\n\n")[0].strip()
    if not where:
        frames = [
            f
            for f in inspect.getinnerframes(cast(types.TracebackType, error.__traceback__))
            if "torch" not in f.filename.split("/")
        ]
        frames = [f for f in frames if "/fxopt/" not in f.filename]
        where = "".join(
            f'File "{f.filename}", line {f.lineno}\n    {(f.code_context or [""])[0].strip()}' for f in frames[-1:]
        )
    name = type(error).__name__
    if "DataDependent" in name or "data-dependent" in text:
        what = "the model decides by the value of a tensor (data-dependent control flow), which one graph cannot hold"
        todo = "Write the branch with torch.where or torch.cond, or compile the parts around it."
    elif "Constraints violated" in text or "specialized" in text or "dynamic" in name.lower():
        reasons = [line.strip(" -").partition(". ")[0] for line in text.splitlines() if line.lstrip().startswith("- ")]
        what = f"the dynamic shapes do not hold for this model: {'; '.join(reasons) or text}"
        fixes = " ".join(text.partition("Suggested fixes:")[2].partition("\n\n")[0].split("\n  ")).strip()
        todo = "Relax dynamic_shapes, or make that size static" + (f": PyTorch suggests {fixes}" if fixes else ".")
    elif "not a known type" in text or "pytree" in text:
        what = f"an input or output is of a type that cannot be taken apart: {text.split('. ')[0]}"
        todo = "Return tensors, tuples, dicts or dataclasses, or register the type with torch.utils._pytree."
    elif "register it as buffer" in text:
        what = f"it mutates a tensor that is no buffer: {text.splitlines()[0].partition(' Pls')[0]}"
        todo = "Register the tensor with register_buffer, so that the compiled model can keep it up to date."
    elif "compiled_fn to be GraphModule" in text:
        what = f"it mutates a buffer that shares memory with another tensor of the model: {_shared(model)}"
        todo = "Register it once; take views of it in forward, and let other modules read it through its owner."
    else:
        what = f"torch.export failed with {name}: {text.splitlines()[0] if text else ''}"
        todo = "Try torch.export.export(model, inputs) on its own to see all of it."
    place = f"  {where}\n" if where else ""
    return f"{type(model).__name__} cannot be captured: {what}\n{place}{todo}"
