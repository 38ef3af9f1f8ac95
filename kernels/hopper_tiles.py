"""Which tile of queries comes next, and which keys it has (Gluon device code)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sigjax.kernels.hopper_math import uniform


@gluon.jit
def key_range(
    start, key_length, ROWS: gl.constexpr, BLOCK_K: gl.constexpr, IS_CAUSAL: gl.constexpr
):
    """(inner, end): key blocks below inner need no mask, those from inner to end do."""
    inner = key_length // BLOCK_K * BLOCK_K
    end = key_length
    if IS_CAUSAL:
        inner = gl.minimum(inner, (start + 1) // BLOCK_K * BLOCK_K)
        end = gl.minimum(end, start + ROWS)
    return inner, end


@gluon.jit
def tiles_of(schedule, N: gl.constexpr, ROWS: gl.constexpr):
    """Number of tiles of all heads and sequences."""
    return gl.cdiv(schedule[5], ROWS) * N * schedule[4]


@gluon.jit
def tile_of(
    program, position, schedule, N: gl.constexpr, ROWS: gl.constexpr, IS_CAUSAL: gl.constexpr
):
    """(position, batch, head, first query, query length, key length) of one tile.

    The key length of a tile of padding is 0. Without lengths a head's tiles are neighbours, to
    share L2; with lengths the longest sequences come first, see schedule.py, and position is
    where in the order to look from on.
    """
    query_lengths_ptr, key_lengths_ptr, order_ptr, ends_ptr, B, T, S = schedule
    per_head = gl.cdiv(T, ROWS)
    if order_ptr is None:
        tile = program % per_head
        head = program // per_head
        tile = rotated(tile, head, per_head)
        batch = head // N
        head = head % N
        query_length = gl.to_tensor(T)
        key_length = gl.to_tensor(S)
        used = gl.to_tensor(per_head)
        first = tile * 0
    else:
        end = gl.load(ends_ptr + position + 1)
        while program >= end:
            position += 1
            end = gl.load(ends_ptr + position + 1)
        tile = program - gl.load(ends_ptr + position)
        batch = uniform(gl.load(order_ptr + position))
        query_length = uniform(gl.load(query_lengths_ptr + batch))
        key_length = uniform(gl.load(key_lengths_ptr + batch))
        used = gl.cdiv(query_length, ROWS)
        if key_length <= 0:
            used = used * 0
        first = used * 0
        if position >= B:
            first = used
            used = per_head - used
            key_length = key_length * 0
        head = tile // used
        tile = rotated(tile - head * used, head, used)
    if IS_CAUSAL:
        # Every other head from the end, so that a program gets long and short tiles.
        if head % 2 == 0:
            tile = used - 1 - tile
    start = uniform((first + tile) * ROWS)
    return uniform(position), uniform(batch), uniform(head), start, query_length, key_length


@gluon.jit
def rotated(tile, head, tiles):
    """Another tile of the same head: programs take every so many-th, and not all are as long."""
    return (tile + head // 2) % tiles
