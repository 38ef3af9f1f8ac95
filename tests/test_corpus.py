"""Many files in one run: values in are values out, and the commands take all options of intake."""

import os
from pathlib import Path
from typing import Any, cast

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from sigjax.models import cli
from sigjax.models.checkpoints import describe
from sigjax.models.config import DataConfig, InputError
from sigjax.models.corpus import read_cells
from sigjax.models.intake import IntakeConfig
from sigjax.models.manifest import find_stores, write_manifest
from sigjax.models.quiet import quiet
from sigjax.models.recovery import recover_counts
from sigjax.models.vocabulary import RESERVED, Vocabulary, read_aliases

# The ten real sets, as `unpack` writes them; their exactness is checked where they are.
CELLS = os.environ.get("SIGJAX_CELLS")
UNCUT = DataConfig(max_genes=10**6)
GENES = [f"GENE{i}" for i in range(40)]
OPTIONS = {
    "layers": 1,
    "width": 16,
    "heads": 2,
    "steps": 2,
    "buckets": 2,
    "multiple": 16,
    "tokens-per-batch": 256,
    "query-genes": 16,
    "held-out": 0.2,
}
SMALL = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]


def write(path: Path, seed: int, genes=GENES, change=lambda x: x, **var) -> Path:
    """Counts of 30 cells, no cell without any."""
    counts = np.random.default_rng(seed).poisson(0.8, (30, len(genes))).astype(np.float32)
    counts[:, 0] += 1
    with quiet():
        obs = pd.DataFrame({"cell_type": ["T", "B"] * 15}, index=[f"c{i}" for i in range(30)])
        data = anndata.AnnData(sp.csr_matrix(change(counts)), obs=obs)
        data.var = pd.DataFrame(var, index=genes)
        (data.write_zarr if path.suffix == ".zarr" else data.write_h5ad)(path)
    return path


def check_exact(paths: list[Path], vocabulary: Vocabulary, cells) -> int:
    """Compares each cell with what scipy makes of the file; returns the number of cells."""
    first = 0
    for path in paths:
        with quiet():
            data = (anndata.read_zarr if path.is_dir() else anndata.read_h5ad)(path)
        counts = sp.csr_matrix(data.X).astype(np.float64)
        ids = vocabulary.ids(list(data.var_names))
        assert ids.min() >= RESERVED
        # Columns of the same gene add up.
        to_token = sp.csr_matrix(
            (np.ones(len(ids)), (np.arange(len(ids)), ids)), (len(ids), vocabulary.size)
        )
        tokens = (counts @ to_token).tocsr()
        tokens.sort_indices()
        totals = np.asarray(counts.sum(axis=1)).ravel()
        per_entry = np.repeat(1e4 / totals, np.diff(tokens.indptr))
        here = cells.take(np.arange(first, first + len(totals)))
        np.testing.assert_array_equal(here.indptr, tokens.indptr)
        np.testing.assert_array_equal(here.gene_ids, tokens.indices)
        expected = np.log1p(tokens.data * per_entry).astype(np.float32)
        np.testing.assert_array_equal(here.values, expected)
        # And the counts themselves are still in the values.
        np.testing.assert_array_equal(
            np.rint(np.expm1(here.values.astype(np.float64)) / per_entry), tokens.data
        )
        first += len(totals)
    assert first == len(cells)
    return first


@pytest.mark.parametrize("in_memory", [2**30, 100], ids=["in memory", "on disk"])
def test_values_in_are_values_out_for_a_folder_of_stores(tmp_path: Path, monkeypatch, in_memory):
    monkeypatch.setattr("sigjax.models.spool.Spool.__init__.__defaults__", (in_memory, tmp_path))
    data = tmp_path / "data"
    (data / "more").mkdir(parents=True)
    write(data / "a.h5ad", 0)
    write(data / "b.zarr", 1, [f"GENE{i}" for i in range(30, 60)])
    write(data / "more/c.h5ad", 2, [f"OTHER{i}" for i in range(30)])
    lines: list[str] = []
    cells, vocabulary = read_cells([data], UNCUT, lines.append)
    assert isinstance(cells.values, np.memmap) == (in_memory == 100)
    assert check_exact(list(find_stores([data])), vocabulary, cells) == 90
    assert [line.split(": ")[0].rsplit("/")[-1] for line in lines] == ["a.h5ad", "b.zarr", "c.h5ad"]


@pytest.mark.skipif(CELLS is None, reason="SIGJAX_CELLS names no folder with the ten real sets")
@pytest.mark.parametrize("names", ["as they are", "by table", "by column"])
def test_values_in_are_values_out_for_the_ten_real_sets(names: str):
    folder = Path(str(CELLS))
    intake = {
        "as they are": IntakeConfig(),
        "by table": IntakeConfig(aliases=folder / "genes.tsv"),
        "by column": IntakeConfig(gene_column="gene_symbol"),
    }[names]
    cells, vocabulary = read_cells([folder], UNCUT, print, intake=intake)
    if names != "by column":
        assert check_exact(list(find_stores([folder])), vocabulary, cells) == 17_604
    known = {"as they are": 83_212, "by table": 59_932, "by column": 62_399}
    assert len(vocabulary.genes) == known[names]


@pytest.mark.skipif(CELLS is None, reason="SIGJAX_CELLS names no folder with the ten real sets")
def test_counts_of_the_real_sets_are_recovered_after_log_normalisation():
    for path in find_stores([Path(str(CELLS))]):
        with quiet():
            counts = sp.csr_matrix(anndata.read_h5ad(path).X)
        totals = np.asarray(counts.sum(axis=1)).ravel().astype(np.float32)
        lengths = np.diff(counts.indptr)
        logs = np.log1p(counts.data * np.repeat(np.float32(1e4) / totals, lengths))
        assert logs.dtype == np.float32
        found = recover_counts(counts.indptr.astype(np.int64), logs)
        # Full-length reads count past 100,000, where float32 cannot always tell counts apart.
        assert found.exact.mean() >= (0.9 if "full_length" in path.name else 1)
        exact = np.repeat(found.exact, lengths)
        np.testing.assert_array_equal(found.counts[exact], counts.data[exact])


def test_a_file_that_changed_since_its_manifest_is_refused_before_it_is_read(tmp_path: Path):
    path = write(tmp_path / "cells.h5ad", 0)
    config = IntakeConfig(manifest=tmp_path / "SHA256SUMS")
    write_manifest([path], tmp_path / "SHA256SUMS")
    assert len(read_cells([path], UNCUT, print, intake=config)[0]) == 30
    write(path, 1)
    assert len(read_cells([path], UNCUT, print)[0]) == 30
    with pytest.raises(InputError, match=r"cells.h5ad: its bytes are not those"):
        read_cells([path], UNCUT, print, intake=config)


def test_counts_are_taken_as_they_are_or_recovered_and_nothing_else():
    with pytest.raises(InputError, match="counts must be 'as-is' or 'recover', got 'guess'"):
        IntakeConfig(counts=cast("Any", "guess"))


def test_unknown_genes_are_counted_and_coverage_is_told(tmp_path: Path):
    path = write(tmp_path / "cells.h5ad", 0)
    lines: list[str] = []
    read_cells([path], UNCUT, lines.append, Vocabulary(tuple(GENES[:10])))
    assert "10 of 40 genes known (25.0%)" in lines[0]
    assert "values of unknown genes left out" in lines[0]


def test_the_commands_take_stores_tables_and_manifests_from_training_to_embedding(
    tmp_path: Path, capsys
):
    data = tmp_path / "data"
    data.mkdir()
    ids = [f"ENSG{i:011d}" for i in range(40)]
    write(data / "symbols.h5ad", 0)
    store = write(data / "ids.zarr", 1, [f"{name}.2" for name in ids])
    table = tmp_path / "aliases.tsv"
    table.write_text("".join(f"{i}\t{g}\n" for i, g in zip(ids, GENES, strict=True)))
    sums, run, out = tmp_path / "SUMS", tmp_path / "run", tmp_path / "out.zarr"
    assert cli.main(["manifest", str(data), "--out", str(sums)]) == 0
    train = ["train", str(data), "--out", str(run), *SMALL, "--manifest", str(sums)]
    assert cli.main([*train, "--aliases", str(table)]) == 0
    vocabulary = describe(run / "checkpoint").vocabulary
    assert vocabulary.genes == tuple(sorted(GENES, key=lambda name: int(name[4:])))
    assert vocabulary.aliases == read_aliases(table)
    # The checkpoint brings the table along.
    embed = ["embed", str(store), "--checkpoint", str(run)]
    assert cli.main([*embed, "--out", str(out)]) == 0
    assert "40 of 40 genes known" in capsys.readouterr().out
    with quiet():
        assert anndata.read_zarr(out).obsm["X_sigjax"].shape == (30, 16)
    # In the format it was read in, or not at all.
    other = tmp_path / "out.h5ad"
    assert cli.main([*embed, "--out", str(other)]) == 2
    assert "out.h5ad: must be a zarr store, as " in capsys.readouterr().err
    assert not other.exists()
