"""Pictures of a result folder.

    python -m benchmarks.plot benchmarks/results/CARD

draws them anew from its attention.csv. Further folders are merged into that file
first, cell by cell, the last one counts:

    python -m benchmarks.plot benchmarks/results/CARD FIRST_RUN SECOND_RUN
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.rows import CSV_NAME, Row, merge, read_csv, write_csv

# Colour-blind safe (Okabe and Ito), ours first.
STYLES = {
    "sigjax": ("sigjax, exact sigmoid", "#0072B2"),
    "sigjax_fast": ("sigjax, tanh", "#CC79A7"),
    "sigjax_xla": ("sigjax, xla", "#56B4E9"),
    "triton_sigmoid": ("triton-sigmoid, tanh", "#D55E00"),
    "jax_cudnn": ("jax.nn softmax, cuDNN", "#009E73"),
    "jax_xla": ("jax.nn softmax, xla", "#999999"),
}


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """One picture per workload: TFLOPS by T, a panel per direction and head size.

    Bars are medians, whiskers the 20 and 80 % quantiles over the rounds.

    Returns:
        The files written, attention_<workload>.png.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for workload in dict.fromkeys(row.workload for row in rows):
        path = folder / f"attention_{workload}.png"
        part = path.with_suffix(".part.png")
        figure([row for row in rows if row.workload == workload]).savefig(part, dpi=130)
        part.replace(path)
        paths.append(path)
    return paths


def figure(rows: Sequence[Row]) -> Figure:
    """The panels of one workload: directions down, head sizes across."""
    directions = sorted({row.direction for row in rows}, reverse=True)
    head_sizes = sorted({row.H for row in rows})
    contenders = [name for name in STYLES if any(row.contender == name for row in rows)]
    size = (1.5 + 4.5 * len(head_sizes), 1.2 + 3.0 * len(directions))
    result = Figure(figsize=size, layout="constrained")
    panels = result.subplots(len(directions), len(head_sizes), squeeze=False)
    for i, direction in enumerate(directions):
        for j, head_size in enumerate(head_sizes):
            panel = [row for row in rows if row.direction == direction and head_size == row.H]
            _bars(panels[i][j], panel, contenders)
            panels[i][j].set_title(f"{direction}, head size {head_size}", fontsize=10)
    handles = [Patch(color=STYLES[name][1]) for name in contenders]
    labels = [STYLES[name][0] for name in contenders]
    result.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3))
    cards = ", ".join(sorted({row.card for row in rows}))
    dtypes = ", ".join(sorted({row.dtype for row in rows}))
    result.suptitle(f"{rows[0].workload}, {dtypes}, {cards}: useful TFLOPS", fontsize=11)
    return result


def _bars(axes: Axes, rows: Sequence[Row], contenders: Sequence[str]) -> None:
    lengths = sorted({row.T for row in rows})
    width = 0.8 / max(len(contenders), 1)
    for place, name in enumerate(contenders):
        own = [row for row in rows if row.contender == name]
        x = [lengths.index(row.T) - 0.4 + width * (place + 0.5) for row in own]
        height = [row.tflops_median for row in own]
        whiskers = [
            [row.tflops_median - row.tflops_q20 for row in own],
            [row.tflops_q80 - row.tflops_median for row in own],
        ]
        axes.bar(x, height, width, color=STYLES[name][1], yerr=whiskers, ecolor="#333333")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_xlabel("T, tokens")
    axes.set_ylabel("TFLOPS")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def main(argv: Sequence[str] | None = None) -> int:
    """Merges result folders into the first one and draws its pictures."""
    parser = argparse.ArgumentParser(description="Draws the pictures of a result folder.")
    parser.add_argument("folder", type=Path, help="results to draw, and to merge others into")
    parser.add_argument("others", type=Path, nargs="*", help="folders of further runs")
    given = parser.parse_args(argv)
    rows = read_csv(given.folder / CSV_NAME)
    for other in given.others:
        further = read_csv(other / CSV_NAME)
        if not further:
            parser.error(f"{other} must hold {CSV_NAME} with rows")
        rows = merge(rows, further)
    if not rows:
        parser.error(f"{given.folder} must hold {CSV_NAME} with rows")
    if given.others:
        write_csv(given.folder / CSV_NAME, rows)
    for path in plot(rows, given.folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
