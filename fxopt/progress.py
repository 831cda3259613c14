"""Timing of the stages of a compile, shown as a spinner with a clock where stderr is a terminal.

``say`` tells from anywhere within a stage, such as a pass that takes long, what is being done, and how much of it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn

_current: ContextVar[Callable[[str, float | None], None] | None] = ContextVar("say", default=None)


def say(text: str, part: float | None = None) -> None:
    """Show *text* as what is being done, where stages are shown, and a bar for the *part* (0 to 1) that is done."""
    current = _current.get()
    if current is not None:
        current(text, part)


class _Bar(BarColumn):
    """A bar for what has a known part done; nothing for anything else."""

    def render(self, task: Task) -> Any:
        return super().render(task) if task.total is not None else ""


def _nothing(text: str, part: float | None) -> None:
    """Where nothing is shown."""


class Stages:
    """Collects seconds by stage; ``say`` tells what is going on within one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._say: Callable[[str, float | None], None] = _nothing

    def say(self, text: str) -> None:
        """Show *text* as what is being done."""
        self._say(text, None)

    @contextmanager
    def shown(self, title: str) -> Iterator[Stages]:
        """Show the stages under *title* while the block runs; on a terminal only."""
        console = Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), _Bar(20), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(title, total=None)

            def show(text: str, part: float | None) -> None:
                bar.tasks[0].total = None if part is None else 1.0
                bar.update(task, description=f"{title}: {text}", completed=part or 0.0)

            self._say = show
            token = _current.set(self._say)
            try:
                yield self
            finally:
                _current.reset(token)
                self._say = _nothing

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as stage *name*; times of one name add up."""
        self.say(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
