"""Counts come back from log-normalised values exactly, or not at all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigjax.models.recovery import recover_counts

TRANSFORMS = {"log1p": np.log1p, "log2": lambda x: np.log2(x + 1)}


def normalised(counts: list[list[int]], target: float, log="log1p", dtype=np.float32):
    """What scanpy's normalize_total and log1p make of cells, in float32 throughout."""
    indptr = np.cumsum([0] + [len(cell) for cell in counts])
    values = [
        TRANSFORMS[log](np.array(cell, dtype) * dtype(target / sum(cell))).astype(dtype)
        for cell in counts
        if cell
    ]
    return indptr, np.concatenate(values) if values else np.zeros(0, dtype)


@settings(deadline=None, max_examples=60)
@given(
    cells=st.lists(st.lists(st.integers(1, 3000), max_size=40), min_size=1, max_size=6),
    target=st.sampled_from([1e4, 1e6, 1234.5]),
    log=st.sampled_from(sorted(TRANSFORMS)),
)
def test_counts_of_cells_with_a_count_of_one_come_back(cells, target, log):
    # The first cell leaves no doubt about the base.
    cells = [[*range(1, 40)], *([1, *cell] if cell else [] for cell in cells)]
    indptr, values = normalised(cells, target, log)
    found = recover_counts(indptr, values)
    assert found.exact.all()
    assert found.counts.tolist() == [count for cell in cells for count in cell]


@pytest.mark.parametrize("smallest", [2, 3, 5])
def test_counts_come_back_where_the_smallest_is_not_one(smallest: int):
    cell = [smallest, smallest + 1, 2 * smallest + 1, 40]
    found = recover_counts(*normalised([cell], 1e4))
    assert found.counts.tolist() == cell


def test_counts_with_a_common_divisor_come_back_without_it():
    assert recover_counts(*normalised([[4, 8, 12]], 1e4)).counts.tolist() == [1, 2, 3]


def test_each_cell_is_judged_alone():
    indptr, values = normalised([[1, 5, 2], [1, 7, 9]], 1e4)
    values[1] *= 1.01
    found = recover_counts(indptr, values)
    assert found.exact.tolist() == [False, True]
    assert found.counts.tolist() == [0, 0, 0, 1, 7, 9]


def test_values_that_never_were_counts_do_not_come_back():
    rng = np.random.default_rng(0)
    indptr = np.arange(0, 2001, 100)
    assert not recover_counts(indptr, rng.uniform(0.1, 6, 2000).astype(np.float32)).exact.any()


def test_counts_too_large_for_float32_to_tell_apart_do_not_come_back():
    # Their neighbours have the same logarithm in float32.
    found = recover_counts(*normalised([[1, 9_000_001, 3]], 1e4))
    assert not found.exact.any()


def test_values_past_every_logarithm_do_not_come_back_and_do_not_overflow():
    assert not recover_counts(np.array([0, 2]), np.array([1.0, 1e30])).exact.any()


def test_a_cell_without_values_has_its_counts_already():
    assert recover_counts(np.array([0, 0]), np.zeros(0)).exact.tolist() == [True]
