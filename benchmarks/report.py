"""What a person sees: progress while it runs, a table at the end."""

import importlib.util
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.rows import Row

HEADINGS = (
    "workload",
    "T",
    "H",
    "direction",
    "contender",
    "ms",
    "TFLOPS (q20-q80)",
    "x t-sigmoid",
    "x cuDNN",
    "MHz",
    "°C",
)


class Progress:
    """A bar on a terminal that rich can draw on, a line per step anywhere.

    Args:
        total: steps of the whole run.
    """

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._start = time.monotonic()
        self._bar = _rich_bar()
        self._task = None if self._bar is None else self._bar.add_task("", total=total)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def working_on(self, what: str) -> None:
        """Names the current step on the bar."""
        if self._bar is not None:
            self._bar.update(self._task, description=what)

    def finished(self, what: str) -> None:
        """Counts a step and prints what came of it."""
        self._done += 1
        self.say(f"[{self._done}/{self._total}] {what}")
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)

    def say(self, text: str) -> None:
        """Prints a line with the seconds since the start."""
        line = f"{time.monotonic() - self._start:6.1f} s  {text}"
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.console.print(line, markup=False, highlight=False)


def _rich_bar() -> Any:
    if importlib.util.find_spec("rich") is None:
        return None
    from rich.progress import Progress as Bar

    bar = Bar(transient=True)
    return bar if bar.console.is_terminal else None


def cell_line(rows: Sequence[Row]) -> str:
    """A cell in one line: "dense T=1024 H=64 forward: sigjax 345 | jax_cudnn 383 TFLOPS"."""
    first = rows[0]
    figures = " | ".join(f"{row.contender} {row.tflops_median:.4g}" for row in rows)
    thrown = f", {first.rounds_thrown_away} rounds thrown away" if first.rounds_thrown_away else ""
    return (
        f"{first.workload} T={first.T} H={first.H} {first.direction}: {figures} TFLOPS"
        f" ({first.rounds} rounds{thrown})"
    )


def table(rows: Sequence[Row]) -> str:
    """All rows as plain text in columns, which fits a log as well as a terminal."""
    lines = [HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    texts = (
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return "\n".join(texts)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.workload,
        str(row.T),
        str(row.H),
        row.direction,
        row.contender,
        f"{row.ms_median:.4g}",
        f"{row.tflops_median:.4g} ({row.tflops_q20:.4g}-{row.tflops_q80:.4g})",
        _optional(row.ratio_vs_triton_sigmoid_median, ".3f"),
        _optional(row.ratio_vs_cudnn_median, ".3f"),
        _optional(row.sm_clock_mhz_min, ".0f"),
        _optional(row.temperature_c_max, ".0f"),
    )


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
