"""Three small networks and scikit-learn's handwritten digits, upsampled to 32 × 32; trained weights are kept on disk.

A residual network with batch norms, a MobileNetV3 (depthwise convs, squeeze-and-excite, hardswish) and a vision
transformer: the three kinds of model that quantization treats differently.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 32


@dataclass(frozen=True)
class Digits:
    """Images f32[N,1,32,32] of about zero mean and unit variance, and labels i64[N], to train on and held out."""

    images: Tensor
    labels: Tensor
    held_images: Tensor
    held_labels: Tensor


def load() -> Digits:
    """The 1,797 digits; 30 % are held out, always the same ones."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    small = torch.from_numpy(data.images[:, None].astype("float32")) / 16
    images = F.interpolate(small, (SIDE, SIDE), mode="bilinear", align_corners=False)
    train, held = train_test_split(range(len(images)), test_size=0.3, random_state=0, stratify=data.target)
    images = (images - images[train].mean()) / images[train].std()
    labels = torch.from_numpy(data.target).long()
    return Digits(images[train], labels[train], images[held], labels[held])


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
    """Conv and batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(*conv_bn(inputs, outputs, 3, stride), nn.ReLU(), *conv_bn(outputs, outputs, 3, 1))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_bn(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """f32[N,C,H,W] → f32[N,C',H/stride,W/stride]."""
        return F.relu(self.shortcut(x) + self.inner(x))


def residual() -> nn.Module:
    """A ResNet of six blocks."""
    blocks = [Residual(24, 24, 1), Residual(24, 24, 1), Residual(24, 48, 2), Residual(48, 48, 1)]
    blocks += [Residual(48, 96, 2), Residual(96, 96, 1)]
    stem = [*conv_bn(1, 24, 3, 2), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


class SqueezeExcite(nn.Module):
    """x · hardsigmoid(conv(relu(conv(mean(x)))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(8, channels // 4)
        self.scale = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            *(nn.Conv2d(channels, inner, 1), nn.ReLU()),
            *(nn.Conv2d(inner, channels, 1), nn.Hardsigmoid()),
        )

    def forward(self, x: Tensor) -> Tensor:
        """f32[N,C,H,W] → the same shape."""
        gate: Tensor = self.scale(x)
        return x * gate


class InvertedResidual(nn.Module):
    """Expand, depthwise conv, squeeze and excite, project; added to x where the shapes allow."""

    def __init__(self, inputs: int, inner: int, outputs: int, kernel: int, stride: int, hard: bool) -> None:
        super().__init__()
        activation: Callable[[], nn.Module] = nn.Hardswish if hard else nn.ReLU
        self.inner = nn.Sequential(
            *conv_bn(inputs, inner, 1, 1), activation(),
            *conv_bn(inner, inner, kernel, stride, inner), activation(),
            SqueezeExcite(inner), *conv_bn(inner, outputs, 1, 1),
        )  # fmt: skip
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """f32[N,C,H,W] → f32[N,C',H/stride,W/stride]."""
        y: Tensor = self.inner(x)
        return x + y if self.adds else y


def mobilenet() -> nn.Module:
    """A MobileNetV3 of six blocks."""
    blocks = [
        InvertedResidual(16, 32, 16, 3, 1, hard=False),
        InvertedResidual(16, 64, 24, 3, 2, hard=False),
        InvertedResidual(24, 72, 24, 3, 1, hard=False),
        InvertedResidual(24, 96, 40, 5, 2, hard=True),
        InvertedResidual(40, 160, 40, 5, 1, hard=True),
        InvertedResidual(40, 160, 40, 5, 1, hard=True),
    ]
    stem = [*conv_bn(1, 16, 3, 2), nn.Hardswish()]
    last = [*conv_bn(40, 160, 1, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*stem, *blocks, *last, nn.Linear(160, 128), nn.Hardswish(), nn.Linear(128, 10))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """f32[N,T,C] → the same shape."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class VisionTransformer(nn.Module):
    """Patches of 4 × 4, a learned position for each, four blocks, the mean of all tokens."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.positions = nn.Parameter(0.1 * torch.randn(1, (SIDE // 4) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """f32[N,1,32,32] → logits f32[N,10]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        y: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return y


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "residual": (residual, 16),
    "mobilenet": (mobilenet, 24),
    "vit": (VisionTransformer, 30),
}
"""Constructor and training epochs of each network."""


def shifted(images: Tensor) -> Tensor:
    """Each image moved by up to three pixels in each direction."""
    padded = F.pad(images, (3, 3, 3, 3), value=float(images.min()))
    rows, columns = (torch.randint(0, 7, (len(images), 1)) + torch.arange(SIDE) for _ in range(2))
    index = torch.arange(len(images))[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def fit(model: nn.Module, data: Digits, *, steps: int, rate: float, batch: int) -> None:
    """Trains in place with AdamW and one cycle of learning rates that ends at zero; leaves the mode alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(0, len(data.images), (batch,))
        loss = F.cross_entropy(model(shifted(data.images[chosen])), data.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def trained(name: str, data: Digits, seed: int, *, steps: int | None = None) -> nn.Module:
    """The network *name* in eval mode, trained from *seed*, or as it was trained before.

    Args:
        name: one of ``MODELS``.
        data: what to train on.
        seed: of the initial weights and of the batches.
        steps: batches of 64; None for as many as its epochs need.
    """
    make, epochs = MODELS[name]
    steps = steps or epochs * -(-len(data.images) // 64)
    torch.manual_seed(seed)
    model = make()
    path = _folder() / f"{name}-{_key(name, seed, steps)}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    fit(model.train(), data, steps=steps, rate=3e-3, batch=64)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)  # an interrupted run leaves no half a file
    return model.eval()


def _folder() -> Path:
    """Where trained weights are kept: in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fxopt" / "accuracy"


def _key(name: str, seed: int, steps: int) -> str:
    """Changes with everything that decides the weights: this file, the torch version, the settings."""
    text = f"{Path(__file__).read_text()} {torch.__version__} {name} {seed} {steps}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
