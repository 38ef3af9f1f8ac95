"""From planned cells to arrays: tokens, hidden values and queries, a whole batch at a time."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sigjax.models.cells import Cells
from sigjax.models.draws import hidden_entries
from sigjax.models.packing import CELLS_A_ROW
from sigjax.models.plan import Planned
from sigjax.models.tokens import Encoding
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
        codes: int32 [B, L]; what the model sees in place of values, from 1, and 0 at the cell
            token and past the length; None where it sees the values.
    """

    gene_ids: np.ndarray
    values: np.ndarray
    masked: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    queries: np.ndarray
    query_values: np.ndarray
    codes: np.ndarray | None = None

    @property
    def real(self) -> np.ndarray:
        """Which rows are cells and do not just fill up: bool [B]."""
        return self.rows != FILLER


class PackedBatch(NamedTuple):
    """A batch whose rows hold up to M cells each, one behind the other, each as in Batch.

    Attributes:
        gene_ids: int32 [B, L]; CELL_TOKEN at the start of each cell.
        values: float32 [B, L].
        masked: bool [B, L].
        lengths: int32 [B]; tokens of a row, all its cells together.
        segment_ids: int32 [B, L]; 1 for the tokens of a row's first cell, 2 for those of its
            second and so on, 0 past the length.
        starts: int32 [B, M]; where each cell's token is, 0 where there is no such cell.
        cells: int32 [B, M]; which cells a row holds; FILLER where there is none.
        queries: int32 [Q].
        query_values: float32 [B, M, Q].
        codes: int32 [B, L] or None.
    """

    gene_ids: np.ndarray
    values: np.ndarray
    masked: np.ndarray
    lengths: np.ndarray
    segment_ids: np.ndarray
    starts: np.ndarray
    cells: np.ndarray
    queries: np.ndarray
    query_values: np.ndarray
    codes: np.ndarray | None = None

    @property
    def real(self) -> np.ndarray:
        """Where a row holds a cell: bool [B, M]."""
        return self.cells != FILLER


type AnyBatch = Batch | PackedBatch


@dataclass(frozen=True)
class Collator:
    """Makes batches of cells; a cell's part of one depends on that cell, epoch and seed alone.

    Attributes:
        cells: the cells.
        shapes: (B, L) of each bucket in this process.
        encoding: what the model sees of values.
        vocabulary_size: V.
        mask_share: share of a cell's values that is hidden, at least one.
        query_genes: Q, at most the genes of the vocabulary.
        seed: of masks and queries.
    """

    cells: Cells
    shapes: tuple[tuple[int, int], ...]
    encoding: Encoding
    vocabulary_size: int
    mask_share: float
    query_genes: int
    seed: int

    def single(self, planned: Planned) -> Batch:
        """A batch of one cell a row."""
        cells = self._gathered([row[0] for row in planned.rows])
        where = np.arange(len(cells.numbers))
        tokens = self._laid(cells, planned, where, np.zeros_like(where))
        queries = self._queries(planned)
        size = self.shapes[planned.bucket][0]
        return Batch(
            tokens.gene_ids,
            tokens.values,
            tokens.masked,
            _filled(cells.lengths + 1, size, 0),
            _filled(cells.numbers, size, FILLER),
            queries,
            self._asked(cells, queries, where, size),
            tokens.codes,
        )

    def packed(self, planned: Planned) -> PackedBatch:
        """A batch of several cells a row."""
        cells = self._gathered([cell for row in planned.rows for cell in row])
        size, length = self.shapes[planned.bucket]
        counts = np.array([len(row) for row in planned.rows], np.int64)
        where = np.repeat(np.arange(len(counts)), counts)
        place = np.arange(len(where)) - np.repeat(np.cumsum(counts) - counts, counts)
        lengths = cells.lengths + 1
        # Tokens of all cells before each cell, less those of earlier rows.
        before = np.cumsum(lengths) - lengths
        starts = before - before[place == 0][where]
        tokens = self._laid(cells, planned, where, starts)
        segments = np.zeros((size, length), np.int32)
        columns = np.arange(int(lengths.sum())) - np.repeat(before - starts, lengths)
        segments[np.repeat(where, lengths), columns] = np.repeat(place + 1, lengths)
        queries, slots = self._queries(planned), where * CELLS_A_ROW + place
        per_row = (size, CELLS_A_ROW)
        return PackedBatch(
            tokens.gene_ids,
            tokens.values,
            tokens.masked,
            np.bincount(where, lengths, size).astype(np.int32),
            segments,
            _scattered(slots, starts, size * CELLS_A_ROW, 0).reshape(per_row),
            _scattered(slots, cells.numbers, size * CELLS_A_ROW, FILLER).reshape(per_row),
            queries,
            self._asked(cells, queries, slots, size * CELLS_A_ROW).reshape(*per_row, -1),
            tokens.codes,
        )

    def _gathered(self, cells: list[int]) -> "_Gathered":
        """The entries of the given cells, one cell after the other."""
        numbers = np.array(cells, np.int64)
        # Not cells.lengths, which goes over all cells.
        starts = self.cells.indptr[numbers]
        lengths = self.cells.indptr[numbers + 1] - starts
        entries = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
        entries += np.arange(len(entries))
        return _Gathered(numbers, lengths, self.cells.gene_ids[entries], self.cells.values[entries])

    def _laid(
        self, cells: "_Gathered", planned: Planned, where: np.ndarray, starts: np.ndarray
    ) -> "_Tokens":
        """Lays tokens out in rows: the cell token of each cell at row where, column starts."""
        shape, lengths = self.shapes[planned.bucket], cells.lengths
        hidden = hidden_entries(lengths, cells.numbers, self.mask_share, (self.seed, planned.epoch))
        order, codes = self.encoding.encode(cells.values, lengths)
        # From entries to places in the flat array, behind the cell token.
        offsets = where * shape[1] + starts + 1 - (np.cumsum(lengths) - lengths)
        flat = np.arange(len(order)) + np.repeat(offsets, lengths)

        def laid(entries: np.ndarray, fill: int, dtype: type) -> np.ndarray:
            array = np.full(shape, fill, dtype)
            array.reshape(-1)[flat] = entries
            return array

        gene_ids = laid(cells.ids[order], PADDING, np.int32)
        gene_ids[where, starts] = CELL_TOKEN
        return _Tokens(
            gene_ids,
            laid(cells.values[order], 0, np.float32),
            laid(hidden[order], 0, np.bool_),
            None if codes is None else laid(codes, 0, np.int32),
        )

    def _queries(self, planned: Planned) -> np.ndarray:
        """Genes to ask of a batch, drawn by its first cell: int32 [Q]."""
        genes = self.vocabulary_size - RESERVED
        rng = np.random.default_rng((self.seed, planned.epoch, planned.first, 1))
        drawn = rng.choice(genes, min(genes, self.query_genes), replace=False)
        return (RESERVED + drawn).astype(np.int32)

    def _asked(
        self, cells: "_Gathered", queries: np.ndarray, slots: np.ndarray, size: int
    ) -> np.ndarray:
        """Values of the queries, float32 [size, Q]; those of each cell at its slot, else 0."""
        place = np.full(self.vocabulary_size, len(queries))
        place[queries] = np.arange(len(queries))
        # One column more than queries takes the values that nobody asks for.
        values = np.zeros((size, len(queries) + 1), np.float32)
        values[np.repeat(slots, cells.lengths), place[cells.ids]] = cells.values
        return np.ascontiguousarray(values[:, :-1])


class _Gathered(NamedTuple):
    """Cells' numbers [C] and lengths [C], and all their entries [E]."""

    numbers: np.ndarray
    lengths: np.ndarray
    ids: np.ndarray
    values: np.ndarray


class _Tokens(NamedTuple):
    """Tokens laid out in rows, each [B, L]."""

    gene_ids: np.ndarray
    values: np.ndarray
    masked: np.ndarray
    codes: np.ndarray | None


def _filled(values: np.ndarray, size: int, fill: int) -> np.ndarray:
    """int32 [size]: the values, then fill."""
    return _scattered(np.arange(len(values)), values, size, fill)


def _scattered(slots: np.ndarray, values: np.ndarray, size: int, fill: int) -> np.ndarray:
    """int32 [size]: values at slots, else fill."""
    array = np.full(size, fill, np.int32)
    array[slots] = values
    return array
