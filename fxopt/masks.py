"""Weights that are zero and stay zero: which ones go, and the masks that hold them there while a model trains.

    conv(x, @w)   →   conv(x, mul(@w, @w_mask))

The same product is in models that ``torch.nn.utils.prune`` has pruned. Its gradient is zero where the mask is, so that
masked weights do not move; once training is over it is one constant. What goes are the weights, or the blocks of
weights, of smallest magnitude (Han et al., "Learning both Weights and Connections", NeurIPS 2015).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Mapping

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxopt import ops
from fxopt.errors import InputError, PreconditionError
from fxopt.fake_quant import FAKE_QUANTIZE
from fxopt.notice import warn
from fxopt.program import Program
from fxopt.rewriter import Rewriter
from fxopt.sparsity import N_OF_M, Pattern

UNITS = ("conv", "conv_transpose", "linear")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tiles of a weight seen as a matrix: output channels × everything else. At the edges they may be smaller.

    Attributes:
        rows: of a block; ``columns``: likewise.
    """

    rows: int = 1
    columns: int = 1

    def scores(self, weight: torch.Tensor, axis: int) -> torch.Tensor:
        """Mean magnitude of each block, f32[rows of blocks, columns of blocks]; *axis* is that of the channels."""
        matrix = weight.detach().movedim(axis, 0).flatten(1).abs().float()
        return self._sums(matrix) / self._sums(torch.ones_like(matrix))

    def spread(self, blocks: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
        """What *blocks* says of each block, for each element of *weight*."""
        moved = weight.movedim(axis, 0)
        each = blocks.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
        return each[: len(moved), : moved[0].numel()].reshape(moved.shape).movedim(0, axis).contiguous()

    def _sums(self, matrix: torch.Tensor) -> torch.Tensor:
        rows, columns = -matrix.shape[0] % self.rows, -matrix.shape[1] % self.columns
        return F.pad(matrix, (0, columns, 0, rows)).unfold(0, self.rows, self.rows).unfold(
            1, self.columns, self.columns
        ).sum((2, 3))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Masked:
    """The weights of a model that are pruned together.

    Attributes:
        axes: the axis of the output channels, by name of the weight.
        blocks: what is pruned as one.
        together: rank the blocks of all weights together, not those of each.
        masks: where a model is to be trained, the name of the mask of each weight.
        patterns: the N:M sparsity that weights have to have once they are trained, by name.
    """

    axes: Mapping[str, int]
    blocks: Blocks
    together: bool
    masks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    patterns: Mapping[str, Pattern] = dataclasses.field(default_factory=dict)

    def kept(self, weights: Mapping[str, torch.Tensor], ratio: float) -> dict[str, torch.Tensor]:
        """For each of *weights* which elements stay when *ratio* of the blocks go; one block of each stays always."""
        scores = {name: self.blocks.scores(weight, self.axes[name]) for name, weight in weights.items()}
        sets = [scores] if self.together else [{name: score} for name, score in scores.items()]
        chosen = {name: stays for one in sets for name, stays in _largest(one, ratio).items()}
        return {name: self.blocks.spread(stays, weights[name], self.axes[name]) for name, stays in chosen.items()}

    def tighten(self, ratio: float, tensor: Callable[[str], torch.Tensor]) -> None:
        """Let *ratio* of the blocks be zero, in place; *tensor* gives weights and masks by name. No mask opens again.

        Raises:
            InputError: *ratio* is not a share. PreconditionError: there are no masks.
        """
        if not 0 <= ratio < 1:
            raise InputError(f"ratio must be at least 0 and below 1, not {ratio}")
        if not self.masks:
            raise PreconditionError('no weights are masked: fxopt.prepare(model, inputs, passes="prune-weights")')
        with torch.no_grad():
            now = {name: tensor(name) * tensor(mask) for name, mask in self.masks.items()}
            for name, kept in self.kept(now, ratio).items():
                tensor(self.masks[name]).logical_and_(kept)
        self.apply(tensor)

    def of(self, names: Container[str]) -> Masked:
        """What is left of it where of all weights those in *names* are left."""
        masks = {name: mask for name, mask in self.masks.items() if name in names}
        patterns = {name: pattern for name, pattern in self.patterns.items() if name in names}
        return dataclasses.replace(self, masks=masks, patterns=patterns)

    def apply(self, tensor: Callable[[str], torch.Tensor]) -> None:
        """Set the weights to zero that are masked, in place."""
        with torch.no_grad():
            for name, mask in self.masks.items():
                tensor(name).mul_(tensor(mask))


NOTHING = Masked({}, Blocks(), together=False)


def _largest(scores: Mapping[str, torch.Tensor], ratio: float) -> dict[str, torch.Tensor]:
    """Which blocks stay when *ratio* of all go, of each weight the largest at any rate."""
    spared = {name: score.flatten().clone() for name, score in scores.items()}
    for score in spared.values():
        score[score.argmax()] = torch.inf
    every = torch.cat(list(spared.values()))
    count = min(round(ratio * len(every)), len(every) - len(spared))
    stays = torch.ones_like(every, dtype=torch.bool)
    stays[every.topk(count, largest=False, sorted=False).indices] = False
    parts = stays.split([len(score) for score in spared.values()])
    return {name: part.reshape(scores[name].shape) for name, part in zip(spared, parts, strict=True)}


def gradual(step: int, steps: int, final: float, initial: float = 0.0) -> float:
    """The ratio at *step* of *steps*: fast at first, when much is redundant, then ever slower.

    s = s_f + (s_i − s_f)·(1 − t/T)³  (Zhu and Gupta, "To prune, or not to prune", arXiv:1710.01878, equation 1).
    """
    left = 1 - min(max(step, 0), steps) / max(steps, 1)
    return final + (initial - final) * left**3


def hold(rewriter: Rewriter, weight: fx.Node, mask: fx.Node | None, kept: torch.Tensor) -> str:
    """Close the *mask* of the constant *weight* where not *kept*, or put one on it; gives the name of the mask."""
    if mask is not None:
        name, old = str(mask.target), rewriter.program.constants[str(mask.target)]
        new = (old.bool() & kept).to(old.dtype)
        if not torch.equal(old, new):
            rewriter.resize({name: new}, {})
        return name
    readers = list(weight.users)
    mask = rewriter.constant(f"{weight.target}_mask", kept)
    multiply = torch.ops.aten.mul.Tensor
    product = rewriter.call(multiply, (weight, mask), before=rewriter.first_call(), origin=readers[0])
    for reader in readers:
        rewriter.rewire(reader, weight, product)
    return str(mask.target)


@dataclasses.dataclass(frozen=True)
class Held:
    """A weight, and the mask that it is under.

    Attributes:
        read: what convs or linears read: the weight, or its product with a mask.
        weight: the constant itself; ``mask``: likewise, where there is one.
    """

    read: fx.Node
    weight: fx.Node
    mask: fx.Node | None

    @classmethod
    def of(cls, rewriter: Rewriter, read: fx.Node) -> Held:
        """What stands behind *read*."""
        return cls(read, *(parts(rewriter, read) or (read, None)))

    def value(self, rewriter: Rewriter) -> torch.Tensor:
        """The weight as it is read."""
        weight, mask = rewriter.tensor(self.weight), rewriter.tensor(self.mask)
        assert weight is not None
        return weight.detach() if mask is None else torch.where(mask.bool(), weight.detach(), 0)


def parts(rewriter: Rewriter, node: object) -> tuple[fx.Node, fx.Node] | None:
    """Weight and mask of *node* where it is a product of two such constants; a mask is zeros and ones."""
    if not isinstance(node, fx.Node) or ops.kind(node) != "mul":
        return None
    for weight, mask in (node.args[:2], node.args[1::-1]):
        value, kept = rewriter.tensor(weight), rewriter.tensor(mask)
        if value is None or kept is None or value.shape != kept.shape or not value.is_floating_point():
            continue
        if torch.result_type(value, kept) is not value.dtype:
            continue
        if kept.dtype is torch.bool or bool(((kept == 0) | (kept == 1)).all()):
            assert isinstance(weight, fx.Node)
            assert isinstance(mask, fx.Node)
            return weight, mask
    return None


def uncover(program: Program, model: nn.Module) -> None:
    """Let *program* multiply weights and masks itself where ``torch.nn.utils.prune`` has done so once and for all.

    It masks a weight whenever its layer is called. ``nn.MultiheadAttention`` reads the weight of its ``out_proj``
    without a call, so that a product made long ago is all that capture finds, and nothing to train.
    """
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    rewriter = Rewriter(program)
    for node in list(program.graph.find_nodes(op="get_attr")):
        name = str(node.target)
        weight, mask = parameters.get(f"{name}_orig"), buffers.get(f"{name}_mask")
        if weight is None or mask is None or not node.users:
            continue
        if not torch.equal(program.constants[name], weight * mask):
            text = f"{name} is no longer the product of {name}_orig and its mask, and will not be trained"
            warn(f"fxopt.prepare: {text}; torch.nn.utils.prune.remove settles it")
            continue
        factors = rewriter.constant(f"{name}_orig", weight), rewriter.constant(f"{name}_mask", mask)
        before, readers = rewriter.first_call(), list(node.users)
        product = rewriter.call(torch.ops.aten.mul.Tensor, factors, before=before, origin=readers[0])
        for reader in readers:
            rewriter.rewire(reader, node, product)
    program.remove_dead()


def fold(rewriter: Rewriter) -> None:
    """Make constants of masked weights, under the name of the weight where nobody else reads that."""
    for node in rewriter.nodes():
        found = parts(rewriter, node) if is_weight(node) else None
        if found is None:
            continue
        weight, mask = (rewriter.tensor(one) for one in found)
        assert weight is not None
        assert mask is not None
        _settle(rewriter, node, found[0], torch.where(mask.bool(), weight, 0))
    for node in rewriter.nodes():
        source = node.args[0] if node.target is N_OF_M else None
        value = rewriter.tensor(source)
        if value is not None:
            assert isinstance(source, fx.Node)
            _settle(rewriter, node, source, N_OF_M(value, *node.args[1:]))


def _settle(rewriter: Rewriter, node: fx.Node, weight: fx.Node, value: torch.Tensor) -> None:
    """Let the constant *value* take the place of *node*, which is computed from the constant *weight*."""
    name = str(weight.target)
    if len(weight.users) == 1:
        rewriter.program.constants[name] = value
        rewriter.replace(node, weight)
    else:
        rewriter.replace(node, rewriter.constant(f"{name}_masked", value))


def is_weight(node: fx.Node) -> bool:
    """Whether an op that has weights reads *node* as its weight or bias, perhaps rounded or under a mask."""
    for user in node.users:
        if user.target in (FAKE_QUANTIZE, N_OF_M) or (_masks(user) and user.args[0] is node):
            if is_weight(user):
                return True
        elif ops.kind(user) in (*UNITS, "batch_norm", "norm", "embedding"):
            a = ops.arguments(user)
            if node in (a.get("weight"), a.get("bias")):
                return True
    return False


def _masks(node: fx.Node) -> bool:
    """Whether *node* is what :func:`hold` makes."""
    mask = node.args[1] if ops.kind(node) == "mul" and len(node.args) == 2 else None
    return isinstance(mask, fx.Node) and mask.op == "get_attr" and mask.meta["val"].dtype is torch.bool
