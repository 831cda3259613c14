"""Timing of the stages of a compile, shown as a spinner with a clock where stderr is a terminal.

``say`` tells from anywhere within a stage, such as a pass that takes long, what is being done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_current: ContextVar[Callable[[str], None] | None] = ContextVar("say", default=None)


def say(text: str) -> None:
    """Show *text* as what is being done, where stages are shown."""
    current = _current.get()
    if current is not None:
        current(text)


class Stages:
    """Collects seconds by stage; ``say`` tells what is going on within one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._say: Callable[[str], None] = lambda text: None

    def say(self, text: str) -> None:
        """Show *text* as what is being done."""
        self._say(text)

    @contextmanager
    def shown(self, title: str) -> Iterator[Stages]:
        """Show the stages under *title* while the block runs; on a terminal only."""
        console = Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(title)
            self._say = lambda text: bar.update(task, description=f"{title}: {text}")
            token = _current.set(self._say)
            try:
                yield self
            finally:
                _current.reset(token)
                self._say = lambda text: None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as stage *name*; times of one name add up."""
        self.say(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
