"""From a file or an AnnData in memory to a stream of its rows, before a vocabulary is applied.

A file is read by the child process of sigjax.models.store_reader, block by
block. Nothing is ever made dense.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy.sparse as sp

from sigjax.models.config import InputError
from sigjax.models.quiet import quiet
from sigjax.models.rows import Rows, blocks, keep, row_numbers
from sigjax.models.store_reader import StoreReader, check_kind
from sigjax.models.vocabulary import canonical, check_unique

if TYPE_CHECKING:
    from anndata import AnnData

type Kind = Literal["counts", "log-normalised"]

COUNTS_PER_CELL = 10_000.0
# log2 of a million is 19.9: no logarithm of a normalised value is larger.
LARGEST_LOGARITHM = 20.0


@dataclass(frozen=True)
class Source:
    """A matrix of C cells and G genes that can be streamed, its names checked.

    Attributes:
        name: the file, for messages.
        values: which of its matrices, for messages.
        genes: names of the G columns.
        cells: C.
        stream: starts a stream of all rows in order; see checked_rows.
        aliases: names of the file's index that its var column gives another name.
        columns: names of the columns of var.
        has_column: whether the asked column is one of them.
        notes: what the user should know about how the file is read.
    """

    name: str
    values: str
    genes: tuple[str, ...]
    cells: int
    stream: Callable[[], Iterator[Rows]]
    aliases: Mapping[str, str] = field(default_factory=dict, hash=False)
    columns: tuple[str, ...] = ()
    has_column: bool = False
    notes: tuple[str, ...] = ()


def open_source(
    path: Path, reader: StoreReader, values: str = "X", gene_column: str | None = None
) -> Source:
    """Opens a file or store after its checks; its values are read later, by checked_rows.

    Args:
        path: an .h5ad file or a zarr store.
        reader: reads it, and has to stay open as long as rows are read.
        values: "X", "raw" or the name of a layer.
        gene_column: column of var whose names are used; where the file has none, or where a name
            is missing, its index serves.

    Raises:
        InputError: it cannot be used; the text names file, field and remedy.
    """
    found = reader.describe(path, values, gene_column)
    notes = []
    if found.storage == "csc":
        notes.append("stored by genes (csc), turned into csr in memory")
    genes, aliases = found.genes, {}
    if gene_column is not None and found.column is None:
        notes.append(f"var has no column {gene_column!r}, its index is used")
    elif found.column is not None:
        genes, missing = _renamed(found.genes, found.column)
        if missing:
            notes.append(f"{missing:,} genes without {gene_column!r} keep the name of the index")
        aliases = _aliases(found.genes, genes)
    check_unique(str(path), found.genes)
    return Source(
        name=str(path),
        values=values,
        genes=genes,
        cells=found.cells,
        stream=lambda: reader.rows(path, values),
        aliases=aliases,
        columns=found.columns,
        has_column=found.column is not None,
        notes=tuple(notes),
    )


def source_of(data: "AnnData", name: str, values: str = "X") -> Source:
    """The matrix of an AnnData in memory that values names.

    Args:
        data: C cells of G genes.
        name: the file, for messages.
        values: "X", "raw" or the name of a layer.

    Raises:
        InputError: no such matrix, one that holds no numbers or is invalid, or names that occur
            twice.
    """
    matrix, genes = _matrix(data, name, values)
    check_unique(name, genes)
    where = _where(name, values)
    if not np.issubdtype(matrix.dtype, np.number) or np.issubdtype(
        matrix.dtype, np.complexfloating
    ):
        msg = f"{where} must be numbers, got dtype {matrix.dtype}"
        raise InputError(msg)
    csr = sp.csr_matrix(matrix)
    _check_structure(csr, where)

    def stream() -> Iterator[Rows]:
        indptr = csr.indptr.astype(np.int64)
        for start, end in blocks(indptr):
            part = slice(indptr[start], indptr[end])
            yield Rows(
                indptr[start : end + 1] - indptr[start],
                csr.indices[part].astype(np.int64),
                csr.data[part],
            )

    return Source(name, values, genes, csr.shape[0], stream)


def read_h5ad(path: Path) -> "AnnData":
    """Reads a whole .h5ad file into memory, for files that are trusted; see open_source.

    Raises:
        InputError: there is no such file, or it is no readable .h5ad.
    """
    check_kind(path)
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


def checked_rows(source: Source) -> Iterator[Rows]:
    """All rows of a source in order, in blocks, each checked, sorted and without stored zeros.

    Raises:
        InputError: a gene twice in a cell, a value that is not finite or negative, or other
            numbers of cells than the source says; or see StoreReader.rows.
    """
    first = 0
    for rows in source.stream():
        _check_values(rows.values, _where(source.name, source.values))
        rows = _sorted(rows, source, first)
        yield keep(rows, rows.values != 0)
        first += len(rows.indptr) - 1
    if first != source.cells:
        msg = f"{source.name}: {source.cells:,} cells are named, got rows of {first:,}"
        raise InputError(msg)


def _renamed(index: tuple[str, ...], column: tuple[str | None, ...]) -> tuple[tuple[str, ...], int]:
    """Names of a column, of the index where missing, and how many were."""
    missing = [not name or name == "nan" for name in column]
    names = (i if gone else c for i, c, gone in zip(index, column, missing, strict=True))
    return tuple(str(name) for name in names), sum(missing)


def _aliases(index: tuple[str, ...], genes: tuple[str, ...]) -> dict[str, str]:
    """What the index calls genes, without versions; an id that would mean two genes is left out."""
    aliases: dict[str, str] = {}
    unclear = set()
    for alias, gene in zip(index, genes, strict=True):
        bare, name = canonical(alias, {}), canonical(gene, {})
        if bare != name and aliases.setdefault(bare, name) != name:
            unclear.add(bare)
    return {alias: gene for alias, gene in aliases.items() if alias not in unclear}


def _where(name: str, values: str) -> str:
    return f"{name}: values of {values!r}"


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


def _check_structure(csr: sp.csr_matrix, where: str) -> None:
    try:
        csr.check_format(full_check=True)
    except ValueError as error:
        msg = f"{where} must be a valid sparse matrix, got one where {_first_line(error)}"
        raise InputError(msg) from error


def _check_values(values: np.ndarray, where: str) -> None:
    bad = ~np.isfinite(values)
    if bad.any():
        msg = (
            f"{where} must be finite, got {int(bad.sum())} that are NaN or infinite; "
            "choose other values, or write the file again without them"
        )
        raise InputError(msg)
    bad = values < 0
    if bad.any():
        msg = (
            f"{where} must not be negative, got {int(bad.sum())} below 0 (scaled values?); "
            "choose counts or log-normalised values"
        )
        raise InputError(msg)


def _sorted(rows: Rows, source: Source, first: int) -> Rows:
    """Rows with the genes of each in increasing order, each once."""
    width = len(source.genes)
    keys = row_numbers(rows) * width + rows.indices
    if np.all(keys[1:] > keys[:-1]):
        return rows
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(np.diff(keys[order]) == 0)
    if len(again):
        cell, gene = divmod(int(keys[order[again[0]]]), width)
        msg = (
            f"{_where(source.name, source.values)} must hold each gene once a cell, got "
            f"{source.genes[gene]!r} twice in cell number {first + cell}; "
            "add them up, for instance by scipy's sum_duplicates"
        )
        raise InputError(msg)
    return Rows(rows.indptr, rows.indices[order], rows.values[order])


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
