"""Tile tables: every tile of every sequence once, long sequences first."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sigjax.kernels.schedule import longest_first, order_of

HEADS, ROWS, TILES = 2, 128, 3  # padded length 3 * 128

pairs_of_lengths = st.tuples(st.integers(0, TILES * ROWS), st.integers(0, 9))
lengths = st.lists(pairs_of_lengths, min_size=1, max_size=6)

# (sequence, head, tile, whether it has work)
type Entry = tuple[int, int, int, bool]


def tiles_of(query_lengths: np.ndarray, key_lengths: np.ndarray) -> list[Entry]:
    """The tiles in the order of the table, as tile_of of hopper_tiles reads it."""
    order, ends = map(
        np.asarray,
        longest_first(jnp.array(query_lengths), jnp.array(key_lengths), HEADS, TILES, ROWS),
    )
    batch = len(query_lengths)
    found = []
    for program in range(TILES * HEADS * batch):
        position = int(np.searchsorted(ends[1:], program, side="right"))
        sequence = int(order[position])
        used = -(-int(query_lengths[sequence]) // ROWS) if key_lengths[sequence] > 0 else 0
        works = position < batch
        count = used if works else TILES - used
        head, tile = divmod(program - int(ends[position]), count)
        tile = (tile + head // 2) % count
        found.append((sequence, head, tile if works else used + tile, works))
    return found


@settings(deadline=None, max_examples=60)
@given(lengths)
def test_every_tile_comes_once_and_works_where_it_has_queries_and_keys(pairs):
    query_lengths, key_lengths = np.array(pairs, np.int32).T
    found = tiles_of(query_lengths, key_lengths)
    everything = {(b, h, t) for b in range(len(pairs)) for h in range(HEADS) for t in range(TILES)}
    assert {tile[:3] for tile in found} == everything
    assert len(found) == len(everything)
    for sequence, _, tile, works in found:
        has_rows = tile * ROWS < query_lengths[sequence] and key_lengths[sequence] > 0
        assert works == has_rows


@settings(deadline=None, max_examples=60)
@given(lengths)
def test_work_comes_before_padding_and_falls_in_length(pairs):
    query_lengths, key_lengths = np.array(pairs, np.int32).T
    found = tiles_of(query_lengths, key_lengths)
    works = [works for *_, works in found]
    assert works == sorted(works, reverse=True)
    taken = [int(key_lengths[sequence]) for sequence, *_, works in found if works]
    assert taken == sorted(taken, reverse=True)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_order_is_a_stable_sort_by_falling_length(values):
    expected = np.argsort(-np.array(values), kind="stable")
    assert order_of(jnp.array(values, jnp.int32)).tolist() == expected.tolist()


def test_the_table_is_built_inside_jit():
    build = jax.jit(longest_first, static_argnums=(2, 3, 4))
    order, ends = build(jnp.array([100, 300]), jnp.array([5, 9]), 1, TILES, ROWS)
    assert order.tolist() == [1, 0, 1, 0]
    assert ends.tolist() == [0, 3, 4, 4, 6]
