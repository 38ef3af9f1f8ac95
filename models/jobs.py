"""The jobs behind the commands: training, embedding and evaluating files of cells."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sigjax.models import checkpoints, evaluate
from sigjax.models.batches import BatchStream, fit_buckets
from sigjax.models.cells import Cells, require_expressed
from sigjax.models.config import Implementation, InputError
from sigjax.models.corpus import read_cells
from sigjax.models.intake import IntakeConfig
from sigjax.models.outputs import written
from sigjax.models.quiet import quiet
from sigjax.models.runs import Say, Settings, Trained, fit
from sigjax.models.store_limits import Limits
from sigjax.models.store_reader import StoreReader, check_kind
from sigjax.models.train import Trainer
from sigjax.models.vocabulary import Vocabulary

if TYPE_CHECKING:
    from anndata import AnnData


def train_files(
    paths: Sequence[Path],
    settings: Settings,
    out: Path,
    say: Say,
    *,
    resume: bool,
    intake: IntakeConfig | None = None,
) -> Trained:
    """Trains a model on the cells of files; arguments, files written and errors as in fit."""
    if not paths:
        msg = "train needs at least one .h5ad file, got none"
        raise InputError(msg)
    cells, vocabulary = read_cells(paths, settings.data, say, intake=intake)
    return fit(cells, vocabulary, settings, out, say, resume=resume)


def embed_cells(restored: checkpoints.Restored, cells: Cells) -> np.ndarray:
    """Embeddings of cells, none empty: float32 [C, W] in their order."""
    return evaluate.embed(
        restored.model, restored.state.params, _fixed_stream(cells, restored.about)
    )


def embed_file(
    path: Path,
    checkpoint: Path,
    out: Path,
    values: str,
    implementation: Implementation,
    say: Say,
    intake: IntakeConfig | None = None,
) -> None:
    """Writes a copy of a file or store with obsm["X_sigjax"], the embedding of each cell.

    Raises:
        InputError: the file or the checkpoint cannot be used, a cell is empty, or out is of
            another kind than path.
    """
    restored = checkpoints.load(checkpoint, implementation)
    check_kind(path)
    if path.is_dir() != (out.suffix == ".zarr"):
        kind = "a zarr store" if path.is_dir() else "an .h5ad file"
        msg = f"{out}: must be {kind}, as {path} is one; choose a name that ends accordingly"
        raise InputError(msg)
    cells = _known_cells(path, values, restored, say, intake)
    embedding = embed_cells(restored, cells)
    with written(out) as temporary:
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, temporary)
        with StoreReader(_limits(intake)) as reader:
            reader.add_to_obsm(temporary, "X_sigjax", embedding, path)


def evaluate_file(
    path: Path,
    checkpoint: Path,
    values: str,
    label: str | None,
    implementation: Implementation,
    say: Say,
    intake: IntakeConfig | None = None,
) -> None:
    """Says the loss on a file's cells beside the baseline's, and silhouettes of a label.

    Raises:
        InputError: the file or the checkpoint cannot be used, or a cell is empty.
    """
    restored = checkpoints.load(checkpoint, implementation)
    # Its digest, where there is a manifest, is compared before anything else is read.
    cells = _known_cells(path, values, restored, say, intake)
    labels = None if label is None else read_labels(path, label, intake)
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


def read_labels(path: Path, label: str, intake: IntakeConfig | None = None) -> np.ndarray:
    """A column of a file's obs as text, None where a value is missing: object [C].

    Raises:
        InputError: the file cannot be used, or there is no such column.
    """
    with StoreReader(_limits(intake)) as reader:
        return reader.labels(path, label)


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
    path: Path, values: str, restored: checkpoints.Restored, say: Say, intake: IntakeConfig | None
) -> Cells:
    """A file's cells in a checkpoint's vocabulary, none of them empty."""
    about = restored.about
    data = replace(about.data, values=values)
    cells, _ = read_cells([path], data, say, about.vocabulary, intake)
    require_expressed(cells, str(path))
    return cells


def _limits(intake: IntakeConfig | None) -> Limits:
    return (intake or IntakeConfig()).limits


def _fixed_stream(cells: Cells, about: checkpoints.About) -> BatchStream:
    """Batches of cells that a checkpoint is applied to: the same masks each time, unpacked."""
    data = replace(about.data, pack_window=0)
    return BatchStream(
        cells,
        fit_buckets(cells, data),
        about.vocabulary.size,
        data,
        about.training.seed,
        shuffled=False,
    )
