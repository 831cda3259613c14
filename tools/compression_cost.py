"""What low-rank-linear takes, in a process of its own: ``python -m tools.compression_cost CASE THREADS``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

from fxopt import registry, spec
from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.passbase import PassContext
from fxopt.passes.low_rank_linear import decompose
from fxopt.pipeline import FIRST, Pipeline
from fxopt.target import resolve_target
from tools import models
from tools.bench_compile import rss_mib

BERT = {
    "BERT-base, ratio=0.5": "low-rank-linear{ratio=0.5}",
    "BERT-base, params=0.6": "low-rank-linear{params=0.6}",
    "BERT-base, ratio=0.5, whitened": "low-rank-linear{ratio=0.5,method=whitened}",
}
LARGE = {"4096×11008, rank 512": 512, "4096×11008, rank 1490": 1490}
CASES = (*BERT, *LARGE)
CALIBRATION = 8  # batches of one text of 128 tokens


@torch.no_grad()
def with_decaying_spectra(model: nn.Module) -> nn.Module:
    """Gives every linear of *model* singular values that fall like 1/(1 + i/32), as in trained ones, roughly."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            rows, columns = module.weight.shape
            side = min(rows, columns)
            falling = 1 / (1 + torch.arange(side) / 32)
            product = (torch.randn(rows, side) * falling) @ torch.randn(side, columns)
            module.weight.copy_(product * (0.02 / product.std()))
    return model


def of_bert(passes: str) -> dict[str, float]:
    """Seconds of the pass, and the peak of memory in it over the weights of the model, which are part of it."""
    models.load("bert")  # a small one: what imports take is not of the pass
    before = rss_mib("VmRSS")
    model, inputs = models.load("bert-base")
    with_decaying_spectra(model)
    captured = capture(model, inputs, None, None)
    texts = [(torch.randint(0, 30000, (1, 128)),) for _ in range(CALIBRATION)]
    data = Calibration(texts, captured.program.signature)
    ctx = PassContext(resolve_target("x86"), captured.inputs, data if "whitened" in passes else None)
    pipeline = Pipeline(ctx, captured.reference)
    state = pipeline.advance(pipeline.start(captured.program), [registry.find_pass(name)() for name in FIRST])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = time.perf_counter()
    done = pipeline.advance(state, spec.parse(passes, registry.find_pass))
    seconds = time.perf_counter() - start
    assert done.records[-1].edits
    weights = sum(p.nbytes for p in model.parameters()) / 2**20
    return {"seconds": seconds, "peak": (rss_mib("VmHWM") - before) / weights}


def of_layer(rank: int) -> dict[str, float]:
    """Seconds of the randomised path, and its error over that of exact truncation."""
    falling = 1 / (1 + torch.arange(4096.0) / 32)
    weight = (torch.randn(4096, 4096) * falling) @ torch.randn(4096, 11008) / 64
    start = time.perf_counter()
    b, a = decompose(weight, rank).factors(weight, rank)
    seconds = time.perf_counter() - start
    left = torch.linalg.eigvalsh((weight @ weight.T).double()).flip(0)[rank:].clamp(min=0).sum().sqrt()
    return {"seconds": seconds, "error": float((weight - b @ a).norm() / left)}


def main() -> None:
    """Measure the case that the arguments name."""
    what, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    print(json.dumps(of_bert(BERT[what]) if what in BERT else of_layer(LARGE[what])))


if __name__ == "__main__":
    main()
