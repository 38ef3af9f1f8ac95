"""Live progress of a training run in the terminal."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from sigjax.models.train import StepRecord


class Live:
    """Shows steps, loss, learning rate, cells a second and the time left.

    Args:
        progress: rich's, running.
        task: the bar.
    """

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def stepped(self, record: StepRecord) -> None:
        """Moves the bar."""
        self._progress.update(
            self._task,
            completed=record.step,
            loss=f"{record.loss:.4f}",
            rate=f"{record.learning_rate:.1e}",
            speed=f"{record.cells / max(record.seconds, 1e-9):,.0f}",
        )

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def live(first: int, steps: int) -> Iterator[Live]:
    """A bar from step first to steps, until the body ends.

    Where output goes to a file there is no bar, only the lines.
    """
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn(
            "loss {task.fields[loss]}  lr {task.fields[rate]}  {task.fields[speed]} cells/s"
        ),
        TimeRemainingColumn(),
    )
    console = Console()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=steps, completed=first, loss="-", rate="-", speed="-")
        yield Live(progress, task)
