"""The commands, by name. Each lives in a module that is imported when it runs: ``fxopt --help`` needs no torch."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from fxopt.cli.output import Json, guarded

app = typer.Typer(
    name="fxopt", help="Compile a trained PyTorch model for the machine it must run on.", no_args_is_help=True,
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def _complete(known: Callable[[], list[str]]) -> Callable[[str], list[str]]:
    """How a shell completes the last of some words with commas between, without torch, which takes a second."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + name for name in known() if name.startswith(last)]

    return complete


def _installed(group: str) -> list[str]:
    return sorted(entry.name for entry in entry_points(group=group))


_BACKENDS = _complete(lambda: ["auto", *_installed("fxopt.backends")])
_TARGETS = _complete(lambda: ["x86", "arm", "cuda"])
_PASSES = _complete(lambda: _installed("fxopt.passes"))

Model = Annotated[str, typer.Argument(metavar="MODEL", help="module:factory, a .pt2 file, or a .fxopt file.")]
Artifact = Annotated[str, typer.Argument(metavar="ARTIFACT", help="A .fxopt file.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", "-i", help="Example input such as 'x:f32[batch=8,3,224,224]' or 'i64[1,128]<30000'."),
]
Target = Annotated[str | None, typer.Option(help="x86, arm, cuda, or one of `fxopt targets`.", autocompletion=_TARGETS)]
Backend = Annotated[str | None, typer.Option(help="auto, or one of `fxopt backends`.", autocompletion=_BACKENDS)]
Passes = Annotated[
    str | None,
    typer.Option(help="A spec, such as 'prune-channels{macs=0.5},insert-fake-quant'.", autocompletion=_PASSES),
]
Calibration = Annotated[str | None, typer.Option(help="module:name of batches, for passes that look at data.")]
Recipe = Annotated[Path | None, typer.Option(help="A .yaml or .toml file with all of these; options override it.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of a call; all cores where none is given.")]
AllowCode = Annotated[bool, typer.Option(help="Load machine code from the file, where you trust it.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from fxopt import __version__

        typer.echo(f"fxopt {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise typer.Exit


@app.command("compile")
@guarded
def compile_(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="m.fxopt, or m.onnx on an ONNX backend.")
    ] = None,
    inputs: Inputs = None,
    target: Target = None,
    backend: Backend = None,
    passes: Passes = None,
    calibration: Calibration = None,
    recipe: Recipe = None,
    dump: Annotated[Path | None, typer.Option(help="Folder for one .fxir file a pass.")] = None,
    verify: Annotated[bool | None, typer.Option(help="Check after each pass, and the end against the model.")] = None,
    as_json: Json = False,
) -> int | None:
    """Compile MODEL, print the report, and write it to a file."""
    from fxopt.cli import build

    wish = build.Wish.of(recipe, inputs, target, backend, passes, calibration, verify)
    return build.compile_model(model, wish, output, dump, as_json=as_json)


@app.command()
@guarded
def explain(
    model: Model,
    inputs: Inputs = None,
    target: Target = None,
    backend: Backend = None,
    passes: Passes = None,
    calibration: Calibration = None,
    recipe: Recipe = None,
    as_json: Json = False,
) -> int | None:
    """What each pass did to MODEL, and what it left alone and why."""
    from fxopt.cli import build

    wish = build.Wish.of(recipe, inputs, target, backend, passes, calibration, None)
    return build.explain(model, wish, as_json=as_json)


@app.command()
@guarded
def bench(
    model: Model,
    inputs: Inputs = None,
    target: Target = None,
    backends: Annotated[
        str | None,
        typer.Option(help="Names with commas; all installed where none are given.", autocompletion=_BACKENDS),
    ] = None,
    passes: Passes = None,
    calibration: Calibration = None,
    recipe: Recipe = None,
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each takes its turn.")] = 5,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> int | None:
    """Latency of MODEL on each backend beside eager, in turns; of an artifact, on its own."""
    from fxopt.cli import build

    wish = build.Wish.of(recipe, inputs, target, None, passes, calibration, None)
    return build.bench(model, wish, backends, threads, rounds, allow_code=allow_code, as_json=as_json)


@app.command()
@guarded
def run(
    artifact: Artifact,
    inputs: Annotated[
        list[Path] | None, typer.Option("--inputs", help=".npy, .npz, .safetensors or .pt; random where none is given.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help=".npz, .safetensors or .pt.")] = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> int | None:
    """Run ARTIFACT once, print what its outputs are, and write them to a file."""
    from fxopt.cli import use

    return use.run(artifact, inputs or [], output, allow_code=allow_code, as_json=as_json)


@app.command()
@guarded
def verify(
    artifact: Artifact,
    model: Model,
    data: Annotated[
        str | None, typer.Option(help="module:name of input batches; random ones where none is given.")
    ] = None,
    cosine: Annotated[
        float | None, typer.Option(min=-1, max=1, help="The least cosine similarity; for lossy artifacts.")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="At most so many batches.")] = 16,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> int | None:
    """Compare ARTIFACT with the MODEL it was made from, on data. Exit status 1 where they differ too much."""
    from fxopt.cli import use

    return use.verify(artifact, model, data, cosine, batches, allow_code=allow_code, as_json=as_json)


@app.command()
@guarded
def dump(
    model: Model,
    inputs: Inputs = None,
    target: Target = None,
    passes: Passes = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> int | None:
    """Print the final graph of MODEL as fxir text."""
    from fxopt.cli import look

    return look.dump(model, inputs or [], target, passes, allow_code=allow_code, as_json=as_json)


@app.command()
@guarded
def diff(
    first: Annotated[str, typer.Argument(help="A .fxir or .fxopt file.")],
    second: Annotated[str, typer.Argument(help="Another.")],
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> int | None:
    """What differs between two dumps or two artifacts. Exit status 1 where something does."""
    from fxopt.cli import look

    return look.diff(first, second, allow_code=allow_code, as_json=as_json)


@app.command()
@guarded
def report(
    artifact: Artifact,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="An .html file; printed where none is given.")
    ] = None,
    as_json: Json = False,
) -> int | None:
    """The report of ARTIFACT: as text, or as a page to look at."""
    from fxopt.cli import look

    return look.report(artifact, output, as_json=as_json)


@app.command()
@guarded
def cache(
    folder: Annotated[Path | None, typer.Option(help="The folder; the user's own where none is given.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove everything in it.")] = False,
    as_json: Json = False,
) -> int | None:
    """Compiled models that are kept on disk (FXOPT_CACHE=1, or compile(..., cache=True))."""
    from fxopt.cli import look

    look.cache(folder, clear=clear, as_json=as_json)
    return None


def _listing(name: str, text: str) -> None:
    """A command that prints a table and takes nothing."""

    def command(as_json: Json = False) -> int | None:
        from fxopt.cli import look

        show: Any = getattr(look, name)
        result: int | None = show(as_json=as_json)
        return result

    command.__doc__ = text
    app.command(name)(guarded(command))


_listing("targets", "The machines that can be compiled for.")
_listing("passes", "The passes, with their options and defaults.")
_listing("backends", "The engines, and whether they are installed.")


def main() -> None:
    """The entry point of the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows fewer letters gets a ?
    app()
