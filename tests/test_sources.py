"""Every format that AnnData has been stored in gives the same cells, streamed and checked."""

from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from sigjax.models import rows, sources, store_rows
from sigjax.models.config import DataConfig, InputError
from sigjax.models.corpus import read_cells
from sigjax.models.intake import IntakeConfig
from sigjax.models.quiet import quiet
from sigjax.models.sources import Source, checked_rows, open_source
from sigjax.models.store_limits import Limits
from sigjax.models.store_reader import StoreReader
from sigjax.models.vocabulary import RESERVED

COUNTS = np.array([[3, 0, 1, 0], [0, 0, 0, 0], [1, 2, 3, 4], [0, 7, 0, 2]], np.float32)
GENES = ["A", "B", "C", "D"]
TYPES = ["T", "B", "T", None]


def made(matrix=None, genes=GENES, **var) -> anndata.AnnData:
    matrix = sp.csr_matrix(COUNTS) if matrix is None else matrix
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(TYPES), "batch": [1, 1, 2, 2]},
        index=[f"cell-{i}" for i in range(4)],
    )
    with quiet():
        return anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(var, index=genes))


def written(data: anndata.AnnData, path: Path, version: int = 2, **options) -> Path:
    with quiet():
        if path.suffix == ".zarr":
            with anndata.settings.override(zarr_write_format=version):
                data.write_zarr(path, **options)
        else:
            data.write_h5ad(path, **options)
    return path


@pytest.fixture(scope="module")
def reader():
    with StoreReader() as opened:
        yield opened


def dense(source: Source) -> np.ndarray:
    parts = [
        sp.csr_matrix(
            (part.values.astype(np.float64), part.indices, part.indptr), (len(part.indptr) - 1, 4)
        ).toarray()
        for part in checked_rows(source)
    ]
    return np.concatenate(parts)


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix, np.asarray])
@pytest.mark.parametrize("file_format", ["plain", "gzip", "lzf", "zarr 2", "zarr 3"])
def test_every_format_and_storage_gives_the_values_that_were_written(
    tmp_path: Path, reader: StoreReader, kind, file_format: str
):
    zarr = file_format.startswith("zarr")
    path = tmp_path / ("cells.zarr" if zarr else "cells.h5ad")
    compression = {} if zarr or file_format == "plain" else {"compression": file_format}
    written(made(kind(COUNTS)), path, int(file_format[-1]) if zarr else 2, **compression)
    source = open_source(path, reader)
    assert source.genes == tuple(GENES)
    assert source.cells == 4
    np.testing.assert_array_equal(dense(source), COUNTS)
    assert reader.labels(path, "cell_type").tolist() == TYPES
    assert reader.labels(path, "batch").tolist() == ["1", "1", "2", "2"]


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix, np.asarray])
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_cells_without_any_value_are_said_to_be_empty(tmp_path: Path, kind, suffix: str):
    path = written(made(kind(np.zeros((4, 4), np.float32))), tmp_path / f"cells{suffix}")
    with pytest.raises(InputError, match=r"values of 'X': all 4 cells are empty: .* choose other"):
        read_cells([path], DataConfig(), print)


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix])
@pytest.mark.parametrize("dtype", ["i1", "u2", "i8", "f2", "f8", ">f4", ">i4"])
def test_any_kind_of_number_gives_the_same_values(
    tmp_path: Path, reader: StoreReader, kind, dtype: str
):
    path = written(made(kind(COUNTS)), tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        values = file["X/data"][:].astype(dtype)
        del file["X/data"]
        file["X/data"] = values
    np.testing.assert_array_equal(dense(open_source(path, reader)), COUNTS)


def test_values_come_from_raw_or_a_layer_on_request(tmp_path: Path, reader: StoreReader):
    data = made()
    with quiet():
        data.raw = made(genes=["R1", "R2", "R3", "R4"], symbol=["S1", "S2", "S3", "S4"])
        data.layers["twice"] = sp.csc_matrix(2 * COUNTS)
    for path in (tmp_path / "cells.h5ad", tmp_path / "cells.zarr"):
        written(data, path)
        assert open_source(path, reader, "raw").genes == ("R1", "R2", "R3", "R4")
        assert open_source(path, reader, "raw", "symbol").genes == ("S1", "S2", "S3", "S4")
        np.testing.assert_array_equal(dense(open_source(path, reader, "twice")), 2 * COUNTS)
        with pytest.raises(InputError, match=r"no layer 'once'; choose 'X', 'raw' .*\['twice'\]"):
            open_source(path, reader, "once")


def test_what_is_not_there_is_refused_with_what_is(tmp_path: Path, reader: StoreReader):
    data = made()
    data.X = None
    path = written(data, tmp_path / "cells.h5ad")
    with pytest.raises(InputError, match=r"cells.h5ad: X is empty; choose 'raw' or a layer"):
        open_source(path, reader)
    with pytest.raises(InputError, match=r"has no raw values; choose 'X' or a layer of \[\]"):
        open_source(path, reader, "raw")
    with pytest.raises(InputError, match=r"obs has no column 'x'; choose one of .*'cell_type'"):
        reader.labels(path, "x")


def test_a_file_from_before_anndata_0_7_is_read(tmp_path: Path, reader: StoreReader):
    path = tmp_path / "old.h5ad"
    matrix = sp.csr_matrix(COUNTS)
    with h5py.File(path, "w") as file:
        for name in ("X", "raw.X"):
            group = file.create_group(name)
            group.attrs.update({"h5sparse_format": "csr", "h5sparse_shape": COUNTS.shape})
            for part in ("data", "indices", "indptr"):
                group[part] = getattr(matrix, part)
        for name, prefix in (("var", ""), ("raw.var", "R")):
            file[name] = np.array(
                [((prefix + gene).encode(),) for gene in GENES], [("index", "S4")]
            )
        file["obs"] = np.array(
            [(f"c{i}".encode(), i) for i in range(4)], [("index", "S4"), ("n", "i8")]
        )
    np.testing.assert_array_equal(dense(open_source(path, reader)), COUNTS)
    assert open_source(path, reader, "raw").genes == ("RA", "RB", "RC", "RD")


def test_categories_as_anndata_0_7_stored_them_are_read(tmp_path: Path, reader: StoreReader):
    path = written(made(), tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        obs = file["obs"]
        obs["__categories/cell_type"] = np.array([b"B", b"T"])
        del obs["cell_type"]
        obs["cell_type"] = np.array([1, 0, 1, -1], np.int8)
        obs["cell_type"].attrs["categories"] = obs["__categories/cell_type"].ref
    assert reader.labels(path, "cell_type").tolist() == TYPES


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_blocks_do_not_change_the_cells(tmp_path: Path, reader: StoreReader, kind, monkeypatch):
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.7, (4, 4)).astype(np.float32)
    path = written(made(kind(counts)), tmp_path / "cells.h5ad")
    whole, _ = read_cells([path], DataConfig(), lambda _: None)
    with h5py.File(path) as file:
        monkeypatch.setattr(store_rows, "BLOCK_ENTRIES", 2)
        monkeypatch.setattr(rows.blocks, "__defaults__", (2,))
        store = store_rows.Store(file, path, Limits(), lambda _: None)
        parts = list(store_rows.rows_of(store_rows.open_matrix(store, "X")))
    assert len(parts) > 1
    source = Source("cells", "X", tuple(GENES), 4, lambda: iter(parts))
    np.testing.assert_array_equal(dense(source), counts)
    assert len(whole) == 4


def test_genes_out_of_order_are_sorted_and_stored_zeros_left_out(tmp_path: Path, reader):
    matrix = sp.csr_matrix(COUNTS)
    for i in range(4):
        part = slice(matrix.indptr[i], matrix.indptr[i + 1])
        matrix.indices[part] = matrix.indices[part][::-1].copy()
        matrix.data[part] = matrix.data[part][::-1].copy()
    matrix.data[0] = 0
    expected = COUNTS.copy()
    expected[0, 2] = 0
    matrix.has_sorted_indices = False
    path = tmp_path / "cells.h5ad"
    written(made(matrix), path)
    blocks = list(checked_rows(open_source(path, reader)))
    assert np.concatenate([block.indices for block in blocks]).tolist() == [0, 0, 1, 2, 3, 1, 3]
    np.testing.assert_array_equal(dense(open_source(path, reader)), expected)


def test_a_column_of_var_names_genes_and_the_index_where_a_name_is_missing(tmp_path, reader):
    data = made(symbol=pd.Categorical(["S1", None, "", "S4"]), number=[1, 2, 3, 4])
    path = written(data, tmp_path / "cells.h5ad")
    source = open_source(path, reader, gene_column="symbol")
    assert source.genes == ("S1", "B", "C", "S4")
    assert source.aliases == {"A": "S1", "D": "S4"}
    assert source.notes == ("2 genes without 'symbol' keep the name of the index",)


def test_a_column_that_no_file_has_is_refused_with_those_there_are(tmp_path: Path):
    path = written(made(symbol=GENES), tmp_path / "cells.h5ad")
    config = IntakeConfig(gene_column="symbols")
    with pytest.raises(InputError, match=r"cells.h5ad: var has no column 'symbols'; .*'symbol'"):
        read_cells([path], DataConfig(), print, intake=config)


def test_the_limits_of_memory_and_time_hold(tmp_path: Path):
    path = written(made(np.zeros((4, 4), np.float32)), tmp_path / "cells.h5ad")
    with (
        StoreReader(Limits(streamed_gib=1e-9)) as reader,
        pytest.raises(InputError, match=r"X: shape \(4, 4\) needs .* over the budget of 1e-09 GiB"),
    ):
        open_source(path, reader)
    with (
        StoreReader(Limits(whole_gib=1e-9)) as reader,
        pytest.raises(InputError, match=r"needs .* at once, over the budget .*--budget-gib"),
    ):
        open_source(path, reader)
    with (
        StoreReader(Limits(seconds=1e-4)) as reader,
        pytest.raises(InputError, match=r"took longer than 0.0001 s; .*--guard-seconds"),
    ):
        open_source(path, reader)


@pytest.mark.parametrize("name", ["whole_gib", "streamed_gib", "seconds"])
def test_a_limit_that_is_not_positive_is_refused(name: str):
    with pytest.raises(InputError, match=f"{name} must be positive, got 0"):
        Limits(**{name: 0})


def test_a_reader_that_dies_says_what_it_looked_at_and_another_one_follows(tmp_path, monkeypatch):
    path = written(made(), tmp_path / "cells.h5ad")
    start = sources.StoreReader.__init__.__globals__["StoreChild"].__init__.__globals__["START"]
    crash = "import os, signal; from sigjax.models import hdf5_guard\n"
    crash += "def die(file, mark): mark('X/data'); os.kill(os.getpid(), signal.SIGSEGV)\n"
    crash += "hdf5_guard.check_file = die\nmain()"
    with StoreReader() as reader:
        monkeypatch.setattr("sigjax.models.store_child.START", start.replace("main()\n", crash))
        with pytest.raises(InputError, match=r"X/data: damaged: .* crashed \(SIGSEGV\); write"):
            open_source(path, reader)
        monkeypatch.undo()
        assert open_source(path, reader).cells == 4


def test_rows_left_half_way_do_not_disturb_what_follows(tmp_path: Path):
    path = written(made(), tmp_path / "cells.h5ad")
    with StoreReader() as reader:
        stream = reader.rows(path, "X")
        next(stream)
        assert open_source(path, reader).cells == 4
        with pytest.raises(RuntimeError, match="used for something else before the last row"):
            next(stream)
        np.testing.assert_array_equal(dense(open_source(path, reader)), COUNTS)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_an_array_added_to_obsm_is_there_for_anndata_and_all_else_as_it_was(
    tmp_path: Path, reader: StoreReader, suffix: str
):
    data = made()
    data.obsm["X_pca"] = np.ones((4, 2))
    for version in (2, 3):
        path = written(data, tmp_path / f"{version}{suffix}", version)
        for scale in (1, 2):
            added = np.full((4, 3), scale, np.float32)
            reader.add_to_obsm(path, "X_sigjax", added, path)
            with quiet():
                read = anndata.read_zarr if suffix == ".zarr" else anndata.read_h5ad
                back = read(path)
            np.testing.assert_array_equal(back.obsm["X_sigjax"], added)
            np.testing.assert_array_equal(back.obsm["X_pca"], data.obsm["X_pca"])
            np.testing.assert_array_equal(sp.csr_matrix(back.X).toarray(), COUNTS)


def test_files_of_other_ids_mix_once_a_table_or_a_column_connects_them(tmp_path: Path):
    ids = [f"ENSG0000000000{i}.{i}" for i in range(4)]
    by_symbol = written(made(), tmp_path / "symbols.h5ad")
    by_id = written(made(genes=ids), tmp_path / "ids.h5ad")
    both = written(made(genes=ids, symbol=GENES), tmp_path / "both.zarr")
    table = tmp_path / "aliases.tsv"
    table.write_text("".join(f"{i}\t{g}\n" for i, g in zip(ids, GENES, strict=True)))
    for paths, config in (
        ([by_symbol, by_id], IntakeConfig(aliases=table)),
        ([by_id, by_symbol, both], IntakeConfig(gene_column="symbol")),
    ):
        cells, vocabulary = read_cells(paths, DataConfig(), print, intake=config)
        assert vocabulary.genes == tuple(GENES)
        np.testing.assert_array_equal(
            cells.gene_ids, np.tile(RESERVED + np.nonzero(COUNTS)[1], len(paths))
        )
    _, apart = read_cells([by_symbol, by_id], DataConfig(), print)
    assert len(apart.genes) == 8


def test_counts_of_genes_of_the_same_name_are_added_up_and_logarithms_are_refused(tmp_path: Path):
    table = tmp_path / "aliases.tsv"
    table.write_text("D\tB\n")
    lines: list[str] = []
    config = IntakeConfig(aliases=table)
    path = written(made(), tmp_path / "counts.h5ad")
    cells, vocabulary = read_cells([path], DataConfig(), lines.append, intake=config)
    assert vocabulary.genes == ("A", "B", "C")
    assert "1 genes added to another of the same name" in lines[0]
    np.testing.assert_allclose(
        cells.values[cells.indptr[2] :], np.log1p([1e3, 6e3, 3e3, 1e4]), rtol=1e-6
    )
    logs = written(made(sp.csr_matrix(np.log1p(COUNTS * 1.7))), tmp_path / "logs.h5ad")
    with pytest.raises(InputError, match=r"logs.h5ad: 'B' and 'D' are the same gene.*--counts"):
        read_cells([logs], DataConfig(), print, intake=config)


def test_counts_are_recovered_on_request_offered_where_they_could_be_and_refused_where_not(
    tmp_path: Path,
):
    totals = np.maximum(COUNTS.sum(1, keepdims=True), 1)
    logs = np.log1p(COUNTS / totals * 3000).astype(np.float32)
    path = written(made(sp.csr_matrix(logs)), tmp_path / "logs.h5ad")
    lines: list[str] = []
    as_is, _ = read_cells([path], DataConfig(), lines.append)
    assert "log-normalised, taken as they are (their counts can be recovered" in lines[-1]
    np.testing.assert_array_equal(as_is.values, logs[logs > 0])
    recover = IntakeConfig(counts="recover")
    recovered, _ = read_cells([path], DataConfig(), lines.append, intake=recover)
    assert "counts recovered exactly and normalised to 10,000 per cell, log1p" in lines[-1]
    counts, _ = read_cells([written(made(), tmp_path / "counts.h5ad")], DataConfig(), lines.append)
    np.testing.assert_array_equal(recovered.values, counts.values)
    logs[2] *= 1 + 0.01 * np.arange(4)
    path = written(made(sp.csr_matrix(logs)), tmp_path / "spoilt.h5ad")
    with pytest.raises(InputError, match=r"counts of 1 of 4 cells cannot be recovered exactly"):
        read_cells([path], DataConfig(), lines.append, intake=recover)
    assert read_cells([path], DataConfig(), lines.append)
    assert "can be recovered" not in lines[-1]
