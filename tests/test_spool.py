"""Cells are the same whether they were kept in memory or on disk."""

from pathlib import Path

import numpy as np
import pytest

from sigjax.models import spool as spool_module
from sigjax.models.rows import Rows, blocks, by_token, cut, known
from sigjax.models.spool import Spool


def filled(spool: Spool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    for _ in range(5):
        lengths = rng.integers(0, 40, 30)
        spool.append(lengths, rng.integers(2, 99, lengths.sum()), rng.uniform(1, 9, lengths.sum()))
    spool.log_normalise(30, np.linspace(0.5, 2, 60))
    return spool.finish()


def test_on_disk_and_in_memory_are_the_same(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(spool_module, "STEP", 100)
    in_memory = filled(Spool())
    on_disk = filled(Spool(in_memory=2000, folder=tmp_path))
    assert isinstance(on_disk[2], np.memmap)
    assert not isinstance(in_memory[2], np.memmap)
    for ours, theirs in zip(on_disk, in_memory, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert list(tmp_path.iterdir()) == []


def test_only_the_cells_that_were_asked_for_are_log_normalised():
    spool = Spool()
    for _ in range(3):
        spool.append(np.array([2]), np.array([2, 3]), np.array([1.0, 3.0]))
    spool.log_normalise(1, np.array([2.0]))
    indptr, ids, values = spool.finish()
    assert indptr.tolist() == [0, 2, 4, 6]
    assert ids.tolist() == [2, 3] * 3
    expected = np.array([1, 3, *np.log1p([2.0, 6.0]), 1, 3], np.float32)
    np.testing.assert_array_equal(values, expected)


def test_an_empty_spool_gives_no_cells():
    indptr, ids, values = Spool().finish()
    assert (indptr.tolist(), ids.dtype, values.dtype) == ([0], np.int32, np.float32)


@pytest.mark.parametrize("most", [1, 4, 7, 100])
def test_blocks_cover_every_row_once_and_hold_at_most_so_many_entries(most: int):
    indptr = np.cumsum([0, 3, 0, 0, 9, 1, 1, 0, 2])
    found = list(blocks(indptr, most))
    assert [start for start, _ in found] == [0] + [end for _, end in found[:-1]]
    assert found[-1][1] == 8
    assert all(indptr[b] - indptr[a] <= most or b - a == 1 for a, b in found)


def test_rows_are_mapped_added_up_and_cut_one_by_one():
    rows = Rows(np.array([0, 3, 3, 5]), np.array([0, 1, 3, 2, 3]), np.array([5.0, 1, 2, 7, 8]))
    tokens = by_token(known(rows, np.array([4, 3, -1, 3])), 5)
    assert tokens.indptr.tolist() == [0, 2, 2, 3]
    assert tokens.indices.tolist() == [3, 4, 3]
    assert tokens.values.tolist() == [3, 5, 8]
    assert cut(tokens, 1).values.tolist() == [5, 8]
