"""Cells as they come in: in memory while they are few, in files without a name once many."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

IN_MEMORY = 256 * 2**20
# Entries that are rescaled at once: 64 MB as float64.
STEP = 8_000_000


@dataclass
class _Column:
    """One array that grows at its end, in memory and then on disk."""

    dtype: type[np.generic]
    parts: list[np.ndarray]
    file: IO[bytes] | None = None

    def append(self, part: np.ndarray) -> None:
        if self.file is None:
            self.parts.append(part)
        else:
            part.tofile(self.file)

    def to_disk(self, folder: Path | None) -> None:
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 it lives as long as the spool
        for part in self.parts:
            part.tofile(self.file)
        self.parts = []

    def array(self) -> np.ndarray:
        if self.file is None:
            return np.concatenate([*self.parts, np.zeros(0, self.dtype)])
        self.file.flush()
        # The mapping keeps the unlinked file alive, and the kernel may drop its pages.
        with self.file:
            return np.memmap(self.file, self.dtype, mode="r+")


class Spool:
    """Collects the cells of many files, in order.

    Args:
        in_memory: bytes of entries over which they go to files that have no name and vanish
            with the process.
        folder: where those files lie; Python's default, which TMPDIR changes, where None.
    """

    def __init__(self, in_memory: int = IN_MEMORY, folder: Path | None = None) -> None:
        self._in_memory, self._folder = in_memory, folder
        self._lengths: list[np.ndarray] = [np.zeros(0, np.int64)]
        self._ids = _Column(np.int32, [])
        self._values = _Column(np.float32, [])
        self._rescales: list[tuple[int, np.ndarray]] = []
        self.cells = self.entries = 0

    def append(self, lengths: np.ndarray, gene_ids: np.ndarray, values: np.ndarray) -> None:
        """Adds cells: int64 lengths [C], and the int32 ids and float32 values of their entries."""
        if self._ids.file is None and 8 * (self.entries + len(values)) > self._in_memory:
            self._ids.to_disk(self._folder)
            self._values.to_disk(self._folder)
        self._ids.append(gene_ids.astype(np.int32, copy=False))
        self._values.append(values.astype(np.float32, copy=False))
        self._lengths.append(lengths)
        self.cells += len(lengths)
        self.entries += len(values)

    def log_normalise(self, first: int, scale: np.ndarray) -> None:
        """Asks for log1p(value * scale) of the cells from number first on, at the end."""
        self._rescales.append((first, scale))

    def finish(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All cells as indptr int64 [C + 1], ids int32 [E] and values float32 [E]."""
        lengths = np.concatenate(self._lengths)
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        values = self._values.array()
        for first, scale in self._rescales:
            _log_normalise(values, indptr[first : first + len(scale) + 1], scale)
        return indptr, self._ids.array(), values


def _log_normalise(values: np.ndarray, indptr: np.ndarray, scale: np.ndarray) -> None:
    """In place, some cells at a time."""
    start = 0
    while start < len(scale):
        end = int(np.searchsorted(indptr, indptr[start] + STEP, side="right")) - 1
        end = min(max(end, start + 1), len(scale))
        part = slice(indptr[start], indptr[end])
        factors = np.repeat(scale[start:end], np.diff(indptr[start : end + 1]))
        values[part] = np.log1p(values[part] * factors)
        start = end
