"""Which tiles of packed rows meet: segments.py."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sigjax.kernels.segments import segment_ranges

BLOCK, OTHER_BLOCK = 4, 3


def packed(lengths: list[int], total: int) -> np.ndarray:
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[:total]
    return np.pad(ids, (0, total - len(ids))).astype(np.int32)


def needed(ids: np.ndarray, others: np.ndarray) -> list[set[int]]:
    """For each tile the tiles of the other side with a pair that takes part."""
    meets = (ids[:, None] == others[None, :]) & (ids[:, None] > 0)
    tiles = [set() for _ in range(-(-len(ids) // BLOCK))]
    for i, j in zip(*np.nonzero(meets), strict=True):
        tiles[i // BLOCK].add(int(j) // OTHER_BLOCK)
    return tiles


def ranges_of(ids: np.ndarray, others: np.ndarray) -> list[tuple[int, int]]:
    ranges = segment_ranges(jnp.array([ids]), jnp.array([others]), BLOCK, OTHER_BLOCK)
    return [tuple(pair) for pair in ranges[0].tolist()]


lengths = st.lists(st.integers(0, 7), min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(lengths, lengths)
def test_packed_rows_visit_every_tile_that_meets_and_whole_tiles_only(rows, columns):
    ids, others = packed(rows, 17), packed(columns, 19)
    for (begin, end), tiles in zip(ranges_of(ids, others), needed(ids, others), strict=True):
        assert begin % OTHER_BLOCK == end % OTHER_BLOCK == 0
        visited = set(range(begin // OTHER_BLOCK, end // OTHER_BLOCK))
        assert tiles <= visited


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=17), lengths)
def test_no_pair_is_lost_whatever_the_order_of_the_segments(ids, columns):
    ids, others = np.array(ids, np.int32), packed(columns, 19)
    for (begin, end), tiles in zip(ranges_of(ids, others), needed(ids, others), strict=True):
        assert tiles <= set(range(begin // OTHER_BLOCK, end // OTHER_BLOCK))


def test_equal_packing_visits_just_the_tiles_that_meet():
    ids = packed([5, 4, 8], 17)
    for (begin, end), tiles in zip(ranges_of(ids, ids), needed(ids, ids), strict=True):
        assert set(range(begin // OTHER_BLOCK, end // OTHER_BLOCK)) == tiles


def test_padding_meets_nothing():
    ids = packed([4], 12)
    assert ranges_of(ids, packed([4], 6)) == [(0, 6), (0, 0), (0, 0)]
    assert ranges_of(np.full(4, -3, np.int32), ids) == [(0, 0)]
