"""The results of benchmarks.variants: rows, their tables, and the picture."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measure import Measurement
from benchmarks.rows import Provenance, Row, columns, summarise, write_csv
from benchmarks.variants_cases import (
    PLAIN,
    Basis,
    Cell,
    Program,
    Variant,
    shape_of,
    sparsity,
)
from benchmarks.variants_tiles import Sparsity, Visits, helpers, hopper_visits, visits
from sigjax.testing import Direction

CSV_NAME = "variants.csv"
PICTURE_NAME = "variants.png"
HOPPER_PICTURE_NAME = "variants_hopper.png"
BASES: tuple[Basis, ...] = ("tile", "time")
QUANTILES = ("median", "q20", "q80")
OWN_COLOUR, CLAIM_COLOUR = "#0072B2", "#D55E00"

# XLA's own share of a program's memory: tables of pointers, arrays rounded up to 256 bytes.
XLA_BYTES = 4096


@dataclass(frozen=True)
class VariantRow(Provenance):
    """One variant in one cell. A cell's rows were measured together, round by round.

    Times are milliseconds per call. tiles are those that all kernels of the call visit,
    programs those of the kernel that has the fewest: what fills the card. visited_tflops
    counts the matrix products over visited tiles, so that kernels of unequal tiles add up.
    ratio_tile is the plain call's time per visited tile over the variant's, ratio_time
    the plain call's time over the variant's, both within a round: above 1 is faster than
    the plain call. ratio_peer is as ratio_tile beside the call peer, see Variant; None without
    one. q20 and q80 are quantiles over the rounds. kernels were launched by a
    call, kernels_counted are those that tiles counts and those that look segments up. A
    row without a claim has no basis.
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
    kernels: int
    kernels_counted: int
    programs: int
    tiles: int
    visited_tflops_median: float
    ratio_tile_median: float
    ratio_tile_q20: float
    ratio_tile_q80: float
    ratio_time_median: float
    ratio_time_q20: float
    ratio_time_q80: float
    peer: str
    ratio_peer_median: float | None
    ratio_peer_q20: float | None
    ratio_peer_q80: float | None
    claim_basis: str
    claim_least: float | None
    sm_clock_mhz_median: float | None
    sm_clock_mhz_min: int | None
    temperature_c_max: int | None
    throttle_reasons: str

    @property
    def met(self) -> bool | None:
        """Whether the claim holds; None where there is none."""
        if self.claim_least is None:
            return None
        ratio = self.ratio_tile_median if self.claim_basis == "tile" else self.ratio_time_median
        return ratio >= self.claim_least

    @property
    def text(self) -> str:
        """The row in one line."""
        place = f"T={self.T} B={self.B} H={self.H} {self.direction} {self.contender}"
        figures = (
            f"{self.ms_median:.4g} ms, {self.tiles:,} tiles, per tile {self.ratio_tile_median:.3f}"
            f", time {self.ratio_time_median:.3f}"
        )
        if self.ratio_peer_median is not None:
            figures += f", per tile of {self.peer} {self.ratio_peer_median:.3f}"
        if self.met is None:
            return f"{place}: {figures}"
        verdict = "met" if self.met else "NOT met"
        return f"{place}: {figures}; claimed {self.claim_basis} >= {self.claim_least:g}: {verdict}"


@dataclass(frozen=True)
class MemoryRow(Provenance):
    """Device memory of one forward and backward pass, bytes.

    planned is what the compiled program says it takes, arguments, outputs and temporaries;
    peak is what the device's allocator saw in a process of its own, None where it does not
    tell. allowed is inputs, output, gradients and one float32 query gradient.
    """

    T: int
    B: int
    N: int
    H: int
    dtype: str
    implementation: str
    allowed_bytes: int
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    planned_bytes: int
    peak_bytes: int | None

    @property
    def met(self) -> bool:
        """Whether plan and peak are within what is allowed."""
        return max(self.planned_bytes, self.peak_bytes or 0) <= self.allowed_bytes + XLA_BYTES

    @property
    def text(self) -> str:
        """The row in one line."""
        peak = "unknown" if self.peak_bytes is None else f"{self.peak_bytes:,}"
        return (
            f"memory T={self.T} N={self.N} H={self.H}: allowed {self.allowed_bytes:,} bytes, "
            f"found {self.planned_bytes:,} planned, {peak} at the peak"
        )


def ratios(
    measurement: Measurement, work: dict[str, float], name: str, basis: Basis, peer: str = PLAIN
) -> tuple[float, float, float]:
    """Median, 20 and 80 % quantile over the rounds of a peer over a variant.

    Args:
        measurement: with a burst of the peer in every round.
        work: visited work of each contender, in any unit.
        name: of the variant.
        basis: "tile" divides the times by the work.
        peer: another variant.
    """
    share = work[name] / work[peer] if basis == "tile" else 1.0
    values = [share * round_[peer].ms / round_[name].ms for round_ in measurement.rounds]
    low, middle, high = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
    return middle, low, high


def cell_rows(
    cell: Cell,
    programs: Sequence[Program],
    measurement: Measurement,
    provenance: Provenance,
    capability: int,
) -> list[VariantRow]:
    """The rows of a measured cell, in the order of its programs."""
    skipped = {p.name: sparsity(p.variant, cell.workload) for p in programs}
    shapes = {p.name: shape_of(p.variant, cell.workload) for p in programs}
    counted = {
        name: hopper_visits(shapes[name], cell.direction, part)
        if cell.kernels == "hopper"
        else visits(shapes[name], cell.direction, part, capability)
        for name, part in skipped.items()
    }
    work = {name: _flops(parts, cell.workload.head_size) for name, parts in counted.items()}
    timed = summarise(cell.workload, cell.direction, measurement, provenance)
    by_name = {row.contender: row for row in timed}
    return [
        _row(
            by_name[p.name],
            counted[p.name],
            work,
            measurement,
            (p.kernels, launches(p.variant, cell.direction, counted[p.name], skipped[p.name])),
            p.variant,
        )
        for p in programs
    ]


def launches(
    variant: Variant, direction: Direction, visited: Sequence[Visits], skipped: Sparsity
) -> int:
    """Kernels that XLA runs in one call."""
    number = len(visited) + helpers(direction, skipped)
    if visited[0].kernel == "hopper_backward":
        number += 2  # before it sums of query gradients are cleared, after it rounded
    if direction == "forward" or not variant.own_bias:
        return number
    if len(visited) == 1:
        number -= 1  # the Hopper kernel has no use for the keys of its queries
    else:
        # Queries and keys have the same segments: XLA looks up once what two kernels look up
        # for tiles as large.
        query, key = visited[0].tile, visited[1].tile
        number -= query.block_q == key.block_k
    return number


def _row(
    timed: Row,
    counted: tuple[Visits, ...],
    work: dict[str, float],
    measurement: Measurement,
    kernels: tuple[int, int],
    variant: Variant,
) -> VariantRow:
    claim, peer = variant.claim, variant.peer
    own = {field.name for field in fields(VariantRow)}
    given: dict[str, Any] = {name: x for name, x in asdict(timed).items() if name in own}
    for basis in BASES:
        values = ratios(measurement, work, timed.contender, basis)
        for part, value in zip(QUANTILES, values, strict=True):
            given[f"ratio_{basis}_{part}"] = value
    beside: Sequence[float | None] = (None, None, None)
    if peer in work:
        beside = ratios(measurement, work, timed.contender, "tile", peer)
    given |= {f"ratio_peer_{part}": x for part, x in zip(QUANTILES, beside, strict=True)}
    return VariantRow(
        **given,
        kernels=kernels[0],
        kernels_counted=kernels[1],
        programs=min(part.programs for part in counted),
        tiles=sum(part.tiles for part in counted),
        visited_tflops_median=work[timed.contender] / timed.ms_median / 1e9,
        peer=peer or "",
        claim_basis="" if claim is None else claim.basis,
        claim_least=None if claim is None else claim.least,
    )


def _flops(parts: Sequence[Visits], head_size: int) -> float:
    return sum(part.flops(head_size) for part in parts)


def write_table(path: Path, rows: Sequence[VariantRow] | Sequence[MemoryRow]) -> None:
    """Writes rows of one kind and whether each met its claim, whole or not at all."""
    write_csv(path, rows, columns(type(rows[0]), "met"))


def plot(rows: Sequence[VariantRow], folder: Path, name: str = PICTURE_NAME) -> Path:
    """Ratio per visited tile by variant, a panel per direction and head size."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    part = path.with_suffix(".part.png")
    figure(rows).savefig(part, dpi=130)
    part.replace(path)
    return path


def figure(rows: Sequence[VariantRow]) -> Figure:
    """Directions down, head sizes across; bars are medians, whiskers 20 and 80 % quantiles."""
    directions = sorted({row.direction for row in rows}, reverse=True)
    head_sizes = sorted({row.H for row in rows})
    size = (1.5 + 4.5 * len(head_sizes), 1.0 + 3.2 * len(directions))
    result = Figure(figsize=size, layout="constrained")
    panels = result.subplots(len(directions), len(head_sizes), squeeze=False)
    for i, direction in enumerate(directions):
        for j, head_size in enumerate(head_sizes):
            shown = [r for r in rows if (r.direction, r.H) == (direction, head_size)]
            _bars(panels[i][j], shown)
            panels[i][j].set_title(f"{direction}, head size {head_size}", fontsize=10)
    cards = ", ".join(sorted({row.card for row in rows}))
    lengths = ", ".join(sorted({f"{row.T:,}" for row in rows}))
    title = f"T = {lengths}, {rows[0].dtype}, {cards}\nthroughput per visited tile, plain call = 1"
    result.suptitle(title, fontsize=11)
    return result


def _bars(axes: Axes, rows: Sequence[VariantRow]) -> None:
    places = range(len(rows))
    low = [row.ratio_tile_median - row.ratio_tile_q20 for row in rows]
    high = [row.ratio_tile_q80 - row.ratio_tile_median for row in rows]
    axes.barh(
        places,
        [row.ratio_tile_median for row in rows],
        color=OWN_COLOUR,
        xerr=[low, high],
        ecolor="#333333",
    )
    claims = [(p, row.claim_least) for p, row in zip(places, rows, strict=True) if row.claim_least]
    for place, least in claims:
        axes.plot([least, least], [place - 0.4, place + 0.4], color=CLAIM_COLOUR)
    axes.set_yticks(places, [row.contender for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ratio; the mark is what is claimed")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
