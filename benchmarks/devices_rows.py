"""The rows of devices.csv: from the bursts of a cell to numbers with their origin."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

from benchmarks.devices_cells import FLOPS_PER_PAIR, Cell, Work
from benchmarks.devices_model import (
    efficiencies,
    predict,
    predict_data_parallel,
    ring_bytes,
    scaled_step_ms,
)
from benchmarks.measure import Measurement
from benchmarks.rows import Provenance, clocks, milliseconds, spread

CSV_NAME = "devices.csv"
PREDICTED = (4, 8)
BF16_BYTES, SUM_BYTES = 2, 4
# Errors over the largest value: a few roundings of bfloat16 (2^-9 each) are less.
LARGEST_ERROR = 2.0**-6


@dataclass(frozen=True)
class Row(Provenance):
    """One number of devices in one cell.

    Times are milliseconds per call. efficiency is t(1) / t(n) where scaling is weak and
    t(1) / (n · t(n)) where it is strong, within a round. q20 and q80 are quantiles over the
    rounds. communication is the ring's sends alone, its share theirs in the call's time. Counts
    are of collectives in the compiled program. Errors are against one device, over the largest
    value. None, an empty field, is what does not apply, and all that a prediction has not.
    """

    kind: Literal["measured", "predicted"]
    part: str
    case: str
    direction: str
    scaling: str
    T: int
    B: int
    N: int
    H: int
    dtype: str
    devices: int
    ms_median: float
    efficiency_median: float
    ms_q20: float | None = None
    ms_q80: float | None = None
    efficiency_q20: float | None = None
    efficiency_q80: float | None = None
    tflops_per_device_median: float | None = None
    communication_ms_median: float | None = None
    communication_share_median: float | None = None
    communication_share_q20: float | None = None
    communication_share_q80: float | None = None
    sent_mb_per_device: float | None = None
    bandwidth_gb_s: float | None = None
    all_gather: int | None = None
    all_reduce: int | None = None
    all_to_all: int | None = None
    collective_permute: int | None = None
    other_collectives: int | None = None
    bitwise_equal: bool | None = None
    output_error: float | None = None
    gradient_error: float | None = None
    rounds: int | None = None
    rounds_thrown_away: int | None = None
    calls_per_burst: int | None = None
    sm_clock_mhz_median: float | None = None
    sm_clock_mhz_min: int | None = None
    temperature_c_max: int | None = None
    throttle_reasons: str | None = None

    @property
    def label(self) -> str:
        """What was measured, on however many devices."""
        return f"{self.part}, {self.case}, {self.direction}, T={self.T:,}"


def contender_name(devices: int) -> str:
    """What a work is called within its cell."""
    return f"{devices} devices"


def sends_name(devices: int) -> str:
    """What a ring's sends alone are called."""
    return f"sends of {devices} devices"


def summarise(cell: Cell, measurement: Measurement, origin: Provenance) -> list[Row]:
    """The measured rows of a cell, in the order of its works.

    Raises:
        ValueError: no round counts.
    """
    ms = milliseconds(measurement)
    one = ms[contender_name(1)]
    rows = []
    for work in cell.works:
        name = contender_name(work.devices)
        efficiency = efficiencies(one, ms[name], work.devices, cell.scaling)
        rows.append(
            Row(
                **asdict(origin),
                kind="measured",
                **_shape(cell, work.devices, work.batch),
                **spread("ms", ms[name]),
                **spread("efficiency", efficiency),
                tflops_per_device_median=_tflops(cell, work, float(np.median(ms[name]))),
                **_communication(work, ms),
                **_counts(work.collectives),
                **_equality(work),
                rounds=len(measurement.rounds),
                rounds_thrown_away=measurement.thrown_away,
                calls_per_burst=measurement.calls[name],
                **clocks(measurement, name),
            )
        )
    return rows


def predictions(rows: Sequence[Row]) -> list[Row]:
    """Rows of kind "predicted" for PREDICTED devices beyond the most that a cell has.

    From the row of most devices, at least two. A ring goes by predict, training by
    predict_data_parallel. Attention by itself sends nothing: nothing is predicted.
    """
    one, last = rows[0], rows[-1]
    if last.devices == 1 or last.part == "op":
        return []
    result = []
    for devices in (n for n in PREDICTED if n > last.devices):
        if last.part == "train":
            efficiency = predict_data_parallel(
                devices,
                one_device_ms=one.ms_median,
                measured=last.devices,
                measured_ms=last.ms_median,
            )
            ms, batch = one.ms_median / efficiency, one.B * devices
        else:
            efficiency = _predicted_ring(one, last, devices)
            ms, batch = one.ms_median / (devices * efficiency), one.B
        kept = {f.name: getattr(last, f.name) for f in fields(Provenance)}
        kept |= {x: getattr(last, x) for x in ("part", "case", "direction", "scaling", "dtype")}
        kept |= {"T": last.T, "N": last.N, "H": last.H, "B": batch, "devices": devices}
        result.append(Row(**kept, kind="predicted", ms_median=ms, efficiency_median=efficiency))
    return result


def problems(row: Row) -> list[str]:
    """What a measured row breaks of what is promised."""
    where = f"{row.label}, {row.devices} devices"
    counts = {name: getattr(row, name) for name in _counts({})}
    found = []
    if row.part == "op" and row.direction == "forward" and any(counts.values()):
        found.append(f"{where}: the forward pass has collectives: {counts}")
    elif row.all_gather:
        found.append(f"{where}: {row.all_gather} all-gathers")
    for name in ("output_error", "gradient_error"):
        error = getattr(row, name)
        # Not ">": NaN is a problem too.
        if error is not None and not error <= LARGEST_ERROR:
            found.append(f"{where}: {name} {error:.3g} is above {LARGEST_ERROR:.3g}")
    return found


def _predicted_ring(one: Row, last: Row, devices: int) -> float:
    if last.bandwidth_gb_s is None:
        msg = f"a ring's row must have a bandwidth, got none in {last.label}"
        raise ValueError(msg)
    elements = last.B * last.T // devices * last.N * last.H
    return predict(
        devices,
        one_device_ms=one.ms_median,
        step_ms=scaled_step_ms(last.ms_median, last.devices, devices),
        step_bytes=ring_bytes(elements, BF16_BYTES, SUM_BYTES, devices) / devices,
        gb_s=last.bandwidth_gb_s,
    )


def _shape(cell: Cell, devices: int, batch: int) -> dict[str, Any]:
    return {
        "part": cell.part,
        "case": cell.case,
        "direction": cell.direction,
        "scaling": cell.scaling,
        "T": cell.length,
        "B": batch,
        "N": cell.heads,
        "H": cell.head_size,
        "dtype": cell.dtype,
        "devices": devices,
    }


def _tflops(cell: Cell, work: Work, ms: float) -> float | None:
    """Useful TFLOPS of each device; None for a training step, which is more than attention."""
    if cell.direction not in FLOPS_PER_PAIR:
        return None
    pairs = work.batch * cell.heads * cell.length**2
    flop = FLOPS_PER_PAIR[cell.direction] * cell.head_size * pairs
    return flop / work.devices / ms / 1e9


def _communication(work: Work, ms: Mapping[str, np.ndarray]) -> dict[str, Any]:
    if work.sends is None:
        return {}
    sends = ms[sends_name(work.devices)]
    median = float(np.median(sends))
    return {
        "communication_ms_median": median,
        **spread("communication_share", sends / ms[contender_name(work.devices)]),
        "sent_mb_per_device": work.sends.bytes / 1e6,
        "bandwidth_gb_s": work.sends.bytes / median / 1e6,
    }


def _counts(collectives: Mapping[str, int]) -> dict[str, Any]:
    named = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    other = sum(count for name, count in collectives.items() if name not in named)
    counts = {name.replace("-", "_"): collectives.get(name, 0) for name in named}
    return {**counts, "other_collectives": other}


def _equality(work: Work) -> dict[str, Any]:
    if work.equality is None:
        return {}
    found = work.equality
    return {
        "bitwise_equal": found.bitwise,
        "output_error": found.output,
        "gradient_error": found.gradients,
    }
