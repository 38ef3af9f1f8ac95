"""Rows of a sparse matrix, and the steps that make cells of them, block by block."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# Entries of a block: 16 MB of indices and float32 values, a tenth of a second of reading.
BLOCK_ENTRIES = 2_000_000


class Rows(NamedTuple):
    """R rows of a matrix of G genes as csr, as they are stored.

    Attributes:
        indptr: int64 [R + 1], from 0 to E.
        indices: int64 [E], the genes.
        values: [E], in the stored dtype.
    """

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray


def blocks(indptr: np.ndarray, most: int = BLOCK_ENTRIES) -> Iterator[tuple[int, int]]:
    """Cuts rows into blocks of at most that many entries, one row at least: (first, end)."""
    start, count = 0, len(indptr) - 1
    while start < count:
        end = int(np.searchsorted(indptr, indptr[start] + most, side="right")) - 1
        end = min(max(end, start + 1), count)
        yield start, end
        start = end


def row_numbers(rows: Rows) -> np.ndarray:
    """Which row each entry is of: int64 [E]."""
    return np.repeat(np.arange(len(rows.indptr) - 1), np.diff(rows.indptr))


def sums(rows: Rows) -> np.ndarray:
    """Sum of each row: float64 [R]."""
    return np.bincount(row_numbers(rows), rows.values, minlength=len(rows.indptr) - 1)


def keep(rows: Rows, kept: np.ndarray) -> Rows:
    """The entries that kept [E] marks."""
    if kept.all():
        return rows
    ends = np.concatenate([[0], np.cumsum(kept)])
    return Rows(ends[rows.indptr], rows.indices[kept], rows.values[kept])


def known(rows: Rows, ids: np.ndarray) -> Rows:
    """Rows with token ids for genes, without the genes that have none (-1)."""
    tokens = ids[rows.indices]
    return keep(rows._replace(indices=tokens), tokens >= 0)


def by_token(rows: Rows, size: int) -> Rows:
    """Rows sorted by token, the values of equal tokens of a row added up.

    Args:
        rows: with token ids.
        size: number of token ids.
    """
    keys = row_numbers(rows) * size + rows.indices
    if np.all(keys[1:] > keys[:-1]):
        return rows
    order = np.argsort(keys, kind="stable")
    keys, tokens, values = keys[order], rows.indices[order], rows.values[order]
    first = np.concatenate([[True], keys[1:] != keys[:-1]])
    if first.all():
        return Rows(rows.indptr, tokens, values)
    starts = np.flatnonzero(first)
    added = np.add.reduceat(values.astype(np.float64), starts)
    ends = np.concatenate([[0], np.cumsum(first)])
    return Rows(ends[rows.indptr], tokens[starts], added)


def cut(rows: Rows, most: int) -> Rows:
    """Rows of at most that many entries: the highest values, ties by token."""
    lengths = np.diff(rows.indptr)
    kept = np.ones(len(rows.values), bool)
    for row in np.flatnonzero(lengths > most):
        start, end = rows.indptr[row], rows.indptr[row + 1]
        order = np.argsort(-rows.values[start:end].astype(np.float64), kind="stable")
        kept[start + order[most:]] = False
    return keep(rows, kept)
