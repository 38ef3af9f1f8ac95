"""Named workloads: shapes, lengths and what is counted."""

import dataclasses
import re

import pytest

from sigjax.testing import (
    PAPER_HEAD_SIZES,
    PAPER_LENGTHS,
    WORKLOAD_NAMES,
    workload,
)
from tests.benchmark_parts import TINY

PADDED25_4K = (3787, 3575, 3983, 3563)
RAGGED = (
    1451,
    1188,
    263,
    786,
    14599,
    2769,
    1809,
    6653,
    16378,
    880,
    878,
    1045,
    3958,
    8105,
    810,
    803,
)


@pytest.mark.parametrize("head_size", PAPER_HEAD_SIZES)
@pytest.mark.parametrize("length", PAPER_LENGTHS)
@pytest.mark.parametrize("name", ["dense", "padded25", "padded50"])
def test_the_papers_workloads_keep_tokens_and_width(name, length, head_size):
    shape = workload(name, length, head_size)
    assert shape.batch * shape.length == 16384
    assert shape.heads * shape.head_size == 2048
    assert shape.dtype == "bfloat16"


@pytest.mark.parametrize(("name", "share"), [("padded25", 0.75), ("padded50", 0.5)])
def test_padded_lengths_fill_their_range(name, share):
    lengths = workload(name, 64, 128, tokens=64 * 2000).lengths
    assert lengths is not None
    assert (min(lengths), max(lengths)) == (share * 64, 64)


def test_ragged_is_sixteen_rows_spread_log_uniformly_from_200_to_t():
    shape = workload("ragged", 16384, 128)
    assert shape.lengths is not None
    assert shape.batch == len(shape.lengths) == 16
    assert all(200 <= length <= 16384 for length in shape.lengths)
    middle = (200 * 16384) ** 0.5
    assert 4 <= sum(length < middle for length in shape.lengths) <= 12


@pytest.mark.parametrize("name", WORKLOAD_NAMES)
def test_lengths_do_not_depend_on_the_head_size_or_the_moment(name):
    assert workload(name, 4096, 64).lengths == workload(name, 4096, 128).lengths


def test_lengths_stay_what_committed_results_were_measured_with():
    assert workload("padded25", 4096, 64).lengths == PADDED25_4K
    assert workload("ragged", 16384, 64).lengths == RAGGED


def test_flops_count_useful_pairs_and_two_and_a_half_times_as_many_backward():
    dense = workload("dense", 16384, 128)
    assert dense.flops("forward") == 4 * 2048 * 16384**2
    assert dense.flops("backward") == 2.5 * dense.flops("forward")
    assert TINY.flops("forward") == 4 * 2 * 16 * (32**2 + 24**2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dance", 1024, 64), "name must be one of dense, padded25, padded50, ragged, got 'dance'"),
        (("dense", 1000, 64), "length must divide tokens = 16384, got 1000"),
        (("dense", 1024, 96), "head_size must divide width = 2048, got 96"),
        (("ragged", 0, 64), "length must divide"),
    ],
    ids=["name", "length", "head-size", "zero"],
)
def test_a_workload_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        workload(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"lengths": (1,)}, "lengths must hold batch = 2 numbers, got 1"),
        ({"lengths": (1, 33)}, "lengths must lie between 0 and length = 32"),
    ],
    ids=["size", "count", "range"],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(TINY, **change)
