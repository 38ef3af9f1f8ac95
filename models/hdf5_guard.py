"""What an HDF5 file may hold: looked at before anything is read from it.

Runs in the reader's child process only (see sigjax.models.store_worker): even
looking at a damaged file can crash or hang the HDF5 library.
"""

import math
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from sigjax.models.store_limits import REWRITE, Limits, refuse

# gzip, shuffle, checksum and lzf: what h5py holds itself, so no plugin is ever loaded.
LZF = 32000
FILTERS = frozenset((h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32))
MOST_OBJECTS = 100_000
DEEPEST = 32


def check_file(file: h5py.File, mark: Callable[[str], None]) -> None:
    """Walks all links of a file; none may leave it.

    Args:
        file: as opened for reading.
        mark: is told each object before it is opened, for the message of a crash.

    Raises:
        InputError: an external or user-defined link, a soft link to nothing, external or virtual
            storage, or more objects than any AnnData file has.
    """
    waiting: list[tuple[h5py.Group, str, int]] = [(file["/"], "", 0)]
    seen: set[int] = set()
    soft: list[str] = []
    while waiting:
        group, path, depth = waiting.pop()
        if depth > DEEPEST or len(seen) > MOST_OBJECTS:
            refuse(path, f"groups nest over {DEEPEST} deep or hold over {MOST_OBJECTS:,} objects")
        for name in group:
            field = f"{path}/{name}".lstrip("/")
            mark(field)
            if not _is_hard(group, name, field):
                soft.append(field)
                continue
            member = group[name]
            # Hashed by its place in the file.
            address = hash(member.id)
            if address in seen:
                continue
            seen.add(address)
            if isinstance(member, h5py.Dataset):
                _check_storage(member, field)
            elif isinstance(member, h5py.Group):
                waiting.append((member, field, depth + 1))
    # They stay inside, now that no other link leaves the file; their targets were checked.
    for field in soft:
        mark(field)
        if file.get(field) is None:
            refuse(field, "a link to nothing", "remove the link")


def check_dataset(dataset: h5py.Dataset, field: str, limits: Limits, path: Path) -> None:
    """Checks all about a dataset that is going to be read, but not its content.

    Raises:
        InputError: an unknown filter, a shape over the budget, or chunks that are missing,
            overlap or lie outside the file.
    """
    if dataset.shape is None:
        refuse(field, "an empty dataspace, where an array is expected")
    properties = dataset.id.get_create_plist()
    filters = {properties.get_filter(i)[0] for i in range(properties.get_nfilters())}
    unknown = filters - FILTERS - {LZF}
    if unknown:
        refuse(
            field,
            f"filters must be gzip, shuffle, fletcher32 or lzf, got number {min(unknown)}",
            "write the file with compression='gzip'",
        )
    limits.check_size(field, dataset.shape, dataset.dtype.itemsize, dataset.chunks)
    file_size = path.stat().st_size
    if dataset.chunks is not None:
        _check_chunks(dataset, field, file_size, filtered=bool(filters))
    elif properties.get_layout() == h5py.h5d.CONTIGUOUS and dataset.size:
        start, size = dataset.id.get_offset(), dataset.id.get_storage_size()
        # Text of any length is stored as references, whose size h5py does not tell.
        expected = size if dataset.dtype.hasobject else dataset.size * dataset.dtype.itemsize
        if start is None or size == 0 or size != expected:
            refuse(field, "there are no data behind its shape")
        if start + size > file_size:
            refuse(field, "its data end after the file's end", "copy the file again")


def check_number_type(dataset: h5py.Dataset, field: str) -> None:
    """Raises InputError unless a dataset's stored type is a plain integer or IEEE number."""
    stored = dataset.id.get_type()
    plain = dataset.dtype.kind in "iuf" and dataset.dtype.itemsize <= 8
    if not plain or not stored.equal(h5py.h5t.py_create(dataset.dtype)):
        refuse(
            field,
            f"must be numbers, got dtype {dataset.dtype}",
            "store plain integers or floating-point numbers",
        )


def _is_hard(group: h5py.Group, name: str, field: str) -> bool:
    """Whether a link is hard, not soft; any other kind is refused, without following it."""
    link = group.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink | h5py.SoftLink):
        refuse(
            field,
            "a link out of the file",
            "copy what it points to into this file, for instance by anndata's write_h5ad",
        )
    return isinstance(link, h5py.HardLink)


def _check_storage(dataset: h5py.Dataset, field: str) -> None:
    properties = dataset.id.get_create_plist()
    if properties.get_external_count():
        refuse(field, "its data lie in another file (external storage)", REWRITE)
    if properties.get_layout() == h5py.h5d.VIRTUAL:
        refuse(field, "its data lie in another dataset (virtual dataset)", REWRITE)


def _check_chunks(dataset: h5py.Dataset, field: str, file_size: int, *, filtered: bool) -> None:
    chunks = dataset.chunks
    expected = math.prod(-(-n // c) for n, c in zip(dataset.shape, chunks, strict=True))
    found: list[tuple[int, int]] = []
    at: set[tuple[int, ...]] = set()

    def visit(chunk: h5py.h5d.StoreInfo) -> bool | None:
        found.append((chunk.byte_offset, chunk.size))
        at.add(chunk.chunk_offset)
        # Anything but None stops the walk: an index that runs in circles.
        return True if len(found) > expected else None

    dataset.id.chunk_iter(visit)
    if len(found) != expected or len(at) != expected:
        refuse(field, f"{expected:,} chunks are expected, got {len(at):,}")
    table = np.array(sorted(found), np.int64).reshape(-1, 2)
    ends = table.sum(axis=1)
    if np.any(table <= 0) or np.any(ends > file_size):
        refuse(field, "a chunk lies outside the file")
    if np.any(table[1:, 0] < ends[:-1]):
        refuse(field, "two chunks lie on each other")
    size = math.prod(chunks) * dataset.dtype.itemsize
    # No compressor makes a chunk much larger: more bytes would unfold to more than a chunk.
    wrong = table[:, 1] > 1.1 * size + 4096 if filtered else table[:, 1] != size
    if np.any(wrong):
        refuse(field, "a chunk has the wrong size")
