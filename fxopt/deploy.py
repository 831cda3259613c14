"""From a trained graph to the compiler: tensors as they are now, rounding as marks with numbers, then the pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxopt import masks, registry, sparsity, spec, verify
from fxopt.capture import Captured
from fxopt.errors import PreconditionError
from fxopt.fake_quant import FAKE_QUANTIZE, FAKE_QUANTIZED, ActivationFakeQuantize, FakeQuantize
from fxopt.passbase import Pass
from fxopt.program import Program
from fxopt.rewriter import Rewriter
from fxopt.sparsity import Pattern


def program(
    training: Program, tensor: Callable[[str], Any], modules: nn.ModuleDict, patterns: Mapping[str, Pattern]
) -> Program:
    """*training* for inference, with the values that *tensor* gives for its constants.

    Masked and rounded weights become constants, marks of activations get the numbers of their module.

    Raises:
        PreconditionError: a range is not known, or a weight does not have the one of *patterns* with its name.
    """
    result = training.copy()
    for name in result.constants:
        value = tensor(name)
        own = value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
        result.constants[name] = own
    rewriter = Rewriter(result)
    with torch.no_grad():
        masks.fold(rewriter)
        sparsity.check(patterns, result.constants.__getitem__)
        for node in rewriter.nodes():
            if node.target is FAKE_QUANTIZE:
                module = modules[str(node.args[1])]
                assert isinstance(module, FakeQuantize)
                _settle(rewriter, node, module)
    result.remove_dead()
    return result


def _settle(rewriter: Rewriter, node: fx.Node, module: FakeQuantize) -> None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    if not module.enabled:
        rewriter.replace(node, x)
    elif isinstance(module, ActivationFakeQuantize):
        if not module.calibrated:
            raise PreconditionError(
                "the prepared model was neither calibrated nor trained, so the ranges of activations are not known: "
                "give calibration= to fxopt.prepare, or train it"
            )
        grid = module.grid
        how = (float(module.step), int(module.zero_point), grid.qmin, grid.qmax, grid.dtype)
        rewriter.replace(node, rewriter.call(FAKE_QUANTIZED, (x, *how), before=node))
    else:
        name = str(x.target)
        rounded = module(rewriter.program.constants[name].to(module.scale.device)).cpu()
        if len(x.users) == 1:
            rewriter.program.constants[name] = rounded
            rewriter.replace(node, x)
        else:  # somebody else reads the weight as it is
            rewriter.replace(node, rewriter.constant(f"{name}_rounded", rounded))


def listed(own: Program, passes: Any) -> list[Pass]:
    """The passes that *own* needs to become integers, and those that the user wants on top of them."""
    convert = [registry.find_pass("convert-fake-quant")()] if _is_marked(own) else []
    return [*convert, *([] if passes is None else spec.resolve(passes, registry.find_pass))]


def _is_marked(own: Program) -> bool:
    return any(node.target is FAKE_QUANTIZED for node in own.graph.nodes)


def captured(own: Program, module: nn.Module, inputs: list[Any]) -> Captured:
    """*own* as if it had been captured from *module* for the flat *inputs*."""
    reference = verify.run(own, inputs)[: len(own.signature.outputs)]
    return Captured(own, module, inputs, reference)


def as_module(own: Program, name: str) -> nn.Module:
    """*own* as a module of class *name* that is called like the model it came from."""
    signature = own.signature

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = self.graph(*signature.flatten(args, kwargs))
        return signature.unflatten(outputs[: len(signature.outputs)])

    if signature.forward is not None:
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        parameters = list(signature.forward.parameters.values())
        forward.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
    module: nn.Module = type(name, (nn.Module,), {"forward": forward})()
    module.graph = own.to_module()
    return module.eval()
