"""What int8 costs in accuracy: fxopt beside the other engines' own quantizers, on trained models and real data.

Three small networks are trained on scikit-learn's handwritten digits (kept in the user's cache folder) and measured on
the held-out 30 %. Small transformers with outlier channels have no task; there the outputs are compared with float's.
Writes bench-results/accuracy.md and .json.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from tools import RESULTS, calibration, digits, models
from tools.accuracy_contestants import CONTESTANTS, FINE_TUNING_STEPS, NEEDS_TASK, Case, Runner, eager
from tools.contestants import leaves, one_line, time_limit
from tools.zoo import free_memory

BATCH = 20
CALIBRATION_BATCHES = 13
OUTLIERS = {"outliers-bert": "bert", "outliers-vit": "hf-vit", "outliers-gpt2": "gpt2"}
MODELS = (*digits.MODELS, *OUTLIERS)


@dataclass
class Score:
    """One contestant on one model and seed; None where there is nothing to say.

    Attributes:
        model: its name.
        contestant: its name.
        seed: of training or of random weights.
        top1: fraction of held-out samples in the right class.
        drop: percentage points below fp32.
        cosine: mean cosine of the samples' outputs to fp32's; of the worst output where there are several.
        agreement: fraction of samples for which the largest logit is that of fp32.
        smaller: bytes of the fp32 weights over bytes of the stored ones.
        seconds: building it.
        failure: its error, or "".
    """

    model: str
    contestant: str
    seed: int
    top1: float | None = None
    drop: float | None = None
    cosine: float | None = None
    agreement: float | None = None
    smaller: float | None = None
    seconds: float | None = None
    failure: str = ""


NUMBERS = ("top1", "drop", "cosine", "agreement", "smaller", "seconds")
HEADINGS = ("", "top-1", "drop", "cosine", "agree", "smaller", "build")
FORMS = ("{:.2%}", "{:.2f}", "{:.5f}", "{:.2%}", "{:.2f} ×", "{:.1f}")
LEGEND = """\
drop: points of top-1 below fp32; cosine: of the outputs to fp32's; agree: samples with the class that fp32 gives;
smaller: fp32 weights over the stored ones; build: seconds.
"""


def digits_case(name: str, seed: int, folder: Path, *, steps: int | None, tuning: int, threads: int) -> Case:
    """A network trained on the digits, from *seed*; it is calibrated with 260 training images."""
    data = digits.load()
    model = digits.trained(name, data, seed, steps=steps)
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))
    chosen = data.images[order[: BATCH * CALIBRATION_BATCHES]]
    seen, held = (
        list[tuple[torch.Tensor, ...]](zip(images.split(BATCH), strict=True)) for images in (chosen, data.held_images)
    )
    assert len(held[-1][0]) == BATCH, "shapes are fixed when a model is compiled: batches must divide the images"
    return Case(name, model, seen, held, data.held_labels, data, folder, threads, tuning)


def outlier_case(name: str, seed: int, folder: Path, *, threads: int) -> Case:
    """A small random transformer, a few channels of its norms 20 to 50 times as large as the others."""
    model, inputs = models.load(OUTLIERS[name])
    models.with_outliers(model, seed, *inputs)
    data = calibration.samples(inputs, 48, seed)
    return Case(name, model, data[:32], data[32:], None, None, folder, threads)


@torch.no_grad()
def outputs(runner: Runner, case: Case) -> list[torch.Tensor]:
    """f64[N,…] for each output of the model, over all held-out samples."""
    found = [[x.clone() for x in leaves(runner.call(*batch))] for batch in case.held]
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def measure(name: str, case: Case, seed: int, float_outputs: list[torch.Tensor], limit_s: float) -> Score:
    """Builds the contestant *name* and holds its outputs against fp32's; a failure is an answer, too."""
    score = Score(case.name, name, seed)
    start = time.perf_counter()
    try:
        with time_limit(limit_s):
            runner = CONTESTANTS[name](case)
            score.seconds = time.perf_counter() - start
            found = outputs(runner, case)
    except Exception as error:
        score.failure = one_line(error)
        return score
    score.smaller = eager(case).size / runner.size
    pairs = list(zip(found, float_outputs, strict=True))
    score.cosine = min(float(F.cosine_similarity(a.flatten(1), b.flatten(1)).mean()) for a, b in pairs)
    if case.labels is not None:
        predicted, expected = (x.argmax(-1) for x in pairs[0])
        score.top1 = float((predicted == case.labels).double().mean())
        score.drop = 100 * (float((expected == case.labels).double().mean()) - score.top1)
        score.agreement = float((predicted == expected).double().mean())
    return score


def measure_all(case: Case, seed: int, names: Iterable[str], limit_s: float) -> list[Score]:
    """All contestants on one model."""
    float_outputs = outputs(eager(case), case)
    scores = []
    for name in names:
        if case.labels is None and name in NEEDS_TASK:
            continue
        print(f"{case.name}, seed {seed}: {name}", file=sys.stderr)
        scores.append(measure(name, case, seed, float_outputs, limit_s))
        free_memory()
    return scores


def rows(scores: Sequence[Score]) -> list[tuple[str, ...]]:
    """The text of one model's table: a line for each contestant, means over the seeds."""
    lines = []
    for name in dict.fromkeys(score.contestant for score in scores):
        own = [score for score in scores if score.contestant == name]
        failure = next((score.failure for score in own if score.failure), "")
        cells = [_mean(own, field, form) for field, form in zip(NUMBERS, FORMS, strict=True)]
        lines.append((name, *cells) if not failure else (name, f"failed: {failure}", *[""] * (len(cells) - 1)))
    return lines


def _mean(scores: Sequence[Score], field: str, form: str) -> str:
    numbers = [getattr(score, field) for score in scores if getattr(score, field) is not None]
    return form.format(statistics.fmean(numbers)) if numbers else "–"


def markdown(scores: Sequence[Score]) -> str:
    """A section for each model."""
    parts = ["# What int8 costs in accuracy", LEGEND.strip()]
    for model in dict.fromkeys(score.model for score in scores):
        lines = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1))]
        lines += rows([score for score in scores if score.model == model])
        parts += [f"## {model}", "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in ln) + " |" for ln in lines)]
    return "\n\n".join(parts) + "\n"


def show(scores: Sequence[Score], console: Console) -> None:
    """Prints a table for each model; errors come below it."""
    for model in dict.fromkeys(score.model for score in scores):
        table = Table(title=model)
        for heading in HEADINGS:
            table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
        failed = []
        for row in rows([score for score in scores if score.model == model]):
            if row[1].startswith("failed"):
                failed.append(f"{row[0]} {row[1]}")
                row = (row[0], "failed", *row[2:])
            table.add_row(*row)
        console.print(table)
        for line in failed:
            console.print(line, highlight=False, markup=False)
    console.print(LEGEND, highlight=False, end="")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options on the command line."""
    parser = argparse.ArgumentParser(prog="tools/accuracy", description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help=f"comma-separated; default: {', '.join(MODELS)}")
    parser.add_argument(
        "--contestants", default=",".join(CONTESTANTS), help=f"comma-separated; default: {', '.join(CONTESTANTS)}"
    )
    parser.add_argument("--seeds", type=int, default=1, help="average over so many trained models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help="batches of training, for a quick try; default: until it is trained")
    parser.add_argument("--tuning-steps", type=int, default=FINE_TUNING_STEPS, help="batches of fine-tuning (QAT)")
    parser.add_argument("--build-limit", type=float, default=300.0, help="seconds that one contestant may take")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(argv)


def _listed(text: str, known: Iterable[str], what: str) -> list[str]:
    """The comma-separated names in *text*, all of them known."""
    names, known = [name.strip() for name in text.split(",") if name.strip()], list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def run(options: argparse.Namespace) -> list[Score]:
    """Scores of all models, seeds and contestants; written after each model."""
    chosen = _listed(options.models, MODELS, "models")
    names = _listed(options.contestants, CONTESTANTS, "contestants")
    options.output.mkdir(parents=True, exist_ok=True)
    scores: list[Score] = []
    for model in chosen:
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                if model in OUTLIERS:
                    case = outlier_case(model, seed, Path(folder), threads=options.threads)
                else:
                    steps = {"steps": options.steps, "tuning": options.tuning_steps}
                    case = digits_case(model, seed, Path(folder), threads=options.threads, **steps)
                scores += measure_all(case, seed, names, options.build_limit)
        (options.output / "accuracy.md").write_text(markdown(scores))
        (options.output / "accuracy.json").write_text(json.dumps([vars(score) for score in scores], indent=1))
    return scores


def main(argv: Sequence[str] | None = None) -> None:
    """Trains where needed, measures, prints and writes."""
    options = arguments(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    scores = run(options)
    show(scores, Console())
    print(f"written to {options.output}/accuracy.md")


if __name__ == "__main__":
    main()
