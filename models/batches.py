"""From cells to batches of few static shapes, each cell's share of hidden values drawn by seed."""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import grain
import numpy as np

from sigjax.buckets import LengthBuckets
from sigjax.models.cells import Cells
from sigjax.models.collate import AnyBatch, Batch, Collator, PackedBatch
from sigjax.models.config import DataConfig, InputError
from sigjax.models.draws import MOST_CELLS, MOST_ENTRIES
from sigjax.models.packing import CELLS_A_ROW, packed_buckets
from sigjax.models.plan import WHOLE, BatchPlan, CellOrder, Planned, Shapes
from sigjax.models.tokens import encoding_of

# The plan hands out numbers of cells: threads for each would cost more than they save.
_NO_THREADS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclass(frozen=True)
class BatchStream:
    """All batches of some cells, epoch after epoch: a function of the seed alone.

    Attributes:
        cells: the cells, none empty.
        buckets: static lengths; of packed rows where config.pack_window is not 0.
        vocabulary_size: number of token ids.
        config: tokens of a batch, encoding, share of hidden values, number of queries, packing.
        seed: of the order and the masks.
        shuffled: whether the order is drawn; else the cells' order within a bucket.
        devices: of all processes; the rows of every batch divide by it.
        shard: the process and their number, which divides devices. Every process gets its
            rows of the same batches, so that all run the same shape at the same step.

    Raises:
        InputError: a cell is empty, the longest length does not fit a batch as often as there
            are devices, or a batch has more cells or a cell more genes than can be drawn from.
    """

    cells: Cells
    buckets: LengthBuckets
    vocabulary_size: int
    config: DataConfig
    seed: int
    shuffled: bool = True
    devices: int = 1
    shard: grain.sharding.ShardOptions = WHOLE

    def __post_init__(self) -> None:
        if not len(self.cells) or self._token_counts.min() < 2:
            msg = "cells must hold at least one cell and none that is empty; see without_empty"
            raise InputError(msg)
        if self.devices % self.shard.shard_count:
            msg = (
                f"devices must be a multiple of the {self.shard.shard_count} processes, "
                f"got {self.devices}"
            )
            raise InputError(msg)
        most = max(self._shapes.rows) * (CELLS_A_ROW if self.config.pack_window else 1)
        if most > MOST_CELLS or self._token_counts.max() > MOST_ENTRIES:
            msg = (
                f"tokens_per_batch must give at most {MOST_CELLS} cells a batch, and max_genes be "
                f"less than {MOST_ENTRIES}, got {most} cells and {self._token_counts.max()} tokens"
            )
            raise InputError(msg)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The (B, L) that occur in a process, one a bucket that is in use; packed, all."""
        used = np.arange(len(self.buckets.edges))
        if not self.config.pack_window:
            used = np.unique(self.buckets.assign(self._token_counts))
        return tuple(self._local_shapes[i] for i in used)

    def blanks(self) -> tuple[AnyBatch, ...]:
        """A batch without a cell of each of shapes: what a step can be compiled with, ahead."""
        shapes = list(self._local_shapes)
        collate = self._collator.packed if self.config.pack_window else self._collator.single
        return tuple(collate(Planned(0, shapes.index(shape), [], 0)) for shape in self.shapes)

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches in which each cell comes exactly once."""
        if self.config.pack_window:
            return sum(1 for _ in self._planned(0))
        counts = np.bincount(self.buckets.assign(self._token_counts))
        return sum(-(-int(n) // self._shapes.rows[i]) for i, n in enumerate(counts))

    def plan(self) -> BatchPlan:
        """Which cells form which batch, without end: a grain dataset."""
        order = CellOrder(len(self.cells), self.seed, shuffled=self.shuffled)
        return BatchPlan(
            order.to_iter_dataset(_NO_THREADS),
            self._token_counts,
            self._shapes,
            identity=self._identity,
            window=self.config.pack_window,
            shard=self.shard,
        )

    def dataset(self) -> grain.IterDataset[Batch]:
        """Epoch after epoch without end; its iterators have grain's get_state and set_state.

        Raises:
            InputError: config.pack_window is not 0; see packed_dataset.
        """
        self._require_unpacked()
        return self.plan().map(self._collator.single)

    def packed_dataset(self) -> grain.IterDataset[PackedBatch]:
        """The same with several cells a row.

        Raises:
            InputError: config.pack_window is 0.
        """
        self._require_packed()
        return self.plan().map(self._collator.packed)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Each cell once; raises as dataset."""
        self._require_unpacked()
        return map(self._collator.single, self._planned(number))

    def packed_epoch(self, number: int) -> Iterator[PackedBatch]:
        """Each cell once, several a row; raises as packed_dataset."""
        self._require_packed()
        return map(self._collator.packed, self._planned(number))

    def _require_unpacked(self) -> None:
        if self.config.pack_window:
            msg = (
                "pack_window must be 0 for batches of one cell a row, got "
                f"{self.config.pack_window}; those of packed rows are packed_dataset's"
            )
            raise InputError(msg)

    def _require_packed(self) -> None:
        if not self.config.pack_window:
            msg = "pack_window must be at least 1 to pack cells, got 0"
            raise InputError(msg)

    def _planned(self, epoch: int) -> Iterator[Planned]:
        plan = iter(self.plan())
        plan.set_state(self._state_at(epoch))
        return itertools.takewhile(lambda planned: planned.epoch == epoch, plan)

    def _state_at(self, epoch: int) -> dict[str, Any]:
        """The plan's state at the start of an epoch: nothing waits."""
        taken = epoch * len(self.cells)
        return iter(self.plan()).get_state() | {"parent": {"next_index": taken}, "taken": taken}

    @cached_property
    def _token_counts(self) -> np.ndarray:
        """Tokens of each cell, the cell token included: int64 [C]."""
        return self.cells.lengths + 1

    @cached_property
    def _shapes(self) -> Shapes:
        """Of batches over all processes."""
        return Shapes.of_budget(self.buckets, self.config.tokens_per_batch, self.devices)

    @property
    def _local_shapes(self) -> tuple[tuple[int, int], ...]:
        rows = (rows // self.shard.shard_count for rows in self._shapes.rows)
        return tuple(zip(rows, self.buckets.edges, strict=True))

    @property
    def _collator(self) -> Collator:
        return Collator(
            self.cells,
            self._local_shapes,
            encoding_of(self.config),
            self.vocabulary_size,
            self.config.mask_share,
            self.config.query_genes,
            self.seed,
        )

    @cached_property
    def _identity(self) -> str:
        """Of all that decides what a batch holds, but not of who takes which rows."""
        settings = (self._shapes, self.vocabulary_size, self.config, self.seed, self.shuffled)
        digest = hashlib.sha256(repr(settings).encode())
        digest.update(np.ascontiguousarray(self.cells.indptr))
        return digest.hexdigest()[:16]


def fit_buckets(cells: Cells, config: DataConfig) -> LengthBuckets:
    """Static lengths for some cells, the cell token included."""
    if config.pack_window:
        return packed_buckets(int(cells.lengths.max()) + 1, config.buckets, config.multiple)
    return LengthBuckets.fit(cells.lengths + 1, count=config.buckets, multiple=config.multiple)


def split(cells: Cells, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws the held-out cells.

    Args:
        cells: C cells.
        share: share that is held out, at least one cell.
        seed: of the draw.

    Returns:
        Indices of the training cells and of the held-out ones, each in increasing order.

    Raises:
        InputError: fewer than two cells.
    """
    if len(cells) < 2:
        msg = f"training and held-out cells need at least 2 cells, got {len(cells)}"
        raise InputError(msg)
    count = min(max(1, round(share * len(cells))), len(cells) - 1)
    order = np.random.default_rng((seed, len(cells))).permutation(len(cells))
    return np.sort(order[count:]), np.sort(order[:count])
