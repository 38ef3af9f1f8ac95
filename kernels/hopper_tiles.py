"""Which tile of queries comes next, and which keys it has (Gluon device code)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sigjax.kernels.hopper_math import uniform
from sigjax.kernels.hopper_pairs import keys_of_rows, keys_of_tile
from sigjax.kernels.hopper_queue import hear

ALL_SEQUENCES = gl.constexpr(-1)  # of SHARERS


@gluon.jit
def tile_keys(
    tile, schedule, ranges_ptr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    CONSUMERS: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """(whether there are any, begin, end): the keys of a tile, from a block's begin on.

    The producer copies these blocks and every consumer counts them, computing or not.
    """
    batch, start, query_length, key_length = tile
    if LEFT is None and ranges_ptr is None:
        some = key_length > 0
        begin = 0
        end = key_length
        if RIGHT is not None:
            end = gl.minimum(end, start + CONSUMERS * BLOCK_Q)
    else:
        begin, end = keys_of_tile(
            start, query_length, key_length, ranges_ptr, batch, schedule[5], BLOCK_Q, BLOCK_K,
            CONSUMERS, LEFT, RIGHT,
        )  # fmt: skip
        begin = uniform(begin)
        end = uniform(end)
        some = end > 0
    return some, begin, end


@gluon.jit
def own_keys(
    tile, row, begin, end, schedule, ranges_ptr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """(begin, inner, inner_end, end): the keys of a consumer's rows, of those of the tile.

    Key blocks from inner to inner_end need no mask. Without window and segments all consumers
    take all of the tile's, from begin to end.
    """
    batch, start, query_length, key_length = tile
    if LEFT is None and ranges_ptr is None:
        inner = 0
        inner_end = key_length // BLOCK_K * BLOCK_K
        if RIGHT is not None:
            inner_end = gl.minimum(inner_end, (start + 1) // BLOCK_K * BLOCK_K)
    else:
        begin, inner, inner_end, end = keys_of_rows(
            row, query_length, key_length, ranges_ptr, batch, schedule[5], BLOCK_Q, BLOCK_K, LEFT,
            RIGHT,
        )  # fmt: skip
        begin = uniform(begin)
        inner = uniform(inner)
        inner_end = uniform(inner_end)
        end = uniform(end)
    return begin, inner, inner_end, end


@gluon.jit
def tiles_of(schedule, N: gl.constexpr, ROWS: gl.constexpr):
    """Number of tiles of all heads and sequences."""
    return gl.cdiv(schedule[5], ROWS) * N * schedule[4]


@gluon.jit
def tile_of(
    program, position, schedule, N: gl.constexpr, ROWS: gl.constexpr, IS_CAUSAL: gl.constexpr,
    SHARERS: gl.constexpr,
):  # fmt: skip
    """(position, batch, head, first query, query length, key length) of one tile.

    The key length of a tile of padding is 0. Without lengths a head's tiles are neighbours, to
    share L2; with lengths the longest sequences come first, see schedule.py, and position is
    where in the order to look from on.

    SHARERS are neighbours that take the same tile one after the other, as they share its part of
    a matrix of pairs: so many heads; or with ALL_SEQUENCES, where there are no lengths, one head
    of every sequence; 0 is nobody.
    """
    query_lengths_ptr, key_lengths_ptr, order_ptr, ends_ptr, B, T, S = schedule
    per_head = gl.cdiv(T, ROWS)
    if order_ptr is None:
        if SHARERS == 0:
            tile = program % per_head
            head = program // per_head
            tile = rotated(tile, head, per_head)
            batch = head // N
            head = head % N
            group = head
        elif SHARERS == ALL_SEQUENCES:
            batch = program % B
            tile = program // B % per_head
            head = program // B // per_head
            tile = rotated(tile, head, per_head)
            group = head
        else:
            tile = program // SHARERS % per_head
            group = program // SHARERS // per_head
            tile = rotated(tile, group, per_head)
            batch = group // (N // SHARERS)
            head = group % (N // SHARERS) * SHARERS + program % SHARERS
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
        if SHARERS > 0:
            member = tile % SHARERS
            tile = tile // SHARERS
            group = tile // used
            tile = rotated(tile - group * used, group, used)
            head = group * SHARERS + member
        else:
            head = tile // used
            tile = rotated(tile - head * used, head, used)
            group = head
    if IS_CAUSAL:
        # Every other head from the end, so that a program gets long and short tiles.
        if group % 2 == 0:
            tile = used - 1 - tile
    start = uniform((first + tile) * ROWS)
    return uniform(position), uniform(batch), uniform(head), start, query_length, key_length


@gluon.jit
def tile_after(queue, taken, program, position, tiles, work):
    """(tile_of the program, program), the last tile's where it is past all of them.

    With a queue program is what comes after a consumer's taken-th tile, whatever was given. work is
    (schedule, N, ROWS, ..).
    """
    N: gl.constexpr = work[1]
    ROWS: gl.constexpr = work[2]
    IS_CAUSAL: gl.constexpr = work[3]
    SHARERS: gl.constexpr = work[4]
    if queue is not None:
        program = hear(queue, taken)
    last = gl.minimum(program, tiles - 1)
    return tile_of(last, position, work[0], N, ROWS, IS_CAUSAL, SHARERS), program


@gluon.jit
def rotated(tile, head, tiles):
    """Another tile of the same head: programs take every so many-th, and not all are as long."""
    return (tile + head // 2) % tiles
