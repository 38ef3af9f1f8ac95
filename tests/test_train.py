"""Training: it learns, it is a function of its seed, and a cut run goes on as if uncut."""

from contextlib import closing
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from sigjax.models.batches import BatchStream, fit_buckets
from sigjax.models.cells import Cells
from sigjax.models.config import DataConfig, InputError, ModelConfig, TrainConfig
from sigjax.models.evaluate import baseline_loss, mean_loss
from sigjax.models.feed import feed
from sigjax.models.history import History
from sigjax.models.losses import gene_means, profile_means
from sigjax.models.train import (
    Biases,
    Hooks,
    NonFiniteLossError,
    StepRecord,
    Trainer,
    TrainState,
    build,
    make_optimizer,
    train,
)
from sigjax.models.vocabulary import RESERVED

GENES = 24
SIZE = GENES + RESERVED
MODEL = ModelConfig(layers=1, width=16, heads=2)
DATA = DataConfig(buckets=1, multiple=8, tokens_per_batch=256, query_genes=16)
PACKED = replace(DATA, pack_window=16)
TRAINING = TrainConfig(steps=6, learning_rate=3e-3, evaluate_every=3, seed=3)


def made(count: int, seed: int) -> Cells:
    """Cells of two types and of any depth: a gene is high in one type and low in the other."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(8, GENES, count)
    types, depth = rng.integers(0, 2, count), rng.uniform(-0.3, 0.3, count)
    ids = [np.sort(rng.choice(GENES, n, replace=False)) for n in lengths]
    values = [
        2 + d + np.where(i % 2 == t, 1.0, -1.0) for i, t, d in zip(ids, types, depth, strict=True)
    ]
    return Cells(
        np.concatenate([[0], np.cumsum(lengths)]),
        (np.concatenate(ids) + RESERVED).astype(np.int32),
        np.concatenate(values).astype(np.float32),
    )


CELLS = made(60, 0)


def stream_of(cells: Cells, data: DataConfig = DATA, **options) -> BatchStream:
    return BatchStream(cells, fit_buckets(cells, data), SIZE, data, 0, **options)


@cache
def trainer_of(model: ModelConfig, config: TrainConfig) -> Trainer:
    """One trainer for all runs that compile the same step."""
    return Trainer(build(model, SIZE, config)[0])


def run(
    config: TrainConfig = TRAINING,
    hooks: Hooks | None = None,
    model: ModelConfig = MODEL,
    biases: Biases | None = None,
    data: DataConfig = DATA,
) -> tuple[Trainer, TrainState]:
    trainer = trainer_of(model, replace(config, seed=0, evaluate_every=1, checkpoint_every=0))
    _, state = build(model, SIZE, config, biases=biases)
    return trainer, train(trainer, state, feed(stream_of(CELLS, data)), config, hooks)


def assert_equal(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("attention", ["sigmoid", "softmax"])
def test_training_beats_the_per_gene_mean_on_cells_it_never_saw(attention):
    means = gene_means(CELLS, SIZE)
    trainer, state = run(
        replace(TRAINING, steps=120, learning_rate=1e-2),
        model=replace(MODEL, attention=attention),
        biases=Biases(means, profile_means(CELLS, SIZE)),
    )
    held_out = stream_of(made(40, 1), shuffled=False)
    loss = mean_loss(lambda batch: trainer.masked_error(state.params, batch), held_out)
    assert loss < 0.5 * baseline_loss(means, held_out)


@pytest.mark.parametrize("window", [0, 16], ids=["cells", "packed"])
def test_one_step_is_compiled_a_static_shape(window):
    """Of other encodings tests/test_tokens.py counts the steps."""
    data = replace(DATA, buckets=2, pack_window=window)
    stream = stream_of(CELLS, data)
    built, state = build(MODEL, SIZE, TRAINING)
    trainer = Trainer(built)
    train(trainer, state, feed(stream), replace(TRAINING, steps=2 * stream.batches_per_epoch))
    assert len(stream.shapes) == 2
    assert sorted(trainer.compiled) == sorted(stream.shapes)


@pytest.mark.parametrize("window", [0, 16], ids=["cells", "packed"])
def test_steps_compiled_ahead_are_those_that_run_and_give_the_same_bits(window):
    data = replace(DATA, buckets=2, pack_window=window)
    stream = stream_of(CELLS, data)
    model, state = build(MODEL, SIZE, TRAINING)
    trainer, said = Trainer(model), []
    trainer.compile_ahead(state, stream.blanks(), 2, lambda *what: said.append(what))
    assert sorted(shape for shape, _ in said) == sorted(stream.shapes)
    assert all(seconds > 0 for _, seconds in said)
    ends = []
    for one in (trainer, Trainer(model)):
        with closing(feed(stream)) as batches:
            ends.append(train(one, build(MODEL, SIZE, TRAINING)[1], batches, TRAINING).params)
    # No step was traced again.
    assert sorted(trainer.compiled) == sorted(stream.shapes)
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_compiling_ahead_needs_a_worker():
    model, state = build(MODEL, SIZE, TRAINING)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        Trainer(model).compile_ahead(state, [], 0)


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    ours, again, other = (
        run(config)[1] for config in (TRAINING, TRAINING, replace(TRAINING, seed=4))
    )
    assert_equal(ours, again)
    assert not np.array_equal(ours.params["mask"], other.params["mask"])


@pytest.mark.parametrize("data", [DATA, PACKED], ids=["alone", "packed"])
def test_a_cut_run_goes_on_as_if_uncut(data):
    saved = []
    config = replace(TRAINING, checkpoint_every=4)
    hooks = Hooks(saved=lambda state, batches: saved.append((jax.device_get(state), batches)))
    trainer, whole = run(config, hooks, data=data)
    assert [int(state.step) for state, _ in saved] == [4, 6]
    state, batches = saved[0]
    resumed = train(trainer, state, feed(stream_of(CELLS, data), batches), config)
    assert_equal(resumed, whole)


def test_hooks_hear_of_every_step_and_evaluation_in_order():
    steps: list[StepRecord] = []
    evaluated: list[int] = []
    hooks = Hooks(steps.append, lambda step, _: evaluated.append(step))
    run(replace(TRAINING, evaluate_every=4), hooks)
    assert [record.step for record in steps] == list(range(1, 7))
    assert evaluated == [0, 4, 6]
    cells = [record.cells for record in steps]
    assert cells == sorted(cells)
    assert all(np.isfinite(record.loss) and record.gradient_norm > 0 for record in steps)


def test_the_learning_rate_rises_and_falls_as_a_cosine():
    config = replace(TRAINING, steps=100, warmup_share=0.2)
    _, schedule = make_optimizer(config)
    rates = np.array([schedule(step) for step in range(101)], np.float64)
    assert rates.argmax() == 20
    assert rates[20] == pytest.approx(config.learning_rate)
    assert rates[0] == 0
    assert rates[60] == pytest.approx(config.learning_rate / 2, rel=1e-3)
    assert rates[100] == pytest.approx(0, abs=1e-9)


def test_weight_decay_leaves_vectors_alone():
    optimizer, _ = make_optimizer(replace(TRAINING, weight_decay=0.5))
    params = {"matrix": np.ones((2, 2), np.float32), "vector": np.ones(2, np.float32)}
    still = jax.tree.map(np.zeros_like, params)
    state = optimizer.init(params)
    # The rate of the first step is 0: only the second decays.
    _, state = optimizer.update(still, state, params)
    updates, _ = optimizer.update(still, state, params)
    matrix, vector = jax.tree.leaves(updates)
    assert np.all(matrix < 0)
    assert not vector.any()


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step():
    saved = []
    _, state = build(MODEL, SIZE, TRAINING)
    trainer = trainer_of(MODEL, replace(TRAINING, seed=0, evaluate_every=1))
    broken = state._replace(params=state.params | {"value_bias": np.full(SIZE, np.nan, np.float32)})
    hooks = Hooks(saved=lambda *_: saved.append(1))
    with pytest.raises(NonFiniteLossError, match="the loss of step 1 is nan; lower"):
        train(trainer, broken, feed(stream_of(CELLS)), TRAINING, hooks)
    assert not saved


def test_the_first_predictions_may_start_at_the_means():
    biases = Biases(gene_means(CELLS, SIZE), profile_means(CELLS, SIZE))
    _, state = build(MODEL, SIZE, TRAINING, biases=biases)
    np.testing.assert_array_equal(state.params["value_bias"], biases.value_bias)
    np.testing.assert_array_equal(state.params["profile_bias"], biases.profile_bias)


def test_a_history_is_read_back_up_to_a_step(tmp_path):
    history = History(held_out=[(0, 4.5), (2, 3.5), (4, 2.5)])
    history.steps = [
        StepRecord(n, 5.0 / n, 1e-3 * n, 0.5, 8 * n, 0.1 * n, 0.01) for n in range(1, 5)
    ]
    history.write(tmp_path / "loss.csv")
    assert (tmp_path / "loss.csv").read_text().splitlines()[:2] == [
        "step,loss,learning_rate,gradient_norm,cells,seconds,waited,held_out_loss",
        "0,,,,,,,4.5",
    ]
    back = History.read(tmp_path / "loss.csv", until=3)
    assert back.steps == history.steps[:3]
    assert back.held_out == history.held_out[:2]
    np.testing.assert_allclose(back.arrays["loss"], [5.0, 2.5, 5 / 3])
    assert back.arrays["evaluated"].tolist() == [0, 2]


@pytest.mark.parametrize("text", [None, "a,b\n1,2\n", "step,loss\none,2\n"])
def test_a_file_that_is_no_history_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "loss.csv").write_text(text)
    with pytest.raises(InputError, match="not a readable history"):
        History.read(tmp_path / "loss.csv", until=3)
