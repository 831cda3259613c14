"""The main job, on real data: train a small residual network on handwritten digits, compile it, compare.

Run it with ``tools/demo``. Everything below ``train`` is what a user of fxopt would write.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import fxopt

Model = Callable[[Tensor], Tensor]


class Residual(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """f32[N,C,H,W] → f32[N,C,H,W]."""
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(inner)))


def down(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Conv, batch norm and relu that change the number of channels, and the resolution where stride is 2."""
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def digits_net() -> nn.Sequential:
    """A ResNet for 8 × 8 images of ten classes."""
    return nn.Sequential(
        *(down(1, 32, 1), Residual(32), Residual(32)),
        *(down(32, 64, 2), Residual(64), Residual(64)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 10)),
    )


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images f32[N,1,8,8] in 0…1, held-out images, training labels i64[N], held-out labels."""
    data = load_digits()
    images, labels = data.images[:, None].astype("float32") / 16, data.target
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    train_images, held, train_labels, held_labels = (torch.from_numpy(part) for part in parts)
    return train_images, held, train_labels, held_labels


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int = 12, rate: float = 3e-3) -> None:
    """Trains in place; a few seconds on two cores."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    steps = epochs * -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def quantized_in_training(model: nn.Module, images: Tensor, labels: Tensor) -> fxopt.PreparedModel:
    """*model* fine-tuned for two epochs while weights and activations are rounded to int8 (QAT)."""
    prepared = fxopt.prepare(
        model,
        (images[:64],),
        dynamic_shapes=({0: "batch"},),
        calibration=[(batch,) for batch in images[:256].split(32)],
        backend="torch",
    )
    prepared.freeze_batch_norm()  # its statistics have settled
    train(prepared, images, labels, epochs=2, rate=1e-4)
    return prepared


def pruned(model: nn.Module, images: Tensor, labels: Tensor) -> fxopt.PreparedModel:
    """*model* without the channels that matter least, half of its multiplications, fine-tuned for four epochs."""
    prepared = fxopt.prepare(
        model, (images[:64],), dynamic_shapes=({0: "batch"},), passes="prune-channels{macs=0.5,multiple=4}"
    )
    train(prepared, images, labels, epochs=4, rate=1e-3)
    return prepared


def sparsified(model: nn.Module, images: Tensor, labels: Tensor) -> fxopt.PreparedModel:
    """*model* with two of each four weights at zero, as SparseGPT chooses them, fine-tuned for four epochs."""
    prepared = fxopt.prepare(
        model,
        (images[:64],),
        dynamic_shapes=({0: "batch"},),
        passes="sparsify-2-4{method=sparsegpt}",
        calibration=[(batch,) for batch in images[:256].split(32)],
    )
    train(prepared, images, labels, epochs=4, rate=1e-3)
    return prepared


def thinned(model: nn.Module, images: Tensor, labels: Tensor) -> fxopt.PreparedModel:
    """*model* with thin convs in place of wide ones, half of its parameters, fine-tuned for four epochs."""
    passes = "low-rank-conv{ratio=0.5,multiple=4}"
    prepared = fxopt.prepare(model, (images[:64],), dynamic_shapes=({0: "batch"},), passes=passes)
    train(prepared, images, labels, epochs=4, rate=1e-3)
    return prepared


def accuracy(model: Model, images: Tensor, labels: Tensor) -> float:
    """Fraction of *images* that *model*, compiled for one image at a time, puts into the right class."""
    with torch.no_grad():
        predicted = torch.cat([model(image.unsqueeze(0)).argmax(1) for image in images])
    return float((predicted == labels).float().mean())


def latencies_ms(models: Sequence[Model], image: Tensor, rounds: int = 11, calls: int = 60) -> list[float]:
    """Median milliseconds of a call on one image, for each model.

    The models take turns, with a pause between: a machine that slows down for a while slows all of them.
    """
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(rounds):
            for model, own in zip(models, times, strict=True):
                time.sleep(0.02)
                for index in range(-4, calls):
                    start = time.perf_counter()
                    model(image)
                    if index >= 0:
                        own.append(time.perf_counter() - start)
    return [statistics.median(own) * 1e3 for own in times]


def main() -> None:
    """Trains, compiles in several ways, prints the report of the first and the table of all."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    console = Console()
    train_images, images, train_labels, labels = digits()
    model = digits_net()
    with console.status("training"):
        train(model, train_images, train_labels)

    example = (images[:1],)
    exact = fxopt.compile(model, target="x86", example_inputs=example, backend="torch")
    bf16 = fxopt.compile(
        model, target="x86", example_inputs=example, backend="torch", passes="cast-precision{dtype=bf16}"
    )
    onnx = fxopt.compile(model, target="x86", example_inputs=example, backend="onnx")
    few = [(batch,) for batch in train_images[:256].split(32)]  # calibration needs no labels
    int8 = fxopt.compile(
        model, target="x86", example_inputs=example, passes="insert-fake-quant", calibration=few, backend="torch"
    )
    onnx_int8 = fxopt.compile(
        model, target="x86", example_inputs=example, passes="insert-fake-quant", calibration=few, backend="onnx"
    )
    with console.status("training with the rounding in place"):
        int8_qat = quantized_in_training(model, train_images, train_labels).compile(
            example_inputs=example, backend="torch"
        )
    with console.status("pruning, and fine-tuning what is left"):
        small = pruned(model, train_images, train_labels)
    half = small.compile(example_inputs=example, backend="torch")
    half_int8 = small.compile(example_inputs=example, backend="torch", passes="insert-fake-quant", calibration=few)
    with console.status("setting two of four weights to zero, and fine-tuning the others"):
        sparse = sparsified(model, train_images, train_labels)
    two_of_four = sparse.compile(example_inputs=example, backend="torch")
    with console.status("factorising, and fine-tuning what is left"):
        low_rank = thinned(model, train_images, train_labels).compile(example_inputs=example, backend="torch")
    console.print(exact.report)

    before, after = exact.report.bytes
    rows: list[tuple[str, Model, int]] = [
        ("eager", model, before),
        ("fxopt exact", exact, after),
        ("fxopt bf16", bf16, bf16.report.bytes[1]),
        ("fxopt int8 (PTQ)", int8, int8.report.bytes[1]),
        ("fxopt int8 (QAT)", int8_qat, int8_qat.report.bytes[1]),
        ("fxopt pruned", half, half.report.bytes[1]),
        ("fxopt pruned, int8", half_int8, half_int8.report.bytes[1]),
        ("fxopt 2:4, packed", two_of_four, two_of_four.report.packed_bytes),
        ("fxopt low rank", low_rank, low_rank.report.bytes[1]),
        ("ONNX", onnx, onnx.report.bytes[1]),
        ("ONNX int8 (PTQ)", onnx_int8, onnx_int8.report.bytes[1]),
    ]
    table = Table(title=f"{len(labels)} held-out digits, one image a call, {torch.get_num_threads()} threads")
    for heading in ("", "accuracy", "size, KiB", "latency, ms", "faster than eager"):
        table.add_column(heading, justify="right" if heading else "left")
    milliseconds = latencies_ms([compiled for _, compiled, _ in rows], images[:1])
    for (name, compiled, size), ms in zip(rows, milliseconds, strict=True):
        right = accuracy(compiled, images, labels)
        table.add_row(name, f"{right:.2%}", f"{size / 1024:.0f}", f"{ms:.3f}", f"{milliseconds[0] / ms:.2f} ×")
    console.print(table)


if __name__ == "__main__":
    main()
