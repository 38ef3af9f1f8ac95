"""The data-parallel training step: parameters on every device, rows of a batch over them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
import optax
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.devices_cells import (
    BATCH,
    Build,
    Cell,
    Equality,
    Program,
    Work,
    compile_program,
    first_devices,
    placed,
)
from benchmarks.devices_sizes import Sizes
from sigjax.models.collate import Batch
from sigjax.models.config import TrainConfig
from sigjax.models.train import Model, Trainer, TrainState, build
from sigjax.models.vocabulary import CELL_TOKEN, RESERVED

MASK_EVERY = 5


@dataclass(frozen=True)
class Training:
    """Steps of sigjax.models.train, with as many tokens on every device."""

    sizes: Sizes
    counts: tuple[int, ...]

    def cells(self) -> Iterator[tuple[str, Build]]:
        """Labels and what builds the cells."""
        yield "train, batch, step", self._cell

    def _cell(self) -> Cell:
        model = self.sizes.model
        batches = [make_batch(self.sizes, seed) for seed in range(max(self.counts))]
        one = self._compiled(1, batches[:1])
        works = [self._work(count, batches[:count], one) for count in self.counts]
        return Cell(
            part="train",
            case="batch",
            direction="step",
            scaling="weak",
            length=self.sizes.row_length,
            heads=model.heads,
            head_size=model.width // model.heads,
            dtype=model.dtype,
            works=tuple(works),
        )

    def _work(self, count: int, batches: list[Batch], one: Program) -> Work:
        program = one if count == 1 else self._compiled(count, batches)
        compared = None if count == 1 else self._equality(count, batches, program, one)
        steps = Steps(program, self._start(count), place_batch(joined(batches), count))
        return Work(count, self.sizes.rows * count, steps, program.collectives, compared)

    def _compiled(self, count: int, batches: list[Batch]) -> Program:
        whole = NamedSharding(first_devices(count), P())
        return compile_program(
            Trainer(self._model).step,
            self._start(count),
            place_batch(joined(batches), count),
            donate_argnums=0,
            # As it came, or the next step would not take it.
            out_shardings=whole,
        )

    def _equality(
        self, count: int, batches: list[Batch], program: Program, one: Program
    ) -> Equality:
        """Against one device's steps on the parts: their means are the loss and gradient."""
        loss, got = self._first_step(program, count, batches)
        parts = [self._first_step(one, 1, [batch]) for batch in batches]
        expected_loss = float(np.mean([part[0] for part in parts]))
        expected = jax.tree.map(lambda *x: np.mean(x, axis=0), *(part[1] for part in parts))
        errors = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), got, expected)
        largest = [float(np.abs(x).max()) for x in jax.tree.leaves(expected)]
        return Equality(
            bitwise=loss == expected_loss and not any(jax.tree.leaves(errors)),
            output=abs(loss - expected_loss) / abs(expected_loss),
            gradients=float(np.max(jax.tree.leaves(errors))) / max(largest),
        )

    def _first_step(self, program: Program, count: int, batches: list[Batch]) -> tuple[float, Any]:
        """The loss, and Adam's first moment, which after one step is a multiple of the gradient."""
        state, loss, _ = program.call(self._start(count), place_batch(joined(batches), count))
        return float(loss), jax.device_get(optax.tree.get(state.opt_state, "mu"))

    @cached_property
    def _built(self) -> tuple[Model, Any]:
        # Nothing is clipped: the first moment stays linear in the gradient.
        config = TrainConfig(steps=100_000, clip_norm=1e9)
        vocabulary = RESERVED + self.sizes.genes
        model, state = build(self.sizes.model, vocabulary, config, self.sizes.implementation)
        return model, jax.device_get(state)

    @property
    def _model(self) -> Model:
        return self._built[0]

    def _start(self, count: int) -> TrainState:
        """The state before the first step, on every device; a step uses it up."""
        whole = NamedSharding(first_devices(count), P())
        return jax.device_put(self._built[1], whole, may_alias=False)


class Steps:
    """Training, a step a call, on one batch."""

    def __init__(self, program: Program, state: TrainState, batch: Batch) -> None:
        self._step, self._state, self._batch = program.call, state, batch

    def __call__(self) -> Array:
        """Does a step; its loss."""
        self._state, loss, _ = self._step(self._state, self._batch)
        return loss


def make_batch(sizes: Sizes, seed: int) -> Batch:
    """One device's rows, all full; the same number of hidden values in each, and queries in all.

    So losses, which are means over these, are means of several batches' losses too.
    """
    rng = np.random.default_rng(seed)
    shape = (sizes.rows, sizes.row_length)
    gene_ids = rng.integers(RESERVED, RESERVED + sizes.genes, shape, np.int32)
    gene_ids[:, 0] = CELL_TOKEN
    values = np.log1p(rng.geometric(0.5, shape)).astype(np.float32)
    values[:, 0] = 0
    masked = np.tile(np.arange(shape[1]) % MASK_EVERY == 1, (shape[0], 1))
    return Batch(
        gene_ids=gene_ids,
        values=values,
        masked=masked,
        lengths=np.full(shape[0], shape[1], np.int32),
        rows=np.arange(shape[0], dtype=np.int32),
        queries=RESERVED + np.arange(sizes.queries, dtype=np.int32),
        query_values=rng.random((shape[0], sizes.queries), np.float32),
    )


def joined(batches: list[Batch]) -> Batch:
    """One batch of several devices' rows; the queries are all rows'."""
    rows = {
        name: np.concatenate([getattr(batch, name) for batch in batches])
        for name, x in batches[0]._asdict().items()
        if x is not None and name != "queries"
    }
    return batches[0]._replace(**rows)


def place_batch(batch: Batch, count: int) -> Any:
    """A batch with its rows over the first devices and its queries on each."""
    arrays = {name: x for name, x in batch._asdict().items() if x is not None}
    specs = {name: P() if name == "queries" else BATCH for name in arrays}
    return Batch(**{name: placed(x, count, specs[name]) for name, x in arrays.items()})
