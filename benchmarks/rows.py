"""The result format: one row per cell and contender, its CSV columns fixed by `Row`."""

import csv
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Measurement
from sigjax.testing import Direction, Workload

TRITON_SIGMOID = "triton_sigmoid"
CUDNN = "jax_cudnn"
CSV_NAME = "attention.csv"


@dataclass(frozen=True)
class Provenance:
    """Where numbers come from; versions are "" where a package took no part."""

    date: str
    card: str
    driver: str
    jax: str
    jaxlib: str
    triton: str
    jax_triton: str
    cudnn: str
    torch: str
    worker_triton: str
    triton_sigmoid: str
    sigjax: str
    commit: str
    command: str


@dataclass(frozen=True)
class Row(Provenance):
    """One contender in one cell. A cell's rows were measured together, round by round.

    Times are milliseconds per call, throughput is useful TFLOPS (padding does not
    count), ratios are baseline time over own time within a round: above 1 is
    faster than the baseline. q20 and q80 are quantiles over the rounds. None, an
    empty field in the CSV, is a baseline that did not run or a card without NVML.
    """

    workload: str
    T: int
    B: int
    N: int
    H: int
    dtype: str
    direction: str
    contender: str
    rounds: int
    rounds_thrown_away: int
    calls_per_burst: int
    ms_median: float
    ms_q20: float
    ms_q80: float
    tflops_median: float
    tflops_q20: float
    tflops_q80: float
    ratio_vs_triton_sigmoid_median: float | None
    ratio_vs_triton_sigmoid_q20: float | None
    ratio_vs_triton_sigmoid_q80: float | None
    ratio_vs_cudnn_median: float | None
    ratio_vs_cudnn_q20: float | None
    ratio_vs_cudnn_q80: float | None
    sm_clock_mhz_median: float | None
    sm_clock_mhz_min: int | None
    temperature_c_max: int | None
    throttle_reasons: str

    @property
    def cell(self) -> tuple[str, int, int, int, int, str, str]:
        """What was measured, whoever ran it."""
        return (self.workload, self.T, self.B, self.N, self.H, self.dtype, self.direction)


def summarise(
    workload: Workload,
    direction: Direction,
    measurement: Measurement,
    provenance: Provenance,
) -> list[Row]:
    """The rows of a cell, in the order of the measurement's contenders.

    Raises:
        ValueError: no round counts.
    """
    ms = milliseconds(measurement)
    tflop = workload.flops(direction) / 1e12
    cell = {
        "workload": workload.name,
        "T": workload.length,
        "B": workload.batch,
        "N": workload.heads,
        "H": workload.head_size,
        "dtype": workload.dtype,
        "direction": direction,
    }
    return [
        Row(
            **asdict(provenance),
            **cell,
            contender=name,
            rounds=len(measurement.rounds),
            rounds_thrown_away=measurement.thrown_away,
            calls_per_burst=calls,
            **spread("ms", ms[name]),
            **spread("tflops", tflop / (ms[name] / 1e3)),
            **_ratio("ratio_vs_triton_sigmoid", ms.get(TRITON_SIGMOID), ms[name]),
            **_ratio("ratio_vs_cudnn", ms.get(CUDNN), ms[name]),
            **clocks(measurement, name),
        )
        for name, calls in measurement.calls.items()
    ]


def milliseconds(measurement: Measurement) -> dict[str, np.ndarray]:
    """Per call, [rounds], by contender.

    Raises:
        ValueError: no round counts.
    """
    if not measurement.rounds:
        msg = f"measurement must hold a round, got none: {measurement.thrown_away} thrown away"
        raise ValueError(msg)
    return {
        name: np.array([round_[name].ms for round_ in measurement.rounds])
        for name in measurement.calls
    }


def spread(prefix: str, values: np.ndarray) -> dict[str, Any]:
    """Median and 20 and 80 % quantiles, as columns."""
    low, middle, high = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
    return {f"{prefix}_median": middle, f"{prefix}_q20": low, f"{prefix}_q80": high}


def _ratio(prefix: str, baseline: np.ndarray | None, own: np.ndarray) -> dict[str, Any]:
    if baseline is None:
        return {f"{prefix}_{part}": None for part in ("median", "q20", "q80")}
    return spread(prefix, baseline / own)


def clocks(measurement: Measurement, name: str) -> dict[str, Any]:
    """What the card did during a contender's bursts, as columns."""
    states = [round_[name].state for round_ in measurement.rounds]
    clocks = [s.sm_clock_mhz for s in states if s.sm_clock_mhz is not None]
    temperatures = [s.temperature_c for s in states if s.temperature_c is not None]
    reasons = int(np.bitwise_or.reduce([s.reasons for s in states]))
    return {
        "sm_clock_mhz_median": float(np.median(clocks)) if clocks else None,
        "sm_clock_mhz_min": min(clocks, default=None),
        "temperature_c_max": max(temperatures, default=None),
        "throttle_reasons": f"{reasons:#x}",
    }


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Old rows with every cell of new replaced as a whole, sorted by cell.

    A cell's rows are never mixed from two runs: they would come from two cards
    or two clocks.
    """
    replaced = {row.cell for row in new}
    rows = [row for row in old if row.cell not in replaced] + list(new)
    return sorted(rows, key=lambda row: row.cell)


def write_csv(path: Path, rows: Sequence[Provenance], names: Sequence[str] | None = None) -> None:
    """Writes rows to a CSV that is whole or not there, whenever the process ends.

    names are its columns, those of Row where none are given.
    """
    names = columns() if names is None else names
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(names)
            writer.writerows([_text(getattr(row, name)) for name in names] for row in rows)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_csv(path: Path) -> list[Row]:
    """The rows of a CSV that write_csv wrote; none where there is no file.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if list(reader.fieldnames or ()) != columns():
            msg = (
                f"{path.name} must have the columns of benchmarks.rows.Row, got {reader.fieldnames}"
            )
            raise ValueError(msg)
        return [
            Row(**{f.name: _value(f.type, line[f.name]) for f in fields(Row)}) for line in reader
        ]


def columns(kind: type[Provenance] | None = None, *more: str) -> list[str]:
    """Column names: what was measured first, more, and where it came from last."""
    origin = [field.name for field in fields(Provenance) if field.name != "date"]
    own = [field.name for field in fields(kind or Row) if field.name not in {*origin, "date"}]
    return ["date", *own, *more, *origin]


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(kind: object, text: str) -> Any:
    if text == "" and kind is not str:
        return None
    if kind is int or kind == int | None:
        return int(text)
    return text if kind is str else float(text)
