"""From file to cells: values in are values out, and every file that cannot be used is named."""

from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from sigjax.models.cells import Cells, cells_of, require_expressed, without_empty
from sigjax.models.config import InputError
from sigjax.models.quiet import quiet
from sigjax.models.rows import blocks
from sigjax.models.sources import read_h5ad, source_of
from sigjax.models.spool import Spool
from sigjax.models.vocabulary import RESERVED, Vocabulary

COUNTS = np.array([[3, 0, 1, 0], [0, 0, 0, 0], [1, 2, 3, 4]])
GENES = ("A", "B", "C", "D")


def made(matrix=COUNTS, genes=GENES, **others) -> anndata.AnnData:
    with quiet():
        var = pd.DataFrame(index=list(genes))
        return anndata.AnnData(sp.csr_matrix(np.asarray(matrix, np.float32)), var=var, **others)


def read(data, genes=GENES, max_genes=100, values="X"):
    return cells_of(source_of(data, "made.h5ad", values), Vocabulary(tuple(genes)), max_genes)


def dense(cells: Cells, size: int) -> np.ndarray:
    return sp.csr_matrix((cells.values, cells.gene_ids, cells.indptr), (len(cells), size)).toarray()


def test_counts_are_normalised_to_ten_thousand_a_cell_and_log1p_is_taken():
    cells, intake = read(made())
    totals = np.maximum(COUNTS.sum(1, keepdims=True), 1)
    expected = np.log1p(COUNTS / totals * 1e4)
    np.testing.assert_allclose(dense(cells, 6)[:, RESERVED:], expected, rtol=1e-6)
    assert intake.kind == "counts"
    assert "normalised to 10,000 per cell, log1p" in str(intake)


def test_log_normalised_values_are_taken_bit_for_bit():
    values = np.log1p(COUNTS * 1.37).astype(np.float32)
    cells, intake = read(made(values))
    np.testing.assert_array_equal(dense(cells, 6)[:, RESERVED:], values)
    assert intake.kind == "log-normalised"
    assert "taken as they are" in str(intake)


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_the_storage_of_a_matrix_does_not_matter(kind):
    data = made()
    data.X = kind(np.asarray(COUNTS, np.float32))
    cells, _ = read(data)
    np.testing.assert_array_equal(cells.values, read(made())[0].values)
    np.testing.assert_array_equal(cells.gene_ids, read(made())[0].gene_ids)


def test_values_come_from_raw_or_a_layer_on_request():
    data = made()
    with quiet():
        data.raw = made(COUNTS[:, :2], GENES[:2])
        data.layers["doubled"] = sp.csr_matrix(COUNTS.astype(np.float32) * 0.7)
    assert read(data, values="raw")[1].genes == 2
    assert read(data, values="doubled")[1].kind == "log-normalised"


def test_a_cells_tokens_do_not_depend_on_the_order_of_the_files_genes():
    order = [2, 0, 3, 1]
    shuffled = made(COUNTS[:, order], [GENES[i] for i in order])
    ours, theirs = read(made())[0], read(shuffled)[0]
    np.testing.assert_array_equal(ours.gene_ids, theirs.gene_ids)
    np.testing.assert_array_equal(ours.values, theirs.values)


def test_unknown_genes_are_left_out_and_counted():
    cells, intake = read(made(), genes=("A", "C"))
    assert intake.known_genes == 2
    assert intake.unknown_values == 2
    assert "2 values of unknown genes left out" in str(intake)
    # Normalised by all counts of the cell, those of unknown genes included.
    np.testing.assert_allclose(cells.values[-1], np.log1p(3 / 10 * 1e4), rtol=1e-6)


def test_a_long_cell_keeps_its_highest_values_and_ties_go_by_gene_order():
    matrix = np.array([[2, 5, 2, 2], [1, 0, 0, 0]])
    cells, intake = read(made(matrix), max_genes=2)
    assert cells.gene_ids.tolist() == [RESERVED, RESERVED + 1, RESERVED]
    assert cells.lengths.tolist() == [2, 1]
    assert intake.long_cells == 1
    assert "1 cells cut to their 2 highest values" in str(intake)


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    max_genes=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_cutting_keeps_a_largest_set_of_each_cells_values(lengths, max_genes, seed):
    rng = np.random.default_rng(seed)
    matrix = np.array([rng.permutation([1.3] * n + [0.0] * (6 - n)) for n in lengths])
    matrix *= rng.integers(1, 4, matrix.shape)
    if not matrix.any():
        return
    cells, _ = read(made(matrix, "ABCDEF"), "ABCDEF", max_genes)
    for row, values in enumerate(matrix):
        kept = cells.values[cells.indptr[row] : cells.indptr[row + 1]]
        expected = np.sort(values[values > 0])[::-1][:max_genes]
        np.testing.assert_allclose(np.sort(kept)[::-1], expected, rtol=1e-6)


def test_taking_and_concatenating_keep_every_entry():
    cells, _ = read(made())
    back = Cells.concatenate([cells.take(np.array([2])), cells.take(np.array([0, 1]))])
    np.testing.assert_array_equal(dense(back, 6), dense(cells, 6)[[2, 0, 1]])


def test_taking_is_the_same_in_blocks_and_from_disk(monkeypatch):
    monkeypatch.setattr(blocks, "__defaults__", (5,))
    monkeypatch.setattr(Spool.__init__, "__defaults__", (30, None))
    cells, _ = read(made(np.arange(24).reshape(6, 4) % 5))
    assert isinstance(cells.values, np.memmap)
    rows = np.array([5, 0, 0, 3])
    np.testing.assert_array_equal(dense(cells.take(rows), 6), dense(cells, 6)[rows])


def test_empty_cells_are_counted_and_left_out_of_training():
    cells, intake = read(made())
    assert intake.empty_cells == 1
    assert "1 cells without a known expressed gene" in str(intake)
    left = without_empty(cells)
    assert len(left) == 2
    assert without_empty(left) is left


def test_an_empty_cell_is_refused_where_each_needs_an_embedding():
    with pytest.raises(InputError, match=r"made: 1 of 3 cells are empty .* first number 1"):
        require_expressed(read(made())[0], "made")


def test_all_cells_empty_is_refused():
    empty = Cells(np.zeros(4, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
    with pytest.raises(InputError, match="all 3 cells are empty"):
        without_empty(empty)
    with pytest.raises(InputError, match="all 3 cells are empty"):
        read(made(np.zeros((3, 4))))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1.0, r"made.h5ad: values of 'X' must not be negative, got 1"),
        (np.nan, r"made.h5ad: values of 'X' must be finite, got 1"),
        (np.inf, r"made.h5ad: values of 'X' must be finite, got 1"),
        (812.5, r"must be counts \(whole numbers\) or log-normalised \(at most 20\), got 812.5"),
    ],
    ids=["negative", "nan", "inf", "neither count nor logarithm"],
)
def test_a_value_that_is_no_expression_is_refused(value, message):
    matrix = COUNTS.astype(np.float32)
    matrix[2, 1] = value
    with pytest.raises(InputError, match=message):
        read(made(matrix))


def test_values_that_are_no_numbers_are_refused():
    data = made()
    data.layers["flags"] = sp.csr_matrix(COUNTS > 0)
    with pytest.raises(InputError, match="must be numbers, got dtype bool"):
        read(data, values="flags")


def test_a_matrix_that_is_not_there_is_refused_with_what_is():
    data = made(layers={"counts": sp.csr_matrix(COUNTS)})
    with pytest.raises(InputError, match=r"no layer 'count'; choose .* \['counts'\]"):
        read(data, values="count")
    with pytest.raises(InputError, match="has no raw values"):
        read(data, values="raw")
    data.X = None
    with pytest.raises(InputError, match="X is empty"):
        read(data)


def test_an_invalid_sparse_matrix_is_refused():
    matrix = sp.csr_matrix(np.asarray(COUNTS, np.float32))
    matrix.indices[0] = 99
    data = made()
    data.X = matrix
    with pytest.raises(InputError, match="must be a valid sparse matrix"):
        read(data)


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_gene_names_that_occur_twice_are_refused():
    with pytest.raises(InputError, match="gene names must be unique, got 1 repeated, first 'A'"):
        read(made(genes=("A", "B", "A", "C")))


def test_a_file_without_a_known_gene_is_refused():
    with pytest.raises(InputError, match=r"no gene is known, first 'A', 'B', 'C', expected .*'X1'"):
        read(made(), genes=("X1", "X2"))


def test_a_vocabulary_without_genes_is_refused():
    with pytest.raises(InputError, match="at least one gene"):
        Vocabulary(())


def test_a_vocabulary_holds_all_genes_of_all_files_once():
    vocabulary = Vocabulary.union([("B", "A"), ("A", "C")])
    assert vocabulary.genes == ("B", "A", "C")
    assert vocabulary.ids(("C", "?", "B")).tolist() == [RESERVED + 2, -1, RESERVED]
    assert vocabulary.digest != Vocabulary(("A", "B", "C")).digest


def test_a_written_file_is_read_back(tmp_path: Path):
    with quiet():
        made().write_h5ad(tmp_path / "made.h5ad")
    back = read_h5ad(tmp_path / "made.h5ad")
    np.testing.assert_array_equal(sp.csr_matrix(back.X).toarray(), COUNTS)


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "hdf5", "truncated"])
def test_a_file_that_is_no_h5ad_is_refused_by_name(tmp_path: Path, kind: str):
    path = tmp_path / "cells.h5ad"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("gene,cell")
    elif kind == "hdf5":
        with h5py.File(path, "w") as file:
            file["numbers"] = np.arange(3)
    elif kind == "truncated":
        with quiet():
            made().write_h5ad(path)
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"cells\.h5ad: (no such file|not an|not a )"):
        read_h5ad(path)
