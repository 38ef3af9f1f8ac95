"""Which tiles of packed rows meet: segments.py."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sigjax.kernels.pairs import MIXED, PACKED, UNIFORM
from sigjax.kernels.segments import tile_ranges
from tests.other_process import OtherProcess

BLOCK = 4


def packed(lengths: list[int], total: int) -> np.ndarray:
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[:total]
    return np.pad(ids, (0, total - len(ids))).astype(np.int32)


def needed(ids: np.ndarray, others: np.ndarray) -> list[set[int]]:
    """For each tile the positions of the other side with a pair that takes part."""
    meets = (ids[:, None] == others[None, :]) & (ids[:, None] > 0)
    tiles = [set() for _ in range(-(-len(ids) // BLOCK))]
    for i, j in zip(*np.nonzero(meets), strict=True):
        tiles[i // BLOCK].add(int(j))
    return tiles


def ranges_of(ids: np.ndarray, others: np.ndarray) -> list[tuple[int, int, int]]:
    ranges = tile_ranges(jnp.array([ids]), jnp.array([others]), BLOCK)
    return [tuple(part) for part in ranges[0].tolist()]


lengths = st.lists(st.integers(0, 7), min_size=1, max_size=5)
any_ids = st.lists(st.integers(-1, 4), min_size=1, max_size=17)


@settings(deadline=None, max_examples=60)
@given(any_ids, any_ids)
def test_no_pair_is_lost_and_what_a_range_promises_holds_whatever_the_order(ids, others):
    ids, others = np.array(ids, np.int32), np.array(others, np.int32)
    tiles = [ids[start : start + BLOCK] for start in range(0, len(ids), BLOCK)]
    for tile, (begin, end, kind), met in zip(
        tiles, ranges_of(ids, others), needed(ids, others), strict=True
    ):
        assert met <= set(range(begin, end))
        if kind != MIXED.value:  # no padding among the rows that are read
            assert np.all(others[begin:end] > 0)
        if kind == UNIFORM.value:  # every pair takes part
            assert begin < end
            assert np.all(tile[:, None] == others[None, begin:end])


@settings(deadline=None, max_examples=60)
@given(lengths)
def test_equal_packing_meets_just_its_own_segments(rows):
    ids = packed(rows, 17)
    for (begin, end, kind), met in zip(ranges_of(ids, ids), needed(ids, ids), strict=True):
        assert set(range(begin, end)) == met
        assert not met or kind in (PACKED.value, UNIFORM.value)


def test_padding_meets_nothing():
    ids = packed([4], 12)
    uniform = UNIFORM.value
    assert ranges_of(ids, packed([4], 6)) == [(0, 4, uniform), (0, 0, 0), (0, 0, 0)]
    assert ranges_of(np.full(4, -3, np.int32), ids) == [(0, 0, 0)]


def test_rows_behind_the_lengths_are_padding():
    ids = jnp.ones((2, 8), jnp.int32)
    own, other = jnp.array([6, 0]), jnp.array([3, 8])
    ranges = tile_ranges(ids, ids, BLOCK, own, other).tolist()
    assert ranges == [[[0, 3, 2], [0, 3, 2]], [[0, 0, 0], [0, 0, 0]]]


def test_the_kernel_finds_these_ranges_and_counts_the_keys(interpreter: OtherProcess):
    assert interpreter.check("tests.interpreted_kernels", "check_segments") is None
