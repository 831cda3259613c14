"""prune-channels: what each rule says of its ops, in the ways that models use them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from fxopt.passes.prune_channels import find_groups
from tests.passes.models import Model
from tests.passes.pruned_models import cleaned, equals_masked

ROWS = (torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),)
IMAGE = (torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)),)


def line(function: Any, middle: int = 8, last: int = 8, **parts: Any) -> Model:
    """b(function(a(x))): linear layers 6 → *middle*, *last* → 3."""
    return Model(lambda m, x: m.b(function(m, m.a(x))), a=nn.Linear(6, middle), b=nn.Linear(last, 3), **parts)


def picture(function: Any, middle: int = 8, last: int = 8, **parts: Any) -> Model:
    """b(function(a(x))): convolutions 3 → *middle*, *last* → 3."""
    return Model(lambda m, x: m.b(function(m, m.a(x))), a=nn.Conv2d(3, middle, 1), b=nn.Conv2d(last, 3, 1), **parts)


def shuffled(y: torch.Tensor, chunks: int) -> Any:
    """Channel shuffle of two halves, of which the first chunk goes on."""
    halves = y.unflatten(1, (2, -1))
    return halves.transpose(1, 2).flatten(1, 2).chunk(chunks, 1)[0]


def _written(y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of *y* replaced, in the ways that in-place writes become."""
    y = y.clone()
    y[1:3] = rows
    y[0] += rows[1]
    return y


PRUNED: dict[str, tuple[Model, tuple[Any, ...]]] = {
    "einsum broadcasts": (
        line(lambda m, y: torch.einsum("bc,bc->bc", y[:, None].sum(-1), m.c), c=torch.randn(4, 8)), ROWS),
    "einsum broadcasts weights": (
        Model(lambda m, x: torch.einsum("bi,oi,zi->bo", m.a(x), m.w, m.v),
              a=nn.Linear(6, 8), v=torch.randn(1, 1), w=torch.randn(3, 8)), ROWS),
    "einsum with dots": (
        Model(lambda m, x: torch.einsum("...i,oi->...o", m.a(x), m.w), a=nn.Linear(6, 8), w=torch.randn(3, 8)), ROWS),
    "einsum without an arrow": (
        Model(lambda m, x: torch.einsum("...c,cd", m.a(x), m.w) * torch.einsum("ij,ji", x, x.T),
              a=nn.Linear(6, 8), w=torch.randn(8, 3)), ROWS),
    "a vector": (Model(lambda m, x: (m.a(x) @ m.v) @ x, a=nn.Linear(6, 4), v=torch.randn(4)),
                 ROWS),
    "squeeze of what may come to be one": (line(lambda m, y: y[:, :, None].squeeze(), 2, 2), ROWS),
    "squeeze of dims": (line(lambda m, y: y[:, None].squeeze((0, 1, 2)), 2, 2), ROWS),
    "numbers": (line(lambda m, y: y * y.sum() + y.sum().softmax(0)), ROWS),
    "bits of the same width": (line(lambda m, y: y.view(torch.int32).float()), ROWS),
    "repeat_interleave with a size": (line(lambda m, y: y.repeat_interleave(2, 1, output_size=16), 8, 16), ROWS),
    "repeat and tile": (line(lambda m, y: y.repeat(1, 2).tile(2), 8, 32), ROWS),
    "the dtype of another": (line(lambda m, y: y.double().to(m.c).type_as(m.c), c=torch.randn(4, 5)), ROWS),
    "prelu": (picture(lambda m, y: m.p(y), p=nn.PReLU(8)), IMAGE),
    "prelu, one slope": (picture(lambda m, y: m.p(y), p=nn.PReLU()), IMAGE),
    "glu": (picture(lambda m, y: F.glu(y, 1), 16), IMAGE),
    "new tensors": (
        line(lambda m, y: y + y.new_ones(y.shape) + torch.zeros_like(y) + torch.full_like(y, 2.0)
             + y.new_full((1, 8), 1.0)), ROWS),
    "normalize": (line(lambda m, y: F.normalize(y, dim=-1)), ROWS),
    "expand_as and view_as": (line(lambda m, y: y + m.s.expand_as(y) + y[:, None].view_as(y), s=torch.randn(8)), ROWS),
    "every second": (line(lambda m, y: torch.stack([-y[:, 1::2], y[:, ::2]], -1).flatten(1)), ROWS),
    "unfold": (picture(lambda m, y: F.unfold(y, 3, padding=1)[..., None], 8, 72), IMAGE),
    "fold": (picture(lambda m, y: F.fold(m.c(F.unfold(y, 2, stride=2)), (6, 6), 2, stride=2), 8, 6,
                     c=nn.Conv1d(32, 24, 1)), IMAGE),
    "grid_sample": (picture(lambda m, y: F.grid_sample(y, m.g, align_corners=False), g=torch.rand(1, 5, 5, 2)), IMAGE),
    "gather along rows": (line(lambda m, y: y.gather(0, m.i.expand(2, 8)), i=torch.tensor([[1], [3]])), ROWS),
    "index of two axes": (
        line(lambda m, y: (y[..., None] * m.s)[m.i, :, m.i] + (y[:, None] * m.s[..., None])[m.i, m.i],
             s=torch.randn(3), i=torch.tensor([2, 0])), ROWS),
    "written into": (line(lambda m, y: _written(y, m.c(y[:2])), c=nn.Linear(8, 8)), ROWS),
    "narrow": (line(lambda m, y: y.narrow(1, 2, 6) + y.narrow(1, -6, 6), 8, 6), ROWS),
    "narrow from the start": (line(lambda m, y: y.narrow(1, 0, 6), 8, 6), ROWS),
    "meshgrid": (
        line(lambda m, y: y + sum(t.sum((0, 2)) for t in torch.meshgrid(m.p, m.s, m.p, indexing="ij"))
             + torch.meshgrid(m.p, m.s, indexing="xy")[0].sum(1), s=torch.randn(8), p=torch.randn(4)), ROWS),
    "filled": (line(lambda m, y: y.clone().fill_(2.0) + y.clone().zero_() + y), ROWS),
    "other names": (
        line(lambda m, y: torch.multiply(y, m.s).subtract(1).negative().absolute(), s=torch.randn(8)), ROWS),
    "indices of a pool": (picture(lambda m, y: F.max_pool2d(y, 2, return_indices=True)[0]), IMAGE),
    "where and masked_fill": (
        line(lambda m, y: torch.where(y > 0, y, 0.5).masked_fill(y > 1, m.v), v=torch.tensor(2.0)), ROWS),
    "broadcast_to": (line(lambda m, y: torch.broadcast_to(m.s, (4, 8)) * y, s=torch.randn(1, 8)), ROWS),
    "a half of an odd shuffle": (picture(lambda m, y: shuffled(y, 2), 18, 9), IMAGE),
    "a third of a shuffle": (picture(lambda m, y: shuffled(y, 3), 24, 8), IMAGE),
    "tokens of instance norm": (
        Model(lambda m, x: m.c(F.instance_norm(m.b(m.a(x)))), a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3)),
        (torch.randn(2, 5, 6),)),
}  # fmt: skip


@pytest.mark.parametrize("name", PRUNED)
def test_equals_the_dense_model_under_a_mask(name: str) -> None:
    equals_masked(*PRUNED[name])


@pytest.mark.parametrize(
    "model",
    [
        line(lambda m, y: y.view(torch.int16).float(), 8, 16),
        line(lambda m, y: y.view(torch.float64).float(), 8, 4),
        line(lambda m, y: y.repeat_interleave(torch.tensor([2] * 8), 1, output_size=16), 8, 16),
        line(lambda m, y: y[:, 1::3], 8, 3),
        line(lambda m, y: y.gather(1, m.i), i=torch.tensor([[7, 6, 5, 4, 3, 2, 1, 0]] * 4)),
        line(lambda m, y: y.clone().index_fill(1, m.i, 0.0), i=torch.tensor([1])),
        line(lambda m, y: torch.slice_scatter(y, y[:, 4:], 1, 0, 4)),
        line(lambda m, y: y.unfold(1, 3, 1).sum(-1), 8, 6),
        line(lambda m, y: torch.linalg.vector_norm(y, -1.0, -1, keepdim=True) * y),
    ],
)
def test_what_is_not_understood_stays(model: Model) -> None:
    program, _ = cleaned(model, ROWS)
    [first, *_] = find_groups(program).all
    assert first.name == "a.weight:0"
    assert first.reason
    equals_masked(model, ROWS, least=0)


@torch.library.custom_op("fxopt_tests::prelu", mutates_args=())
def not_prelu(self: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return self - self.mean(1, keepdim=True) * weight


@not_prelu.register_fake
def _(self: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(self)


def test_an_op_of_somebody_else_is_not_known_by_its_name() -> None:
    model = line(lambda m, y: not_prelu(y, m.s), s=torch.ones(1))
    equals_masked(model, ROWS, least=0)
    [first, *_] = find_groups(cleaned(model, ROWS)[0]).all
    assert "prelu cannot be followed" in first.reason


@torch.library.custom_op("transformers::grouped_mm_fallback", mutates_args=())
def grouped(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:  # noqa: A002
    parts = input.tensor_split(offs[:-1].cpu())
    return torch.cat([part @ matrix for part, matrix in zip(parts, weight, strict=True)])


@grouped.register_fake
def _(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:  # noqa: A002
    return input.new_empty(len(input), weight.shape[2])


def test_experts() -> None:
    """Of all experts the same channels of the width between go; rows and experts stay."""
    model = Model(
        lambda m, x: m.b(grouped(F.silu(grouped(m.a(x), m.up, m.ends)), m.down, m.ends)), a=nn.Linear(6, 8),
        up=torch.randn(3, 8, 12), down=torch.randn(3, 12, 4), b=nn.Linear(4, 3), ends=torch.tensor([1, 3, 4]),
    )  # fmt: skip
    program = equals_masked(model, ROWS, least=3)
    shapes = {name: tuple(value.shape) for name, value in program.tensors().items()}
    assert (shapes["up"], shapes["down"]) == ((3, 4, 6), (3, 6, 2))


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(5, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.InstanceNorm1d(5)]
)
def test_statistics_over_positions_mix_what_lies_there(norm: nn.Module) -> None:
    model = line(lambda m, y: norm(y))
    groups = {group.name: group for group in find_groups(cleaned(model, (torch.randn(2, 5, 6),))[0]).prunable}
    assert groups["a.weight:0"].atom.mixed


BATCH = {"x": {0: Dim.DYNAMIC}}
SPACE = {"x": {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}


class Block(nn.Module):
    """Layers between linears."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 3)
        layers: dict[str, nn.Module] = {
            "attention": nn.MultiheadAttention(32, 4, batch_first=True),
            "weights": nn.MultiheadAttention(32, 4, batch_first=True),
            "decoder": nn.TransformerDecoderLayer(32, 4, 64, batch_first=True),
            "encoder": nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True),
        }
        self.layer = layers[kind]

    def forward(self, x: torch.Tensor) -> Any:
        y = self.first(x)
        if self.kind in ("attention", "weights"):
            return self.last(self.layer(y, y, y, need_weights=self.kind == "weights")[0])
        return self.last(self.layer(y, x) if self.kind == "decoder" else self.layer(y))


@pytest.mark.parametrize("kind", ["attention", "weights", "decoder", "encoder"])
def test_sizes_that_are_computed_follow(kind: str) -> None:
    other = [(torch.randn(5, 6, 32),)]
    program = equals_masked(Block(kind), (torch.randn(2, 6, 32),), dynamic=BATCH, others=other, least=3)
    [weight] = [v for name, v in program.tensors().items() if name.endswith("in_proj_weight") and "multi" not in name]
    assert weight.shape[0] == 24, "half of the heads, and half of each"


class Heads(nn.Module):
    """Heads and batch on one axis, beside something that is repeated for each of the batch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.places = nn.Linear(6, 4)
        self.last = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> Any:
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, 4, 8).transpose(1, 2).reshape(n * 4, t, 8) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(1, 2)
        if self.kind == "repeat":
            bias = self.places(torch.eye(t)).T[:, None].repeat(n, 1, 1)
        else:
            by = (torch.arange(t)[:, None] - torch.arange(t)).abs()
            bias = scores.exp().gather(2, by.expand(scores.shape[0], t, t))
        y = ((scores + bias).softmax(-1) @ v).view(n, 4, t, 8).transpose(1, 2).reshape(n, t, 32)
        return self.last(self.out(y).relu())


@pytest.mark.parametrize("kind", ["repeat", "expand"])
def test_heads_follow_beside_what_is_repeated_for_each_of_the_batch(kind: str) -> None:
    other = [(torch.randn(5, 6, 32),)]
    program = equals_masked(Heads(kind), (torch.randn(2, 6, 32),), dynamic=BATCH, others=other, least=3)
    shapes = {name: tuple(value.shape) for name, value in program.tensors().items()}
    assert shapes["q.weight"] == shapes["v.weight"] == (8, 32), "half of the heads, and half of each"
    assert shapes.get("places.weight", (2, 6)) == (2, 6)


@pytest.mark.parametrize("options", [{"size": (11, 9)}, {"scale_factor": 2}, {}])
@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_images_of_any_size_are_resampled(mode: str, options: dict[str, Any]) -> None:
    class Resample(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 3, 1)

        def forward(self, x: torch.Tensor) -> Any:
            return self.b(F.interpolate(self.a(x), mode=mode, **(options or {"size": x.shape[-2:]})))

    equals_masked(Resample(), (torch.randn(1, 3, 8, 10),), dynamic=SPACE, others=[(torch.randn(1, 3, 12, 16),)])


def test_a_size_of_the_example_is_no_size_of_the_model() -> None:
    """With four rows, an axis of four rows looks like one of four channels: with eight it is another."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.a(x)
            return self.b(y).sum() + y.flatten().exp().view(4, -1).amax(0)

    program, _ = cleaned(Rows(), ROWS, BATCH)
    [first, *_] = find_groups(program).all
    assert "reshape cannot be followed" in first.reason


def test_windows_of_images_of_any_size() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.a(x)
            n, c, h, w = y.shape
            y = y.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
            return self.b(y - y.amax(1, keepdim=True))

    even = {"x": {0: Dim.DYNAMIC, 2: 2 * Dim("height"), 3: 2 * Dim("width")}}
    equals_masked(Windows(), (torch.randn(2, 3, 8, 6),), dynamic=even, others=[(torch.randn(3, 3, 4, 10),)])


def test_channel_shuffle_of_images_of_any_size() -> None:
    class Shuffle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 3, 1)

        def forward(self, x: torch.Tensor) -> Any:
            y = torch.cat([self.a(x), self.b(x)], 1)
            n, c, h, w = y.shape
            return self.c(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))

    any_size = {"x": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}
    equals_masked(Shuffle(), (torch.randn(2, 3, 8, 6),), dynamic=any_size, others=[(torch.randn(3, 3, 5, 10),)])


def test_sizes_that_depend_on_values() -> None:
    equals_masked(Model(lambda m, x: m.b(m.a(x[x[:, 0] > 0]).relu()), a=nn.Linear(6, 8), b=nn.Linear(8, 3)), ROWS)
    chosen = line(lambda m, y: y[y[:, 0] > 0])
    [first, *_] = find_groups(cleaned(chosen, ROWS)[0]).all
    assert first.reason
