"""From an .h5ad file to cells: the expressed genes of each, with their values.

Counts are normalised to 10,000 per cell and log1p is taken; values that are
log-normalised already are taken as they are. Nothing is ever made dense.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import h5py
import numpy as np
import scipy.sparse as sp

from sigjax.models.config import InputError
from sigjax.models.quiet import quiet
from sigjax.models.vocabulary import Vocabulary, check_unique

if TYPE_CHECKING:
    from anndata import AnnData

type Kind = Literal["counts", "log-normalised"]

COUNTS_PER_CELL = 10_000.0
# log2 of a million is 19.9: no logarithm of a normalised value is larger.
LARGEST_LOGARITHM = 20.0


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
class Source:
    """A checked matrix of one file, before a vocabulary is applied.

    Attributes:
        name: the file, for messages.
        genes: names of the G columns.
        matrix: CSR float32 [C, G], log-normalised, without stored zeros.
        kind: what the file held.
    """

    name: str
    genes: tuple[str, ...]
    matrix: sp.csr_matrix
    kind: Kind


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


def read_h5ad(path: Path) -> "AnnData":
    """Reads an .h5ad file.

    Raises:
        InputError: there is no such file, or it is no readable .h5ad.
    """
    if not path.is_file():
        msg = f"{path}: no such file; give the path of an .h5ad file"
        raise InputError(msg)
    if not h5py.is_hdf5(path):
        msg = f"{path}: not an .h5ad file (no HDF5); write one with anndata's write_h5ad"
        raise InputError(msg)
    with quiet():
        from anndata.io import read_h5ad as read

        try:
            return read(path)
        except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            msg = (
                f"{path}: not a readable .h5ad file ({_first_line(error)}); "
                "write it again with anndata's write_h5ad"
            )
            raise InputError(msg) from error


def source_of(data: "AnnData", name: str, values: str = "X") -> Source:
    """Takes out and checks the matrix that values names.

    Args:
        data: C cells of G genes.
        name: the file, for messages.
        values: "X", "raw" or the name of a layer.

    Raises:
        InputError: no such matrix, names that occur twice, or a value that is
            no number, not finite or negative, or neither count nor logarithm.
    """
    matrix, genes = _matrix(data, name, values)
    field = f"{name}: values of {values!r}"
    check_unique(name, genes)
    if not np.issubdtype(matrix.dtype, np.number) or np.issubdtype(
        matrix.dtype, np.complexfloating
    ):
        msg = f"{field} must be numbers, got dtype {matrix.dtype}"
        raise InputError(msg)
    csr = sp.csr_matrix(matrix)
    _check_structure(csr, field)
    _check_values(csr, field)
    csr.eliminate_zeros()
    csr.sort_indices()
    kind: Kind = "counts" if np.all(csr.data == np.floor(csr.data)) else "log-normalised"
    if kind == "counts":
        csr = _log_normalised(csr)
    elif csr.data.max() > LARGEST_LOGARITHM:
        msg = (
            f"{field} must be counts (whole numbers) or log-normalised (at most "
            f"{LARGEST_LOGARITHM:g}), got {csr.data.max():.6g}; round estimated counts, or take "
            "log1p of normalised values"
        )
        raise InputError(msg)
    return Source(name, genes, csr.astype(np.float32), kind)


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


def _matrix(data: "AnnData", name: str, values: str) -> tuple[Any, tuple[str, ...]]:
    if values == "raw":
        if data.raw is None:
            msg = f"{name}: has no raw values; choose 'X' or a layer of {_layers(data)}"
            raise InputError(msg)
        return data.raw.X, tuple(map(str, data.raw.var_names))
    if values != "X" and values not in data.layers:
        msg = f"{name}: has no layer {values!r}; choose 'X', 'raw' or a layer of {_layers(data)}"
        raise InputError(msg)
    matrix = data.X if values == "X" else data.layers[values]
    if matrix is None:
        msg = f"{name}: X is empty; choose 'raw' or a layer of {_layers(data)}"
        raise InputError(msg)
    return matrix, tuple(map(str, data.var_names))


def _layers(data: "AnnData") -> list[str]:
    return sorted(key for key in data.layers if isinstance(key, str))


def _check_structure(csr: sp.csr_matrix, field: str) -> None:
    try:
        csr.check_format(full_check=True)
    except ValueError as error:
        msg = f"{field} must be a valid sparse matrix, got one where {_first_line(error)}"
        raise InputError(msg) from error


def _check_values(csr: sp.csr_matrix, field: str) -> None:
    bad = ~np.isfinite(csr.data)
    if bad.any():
        msg = f"{field} must be finite, got {int(bad.sum())} that are NaN or infinite"
        raise InputError(msg)
    bad = csr.data < 0
    if bad.any():
        msg = (
            f"{field} must not be negative, got {int(bad.sum())} below 0 (scaled values?); "
            "choose counts or log-normalised values"
        )
        raise InputError(msg)
    if not np.any(csr.data):
        msg = f"{field}: all {csr.shape[0]} cells are empty: no value is above 0"
        raise InputError(msg)


def _log_normalised(counts: sp.csr_matrix) -> sp.csr_matrix:
    totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    scale = COUNTS_PER_CELL / np.maximum(totals, 1.0)
    data = np.log1p(counts.data * np.repeat(scale, np.diff(counts.indptr)))
    return sp.csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape)


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


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
