"""An AnnData store on disk, .h5ad or zarr: names, columns and rows, each checked as it is read.

Runs in the reader's child process only (see sigjax.models.store_worker). Groups
and arrays of h5py and of zarr are used alike, so that one code reads both.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from sigjax.models import hdf5_guard, zarr_guard
from sigjax.models.store_limits import Limits, refuse

type Mark = Callable[[str], None]

# Bytes a name takes, for the budget: its true length is known only after it was read.
NAME_BYTES = 64
CHUNK_CACHE = 64 * 2**20


@dataclass(frozen=True)
class Store:
    """An open store whose links, codecs and layout were checked.

    Attributes:
        root: h5py or zarr group.
        path: of the file or folder.
        limits: budgets.
        mark: is told each field before it is touched.
    """

    root: Any
    path: Path
    limits: Limits
    mark: Mark

    def group(self, field: str) -> Any:
        """The group of that name, or None where there is none."""
        node = self._node(field)
        return node if node is None or not hasattr(node, "shape") else None

    def array(self, field: str) -> Any:
        """The checked array of that name, or None where there is none."""
        node = self._node(field)
        if node is None or not hasattr(node, "shape"):
            return None
        if isinstance(node, h5py.Dataset):
            hdf5_guard.check_dataset(node, field, self.limits, self.path)
        else:
            self.limits.check_size(field, node.shape, node.dtype.itemsize, node.chunks)
        return node

    def numbers(self, field: str, axes: int = 1) -> Any:
        """The checked array of that name.

        Raises:
            InputError: there is none, or it does not hold numbers along that many axes.
        """
        array = self.array(field)
        if array is None:
            refuse(field, "is missing")
        if isinstance(array, h5py.Dataset):
            hdf5_guard.check_number_type(array, field)
        elif array.dtype.kind not in "iuf":
            refuse(field, f"must be numbers, got dtype {array.dtype}", "store plain numbers")
        if len(array.shape) != axes:
            refuse(field, f"must have {axes} axes, got shape {array.shape}")
        return array

    def attribute(self, field: str, name: str) -> Any:
        """An attribute, text as str; None where there is none."""
        node = self._node(field)
        value = None if node is None else node.attrs.get(name)
        return value.decode() if isinstance(value, bytes) else value

    def names(self, field: str) -> list[str]:
        """Names that a field of the group at its root holds."""
        group = self.group(field)
        return [] if group is None else sorted(group)

    def _node(self, field: str) -> Any:
        self.mark(field)
        node = self.root
        for part in field.split("/"):
            if hasattr(node, "shape") or part not in node:
                return None
            node = node[part]
        return node


@contextmanager
def opened(path: Path, limits: Limits, mark: Mark) -> Iterator[Store]:
    """Opens a store after everything about it but its content was checked.

    Raises:
        InputError: see hdf5_guard and zarr_guard.
    """
    if path.is_dir():
        import zarr

        zarr_guard.check_store(path, mark)
        # Consolidated metadata could say something else than what was checked.
        yield Store(zarr.open_group(path, mode="r", use_consolidated=False), path, limits, mark)
        return
    # Without a lock: nothing is written, and some network file systems have none.
    with h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE, locking=False) as file:
        hdf5_guard.check_file(file, mark)
        yield Store(file, path, limits, mark)


def index(store: Store, frame: str) -> list[str]:
    """Names of a data frame's rows, for instance of var.

    Raises:
        InputError: there is no such frame, or its names cannot be read.
    """
    if store.array(frame) is not None:
        return _legacy_index(store, frame)
    if store.group(frame) is None:
        refuse(frame, "is missing")
    name = store.attribute(frame, "_index")
    if not isinstance(name, str):
        refuse(frame, f"attribute _index must be the name of a column, got {name!r}")
    return [str(value) for value in column(store, frame, name)]


def column(store: Store, frame: str, name: str) -> list[str | None]:
    """A column of a data frame as text, None where a value is missing.

    Raises:
        InputError: there is no such column, or it cannot be read.
    """
    field = f"{frame}/{name}"
    if store.group(field) is None:
        values = _values(store, field)
        legacy = store.attribute(field, "categories")
        if legacy is None:
            return values
        return _categorical(field, values, _values(store, f"{frame}/__categories/{name}"))
    kind = store.attribute(field, "encoding-type")
    if kind == "categorical":
        return _categorical(
            field, _values(store, f"{field}/codes"), _values(store, f"{field}/categories")
        )
    if not isinstance(kind, str) or not kind.startswith("nullable-"):
        refuse(field, f"encoding-type {kind!r} is not known", "store plain text or categories")
    values, mask = _values(store, f"{field}/values"), _mask(store, f"{field}/mask")
    if len(mask) != len(values):
        refuse(field, f"{len(values)} values have a mask of {len(mask)}")
    return [None if gone else value for value, gone in zip(values, mask, strict=True)]


def _values(store: Store, field: str) -> list[str | None]:
    """A one-axis array as text; of a nullable text array, its values."""
    if store.group(field) is not None:
        return column(store, field.rpartition("/")[0], field.rpartition("/")[2])
    array = store.array(field)
    if array is None:
        refuse(field, "is missing")
    if len(array.shape) != 1:
        refuse(field, f"must have one axis, got shape {array.shape}")
    store.limits.check_whole(field, array.shape[0] * NAME_BYTES)
    if not isinstance(array, h5py.Dataset):
        if array.dtype.kind not in "biufTUO":
            refuse(field, f"must be text or numbers, got dtype {array.dtype}")
        return [str(value) for value in array[:].tolist()]
    text = h5py.check_string_dtype(array.dtype)
    if text is not None:
        return array.asstr()[:].tolist()
    if array.dtype.kind not in "biuf":
        refuse(field, f"must be text or numbers, got dtype {array.dtype}")
    return [str(value) for value in array[:].tolist()]


def _mask(store: Store, field: str) -> list[bool]:
    array = store.array(field)
    if array is None or array.dtype.kind != "b" or len(array.shape) != 1:
        refuse(field, "must be one bool a value")
    return array[:].tolist()


def _categorical(field: str, codes: list, categories: list) -> list[str | None]:
    numbers = [int(code) for code in codes]
    if any(not -1 <= code < len(categories) for code in numbers):
        refuse(field, f"codes must lie in -1..{len(categories) - 1}")
    return [None if code < 0 else categories[code] for code in numbers]


def _legacy_index(store: Store, frame: str) -> list[str]:
    """Names from the compound array that anndata wrote before 0.7."""
    array = store.array(frame)
    fields = array.dtype.names or ()
    name = next((n for n in ("index", "_index") if n in fields), None)
    if name is None or len(array.shape) != 1:
        refuse(frame, "must be a data frame with an index")
    store.limits.check_whole(frame, array.shape[0] * array.dtype.itemsize)
    return [v.decode() if isinstance(v, bytes) else str(v) for v in array.fields(name)[:].tolist()]


def add_array(path: Path, name: str, array: np.ndarray) -> None:
    """Writes obsm[name], as anndata does, into a store that was checked."""
    about = {"encoding-type": "array", "encoding-version": "0.2.0"}
    if not path.is_dir():
        with h5py.File(path, "r+") as file:
            obsm = _obsm(file, name)
            obsm.create_dataset(name, data=array).attrs.update(about)
        return
    import zarr

    root = zarr.open_group(path, mode="r+", use_consolidated=False)
    _obsm(root, name).create_array(name, data=array).attrs.update(about)
    if zarr.open_group(path, mode="r").metadata.consolidated_metadata is not None:
        # It would hide the new array.
        zarr.consolidate_metadata(root.store)


def _obsm(root: Any, name: str) -> Any:
    obsm = root.require_group("obsm")
    obsm.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    if name in obsm:
        del obsm[name]
    return obsm


def memory_of(*arrays: Any) -> int:
    """Bytes of arrays once they are read whole."""
    return sum(int(np.prod(a.shape, dtype=np.float64)) * a.dtype.itemsize for a in arrays)
