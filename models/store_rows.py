"""Rows of a stored matrix, csr, csc or dense, in blocks that are never densified.

Runs in the reader's child process only (see sigjax.models.store_worker).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sigjax.models.rows import BLOCK_ENTRIES, Rows, blocks
from sigjax.models.store_limits import refuse
from sigjax.models.stores import Store, memory_of

type Storage = Literal["csr", "csc", "dense"]

STORAGES: dict[str, Storage] = {
    "csr_matrix": "csr",
    "csc_matrix": "csc",
    "csr": "csr",
    "csc": "csc",
    "array": "dense",
}


@dataclass(frozen=True)
class Matrix:
    """A stored matrix whose structure was checked.

    Attributes:
        field: where it is in its store.
        storage: how it is stored.
        shape: cells and genes.
        entries: stored values.
        store: that store.
    """

    field: str
    storage: Storage
    shape: tuple[int, int]
    entries: int
    store: Store


def open_matrix(store: Store, field: str) -> Matrix:
    """Looks at a stored matrix without reading its values.

    Raises:
        InputError: it has no known encoding, or its arrays do not fit each other.
    """
    if store.group(field) is None:
        array = store.numbers(field, axes=2)
        shape = (int(array.shape[0]), int(array.shape[1]))
        return Matrix(field, "dense", shape, shape[0] * shape[1], store)
    kind = store.attribute(field, "encoding-type") or store.attribute(field, "h5sparse_format")
    storage = STORAGES.get(kind) if isinstance(kind, str) else None
    if storage is None or storage == "dense":
        refuse(field, f"encoding-type must be csr_matrix or csc_matrix, got {kind!r}")
    shape = _shape(store, field)
    data, indices = store.numbers(f"{field}/data"), store.numbers(f"{field}/indices")
    if data.shape != indices.shape:
        refuse(field, f"data and indices must be equally long, got {data.shape}, {indices.shape}")
    for array, name in ((data, "data"), (indices, "indices")):
        _check_complete(store, array, f"{field}/{name}")
    return Matrix(field, storage, shape, int(data.shape[0]), store)


def rows_of(matrix: Matrix) -> Iterator[Rows]:
    """All rows in order.

    Raises:
        InputError: pointers or indices that are no csr or csc matrix.
    """
    if matrix.storage == "dense":
        return _dense_rows(matrix)
    return _csr_rows(matrix) if matrix.storage == "csr" else _csc_rows(matrix)


def _shape(store: Store, field: str) -> tuple[int, int]:
    shape = store.attribute(field, "shape")
    shape = store.attribute(field, "h5sparse_shape") if shape is None else shape
    axes = [] if shape is None else np.asarray(shape).ravel().tolist()
    if len(axes) != 2 or not all(isinstance(n, int) and 0 <= n < 2**48 for n in axes):
        refuse(field, f"attribute shape must be two integers, got {shape}")
    return axes[0], axes[1]


def _check_complete(store: Store, array: Any, field: str) -> None:
    """A missing file of a zarr store would read as zeros; see hdf5_guard for HDF5."""
    if not hasattr(array, "metadata") or not array.shape[0]:
        return
    step = (array.shards or array.chunks)[0]
    count = -(-array.shape[0] // step)
    for i in range(count if count > 1 else 0):
        key = array.metadata.encode_chunk_key((i,))
        if not (store.path / field / key).is_file():
            refuse(f"{field}/{key}", "a chunk is missing", "copy the store again")


def _pointers(matrix: Matrix, count: int) -> np.ndarray:
    field = f"{matrix.field}/indptr"
    array = matrix.store.numbers(field)
    if array.shape != (count + 1,):
        refuse(field, f"must have shape ({count + 1},), got {array.shape}")
    _check_complete(matrix.store, array, field)
    matrix.store.limits.check_whole(field, memory_of(array))
    pointers = array[:]
    if pointers.dtype.kind not in "iu":
        refuse(field, f"must be integers, got dtype {pointers.dtype}")
    wide = pointers.astype(np.int64)
    if wide[0] != 0 or wide[-1] != matrix.entries or np.any(np.diff(wide) < 0):
        refuse(field, f"must rise from 0 to the number of values, {matrix.entries}")
    return wide


def checked_indices(indices: np.ndarray, field: str, size: int) -> np.ndarray:
    """Indices as int64.

    Raises:
        InputError: no integers, or one outside 0 .. size - 1.
    """
    if indices.dtype.kind not in "iu":
        refuse(field, f"must be integers, got dtype {indices.dtype}")
    wide = indices.astype(np.int64)
    if len(wide) and (wide.min() < 0 or wide.max() >= size):
        refuse(field, f"must lie in 0..{size - 1}, got {wide.min()}..{wide.max()}")
    return wide


def _csr_rows(matrix: Matrix) -> Iterator[Rows]:
    indptr = _pointers(matrix, matrix.shape[0])
    data = _InOrder(matrix.store, f"{matrix.field}/data")
    indices = _InOrder(matrix.store, f"{matrix.field}/indices")
    for start, end in blocks(indptr):
        first, last = int(indptr[start]), int(indptr[end])
        columns = checked_indices(indices.read(first, last), indices.field, matrix.shape[1])
        yield Rows(indptr[start : end + 1] - first, columns, data.read(first, last))


def _csc_rows(matrix: Matrix) -> Iterator[Rows]:
    import scipy.sparse as sp

    store, field = matrix.store, matrix.field
    data, indices = store.numbers(f"{field}/data"), store.numbers(f"{field}/indices")
    # Turned into csr in memory: both at once, with indices of 8 bytes on the way.
    store.limits.check_whole(field, 2 * (memory_of(data) + 8 * matrix.entries))
    pointers = _pointers(matrix, matrix.shape[1])
    rows = checked_indices(indices[:], f"{field}/indices", matrix.shape[0])
    values = data[:]
    if values.dtype == np.float16:
        # scipy knows no float16.
        values = values.astype(np.float32)
    csr = sp.csc_matrix((values, rows, pointers), shape=matrix.shape).tocsr()
    indptr = csr.indptr.astype(np.int64)
    for start, end in blocks(indptr):
        part = slice(indptr[start], indptr[end])
        yield Rows(
            indptr[start : end + 1] - indptr[start],
            csr.indices[part].astype(np.int64),
            csr.data[part],
        )


def _dense_rows(matrix: Matrix) -> Iterator[Rows]:
    array = matrix.store.numbers(matrix.field, axes=2)
    cells, genes = matrix.shape
    step = max(1, BLOCK_ENTRIES // max(genes, 1))
    if array.chunks is not None and array.chunks[0] < cells:
        # Whole storage chunks, so that none is read twice.
        step = max(step // array.chunks[0], 1) * array.chunks[0]
    for start in range(0, cells, step):
        matrix.store.limits.check_whole(matrix.field, min(step, cells) * genes * 8)
        part = array[start : start + step]
        row, gene = np.nonzero(part)
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(part)))])
        yield Rows(indptr.astype(np.int64), gene.astype(np.int64), part[row, gene])


class _InOrder:
    """A long array that is read from front to back in whole storage chunks, each once."""

    def __init__(self, store: Store, field: str) -> None:
        self.field = field
        self._array = store.numbers(field)
        self._mark = store.mark
        chunk = self._array.chunks[0] if self._array.chunks else 1
        self._step = max(BLOCK_ENTRIES // chunk, 1) * chunk
        self._start, self._held = 0, self._array[:0]

    def read(self, start: int, end: int) -> np.ndarray:
        """Entries start to end."""
        self._mark(self.field)
        parts = [self._held[:0]]
        while start < end:
            if not self._start <= start < self._start + len(self._held):
                self._start = start - start % self._step
                self._held = self._array[self._start : self._start + self._step]
            part = self._held[start - self._start : end - self._start]
            if not len(part):
                refuse(self.field, f"ends before entry {end}")
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)
