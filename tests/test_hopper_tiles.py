"""Which rows the consumers of the Hopper forward kernel take: kernels/hopper_tiles.py."""

from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigjax.kernels.schedule import longest_first
from tests.emulated_hopper import Emulator, Pointer, Scalar

HEADS, BLOCK, CONSUMERS = 2, 64, 3
ROWS = CONSUMERS * BLOCK

# (sequence, head, first rows of the consumers' blocks, how many of these have queries)
type Taken = tuple[int, int, list[int], int]


def taken(
    length: int, lengths: tuple[list[int], list[int]] | None, batch: int, *, is_causal: bool
) -> list[Taken]:
    """What each program takes, one tile a program."""
    device = Emulator().module("hopper_tiles")
    tiles = -(-length // ROWS)
    pointers = [None] * 4
    if lengths is not None:
        arrays = [jnp.array(x, jnp.int32) for x in lengths]
        arrays += longest_first(*arrays, HEADS, tiles, ROWS)
        pointers = [Pointer(np.asarray(x)) for x in arrays]
    schedule = (*pointers, Scalar(batch), Scalar(length), Scalar(length))
    found = []
    for program in range(tiles * HEADS * batch):
        _, sequence, head, start, stop, spare, queries, keys = device.tile_of(
            Scalar(program), Scalar(0), schedule, HEADS, BLOCK, CONSUMERS, is_causal, 0, True
        )
        rows = [device.row_of(start, stop, spare, BLOCK, True, i) for i in range(CONSUMERS)]
        works = sum(row < queries for row in rows) if keys > 0 else 0
        assert all(row < stop for row in rows[:works]), "who computes has rows of the tile"
        found.append((int(sequence), int(head), [int(row) for row in rows], works))
    return found


def assert_each_block_once(found: list[Taken], length: int, batch: int) -> None:
    blocks = Counter((b, h, row) for b, h, rows, _ in found for row in rows)
    padded = -(-length // ROWS) * ROWS
    assert blocks == Counter(
        (b, h, row) for b in range(batch) for h in range(HEADS) for row in range(0, padded, BLOCK)
    )


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@settings(deadline=None, max_examples=40)
@given(length=st.integers(1, 2000), batch=st.integers(1, 3))
def test_every_block_of_rows_is_taken_once_by_tiles_that_lack_at_most_one_more(
    is_causal: bool, length: int, batch: int
):
    found = taken(length, None, batch, is_causal=is_causal)
    assert_each_block_once(found, length, batch)
    works = [works for *_, works in found]
    assert max(works) - min(works) <= 1


@settings(deadline=None, max_examples=40)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 3)), min_size=1, max_size=4),
    more=st.integers(0, 400),
)
def test_so_it_is_with_lengths_padding_and_sequences_without_keys(
    pairs: list[tuple[int, int]], more: int
):
    queries, keys = (list(x) for x in zip(*pairs, strict=True))
    length = max(1, *queries) + more
    found = taken(length, (queries, keys), len(pairs), is_causal=False)
    assert_each_block_once(found, length, len(pairs))
    for sequence, count in enumerate(queries):
        works = [works for b, *_, works in found if b == sequence and works > 0]
        has_keys = keys[sequence] > 0
        assert sum(works) == has_keys * HEADS * -(-count // BLOCK)
        assert not works or max(works) - min(works) <= 1
