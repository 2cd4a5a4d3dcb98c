"""What a person sees: progress bars, lines and tables, all through one rich console.

On a terminal, `progress` draws a bar with rate and time left; elsewhere (a log file, a pipe, a CI job) it prints plain
lines. Lines printed by `say` and `warn` while a bar is open appear above it.
"""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0

# All but tab and newline.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

console = Console(highlight=False)
_errors = Console(stderr=True, highlight=False)

# All open bars belong to one live display, so that a bar may open inside another.
_bars: Bars | None = None


class Progress(Protocol):
    """How far something has come, in its unit."""

    def advance(self, n: int = 1) -> None:
        """`n` more units are done."""
        ...

    def describe(self, text: str) -> None:
        """Show `text` beside the description from now on, a loss say; an empty text takes it away."""
        ...


def progress(
    description: str, total: int | None, unit: str = "it", *, completed: int = 0
) -> AbstractContextManager[Progress]:
    """A context manager that shows the course of `total` units (None: unknown) and yields a `Progress`.

    `completed` units were done earlier, by a run that is resumed: they count as progress but not in the rate. The unit
    "B" is shown as kB, MB, GB.
    """
    if _has_terminal():
        return _bar(description, total, unit, completed)
    return _lines(description, total, unit, completed)


def printable(text: str) -> str:
    """The text without control characters, with which data or a young model's answer could confuse a terminal."""
    return _CONTROL.sub("\ufffd", text)


def say(text: str) -> None:
    """Print a line to stdout."""
    console.print(printable(text), markup=False, soft_wrap=True)


def silence() -> None:
    """Print nothing more: another process says it."""
    console.quiet = _errors.quiet = True


def rule(title: str) -> None:
    """Print a line across stdout with a title in it: here a part of the run begins."""
    console.print()
    console.rule(Text(title, style="bold"), align="left", style="dim")


def warn(text: str) -> None:
    """Print a line of warning to stderr; above the open bar if there is one and stderr is the terminal too."""
    line = Text.assemble(("warning: ", "bold yellow"), printable(text))
    target = console if _bars is not None and _errors.is_terminal else _errors
    target.print(line, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table to stdout; columns after the first that hold only numbers are aligned to the right."""
    grid = Table(title=title, title_justify="left", title_style="bold")
    for index, name in enumerate(columns):
        numeric = bool(rows) and index > 0 and all(_is_number(row[index]) for row in rows)
        grid.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        # As Text, so that square brackets in a cell are not taken for markup.
        grid.add_row(*(Text(f"{cell:.6g}" if isinstance(cell, float) else printable(str(cell))) for cell in row))
    console.print(grid)


def _is_number(cell: object) -> bool:
    try:
        float(str(cell).strip().removesuffix("%").replace(",", ""))
    except ValueError:
        return False
    return True


def _has_terminal() -> bool:
    # rich believes FORCE_COLOR to mean a terminal; a log file full of redrawn bars is of use to nobody.
    return console.is_terminal and console.file.isatty() and not console.is_dumb_terminal


def _amount(n: float, unit: str) -> str:
    return decimal(int(n)) if unit == "B" else f"{n:,.0f}"


def _rate(per_second: float | None, unit: str) -> str:
    if not per_second:
        return ""
    if unit == "B":
        return f"{decimal(int(per_second))}/s"
    if per_second < 1.0:
        return f"{1.0 / per_second:.1f} s/{unit}"
    return f"{per_second:,.{0 if per_second >= 100 else 1}f} {unit}/s"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        done = _amount(task.completed, unit)
        whole = "" if task.total is None else f"/{_amount(task.total, unit)}"
        return Text(f"{done}{whole}" if unit == "B" else f"{done}{whole} {unit}", style="progress.download")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        # While it runs the recent speed says more; at the end the whole does.
        whole = task.completed - task.fields["earlier"]
        mean = whole / task.elapsed if task.finished and task.elapsed else None
        return Text(_rate(mean or task.speed, task.fields["unit"]), style="dim")


class _TimeLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        if task.finished or task.total is None:
            return Text(f"in {_clock(task.elapsed or 0.0)}", style="progress.elapsed")
        left = task.time_remaining
        return Text("" if left is None else f"{_clock(left)} left", style="progress.remaining")


class _BarProgress:
    def __init__(self, bars: Bars, task: TaskID):
        self._bars, self._task = bars, task
        self.done = 0

    def advance(self, n: int = 1) -> None:
        self.done += n
        self._bars.update(self._task, advance=n)

    def describe(self, text: str) -> None:
        self._bars.update(self._task, note=text)


@contextmanager
def _bar(description: str, total: int | None, unit: str, completed: int) -> Iterator[Progress]:
    global _bars
    outermost = _bars is None
    if _bars is None:
        bars = _bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28, complete_style="cyan", finished_style="green"),
            _Count(),
            _Rate(),
            _TimeLeft(),
            TextColumn("{task.fields[note]}", style="dim", markup=False, table_column=Column(no_wrap=True)),
            console=console,
            # Where stderr goes to a file it must go on doing so.
            redirect_stderr=_errors.is_terminal,
        )
        bars.start()
    else:
        bars = _bars
    task = bars.add_task(description, total=total, completed=completed, unit=unit, note="", earlier=completed)
    shown = _BarProgress(bars, task)
    try:
        yield shown
    finally:
        if total is None:
            # An unknown total is known at the end; without it the bar would pulse for ever.
            bars.update(task, total=completed + shown.done)
        bars.stop_task(task)
        if outermost:
            _bars = None
            bars.stop()
        else:
            bars.remove_task(task)


class _LineProgress:
    def __init__(self, description: str, total: int | None, unit: str, completed: int):
        self._description, self._total, self._unit = description, total, unit
        self._start = self._done = completed
        self._began = self._said = time.monotonic()
        self._note = ""
        say(f"{description}: {self._count()}")

    def advance(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._said >= SECONDS_BETWEEN_LINES and self._done != self._total:
            self._said = now
            rate = (self._done - self._start) / (now - self._began)
            left = f"{_clock((self._total - self._done) / rate)} left" if self._total and rate else ""
            share = f"{self._done / self._total:.0%}" if self._total else ""
            self._say(share, _rate(rate, self._unit), left, self._note)

    def describe(self, text: str) -> None:
        self._note = text

    def finish(self, failed: bool) -> None:
        seconds = time.monotonic() - self._began
        rate = (self._done - self._start) / seconds if seconds > 0 else None
        how = "stopped after" if failed else "done in"
        self._say(f"{how} {_clock(seconds)}", _rate(rate, self._unit), self._note)

    def _count(self) -> str:
        whole = "" if self._total is None else f"/{_amount(self._total, self._unit)}"
        return _amount(self._done, self._unit) + whole + ("" if self._unit == "B" else f" {self._unit}")

    def _say(self, *parts: str) -> None:
        say(", ".join((f"{self._description}: {self._count()}", *(part for part in parts if part))))


@contextmanager
def _lines(description: str, total: int | None, unit: str, completed: int) -> Iterator[Progress]:
    lines = _LineProgress(description, total, unit, completed)
    try:
        yield lines
    finally:
        lines.finish(failed=sys.exc_info()[0] is not None)
