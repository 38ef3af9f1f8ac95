"""A training run: from cells to a folder with checkpoint, curve and picture."""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sigjax.models import checkpoints, evaluate
from sigjax.models.batches import BatchStream, fit_buckets, split
from sigjax.models.cells import Cells, without_empty
from sigjax.models.config import DataConfig, Implementation, InputError, ModelConfig, TrainConfig
from sigjax.models.feed import feed
from sigjax.models.history import History
from sigjax.models.losses import gene_means, profile_means
from sigjax.models.outputs import written
from sigjax.models.padding import paddings
from sigjax.models.progress import live
from sigjax.models.tokens import encoding_of
from sigjax.models.train import Biases, Hooks, StepRecord, Trainer, TrainState, build, train
from sigjax.models.vocabulary import Vocabulary

type Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """Everything a training run depends on, beside its cells.

    Attributes:
        model: what the model is.
        data: how cells are read and batched.
        training: how it is trained.
        implementation: what computes the attention.
        compile_ahead: steps that are compiled side by side before the first one runs; 0 compiles
            each when its shape comes first.
    """

    model: ModelConfig
    data: DataConfig
    training: TrainConfig
    implementation: Implementation = None
    compile_ahead: int = 0


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
            checkpoint there is of another model, or of other cells or settings of data.
        NonFiniteLossError: the run diverged.
    """
    training_stream, held_out = _streams(cells, vocabulary, settings)
    start = _begin(training_stream.cells, vocabulary, settings, out, resume=resume)
    about, trainer, state = start.about, start.trainer, start.state
    first = int(state.step)
    history = History.read(out / "loss.csv", first) if resume else History()
    batches = feed(training_stream, start.batches)
    baseline = evaluate.baseline_loss(about.gene_means, held_out)
    say(f"{len(training_stream.cells):,} training cells, {len(held_out.cells):,} held out")
    say(f"batches (rows, tokens): {', '.join(map(str, training_stream.shapes))}")
    if settings.data.pack_window:
        say(_padding(training_stream))
    say(f"held-out loss of the per-gene mean {baseline:.4f}")
    with written(out / "settings.json") as temporary:
        temporary.write_text(json.dumps(asdict(settings), indent=2), encoding="utf-8")
    if settings.compile_ahead:
        _compile_ahead(trainer, state, training_stream, settings.compile_ahead, say)
    with closing(batches), live(first, settings.training.steps) as bar:
        state = train(
            trainer,
            state,
            batches,
            settings.training,
            _hooks(history, trainer, held_out, about, out, bar.say, bar.stepped),
        )
    say(f"{len(trainer.compiled)} training steps compiled, one a static shape")
    waited = share_waited(history.steps)
    say(f"waited for batches {waited:.1%} of the time at most, in the second half of the run")
    _draw_loss(out, history, baseline)
    return Trained(checkpoints.Restored(about, trainer.model, state), history, baseline)


def _compile_ahead(
    trainer: Trainer, state: TrainState, stream: BatchStream, workers: int, say: Say
) -> None:
    """Compiles the step of every shape of the stream, and says how far it is."""
    count, done = len(stream.shapes), 0

    def said(shape: tuple[int, int], seconds: float) -> None:
        nonlocal done
        done += 1
        say(f"compiled {done} of {count}: rows, tokens {shape} in {seconds:.1f} s")

    trainer.compile_ahead(state, stream.blanks(), workers, said)


class _Start(NamedTuple):
    """A run before its first step."""

    about: checkpoints.About
    trainer: Trainer
    state: TrainState
    batches: dict[str, Any] | None


def _streams(
    cells: Cells, vocabulary: Vocabulary, settings: Settings
) -> tuple[BatchStream, BatchStream]:
    """Batches of the training cells, and fixed ones, never packed, of the held-out cells."""
    cells, seed = without_empty(cells), settings.training.seed
    train_rows, held_out_rows = split(cells, settings.training.held_out, seed)

    def stream(rows: np.ndarray, config: DataConfig, *, shuffled: bool) -> BatchStream:
        buckets = fit_buckets(cells, config)
        return BatchStream(
            cells.take(rows), buckets, vocabulary.size, config, seed, shuffled=shuffled
        )

    unpacked = replace(settings.data, pack_window=0)
    return (
        stream(train_rows, settings.data, shuffled=True),
        stream(held_out_rows, unpacked, shuffled=False),
    )


def _begin(
    cells: Cells, vocabulary: Vocabulary, settings: Settings, out: Path, *, resume: bool
) -> _Start:
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
        settings.model,
        vocabulary.size,
        settings.training,
        settings.implementation,
        biases,
        encoding_of(settings.data),
    )
    batches = None
    if resume:
        restored = checkpoints.load(folder, settings.implementation)
        checkpoints.require_same(folder, restored.about, settings.model, vocabulary)
        _check_data(folder, restored.about.data, settings.data)
        _check_steps(folder, int(restored.state.step), settings.training.steps)
        if restored.batches is None:
            msg = f"{folder}: says not where its batches were, so that no run can go on from it"
            raise InputError(msg)
        state, batches = restored.state, restored.batches
    elif folder.exists():
        msg = f"{folder}: exists; go on from it with --resume, or choose another --out"
        raise InputError(msg)
    return _Start(about, Trainer(model), state, batches)


def _check_data(folder: Path, saved: DataConfig, asked: DataConfig) -> None:
    theirs, ours = asdict(saved), asdict(asked)
    different = [f"{k} {theirs[k]!r}, not {ours[k]!r}" for k in ours if theirs[k] != ours[k]]
    if different:
        msg = f"{folder}: the run was begun with {'; '.join(different)}; go on with the same"
        raise InputError(msg)


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

    def on_save(state: TrainState, batches: dict[str, Any]) -> None:
        # The history first: one that is ahead of its checkpoint is cut when the run goes on.
        history.write(out / "loss.csv")
        checkpoints.save(out / "checkpoint", about, state, batches)

    return Hooks(on_step, on_evaluation, on_save)


def _padding(stream: BatchStream) -> str:
    """A line with the share of padding that a packed stream has, beside that without packing."""
    _, alone, packed = paddings(stream.cells.lengths + 1, stream.config)
    return f"padding {alone.share:.1%} of all tokens with a cell a row, {packed.share:.1%} packed"


def share_waited(steps: Sequence[StepRecord]) -> float:
    """Share of the time waited for batches, over the second half of the steps of the last run.

    In the first half steps are compiled: that takes long, and meanwhile batches pile up. A
    resumed run counts its seconds anew.
    """
    begins = [i for i in range(1, len(steps)) if steps[i].seconds < steps[i - 1].seconds]
    run = steps[begins[-1] if begins else 0 :]
    middle, last = run[(len(run) - 1) // 2], run[-1]
    if len(run) == 1:
        return last.waited / last.seconds
    return (last.waited - middle.waited) / (last.seconds - middle.seconds)


def _draw_loss(out: Path, history: History, baseline: float) -> None:
    from sigjax.models.pictures import draw_loss

    draw_loss(out / "loss.png", history, baseline)
