"""The pictures: the loss curve, cells on a plane by cell type, and what is in files."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sigjax.models.history import History
from sigjax.models.inspection import MOST_TYPES, Report, all_types
from sigjax.models.outputs import written
from sigjax.models.quiet import quiet


def draw_loss(path: Path, history: History, baseline: float) -> None:
    """Writes the loss of every step, the held-out loss and the baseline.

    Args:
        path: a .png, .svg or .pdf file.
        history: of the run.
        baseline: loss of the per-gene mean on the held-out cells.
    """
    arrays = history.arrays
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(arrays["step"], arrays["loss"], color="0.75", linewidth=0.8, label="training batch")
    axes.plot(
        arrays["evaluated"], arrays["held_out_loss"], color="C0", marker=".", label="held-out cells"
    )
    axes.axhline(baseline, color="C3", linestyle="--", label="per-gene mean, held-out cells")
    axes.set(xlabel="step", ylabel="mean squared error of log1p values", yscale="log")
    axes.legend(frameon=False)
    _save(path, figure)


def draw_cells(path: Path, panels: dict[str, np.ndarray], labels: np.ndarray) -> None:
    """Writes one scatter plot a panel, coloured by label.

    Args:
        path: a .png, .svg or .pdf file.
        panels: title to coordinates, float [C, 2].
        labels: [C], one a cell.
    """
    figure = Figure(figsize=(5.5 * len(panels) + 2.5, 5), layout="constrained")
    names = labels.astype(str)
    for i, (title, points) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1, title=title)
        _scatter(axes, points, names)
    handles, texts = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside right center", frameon=False, markerscale=2)
    _save(path, figure)


def draw_report(path: Path, report: Report) -> None:
    """Writes lengths of cells with the lengths they are padded to, padding, and cell types.

    Args:
        path: a .png, .svg or .pdf file.
        report: of the files.
    """
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    lengths, padding, types = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    _draw_lengths(lengths, report)
    names = [choice.name.replace(", ", ",\n") for choice in report.padding]
    bars = padding.bar(names, [100 * choice.share for choice in report.padding], color="C0")
    padding.bar_label(bars, fmt="%.1f %%")
    padding.set(ylabel="padding, % of tokens", ylim=(0, 105))
    most = all_types(report).most_common(MOST_TYPES)[::-1]
    types.barh([name for name, _ in most], [count for _, count in most], color="C2")
    types.tick_params(axis="y", labelsize=7)
    types.set(xlabel="cells", title="" if most else "no column of cell types")
    _save(path, figure)


def plane(embedding: np.ndarray, seed: int = 0) -> np.ndarray:
    """UMAP coordinates of an embedding, [C, W] to float32 [C, 2]; the same for the same seed."""
    neighbours = min(15, len(embedding) - 1)
    with quiet():
        from umap import UMAP

        return UMAP(n_neighbors=neighbours, random_state=seed, n_jobs=1).fit_transform(embedding)


def _draw_lengths(axes: Axes, report: Report) -> None:
    found = [lengths[lengths > 0] for lengths in report.lengths]
    whole = np.concatenate(found)
    edges = np.geomspace(whole.min(), whole.max() + 1, 50)
    names = [Path(intake.name).stem for intake in report.intakes]
    colours = [mpl.colormaps["tab20"](i % 20) for i in range(len(names))]
    axes.hist(found, edges.tolist(), stacked=True, label=names, color=colours)
    for _, tokens in report.padding[1].shapes:
        axes.axvline(tokens, color="0.3", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", xlabel="expressed genes of a cell; dashed: padded to", ylabel="cells")
    axes.legend(frameon=False, fontsize=7)


def _scatter(axes: Axes, points: np.ndarray, names: np.ndarray) -> None:
    colours = mpl.colormaps["tab20"]
    for i, name in enumerate(np.unique(names)):
        x, y = points[names == name].T
        axes.scatter(x, y, s=8, color=colours(i % 20), label=name, linewidths=0)
    axes.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")


def _save(path: Path, figure: Figure) -> None:
    canvas = FigureCanvasAgg(figure)
    with written(path) as temporary:
        canvas.figure.savefig(temporary, dpi=150)
