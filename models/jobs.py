"""The jobs behind the commands: training, embedding and evaluating files of cells."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sigjax.models import checkpoints, evaluate
from sigjax.models.batches import BatchStream, fit_buckets, split
from sigjax.models.cells import (
    Cells,
    cells_of,
    read_h5ad,
    require_expressed,
    source_of,
    without_empty,
)
from sigjax.models.config import DataConfig, Implementation, InputError, ModelConfig, TrainConfig
from sigjax.models.history import History
from sigjax.models.losses import gene_means, profile_means
from sigjax.models.outputs import written
from sigjax.models.progress import live
from sigjax.models.quiet import quiet
from sigjax.models.train import Biases, Hooks, StepRecord, Trainer, TrainState, build, train
from sigjax.models.vocabulary import Vocabulary

if TYPE_CHECKING:
    from anndata import AnnData

type Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """Everything a training run depends on, beside its cells."""

    model: ModelConfig
    data: DataConfig
    training: TrainConfig
    implementation: Implementation = None


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        restored: the last checkpoint's content, in memory.
        history: of the run.
        baseline: loss of the per-gene mean on the held-out cells.
    """

    restored: checkpoints.Restored
    history: History
    baseline: float


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


def fit(
    cells: Cells, vocabulary: Vocabulary, settings: Settings, out: Path, say: Say, *, resume: bool
) -> Trained:
    """Trains a model on cells and writes out/checkpoint, out/loss.csv and out/loss.png.

    Args:
        cells: none empty; the held-out share is drawn from them by the seed.
        vocabulary: their genes.
        settings: of the run.
        out: folder, made where it is missing.
        say: takes lines for the user.
        resume: go on from out/checkpoint.

    Raises:
        InputError: the cells do not suffice, out holds a run and resume is not set, or the
            checkpoint there is of another model.
        NonFiniteLossError: the run diverged.
    """
    training_stream, held_out = _streams(cells, vocabulary, settings)
    about, trainer, state = _begin(training_stream.cells, vocabulary, settings, out, resume=resume)
    first = int(state.step)
    history = History.read(out / "loss.csv", first) if resume else History()
    baseline = evaluate.baseline_loss(about.gene_means, held_out)
    say(f"{len(training_stream.cells):,} training cells, {len(held_out.cells):,} held out")
    say(f"batches (rows, tokens): {', '.join(map(str, training_stream.shapes))}")
    say(f"held-out loss of the per-gene mean {baseline:.4f}")
    with written(out / "settings.json") as temporary:
        temporary.write_text(json.dumps(asdict(settings), indent=2), encoding="utf-8")
    with live(first, settings.training.steps) as bar:
        state = train(
            trainer,
            state,
            training_stream,
            settings.training,
            _hooks(history, trainer, held_out, about, out, bar.say, bar.stepped),
        )
    say(f"{len(trainer.compiled)} training steps compiled, one a static shape")
    _draw_loss(out, history, baseline)
    return Trained(checkpoints.Restored(about, trainer.model, state), history, baseline)


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
    """A line with the silhouette of labels in the embedding and in a PCA."""
    components = evaluate.pca(evaluate.matrix_of(cells, vocabulary.size))
    return (
        f"silhouette of {label}: embedding {evaluate.silhouette(embedding, labels):.3f} "
        f"({embedding.shape[1]} features), PCA {evaluate.silhouette(components, labels):.3f} "
        f"({components.shape[1]} components)"
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


def _streams(
    cells: Cells, vocabulary: Vocabulary, settings: Settings
) -> tuple[BatchStream, BatchStream]:
    """Batches of the training cells, and fixed ones of the held-out cells."""
    cells = without_empty(cells)
    buckets, seed = fit_buckets(cells, settings.data), settings.training.seed
    train_rows, held_out_rows = split(cells, settings.training.held_out, seed)
    stream = partial(
        BatchStream,
        buckets=buckets,
        vocabulary_size=vocabulary.size,
        config=settings.data,
        seed=seed,
    )
    return stream(cells.take(train_rows)), stream(cells.take(held_out_rows), shuffled=False)


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


def _begin(
    cells: Cells, vocabulary: Vocabulary, settings: Settings, out: Path, *, resume: bool
) -> tuple[checkpoints.About, Trainer, TrainState]:
    """The run before its first step: fresh, or as out/checkpoint left it."""
    folder = out / "checkpoint"
    about = checkpoints.About(
        settings.model,
        settings.data,
        settings.training,
        vocabulary,
        gene_means(cells, vocabulary.size),
    )
    biases = Biases(about.gene_means, profile_means(cells, vocabulary.size))
    model, state = build(
        settings.model, vocabulary.size, settings.training, settings.implementation, biases
    )
    if resume:
        restored = checkpoints.load(folder, settings.implementation)
        checkpoints.require_same(folder, restored.about, settings.model, vocabulary)
        _check_steps(folder, int(restored.state.step), settings.training.steps)
        state = restored.state
    elif folder.exists():
        msg = f"{folder}: exists; go on from it with --resume, or choose another --out"
        raise InputError(msg)
    return about, Trainer(model), state


def _check_steps(folder: Path, done: int, steps: int) -> None:
    if done >= steps:
        msg = f"{folder}: has {done} steps done already; steps must be more, got {steps}"
        raise InputError(msg)


def _hooks(
    history: History,
    trainer: Trainer,
    held_out: BatchStream,
    about: checkpoints.About,
    out: Path,
    say: Say,
    stepped: Callable[[StepRecord], None],
) -> Hooks:
    """Keeps the history and writes it with each checkpoint."""

    def on_step(record: StepRecord) -> None:
        history.steps.append(record)
        stepped(record)

    def on_evaluation(step: int, state: TrainState) -> None:
        loss = evaluate.mean_loss(lambda batch: trainer.masked_error(state.params, batch), held_out)
        if step not in dict(history.held_out):
            history.held_out.append((step, loss))
        say(f"step {step}: held-out loss {loss:.4f}")

    def on_save(state: TrainState) -> None:
        # The history first: one that is ahead of its checkpoint is cut when the run goes on.
        history.write(out / "loss.csv")
        checkpoints.save(out / "checkpoint", about, state)

    return Hooks(on_step, on_evaluation, on_save)


def _draw_loss(out: Path, history: History, baseline: float) -> None:
    from sigjax.models.pictures import draw_loss

    draw_loss(out / "loss.png", history, baseline)
