"""From an .h5ad file to a checked matrix of log-normalised values.

Counts are normalised to 10,000 per cell and log1p is taken; values that are
log-normalised already are taken as they are. Nothing is ever made dense.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import h5py
import numpy as np
import scipy.sparse as sp

from sigjax.models.config import InputError
from sigjax.models.quiet import quiet
from sigjax.models.vocabulary import check_unique

if TYPE_CHECKING:
    from anndata import AnnData

type Kind = Literal["counts", "log-normalised"]

COUNTS_PER_CELL = 10_000.0
# log2 of a million is 19.9: no logarithm of a normalised value is larger.
LARGEST_LOGARITHM = 20.0


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


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
