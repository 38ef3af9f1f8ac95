"""The picture of devices.csv: efficiency by number of devices, a panel a part."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.devices_rows import Row

# Colour-blind safe (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Writes the picture, whole or not at all."""
    part = path.with_suffix(".part.png")
    figure(rows).savefig(part, dpi=130)
    part.replace(path)


def figure(rows: Sequence[Row]) -> Figure:
    """Medians with 20 and 80 % quantiles; hollow marks on dashes are predictions."""
    parts = list(dict.fromkeys(row.part for row in rows))
    result = Figure(figsize=(1 + 4.2 * len(parts), 4.2), layout="constrained")
    panels = result.subplots(1, len(parts), squeeze=False, sharey=True)[0]
    for axes, part in zip(panels, parts, strict=True):
        _panel(axes, [row for row in rows if row.part == part])
        axes.set_title(part, fontsize=10)
    panels[0].set_ylabel("efficiency")
    result.suptitle(f"{rows[0].card}: measured, and predicted (hollow)", fontsize=11)
    return result


def _panel(axes: Axes, rows: Sequence[Row]) -> None:
    for label, colour in zip(dict.fromkeys(row.label for row in rows), COLOURS, strict=False):
        own = [row for row in rows if row.label == label]
        measured = [row for row in own if row.kind == "measured"]
        x, y = [row.devices for row in measured], [row.efficiency_median for row in measured]
        whiskers = [
            [row.efficiency_median - (row.efficiency_q20 or 0.0) for row in measured],
            [(row.efficiency_q80 or 0.0) - row.efficiency_median for row in measured],
        ]
        text = f"{label.partition(', ')[2]} ({own[0].scaling})"
        axes.errorbar(x, y, whiskers, color=colour, marker="o", capsize=3, label=text)
        predicted = measured[-1:] + [row for row in own if row.kind == "predicted"]
        if predicted[1:]:
            x = [row.devices for row in predicted]
            y = [row.efficiency_median for row in predicted]
            hollow = {"markerfacecolor": "none", "markevery": list(range(1, len(x)))}
            axes.plot(x, y, color=colour, linestyle="--", marker="o", **hollow)
    counts = sorted({row.devices for row in rows})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("devices")
    axes.axhline(1, color="#999999", linewidth=0.8)
    axes.set_ylim(0, 1.08)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=7, loc="lower left")
