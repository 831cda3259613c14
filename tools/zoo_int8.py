"""Quantizes a table of third-party models: how close each stays to float, and one backend to the other.

Weights are random, so a cosine here says whether a model is quantized soundly, not what it would score. Deep networks
with random weights amplify noise; the column "noise" says how much: the cosine of float to itself after the input got
noise of 1 %, about what rounding one tensor to int8 adds. A model is low where it loses far more than that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from torch.nn import functional as F

import fxopt
from tools import calibration, models
from tools.contestants import leaves, one_line
from tools.zoo import free_memory

LOSS = 0.05
"""A loss (1 − cosine) up to this is sound, whatever noise does to the model."""
NOISE = 0.01
TIMES_NOISE = 12
"""A loss up to this many times that of noise at the input is sound, too: every quantized tensor adds such noise."""


@dataclass
class Result:
    """One model.

    Attributes:
        model: its name.
        cosine: to float, of the worst output, by backend.
        quantized: convs and linears in int8, and all of them, by backend.
        noise: cosine of the worst output of float to itself, after noise at the input; 1 where inputs are ids.
        agreement: cosine of the worst output between the first two backends; None where one is missing.
        failures: errors by backend.
        seconds: compiling, all backends together.
    """

    model: str
    cosine: dict[str, float] = field(default_factory=dict)
    quantized: dict[str, str] = field(default_factory=dict)
    noise: float = 1.0
    agreement: float | None = None
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """Either "ok", or "low" where a cosine is lower than noise explains, or the errors."""
        if self.failures:
            return "; ".join(f"{backend}: {text}" for backend, text in self.failures.items())
        numbers = [*self.cosine.values(), *([] if self.agreement is None else [self.agreement])]
        allowed = max(LOSS, TIMES_NOISE * (1 - self.noise))
        return "ok" if all(1 - number <= allowed for number in numbers) else "low"


def cosine(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Smallest cosine of any output; masks and other outputs that hold no numbers are left out."""
    pairs = [(a.flatten(), b.flatten()) for a, b in zip(actual, expected, strict=True) if b.abs().max() > 0]
    return min((float(F.cosine_similarity(a, b, dim=0)) for a, b in pairs), default=1.0)


def compare(name: str, backends: Sequence[str], *, small: bool = False, batches: int = 4) -> Result:
    """Quantizes the model *name* for each of *backends* and compares on inputs that calibration has not seen.

    Args:
        name: see :func:`tools.models.load`.
        backends: fxopt backends.
        small: take 96-pixel images where the model allows it.
        batches: of random calibration data.
    """
    model, example = models.load(name, small=small)
    *seen, unseen = calibration.samples(example, batches + 1)
    models.unsettle(model, *(torch.cat(parts) for parts in zip(*seen, strict=True)))  # as if trained on such data
    with torch.inference_mode():
        expected = leaves(model(*unseen))
        noisy = [x + NOISE * x.std() * torch.randn_like(x) if x.is_floating_point() else x for x in unseen]
        result = Result(name, noise=cosine(leaves(model(*noisy)), expected))
    found = []
    start = time.perf_counter()
    for backend in backends:
        try:
            compiled = fxopt.compile(
                model, example_inputs=example, passes="insert-fake-quant", calibration=seen, backend=backend
            )
            found.append(leaves(compiled(*unseen)))
            result.cosine[backend] = cosine(found[-1], expected)
            layers = compiled.report.quantization.layers
            result.quantized[backend] = f"{sum(layer.mode != 'float' for layer in layers)}/{len(layers)}"
        except Exception as error:
            result.failures[backend] = one_line(error)
        free_memory()
    result.seconds = time.perf_counter() - start
    if len(found) > 1:
        result.agreement = cosine(found[0], found[1])
    return result


def row(result: Result, backends: Sequence[str]) -> list[str]:
    """The text of one model."""
    numbers = [*(result.cosine.get(backend) for backend in backends), result.agreement, result.noise]
    cells = ["–" if number is None else f"{number:.4f}" for number in numbers]
    layers = " ".join(dict.fromkeys(result.quantized.values())) or "–"
    return [result.model, layers, *cells, f"{result.seconds:.1f}", result.verdict]


def markdown(results: Sequence[Result], backends: Sequence[str]) -> str:
    """The table, with a line that counts."""
    headings = [
        "model",
        "in int8",
        *(f"{backend}, cosine" for backend in backends),
        "agreement",
        "noise",
        "compile, s",
        "",
    ]
    lines = [headings, ["---"] * len(headings), *(row(result, backends) for result in results)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{table}\n\n{sum(r.verdict == 'ok' for r in results)} of {len(results)} are sound.\n"


def main(names: Sequence[str], backends: Sequence[str], output: Path, console: Console, *, small: bool) -> int:
    """Prints and writes the table; the exit status is 1 where a model fails."""
    results: list[Result] = []
    output.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"{'model':24} {'in int8':>9}  cosine: {', '.join(backends)}, to each other, noise", highlight=False)
    for name in names:
        results.append(compare(name, backends, small=small))
        model, layers, *cells, verdict = row(results[-1], backends)
        numbers = " ".join(f"{cell:>7}" for cell in cells)
        console.print(f"{model:24} {layers:>9}  {numbers} s  {verdict}", highlight=False, markup=False)
        output.write_text(markdown(results, backends))
    failed = [result.model for result in results if result.failures]
    low = [result.model for result in results if result.verdict == "low"]
    console.print(f"{len(failed)} failed {failed}; {len(low)} low {low}; {output}", highlight=False, markup=False)
    return int(bool(failed))
