"""Reading untrusted files through a child process: it may crash or hang, the caller may not."""

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from sigjax.models.config import InputError
from sigjax.models.rows import Rows
from sigjax.models.store_child import StoreChild
from sigjax.models.store_limits import Limits

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True)
class Described:
    """What a store says it holds; only its values and their pointers are still unchecked.

    Attributes:
        cells: number of cells.
        genes: names of the columns.
        storage: "csr", "csc" or "dense".
        entries: stored values, of a dense matrix all.
        column: the asked column of var, None where there is none; of its values, where missing.
        columns: names of the columns of var.
    """

    cells: int
    genes: tuple[str, ...]
    storage: str
    entries: int
    column: tuple[str | None, ...] | None
    columns: tuple[str, ...]


class StoreReader:
    """Reads AnnData stores, .h5ad files and zarr folders, without trusting them.

    Args:
        limits: budgets of memory and time.

    Example:
        >>> from pathlib import Path
        >>> with StoreReader() as reader:
        ...     reader.describe(Path("nowhere.h5ad"), "X")
        Traceback (most recent call last):
        sigjax.models.config.InputError: nowhere.h5ad: no such file; give the path of an .h5ad ...
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._child: StoreChild | None = None
        self._streaming = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child process; the next request would start another."""
        if self._child is not None:
            self._child.close()
            self._child = None
        self._streaming = False

    def describe(self, path: Path, values: str, column: str | None = None) -> Described:
        """Looks at a store and checks it, but for its values.

        Args:
            path: an .h5ad file or a zarr folder.
            values: "X", "raw" or the name of a layer.
            column: of var, to be read too.

        Raises:
            InputError: it cannot be used; the text names file, field and remedy.
        """
        found, _ = self._ask(path, "describe", values=values, column=column)
        if found["repeated_cells"] is not None:
            msg = (
                f"{path}: obs: names of cells must be unique, got {found['repeated_cells']!r} "
                "twice; make them unique, for instance by anndata's obs_names_make_unique"
            )
            raise InputError(msg)
        return Described(
            cells=found["cells"],
            genes=tuple(found["genes"]),
            storage=found["storage"],
            entries=found["entries"],
            column=None if found["column"] is None else tuple(found["column"]),
            columns=tuple(found["columns"]),
        )

    def rows(self, path: Path, values: str) -> Generator[Rows]:
        """All rows of a store's matrix in order, in blocks.

        Raises:
            InputError: as describe, or pointers and indices that make no matrix.
            RuntimeError: the reader was asked for something else meanwhile.
        """
        header, arrays = self._ask(path, "rows", values=values)
        child, self._streaming = self._child, True
        while child is not None and not header["end"]:
            yield Rows(*arrays)
            if child is not self._child:
                msg = f"{path}: the reader was used for something else before the last row"
                raise RuntimeError(msg)
            header, arrays = self._answer(path, child)
        self._streaming = False

    def labels(self, path: Path, column: str) -> np.ndarray:
        """A column of obs as text, None where a value is missing: object [C].

        Raises:
            InputError: as describe, or no such column.
        """
        found, _ = self._ask(path, "labels", column=column)
        if found["column"] is None:
            msg = f"{path}: obs has no column {column!r}; choose one of {found['columns']}"
            raise InputError(msg)
        return np.array(found["column"], object)

    def find_labels(self, path: Path, column: str) -> np.ndarray | None:
        """labels, or None where obs has no such column."""
        found, _ = self._ask(path, "labels", column=column)
        return None if found["column"] is None else np.array(found["column"], object)

    def add_to_obsm(self, path: Path, name: str, array: np.ndarray, of: Path) -> None:
        """Writes obsm[name] into a copy of a store; where this fails, the copy may be spoilt.

        Args:
            path: the copy.
            name: of the array.
            array: [C, W].
            of: the store that was copied, for messages.

        Raises:
            InputError: as describe.
        """
        self._ask(path, "add", [array], of, name=name)

    def _ask(
        self,
        path: Path,
        what: str,
        arrays: Sequence[np.ndarray] = (),
        shown: Path | None = None,
        **arguments: Any,
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        check_kind(path)
        if self._streaming:
            # Rows were left half way: the rest of that answer is still to come.
            self.close()
        if self._child is None:
            self._child = StoreChild()
        request = {"do": what, "path": str(path), "limits": asdict(self.limits), **arguments}
        self._child.send(request, arrays)
        return self._answer(shown or path, self._child)

    def _answer(self, path: Path, child: StoreChild) -> tuple[dict[str, Any], list[np.ndarray]]:
        try:
            return child.receive(self.limits.seconds)
        except InputError as error:
            # A process that met a damaged file is not used for another one.
            self.close()
            msg = f"{path}: {error}"
            raise InputError(msg) from None


def check_kind(path: Path) -> None:
    """Raises InputError unless a path is an HDF5 file or a zarr store, by its first bytes."""
    if path.is_dir():
        if not is_zarr(path):
            msg = f"{path}: not a zarr store (no .zgroup or zarr.json); give a store or .h5ad files"
            raise InputError(msg)
        return
    if not path.is_file():
        msg = f"{path}: no such file; give the path of an .h5ad file or a zarr store"
        raise InputError(msg)
    if not is_hdf5(path):
        msg = f"{path}: not an .h5ad file (no HDF5); write one with anndata's write_h5ad"
        raise InputError(msg)


def is_zarr(path: Path) -> bool:
    """Whether a folder is the root of a zarr store."""
    return any((path / name).is_file() for name in (".zgroup", "zarr.json"))


def is_hdf5(path: Path) -> bool:
    """Whether a file has HDF5's signature, at its start or after a user block."""
    size, at = path.stat().st_size, 0
    with path.open("rb") as file:
        while at + len(HDF5_SIGNATURE) <= size:
            file.seek(at)
            if file.read(len(HDF5_SIGNATURE)) == HDF5_SIGNATURE:
                return True
            at = max(512, 2 * at)
    return False
