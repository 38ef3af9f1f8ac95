"""From cells to batches of few static shapes, each cell's share of hidden values drawn by seed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sigjax.buckets import LengthBuckets
from sigjax.models.cells import Cells
from sigjax.models.config import DataConfig, InputError
from sigjax.models.vocabulary import CELL_TOKEN, PADDING, RESERVED

FILLER = -1


class Batch(NamedTuple):
    """One batch: B rows of L tokens, the cell token first, then the expressed genes.

    Attributes:
        gene_ids: int32 [B, L]; CELL_TOKEN first, PADDING past the length.
        values: float32 [B, L]; the true values, 0 at the cell token and past the length.
        masked: bool [B, L]; whose value the model does not see and has to predict.
        lengths: int32 [B]; tokens of a row, the cell token included; 0 for a row that fills up.
        rows: int32 [B]; which cell a row is; FILLER for a row that fills up.
        queries: int32 [Q]; genes drawn from the vocabulary, expressed or not.
        query_values: float32 [B, Q]; their values, 0 where a cell does not express one.
    """

    gene_ids: np.ndarray
    values: np.ndarray
    masked: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    queries: np.ndarray
    query_values: np.ndarray


@dataclass(frozen=True)
class BatchStream:
    """All batches of some cells, epoch after epoch: a function of the seed alone.

    Attributes:
        cells: the cells, none empty.
        buckets: static lengths.
        vocabulary_size: number of token ids.
        config: tokens of a batch, share of hidden values, number of queries.
        seed: of the order and the masks.
        shuffled: whether order and batch order are drawn; else the cells' order within a bucket.

    Raises:
        InputError: a cell is empty, or the longest length does not fit a batch.
    """

    cells: Cells
    buckets: LengthBuckets
    vocabulary_size: int
    config: DataConfig
    seed: int
    shuffled: bool = True

    def __post_init__(self) -> None:
        if not len(self.cells) or self.cells.lengths.min() < 1:
            msg = "cells must hold at least one cell and none that is empty; see without_empty"
            raise InputError(msg)
        longest = self.buckets.edges[-1]
        if longest > self.config.tokens_per_batch:
            msg = (
                f"tokens_per_batch must hold the longest length {longest}, "
                f"got {self.config.tokens_per_batch}; raise it or lower max_genes"
            )
            raise InputError(msg)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The (B, L) that occur, one a bucket that is in use."""
        used = np.unique(self._assigned())
        return tuple((self._rows_of(i), self.buckets.edges[i]) for i in used)

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches in which each cell comes exactly once."""
        counts = np.bincount(self._assigned())
        return sum(-(-int(n) // self._rows_of(i)) for i, n in enumerate(counts))

    def epoch(self, number: int) -> Iterator[Batch]:
        """Each cell once."""
        for bucket, rows in self._plan(number):
            yield self._collate(rows, bucket, number)

    def stream(self, start: int = 0) -> Iterator[Batch]:
        """Epoch after epoch without end, from batch number start on."""
        number, skip = divmod(start, self.batches_per_epoch)
        while True:
            for bucket, rows in self._plan(number)[skip:]:
                yield self._collate(rows, bucket, number)
            number, skip = number + 1, 0

    def _assigned(self) -> np.ndarray:
        return self.buckets.assign(self.cells.lengths + 1)

    def _rows_of(self, bucket: int) -> int:
        return self.config.tokens_per_batch // self.buckets.edges[bucket]

    def _plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """Bucket and cells of each batch of an epoch, in order."""
        rng = np.random.default_rng((self.seed, epoch))
        order = np.arange(len(self.cells))
        if self.shuffled:
            order = rng.permutation(order)
        assigned = self._assigned()[order]
        plan = []
        for bucket in np.unique(assigned):
            rows, size = order[assigned == bucket], self._rows_of(bucket)
            plan += [(int(bucket), rows[i : i + size]) for i in range(0, len(rows), size)]
        if self.shuffled:
            plan = [plan[i] for i in rng.permutation(len(plan))]
        return plan

    def _collate(self, rows: np.ndarray, bucket: int, epoch: int) -> Batch:
        batch, length = self._rows_of(bucket), self.buckets.edges[bucket]
        lengths = self.cells.lengths[rows]
        entries = self.cells.entries(rows)
        # Where the entries go: after the cell token of their row.
        at_row = np.repeat(np.arange(len(rows)), lengths)
        at_column = entries - np.repeat(self.cells.indptr[rows], lengths) + 1

        gene_ids = np.full((batch, length), PADDING, np.int32)
        gene_ids[: len(rows), 0] = CELL_TOKEN
        gene_ids[at_row, at_column] = self.cells.gene_ids[entries]
        values = np.zeros((batch, length), np.float32)
        values[at_row, at_column] = self.cells.values[entries]
        masked = np.zeros((batch, length), bool)
        for i, row in enumerate(rows):
            masked[i, 1 + self._hidden(int(row), epoch)] = True
        queries = self._queries(int(rows[0]), epoch)
        asked = np.full(self.vocabulary_size, len(queries))
        asked[queries] = np.arange(len(queries))
        # One column more than queries takes the values that nobody asks for.
        query_values = np.zeros((batch, len(queries) + 1), np.float32)
        query_values[at_row, asked[self.cells.gene_ids[entries]]] = self.cells.values[entries]
        filler = (0, batch - len(rows))
        return Batch(
            gene_ids,
            values,
            masked,
            np.pad(lengths + 1, filler).astype(np.int32),
            np.pad(rows, filler, constant_values=FILLER).astype(np.int32),
            queries,
            query_values[:, :-1],
        )

    def _hidden(self, row: int, epoch: int) -> np.ndarray:
        """Which entries of a cell are hidden; drawn per cell, so that no neighbour matters."""
        length = int(self.cells.lengths[row])
        count = max(1, round(self.config.mask_share * length))
        return np.random.default_rng((self.seed, epoch, row)).permutation(length)[:count]

    def _queries(self, row: int, epoch: int) -> np.ndarray:
        """Genes to ask of a batch, drawn by its first cell."""
        genes = self.vocabulary_size - RESERVED
        drawn = np.random.default_rng((self.seed, epoch, row, 1)).permutation(genes)
        return (RESERVED + drawn[: self.config.query_genes]).astype(np.int32)


def fit_buckets(cells: Cells, config: DataConfig) -> LengthBuckets:
    """Static lengths for some cells, the cell token included."""
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
