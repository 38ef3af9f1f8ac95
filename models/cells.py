"""From a matrix to cells: the expressed genes of each, with their values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from sigjax.models.config import InputError
from sigjax.models.intake import Intake, take_in
from sigjax.models.rows import blocks
from sigjax.models.sources import Source
from sigjax.models.spool import Spool
from sigjax.models.vocabulary import Vocabulary


@dataclass(frozen=True)
class Cells:
    """Cells as a ragged array: cell c holds the entries indptr[c] to indptr[c + 1].

    Attributes:
        indptr: int64 [C + 1].
        gene_ids: int32 [entries], token ids, increasing within a cell.
        values: float32 [entries], log1p of counts per 10,000, all positive.

    Ids and values are memory-mapped files where there are many: see sigjax.models.spool.
    """

    indptr: np.ndarray
    gene_ids: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Expressed genes of each cell, int64 [C]."""
        return np.diff(self.indptr)

    def entries(self, rows: np.ndarray) -> np.ndarray:
        """Indices of the entries of the given cells, one cell after the other."""
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        return np.repeat(self.indptr[rows] - (ends - lengths), lengths) + np.arange(
            ends[-1] if len(ends) else 0
        )

    def take(self, rows: np.ndarray) -> Self:
        """The given cells in the given order."""
        spool = Spool()
        lengths = self.lengths[rows]
        # In blocks: the indices of all entries would take more than the entries.
        for start, end in blocks(np.concatenate([[0], np.cumsum(lengths)])):
            entries = self.entries(rows[start:end])
            spool.append(lengths[start:end], self.gene_ids[entries], self.values[entries])
        return type(self)(*spool.finish())

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """The cells of all parts, in order."""
        spool = Spool()
        for part in parts:
            spool.append(part.lengths, part.gene_ids, part.values)
        return cls(*spool.finish())


def cells_of(source: Source, vocabulary: Vocabulary, max_genes: int) -> tuple[Cells, Intake]:
    """Applies a vocabulary and the longest length to a file's cells, in the file's order.

    A cell over max_genes keeps its highest values, ties going to the gene that
    comes first in the vocabulary. Cells may come out empty: see without_empty
    and require_expressed.

    Raises:
        InputError: the vocabulary knows no gene of the file, or a value is no expression; see
            take_in.
    """
    spool = Spool()
    intake = take_in(source, vocabulary, max_genes, spool)
    return Cells(*spool.finish()), intake


def without_empty(cells: Cells) -> Cells:
    """The cells with at least one entry.

    Raises:
        InputError: every cell is empty.
    """
    rows = np.flatnonzero(cells.lengths > 0)
    if len(rows) == len(cells) > 0:
        return cells
    if not len(rows):
        msg = f"all {len(cells)} cells are empty: none expresses a known gene"
        raise InputError(msg)
    return cells.take(rows)


def require_expressed(cells: Cells, name: str) -> None:
    """Raises InputError where a cell is empty: it has no embedding."""
    empty = np.flatnonzero(cells.lengths == 0)
    if len(empty):
        msg = (
            f"{name}: {len(empty)} of {len(cells)} cells are empty (no expressed gene that the "
            f"model knows), first number {empty[0]}; leave them out, for instance by scanpy's "
            "pp.filter_cells(min_genes=1)"
        )
        raise InputError(msg)
