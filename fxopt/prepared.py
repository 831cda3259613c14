"""A captured graph as a module that trains: parameters of its own, train and eval mode, fake quantization, compile."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxopt import deploy, dropout, ops, rounds
from fxopt.backend import Backend
from fxopt.capture import Captured
from fxopt.compiled import CompiledModel
from fxopt.compiler import Plan, as_args, check_kwargs
from fxopt.fake_quant import FAKE_QUANTIZE, ActivationFakeQuantize, FakeQuantize
from fxopt.frozen import Frozen, Part
from fxopt.masks import Masked
from fxopt.passbase import Pass
from fxopt.program import Program
from fxopt.rewriter import Skip


class PreparedModel(nn.Module):
    """A model that trains like any module and compiles for the target it was prepared for.

    Parameters and buffers have the names that they have in the user's model. Inputs and outputs are those of the model.
    """

    compiles_itself: ClassVar[bool] = True

    def __init__(
        self, frozen: Frozen, tensors: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module], model: nn.Module
    ) -> None:
        """:func:`fxopt.prepare` makes it; *model* is looked at only."""
        super().__init__()
        self._frozen = frozen
        self._batch_norm_frozen = False
        self._attention_dropout = dict[str, float]()
        self._averages_all = set[str]()  # modules whose batch norm has no momentum
        self._places = dict[str, tuple[str, str]]()
        self.fake_quant = nn.ModuleDict(modules)
        for name, tensor in tensors.items():
            self._adopt(name, tensor)
        for node in frozen.program.graph.nodes:
            if ops.kind(node) == "attention":
                self._attention_dropout[node.name] = dropout.of_attention(node, model)
            elif ops.kind(node) == "batch_norm" and isinstance(ops.arguments(node)["running_mean"], fx.Node):
                self._count_batches(str(ops.arguments(node)["running_mean"].target), model)
        dropout.warn_of_lost(frozen.program, model, self._attention_dropout)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs, in the model's own structure.

        Raises:
            InputError: the inputs do not fit what was captured. PreconditionError: in eval mode, and ranges of
                activations are not known yet.
        """
        device = next((t.device.type for t in (*self.parameters(), *self.buffers())), "cpu")
        signature = self._frozen.signature(device)
        leaves = signature.bind(args, kwargs)
        outputs = self._run(leaves)
        split = len(signature.outputs)
        with torch.no_grad():
            for back, value in zip(signature.writebacks, outputs[split:], strict=True):
                place = leaves[back.input] if back.input is not None else self.tensor(str(back.constant))
                place.copy_(value)
        return signature.unflatten(outputs[:split])

    def compile(  # type: ignore[override]  # as fxopt.compile; nn.Module's own calls torch.compile
        self,
        *,
        backend: str | Backend = "auto",
        example_inputs: Sequence[Any] | torch.Tensor | None = None,
        example_kwargs: Mapping[str, Any] | None = None,
        dynamic_shapes: Any = None,
        passes: str | Pass | Sequence[str | Pass] | None = None,
        calibration: Iterable[Any] | None = None,
        loss: Callable[..., Any] | None = None,
        backend_options: Mapping[str, Any] | None = None,
        verify: bool = True,
        dump: str | os.PathLike[str] | None = None,
    ) -> CompiledModel:
        """The trained model compiled for its target: weights as they are now, the very ranges that were trained.

        Args:
            backend: as for :func:`fxopt.compile`, like all that follow. "auto" tries all engines of the target.
            example_inputs: inputs of other sizes than those prepared with, where these were kept open.
            example_kwargs: keyword example inputs, with *example_inputs*.
            dynamic_shapes: sizes to keep open, with *example_inputs*.
            passes: further passes, which run after quantization is in place.
            calibration: data for those passes.
            loss: for those of them that look at gradients.
            backend_options: options of the named backend.
            verify: check graph and outputs after each pass.
            dump: folder for one ``.fxir`` file per pass.

        Raises:
            PreconditionError: ranges of activations are not known: no calibration data was given, and no batch trained;
                or a weight has lost its N:M sparsity.
            FxoptError: as :func:`fxopt.compile`.
        """
        frozen = self._frozen
        own = deploy.program(frozen.program, self.tensor, self.fake_quant, self.masked.patterns)
        module = deploy.as_module(own, frozen.name)
        args, kwargs = as_args(example_inputs), example_kwargs
        check_kwargs(kwargs)
        plan = Plan.check(
            module, frozen.target, deploy.listed(own, passes), calibration, loss, backend, backend_options, verify,
            dump, dynamic_shapes,
        )  # fmt: skip
        if args is None and kwargs is None:
            plan = dataclasses.replace(plan, captured=deploy.captured(own, module, frozen.inputs))
        variant = plan.build(args or (), dict(kwargs or {}))
        variant.report.prepared = frozen.notes
        return CompiledModel(frozen.target, variant=variant)

    @property
    def skips(self) -> list[Skip]:
        """What ``fxopt.prepare`` left alone, such as layers that are not rounded, each with the reason."""
        return list(self._frozen.skips)

    def disable_fake_quant(self) -> None:
        """Compute in float, as the model itself does, until :meth:`enable_fake_quant`."""
        self._switch(enabled=False)

    def enable_fake_quant(self) -> None:
        """Round weights and activations, which is the default."""
        self._switch(enabled=True)

    def freeze_ranges(self, frozen: bool = True) -> None:
        """Keep the ranges of activations as they are, or let them follow the data again."""
        for module in self.fake_quant.values():
            if isinstance(module, ActivationFakeQuantize):
                module.frozen = frozen

    def freeze_batch_norm(self, frozen: bool = True) -> None:
        """Let batch norms use their running statistics in training too, and keep those as they are."""
        self._batch_norm_frozen = frozen

    def prune_weights(self, ratio: float) -> None:
        """Raise the share of weights that ``prune-weights`` holds at zero; ``fxopt.masks.gradual`` is a schedule.

        Raises:
            InputError: *ratio* is not a share. PreconditionError: ``prune-weights`` has not prepared the model.
        """
        self.masked.tighten(ratio, self.tensor)

    def rewind(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take the weights back to *state*, a ``state_dict()`` of the dense model, cut as this model is.

        For lottery tickets (Frankle and Carbin, ICLR 2019): train, prune, rewind, train again.

        Raises:
            InputError: *state* lacks a tensor, or it has another shape; nothing has changed then.
        """
        rounds.rewind(self._frozen.program, self.tensor, state)
        self.masked.apply(self.tensor)

    def captured(self) -> Captured:
        """The graph with the weights as they are now, for ``fxopt.prepare`` to go on from.

        Raises:
            PreconditionError: it is prepared for quantization.
        """
        return rounds.captured(self._frozen.program, self, self._frozen.inputs, self.tensor)

    def inherit(self, other: PreparedModel) -> None:
        """Take over what *other*, from which this model was prepared, knows of training besides its graph."""
        self._attention_dropout = dict(other._attention_dropout)
        self._averages_all = set(other._averages_all)

    def step_sizes(self) -> Iterator[nn.Parameter]:
        """The learned scales of ``insert-fake-quant{learnable_step=true}``, for an optimizer group of their own."""
        yield from self.fake_quant.parameters()

    def extra_repr(self) -> str:
        """Model and inputs, for ``print``."""
        return f"{self.name} for {self._frozen.target}, inputs=({self.program.signature.describe()})"

    def _switch(self, *, enabled: bool) -> None:
        for module in self.fake_quant.values():
            assert isinstance(module, FakeQuantize)
            module.enabled = enabled

    def _adopt(self, name: str, tensor: torch.Tensor) -> None:
        """Register *tensor* under its dotted *name*, or the nearest free one."""
        *path, last = name.split(".")
        owner: nn.Module = self
        for part in path:
            while hasattr(owner, part) and not isinstance(owner._modules.get(part), Part):
                part += "_"
            if part not in owner._modules:
                owner.add_module(part, Part())
            owner = owner.get_submodule(part)
            self._places[name] = (self._path(owner), last)
        while hasattr(owner, last):
            last += "_"
        self._places[name] = (self._path(owner), last)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(last, tensor)
        else:
            owner.register_buffer(last, tensor)

    def _path(self, owner: nn.Module) -> str:
        return next(str(name) for name, module in self.named_modules() if module is owner)

    @property
    def program(self) -> Program:
        """The graph that is trained. Its own tensors are those of the start, see :meth:`tensor`."""
        return self._frozen.program

    @property
    def name(self) -> str:
        """Class name of the user's model."""
        return self._frozen.name

    @property
    def masked(self) -> Masked:
        """The weights that ``prune-weights`` holds at zero."""
        return self._frozen.masked

    def tensor(self, name: str) -> Any:
        """The parameter or buffer that the graph calls *name*; or the subgraph."""
        if name not in self._places:
            return self._frozen.program.constants[name]  # a subgraph
        path, last = self._places[name]
        return getattr(self.get_submodule(path), last)

    def _count_batches(self, statistic: str, model: nn.Module) -> None:
        """The counter of a batch_norm, which averages over all batches where it has no momentum."""
        path, _ = self._places[statistic]
        owner = self.get_submodule(path)
        theirs = dict(model.named_buffers()).get(f"{statistic.rpartition('.')[0]}.num_batches_tracked")
        if theirs is not None and not hasattr(owner, "num_batches_tracked"):
            owner.register_buffer("num_batches_tracked", theirs.detach().clone())
            if getattr(model.get_submodule(statistic.rpartition(".")[0]), "momentum", None) is None:
                self._averages_all.add(path)

    def _run(self, leaves: Sequence[Any]) -> list[Any]:
        frozen, values, feed = self._frozen, dict[fx.Node, Any](), iter(leaves)
        for node in frozen.program.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(feed)
            elif node.op == "get_attr":
                values[node] = self.tensor(str(node.target))
            elif node.op == "output":
                return list(fx.node.map_arg(node.args[0], values.__getitem__))
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = self._call(node, args, kwargs)
            for dead in frozen.dying[node]:
                del values[dead]
        raise RuntimeError("the graph has no output node")

    def _call(self, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One op, as it is in training or in eval mode."""
        if node.target is FAKE_QUANTIZE:
            x, name, source = args
            return self.fake_quant[name](x, source)
        assert callable(node.target)
        what = ops.kind(node)
        if self.training and what == "dropout":
            return node.target(args[0], args[1], True)
        if self.training and what == "batch_norm" and not self._batch_norm_frozen:
            return self._batch_norm(node, args, kwargs)
        if self.training and self._attention_dropout.get(node.name):
            names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[attr-defined]
            given = dict(zip(names, args, strict=False)) | dict(kwargs)
            return node.target(**given | {"dropout_p": self._attention_dropout[node.name]})
        if "device" in kwargs:
            kwargs = {**kwargs, "device": self._device(kwargs["device"])}
        return node.target(*args, **kwargs)

    def _batch_norm(self, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        x, weight, bias, mean, variance, training, momentum, eps = args[:8]
        statistic = ops.arguments(node)["running_mean"]
        if training or not isinstance(statistic, fx.Node):
            return node.target(*args, **kwargs)  # type: ignore[operator,no-any-return]
        path = self._places[str(statistic.target)][0]
        owner = self.get_submodule(path)
        if not owner.training:
            return node.target(*args, **kwargs)  # type: ignore[operator,no-any-return]
        counter = owner._buffers.get("num_batches_tracked")
        if counter is not None:
            counter.add_(1)
            if path in self._averages_all:
                momentum = 1 / float(counter)
        return F.batch_norm(x, mean, variance, weight, bias, True, momentum, eps)

    def _device(self, captured: torch.device) -> torch.device:
        """Where a tensor is made that was made on the device of capture."""
        own = next((t.device for t in (*self.parameters(), *self.buffers())), captured)
        return own if torch.device(captured).type == "cpu" else captured


__all__ = ["PreparedModel"]
