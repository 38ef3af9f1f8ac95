"""The child process that opens untrusted files, so that a crash or a hang stays there.

It takes requests on stdin and answers on stdout; sigjax.models.store_reader is
the other end.
"""

import json
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sigjax.models import stores
from sigjax.models.config import InputError
from sigjax.models.store_limits import GIB, REWRITE, Limits, refuse
from sigjax.models.store_messages import MARK, read_array, write_message
from sigjax.models.store_rows import Matrix, open_matrix, rows_of

# What h5py, zarr and their codecs raise on bytes that make no sense.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    lzma.LZMAError,
    zlib.error,
)
# Address space that Python, numpy and the codecs take before anything is read.
OWN_MEMORY = 4 * GIB

type Answer = tuple[dict[str, Any], Sequence[np.ndarray]]


def main() -> None:
    """Serves requests until stdin ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # A library that prints must not print into the answers.
    os.dup2(2, 1)
    while line := requests.readline():
        request = json.loads(line)
        sent = [read_array(requests, *about) for about in request.pop("arrays", [])]
        for header, arrays in _answers(request, sent):
            write_message(answers, header, arrays)


def _answers(request: dict[str, Any], sent: list[np.ndarray]) -> Iterator[Answer]:
    field = ""

    def mark(now: str) -> None:
        nonlocal field
        field = now
        # For the parent, in case this is the last thing that this process does.
        os.write(2, f"{MARK}{now!r}\n".encode())

    limits = Limits(**request["limits"])
    _limit_memory(limits)
    try:
        yield from JOBS[request["do"]](Path(request["path"]), limits, mark, request, sent)
    except InputError as error:
        yield {"error": str(error)}, ()
    except DAMAGE as error:
        text = next(iter(str(error).splitlines()), "")
        message = f"{field or '/'}: damaged ({type(error).__name__}: {text[:160]}); {REWRITE}"
        yield {"error": message}, ()


def _limit_memory(limits: Limits) -> None:
    if sys.platform == "win32":
        return
    import resource

    size = int(OWN_MEMORY + 2 * limits.whole_gib * GIB)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or size < hard:
        resource.setrlimit(resource.RLIMIT_AS, (size, hard))


def _describe(
    path: Path, limits: Limits, mark: stores.Mark, request: dict[str, Any], sent: list[np.ndarray]
) -> Iterator[Answer]:
    """What the store holds, all names included."""
    del sent
    with stores.opened(path, limits, mark) as store:
        matrix, frame = _matrix(store, request["values"])
        genes, cells = stores.index(store, frame), stores.index(store, "obs")
        for axis, names in enumerate((cells, genes)):
            if len(names) != matrix.shape[axis]:
                refuse(
                    matrix.field,
                    f"has shape {matrix.shape}, but {('obs', frame)[axis]} has {len(names)} names",
                )
        column = request["column"]
        columns = _columns(store, frame)
        header = {
            "cells": len(cells),
            "genes": genes,
            "storage": matrix.storage,
            "entries": matrix.entries,
            "repeated_cells": _first_repeated(cells),
            "columns": columns,
            "column": stores.column(store, frame, column) if column in columns else None,
        }
        yield header, ()


def _rows(
    path: Path, limits: Limits, mark: stores.Mark, request: dict[str, Any], sent: list[np.ndarray]
) -> Iterator[Answer]:
    """All rows, block by block, and an end."""
    del sent
    with stores.opened(path, limits, mark) as store:
        for rows in rows_of(_matrix(store, request["values"])[0]):
            yield {"end": False}, [_native(array) for array in rows]
    yield {"end": True}, ()


def _labels(
    path: Path, limits: Limits, mark: stores.Mark, request: dict[str, Any], sent: list[np.ndarray]
) -> Iterator[Answer]:
    """A column of obs, or the names of those there are."""
    del sent
    with stores.opened(path, limits, mark) as store:
        columns, column = _columns(store, "obs"), request["column"]
        found = stores.column(store, "obs", column) if column in columns else None
        yield {"columns": columns, "column": found}, ()


def _add(
    path: Path, limits: Limits, mark: stores.Mark, request: dict[str, Any], sent: list[np.ndarray]
) -> Iterator[Answer]:
    """Writes an array into obsm of a store that is ours to change."""
    name = request["name"]
    with stores.opened(path, limits, mark) as store:
        if store.array("obsm") is not None:
            refuse("obsm", "is of a format before anndata 0.7")
    mark(f"obsm/{name}")
    stores.add_array(path, name, sent[0])
    yield {}, ()


JOBS: dict[str, Callable[..., Iterator[Answer]]] = {
    "describe": _describe,
    "rows": _rows,
    "labels": _labels,
    "add": _add,
}


def _matrix(store: stores.Store, values: str) -> tuple[Matrix, str]:
    """The matrix that values names, and the data frame of its genes."""
    choices = f"a layer of {store.names('layers')}"
    if values == "raw":
        for field, frame in (("raw/X", "raw/var"), ("raw.X", "raw.var")):
            if _present(store, field):
                return open_matrix(store, field), frame
        msg = f"has no raw values; choose 'X' or {choices}"
        raise InputError(msg)
    field = "X" if values == "X" else f"layers/{values}"
    if not _present(store, field):
        what = "X is empty" if values == "X" else f"has no layer {values!r}"
        msg = f"{what}; choose {'' if values == 'X' else repr('X') + ', '}'raw' or {choices}"
        raise InputError(msg)
    return open_matrix(store, field), "var"


def _columns(store: stores.Store, frame: str) -> list[str]:
    """Names of a data frame's columns, the index left out."""
    own = (store.attribute(frame, "_index"), "__categories")
    return [name for name in store.names(frame) if name not in own]


def _present(store: stores.Store, field: str) -> bool:
    """Whether there is something; anndata writes a null array where a matrix is None."""
    if store.attribute(field, "encoding-type") == "null":
        return False
    return store.group(field) is not None or store.array(field) is not None


def _first_repeated(names: list[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


def _native(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder("="), copy=False)
