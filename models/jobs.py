"""The jobs behind the commands: training, embedding and evaluating files of cells."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sigjax.models import checkpoints, evaluate
from sigjax.models.batches import BatchStream, fit_buckets
from sigjax.models.cells import Cells, cells_of, require_expressed
from sigjax.models.config import DataConfig, Implementation, InputError
from sigjax.models.outputs import written
from sigjax.models.quiet import quiet
from sigjax.models.runs import Say, Settings, Trained, fit
from sigjax.models.sources import read_h5ad, source_of
from sigjax.models.train import Trainer
from sigjax.models.vocabulary import Vocabulary

if TYPE_CHECKING:
    from anndata import AnnData


def train_files(
    paths: Sequence[Path], settings: Settings, out: Path, say: Say, *, resume: bool
) -> Trained:
    """Trains a model on the cells of files; arguments, files written and errors as in fit."""
    if not paths:
        msg = "train needs at least one .h5ad file, got none"
        raise InputError(msg)
    cells, vocabulary = read_cells(paths, settings.data, say)
    return fit(cells, vocabulary, settings, out, say, resume=resume)


def read_cells(
    paths: Sequence[Path], data: DataConfig, say: Say, vocabulary: Vocabulary | None = None
) -> tuple[Cells, Vocabulary]:
    """Cells of all files; without a vocabulary, the files' own genes are one.

    Raises:
        InputError: a file cannot be used; see models.cells.
    """
    sources = [source_of(read_h5ad(path), str(path), data.values) for path in paths]
    vocabulary = vocabulary or Vocabulary.union(source.genes for source in sources)
    parts = []
    for source in sources:
        cells, intake = cells_of(source, vocabulary, data.max_genes)
        say(str(intake))
        parts.append(cells)
    return Cells.concatenate(parts), vocabulary


def embed_cells(restored: checkpoints.Restored, cells: Cells) -> np.ndarray:
    """Embeddings of cells, none empty: float32 [C, W] in their order."""
    return evaluate.embed(
        restored.model, restored.state.params, _fixed_stream(cells, restored.about)
    )


def embed_file(
    path: Path, checkpoint: Path, out: Path, values: str, implementation: Implementation, say: Say
) -> None:
    """Writes a copy of an .h5ad file with obsm["X_sigjax"], the embedding of each cell.

    Raises:
        InputError: the file or the checkpoint cannot be used, or a cell is empty.
    """
    restored = checkpoints.load(checkpoint, implementation)
    data = read_h5ad(path)
    cells = _known_cells(data, str(path), values, restored, say)
    require_expressed(cells, str(path))
    data.obsm["X_sigjax"] = embed_cells(restored, cells)
    write_h5ad(data, out)


def evaluate_file(
    path: Path,
    checkpoint: Path,
    values: str,
    label: str | None,
    implementation: Implementation,
    say: Say,
) -> None:
    """Says the loss on a file's cells beside the baseline's, and silhouettes of a label.

    Raises:
        InputError: the file or the checkpoint cannot be used, or a cell is empty.
    """
    restored = checkpoints.load(checkpoint, implementation)
    file = read_h5ad(path)
    labels = None if label is None else labels_of(file, str(path), label)
    cells = _known_cells(file, str(path), values, restored, say)
    require_expressed(cells, str(path))
    about = restored.about
    stream = _fixed_stream(cells, about)
    trainer = Trainer(restored.model)
    loss = evaluate.mean_loss(
        lambda batch: trainer.masked_error(restored.state.params, batch), stream
    )
    baseline = evaluate.baseline_loss(about.gene_means, stream)
    say(f"loss {loss:.4f}, of the per-gene mean {baseline:.4f}")
    if label is not None and labels is not None:
        say(silhouettes(embed_cells(restored, cells), cells, about.vocabulary, labels, label))


def silhouettes(
    embedding: np.ndarray, cells: Cells, vocabulary: Vocabulary, labels: np.ndarray, label: str
) -> str:
    """A line with the silhouette of labels in the embedding and in PCAs.

    Of several sizes, because few components often separate types better than many.
    """
    components = evaluate.pca(evaluate.matrix_of(cells, vocabulary.size))
    sizes = sorted({min(size, components.shape[1]) for size in (5, 10, 20, 50)})
    of_pca = ", ".join(
        f"{evaluate.silhouette(components[:, :size], labels):.3f} ({size})" for size in sizes
    )
    return (
        f"silhouette of {label}: embedding {evaluate.silhouette(embedding, labels):.3f} "
        f"({embedding.shape[1]} features), PCA by components {of_pca}"
    )


def labels_of(data: "AnnData", name: str, label: str) -> np.ndarray:
    """A column of obs, object [C].

    Raises:
        InputError: there is no such column.
    """
    if label not in data.obs:
        msg = f"{name}: obs has no column {label!r}; choose one of {list(data.obs.columns)}"
        raise InputError(msg)
    return data.obs[label].to_numpy(dtype=object)


def write_h5ad(data: "AnnData", out: Path) -> None:
    """Writes an .h5ad file, whole or not at all."""
    with written(out) as temporary, quiet():
        data.write_h5ad(temporary)


def _known_cells(
    data: "AnnData", name: str, values: str, restored: checkpoints.Restored, say: Say
) -> Cells:
    about = restored.about
    cells, intake = cells_of(source_of(data, name, values), about.vocabulary, about.data.max_genes)
    say(str(intake))
    return cells


def _fixed_stream(cells: Cells, about: checkpoints.About) -> BatchStream:
    """Batches of cells that a checkpoint is applied to: the same masks each time."""
    return BatchStream(
        cells,
        fit_buckets(cells, about.data),
        about.vocabulary.size,
        about.data,
        about.training.seed,
        shuffled=False,
    )
