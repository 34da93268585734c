"""Progress displays: a bar on a terminal, occasional plain lines elsewhere, both with the time left."""

from __future__ import annotations

import datetime
import html
import importlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, Literal, TextIO, TypeVar, cast

from rich.console import Console, RenderableType
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from villa.streams import Shown, drawable, visible

T = TypeVar("T")

Mode = Literal["auto", "on", "off"]

#: Seconds over which the speed is averaged for the time left.
_SPEED_WINDOW = 300.0
#: Least seconds between updates of a bar: an update takes as long as a small item.
_REDRAWN = 0.05
#: The same in a notebook, to which every update is sent.
_REDRAWN_IN_NOTEBOOK = 0.3


class Display:
    """Tasks under way, shown together on standard error.

    Args:
        mode: ``on`` draws bars, ``off`` shows nothing, ``auto`` draws bars on a terminal or in a notebook and elsewhere
            prints plain lines.
        interval: seconds between plain lines.
        console: where to write; standard error by default.
    """

    def __init__(self, mode: Mode = "auto", *, interval: float = 30.0, console: Console | None = None) -> None:
        self.console = console or Console(file=drawable(sys.stderr), force_terminal=True if mode == "on" else None)
        self._shown = mode != "off"
        self._notebook = _NotebookBars() if self._shown and self.console.is_jupyter else None
        self._lines = self._notebook is None and mode == "auto" and not self.console.is_terminal
        self._interval = interval
        self._printed = time.monotonic()
        self._bars = _Bars(self.console, disable=not self._shown or self._lines or self._notebook is not None)

    def track(
        self, iterable: Iterable[T], description: str, total: int | None = None, size: Callable[[T], int] = lambda _: 1
    ) -> Iterator[T]:
        """Yield the items while showing how far they have come.

        Args:
            iterable: the items.
            description: a word or two for what is being done.
            total: number of items; by default the iterable's length, if it has one.
            size: number of items that one of the iterable counts as.
        """
        outermost = not self._bars.tasks
        if total is None and isinstance(iterable, Sized):
            total = len(iterable)
        task = self.add(description, total)
        done, shown, due = 0, 0, time.monotonic()
        try:
            for item in iterable:
                yield item
                done += size(item)
                if (now := time.monotonic()) >= due:
                    self.show(task, done)
                    shown, due = done, now + min(_REDRAWN, self._interval)
            if shown < done:
                self.show(task, done)
        finally:
            if self._notebook is not None:
                self._notebook.remove(task)
            self._bars.remove_task(task)
            if outermost:
                self.stop()

    def add(self, description: str, total: int | None, done: int = 0) -> TaskID:
        """Start showing a task of ``total`` steps, ``done`` of them completed; return its handle."""
        self._bars.start()
        return self._bars.add_task(visible(description), total=total, completed=done, status="")

    def show(self, task: TaskID, done: int, status: str = "") -> None:
        """Show that ``done`` steps of a task are completed, with a line of status; plain lines keep their interval.

        A task without a status (a short evaluation, say) gets no plain line just for being done.
        """
        self._bars.update(task, completed=done, status=visible(status))
        if self._notebook is not None:
            self._notebook.show(self._task(task))
        if self._lines and (self._due() or (status and done == self._task(task).total)):
            self.say(_plain(self._task(task)))

    def say(self, text: str) -> None:
        """Print a line, above any bars."""
        if self._shown:
            self._printed = time.monotonic()
            self.console.print(visible(text), markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Freeze the bars and give the terminal back. More tasks may follow."""
        self._bars.stop()

    def _due(self) -> bool:
        return time.monotonic() - self._printed >= self._interval

    def _task(self, task: TaskID) -> Task:
        return next(t for t in self._bars.tasks if t.id == task)


class TrainingProgress(Display):
    """The display of a training run: update, time left, loss, best monitored value, speed, wait for data, cost.

    Args:
        total: updates of the whole run.
        mode: as for ``Display``; ranks above 0 use ``off``.
        monitor: name of the value that chooses the best checkpoint.
        cost: passes of the method relative to standard training (1.0), shown as ``4.0x``.
        interval: as for ``Display``.
        console: as for ``Display``.
    """

    def __init__(
        self,
        total: int,
        mode: Mode = "auto",
        *,
        monitor: str = "accuracy",
        cost: float = 1.0,
        interval: float = 30.0,
        console: Console | None = None,
    ) -> None:
        super().__init__(mode, interval=interval, console=console)
        self._total, self._monitor, self._cost = total, monitor, cost
        self._training: TaskID | None = None

    def start(self, update: int = 0) -> None:
        """Start the display at ``update`` completed updates."""
        self._training = self.add("train", self._total, update)

    def advance(self, update: int, values: Mapping[str, float], best: float | None = None) -> None:
        """Show progress after ``start``.

        Args:
            update: updates completed.
            values: ``loss``, ``examples_per_second`` and ``data_wait`` (share in [0, 1]) are shown where given.
            best: best monitored value so far.
        """
        if self._training is None:
            raise RuntimeError("advance() before start()")
        shown = {"loss": values.get("loss"), f"best {self._monitor}": best}
        parts = [named_value(name, value) for name, value in shown.items() if value is not None]
        if "examples_per_second" in values:
            parts.append(f"{values['examples_per_second']:,.1f} examples/s")
        if "data_wait" in values:
            parts.append(f"{100 * values['data_wait']:.0f} % data wait")
        self.show(self._training, update, ", ".join([*parts, f"{self._cost:.1f}x cost"]))

    def evaluated(self, update: int, split: str, values: Mapping[str, float]) -> None:
        """Print the values of an evaluation after ``update`` updates."""
        self.say(f"{split} at update {update}: " + ", ".join(named_value(k, v) for k, v in values.items()))


class _NotebookBars:
    """Bars in the output of a notebook's cell, one for each task, replaced in place."""

    def __init__(self) -> None:
        self._handles: dict[TaskID, Any] = {}
        self._drawn = 0.0

    def show(self, task: Task) -> None:
        """Draw a task's bar, but not too often."""
        now = time.monotonic()
        if task.id in self._handles and task.completed != task.total and now - self._drawn < _REDRAWN_IN_NOTEBOOK:
            return
        self._drawn = now
        total = "" if task.total is None else f' max="{task.total:.0f}"'
        content = {
            "text/html": f'<progress value="{task.completed:.0f}"{total}></progress> {html.escape(_plain(task))}',
            "text/plain": _plain(task),
        }
        if task.id in self._handles:
            self._handles[task.id].update(content, raw=True)
        else:
            display: Any = importlib.import_module("IPython.display").display
            self._handles[task.id] = display(content, raw=True, display_id=True)

    def remove(self, task: TaskID) -> None:
        """Leave no trace of a task that is over."""
        if task in self._handles:
            self._handles.pop(task).update({"text/plain": ""}, raw=True)


class _Bars(Progress):
    """Bars with a line of values below each; when disabled, they still track the speed for the time left."""

    def __init__(self, console: Console, *, disable: bool) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        super().__init__(
            *columns,
            console=console,
            disable=disable,
            speed_estimate_period=_SPEED_WINDOW,
            redirect_stdout=sys.stdout.isatty(),  # output piped to a file must not land on the terminal
        )

    def start(self) -> None:
        super().start()
        if isinstance(sys.stdout, FileProxy):  # the console prints everything else above the bars
            sys.stdout = cast(TextIO, Shown(cast(TextIO, sys.stdout)))
        if isinstance(sys.stderr, FileProxy):
            sys.stderr = cast(TextIO, Shown(cast(TextIO, sys.stderr)))

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if task.fields["status"]:
                yield Text(task.fields["status"], style="dim")


def track(
    iterable: Iterable[T],
    description: str,
    total: int | None = None,
    *,
    mode: Mode = "auto",
    size: Callable[[T], int] = lambda _: 1,
) -> Iterator[T]:
    """Yield the items of a long operation with a display of its own; see ``Display.track``."""
    return Display(mode).track(iterable, description, total, size)


def named_value(name: str, value: float) -> str:
    """Return ``loss 0.1234`` or ``accuracy 81.2 %``; every value but a loss is a share in [0, 1]."""
    return f"{name} {value:.4f}" if "loss" in name else f"{name} {100 * value:.1f} %"


def _plain(task: Task) -> str:
    """Return ``train 10/100, 0:01:30 left, loss 0.1234, ...``."""
    count = f"{task.description} {task.completed:.0f}" + (f"/{task.total:.0f}" if task.total is not None else "")
    left = task.time_remaining
    parts = [count, f"{datetime.timedelta(seconds=round(left))} left" if left else "", task.fields["status"]]
    return ", ".join(part for part in parts if part)
