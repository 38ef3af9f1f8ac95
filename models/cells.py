"""From a matrix to cells: the expressed genes of each, with their values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import scipy.sparse as sp

from sigjax.models.config import InputError
from sigjax.models.sources import Kind, Source
from sigjax.models.vocabulary import Vocabulary


@dataclass(frozen=True)
class Cells:
    """Cells as a ragged array: cell c holds the entries indptr[c] to indptr[c + 1].

    Attributes:
        indptr: int64 [C + 1].
        gene_ids: int32 [entries], token ids, increasing within a cell.
        values: float32 [entries], log1p of counts per 10,000, all positive.
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
        entries = self.entries(rows)
        indptr = np.concatenate([[0], np.cumsum(self.lengths[rows])]).astype(np.int64)
        return type(self)(indptr, self.gene_ids[entries], self.values[entries])

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """The cells of all parts, in order."""
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.concatenate([part.gene_ids for part in parts]),
            np.concatenate([part.values for part in parts]),
        )


@dataclass(frozen=True)
class Intake:
    """What became of one file, to be told to the user.

    Attributes:
        name: the file.
        kind: what its values were.
        cells: cells in the file.
        genes: genes in the file.
        known_genes: of these, genes of the vocabulary.
        unknown_values: expressed values of unknown genes, left out.
        empty_cells: cells without an expressed known gene.
        long_cells: cells cut to the max_genes highest values.
        max_genes: that limit.
    """

    name: str
    kind: Kind
    cells: int
    genes: int
    known_genes: int
    unknown_values: int
    empty_cells: int
    long_cells: int
    max_genes: int

    def __str__(self) -> str:
        taken = (
            "normalised to 10,000 per cell, log1p" if self.kind == "counts" else "taken as they are"
        )
        text = (
            f"{self.name}: {self.cells:,} cells, {self.known_genes:,} of {self.genes:,} genes "
            f"known; values are {self.kind}, {taken}"
        )
        if self.unknown_values:
            text += f"; {self.unknown_values:,} values of unknown genes left out"
        if self.empty_cells:
            text += f"; {self.empty_cells:,} cells without a known expressed gene"
        if self.long_cells:
            text += (
                f"; {self.long_cells:,} cells cut to their {self.max_genes:,} highest values "
                "(ties by gene order)"
            )
        return text


def cells_of(source: Source, vocabulary: Vocabulary, max_genes: int) -> tuple[Cells, Intake]:
    """Applies a vocabulary and the longest length to a file's cells, in the file's order.

    A cell over max_genes keeps its highest values, ties going to the gene that
    comes first in the vocabulary. Cells may come out empty: see without_empty
    and require_expressed.

    Raises:
        InputError: the vocabulary knows no gene of the file.
    """
    ids = vocabulary.ids(source.genes)
    known = np.flatnonzero(ids >= 0)
    if not len(known):
        msg = (
            f"{source.name}: no gene is known, first {', '.join(map(repr, source.genes[:3]))}, "
            f"expected names like {', '.join(map(repr, vocabulary.genes[:3]))}; "
            "use the same kind of gene names"
        )
        raise InputError(msg)
    # Columns in the order of the vocabulary, so that a cell's tokens are the same in any file.
    columns = known[np.argsort(ids[known])]
    matrix = sp.csr_matrix(source.matrix[:, columns])
    matrix.sort_indices()
    whole = Cells(
        matrix.indptr.astype(np.int64), ids[columns][matrix.indices], matrix.data.astype(np.float32)
    )
    cells = _cut(whole, max_genes)
    intake = Intake(
        name=source.name,
        kind=source.kind,
        cells=len(whole),
        genes=len(source.genes),
        known_genes=len(known),
        unknown_values=source.matrix.nnz - matrix.nnz,
        empty_cells=int(np.sum(whole.lengths == 0)),
        long_cells=int(np.sum(whole.lengths > max_genes)),
        max_genes=max_genes,
    )
    return cells, intake


def without_empty(cells: Cells) -> Cells:
    """The cells with at least one entry.

    Raises:
        InputError: every cell is empty.
    """
    rows = np.flatnonzero(cells.lengths > 0)
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


def _cut(cells: Cells, max_genes: int) -> Cells:
    lengths = cells.lengths
    if not np.any(lengths > max_genes):
        return cells
    keep = np.ones(len(cells.values), bool)
    for row in np.flatnonzero(lengths > max_genes):
        start, end = cells.indptr[row], cells.indptr[row + 1]
        order = np.argsort(-cells.values[start:end], kind="stable")
        keep[start + order[max_genes:]] = False
    indptr = np.concatenate([[0], np.cumsum(np.minimum(lengths, max_genes))]).astype(np.int64)
    return Cells(indptr, cells.gene_ids[keep], cells.values[keep])
