"""Writes one .fxir file for every pass of compiling a model; the diff of two files is what the pass did."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

import torch

import fxopt
from tools import RESULTS, models


def load(name: str) -> models.Loaded:
    """A model of :func:`tools.models.load`, or what the factory ``module:function`` returns.

    A factory takes no arguments and returns a module and a tuple of example inputs.
    """
    if ":" not in name:
        return models.load(name)
    module, _, function = name.partition(":")
    loaded: models.Loaded = getattr(importlib.import_module(module), function)()
    return loaded


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles for the torch backend and lists the files."""
    parser = argparse.ArgumentParser(prog="tools/dump", description=__doc__)
    parser.add_argument("model", help="resnet18, bert, ... or MODULE:FACTORY")
    parser.add_argument("--folder", type=Path, help="default: bench-results/dump/<model>")
    parser.add_argument("--passes", help="a spec string, e.g. cast-precision{dtype=bf16}")
    parser.add_argument("--target", default="x86")
    options = parser.parse_args(argv)
    folder = options.folder or RESULTS / "dump" / options.model.replace(":", "-")
    torch.set_num_threads(2)
    model, inputs = load(options.model)
    fxopt.compile(
        model, target=options.target, example_inputs=inputs, passes=options.passes, backend="torch", dump=folder
    )
    for path in sorted(folder.glob("*.fxir")):
        print(path)


if __name__ == "__main__":
    main()
