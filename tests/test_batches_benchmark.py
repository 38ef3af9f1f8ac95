"""The benchmark of batches: its check sees what is wrong, its rows say where they come from."""

import csv
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import batches
from sigjax.models.cells import Cells
from sigjax.models.collate import Collator
from sigjax.models.vocabulary import RESERVED


@pytest.fixture
def cells(monkeypatch) -> Cells:
    monkeypatch.setattr(batches, "CELLS", 40)
    return batches.made()


@pytest.mark.parametrize("count", [1, 3])
def test_the_check_passes_whole_batches(cells, count, capsys):
    assert batches.is_exact(cells, batches.GENES + RESERVED, count)
    assert "each of 40 cells once and all of its values: yes" in capsys.readouterr().out


@pytest.mark.parametrize("field", ["rows", "values"])
def test_the_check_fails_where_a_cell_or_a_value_is_wrong(cells, field, monkeypatch, capsys):
    single = Collator.single

    def spoilt(self, planned):
        batch = single(self, planned)
        array = getattr(batch, field).copy()
        array[0] = np.roll(array[0], 1) if field == "values" else array[1]
        return batch._replace(**{field: array})

    monkeypatch.setattr(Collator, "single", spoilt)
    assert not batches.is_exact(cells, batches.GENES + RESERVED, 1)
    assert "NO" in capsys.readouterr().out


def test_every_encoding_is_timed_and_written(cells, tmp_path, monkeypatch, capsys):
    config = replace(batches.UNCUT, buckets=2)
    monkeypatch.setattr(batches, "UNCUT", config)
    out = tmp_path / "batches.csv"
    assert batches.main(["--rounds", "1", "--batches", "1", "--out", str(out)]) == 0
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["encoding"] for row in rows] == ["log1p", "bins", "rank"]
    assert all(int(row["cells_per_s"]) > 0 and row["load_1min"] for row in rows)
    assert "cells/s" in capsys.readouterr().out
