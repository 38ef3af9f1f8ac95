"""One run of benchmarks.devices: build, check and measure cell by cell."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from benchmarks import provenance
from benchmarks.clocks import NoProbe
from benchmarks.devices_cells import Build, Cell, Context, Op
from benchmarks.devices_options import Options, UsageError
from benchmarks.devices_plot import plot
from benchmarks.devices_probe import Cards, nvml_cards
from benchmarks.devices_rows import (
    CSV_NAME,
    Row,
    contender_name,
    predictions,
    problems,
    sends_name,
    summarise,
)
from benchmarks.devices_sizes import FULL, SMALL, Sizes
from benchmarks.devices_training import Training
from benchmarks.measure import interleave
from benchmarks.rows import Provenance, columns, write_csv

PARTS: dict[str, Callable[[Sizes, tuple[int, ...]], Any]] = {
    "op": Op,
    "train": Training,
    "context": Context,
}


@dataclass(frozen=True)
class Timed:
    """A call that can be timed; the first devices are all that it uses."""

    name: str
    devices: int
    call: Callable[[], Any]
    cards: Cards

    def burst(self, calls: int) -> float:
        """Enqueues calls back to back after one that is not timed; milliseconds per call."""
        self.cards.use(self.devices)
        # Only a GPU is certain to finish calls in their order: elsewhere wait for each.
        in_order = jax.default_backend() == "gpu"
        result = jax.block_until_ready(self.call())
        start = time.perf_counter()
        for _ in range(calls):
            result = self.call() if in_order else jax.block_until_ready(self.call())
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls * 1e3


class Log:
    """Lines with the seconds since the start."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        """Prints a line at once."""
        print(f"[{self.seconds:6.1f} s] {text}", flush=True)


def run(options: Options, argv: Sequence[str]) -> int:
    """Measures what was asked for and writes it, cell by cell.

    Raises:
        UsageError: there are no GPUs, too few devices, or a number that does not divide the work.
    """
    log, sizes = Log(), SMALL if options.small else FULL
    if not options.small and jax.default_backend() != "gpu":
        msg = f"jax must see NVIDIA GPUs, got {jax.default_backend()}; or use --small"
        raise UsageError(msg)
    counts = choose_counts(options.devices, jax.device_count(), sizes)
    cards = Cards([NoProbe()]) if options.small else nvml_cards(max(counts))
    origin = _origin(cards, options, argv)
    options.out.mkdir(parents=True, exist_ok=True)
    measured: list[Row] = []
    rows: list[Row] = []
    unmeasured: list[str] = []
    longest = 0.0
    for label, build in _builds(options.parts, sizes, counts):
        began = log.seconds
        if options.time_budget_s is not None and began + longest > options.time_budget_s:
            unmeasured.append(f"{label}: no time left")
            continue
        cell = build()
        found = _measure(cell, sizes, cards, origin)
        if not found:
            unmeasured.append(f"{label}: the cards stayed too hot")
            continue
        expected = predictions(found)
        measured += found
        rows += [*found, *expected]
        write_csv(options.out / CSV_NAME, rows, columns(Row))
        longest = max(longest, log.seconds - began)
        log.say(line([*found, *expected]))
    if rows:
        plot(rows, options.out / "devices.png")
        log.say("written: devices.csv, devices.png")
    for text in unmeasured:
        log.say(f"not measured: {text}")
    broken = [text for row in measured for text in problems(row)]
    for text in broken:
        log.say(f"BROKEN: {text}")
    return 1 if broken or not rows else 0


def choose_counts(asked: tuple[int, ...] | None, there: int, sizes: Sizes) -> tuple[int, ...]:
    """The numbers of devices to measure.

    Args:
        asked: by the user; None is every power of two that divides the work.
        there: devices that jax sees.
        sizes: of the work.

    Raises:
        UsageError: more devices than there are, or heads or lengths that do not divide by them.
    """
    wholes = [sizes.heads, *(length for length, _ in sizes.contexts)]
    if asked is None:
        powers = (1 << i for i in range(there.bit_length()))
        return tuple(n for n in powers if n <= there and not any(x % n for x in wholes))
    for count in asked:
        if count > there:
            msg = f"--devices must be at most the {there} that jax sees, got {count}"
            raise UsageError(msg)
        if any(x % count for x in wholes):
            msg = f"--devices must divide heads and lengths, {wholes}, got {count}"
            raise UsageError(msg)
    return asked


def line(rows: Sequence[Row]) -> str:
    """One cell on one line."""
    texts = []
    for row in rows:
        text = f"{row.devices}: {row.ms_median:.3g} ms"
        if row.devices > 1:
            text += f", efficiency {row.efficiency_median:.3f}"
        if row.kind == "predicted":
            text += " (predicted)"
        if row.bitwise_equal is not None:
            errors = [x for x in (row.output_error, row.gradient_error) if x is not None]
            text += ", same bits" if row.bitwise_equal else f", error {np.max(errors):.2g}"
        if row.communication_share_median is not None:
            text += f", sends {row.communication_share_median:.1%}"
        texts.append(text)
    return f"{rows[0].label}: {'; '.join(texts)}"


def _origin(cards: Cards, options: Options, argv: Sequence[str]) -> Provenance:
    origin = provenance.collect(
        card=cards.card,
        driver=cards.driver,
        worker_versions={},
        argv=argv,
        commit=options.commit,
        module="benchmarks.devices",
    )
    # A folder is no part of a command that another can run, but one has to be named.
    return replace(origin, command=f"{origin.command} --out FOLDER")


def _builds(
    parts: Sequence[str], sizes: Sizes, counts: tuple[int, ...]
) -> Iterator[tuple[str, Build]]:
    # A part's arrays are let go of before the next one's are made.
    for part in parts:
        yield from PARTS[part](sizes, counts).cells()


def _measure(cell: Cell, sizes: Sizes, cards: Cards, origin: Provenance) -> list[Row]:
    contenders = [
        Timed(contender_name(work.devices), work.devices, work.call, cards) for work in cell.works
    ]
    contenders += [
        Timed(sends_name(work.devices), work.devices, work.sends.call, cards)
        for work in cell.works
        if work.sends is not None
    ]
    measurement = interleave(contenders, sizes.plan, cards)
    return summarise(cell, measurement, origin) if measurement.rounds else []
