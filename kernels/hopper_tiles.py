"""Which tile of queries comes next, and which keys it has (Gluon device code)."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sigjax.kernels.hopper_math import uniform
from sigjax.kernels.hopper_pairs import keys_of_rows, keys_of_tile
from sigjax.kernels.hopper_queue import hear

ALL_SEQUENCES = gl.constexpr(-1)  # of SHARERS


class Schedule(NamedTuple):
    """Of which sequences the tiles are, see schedule.py; pointers are None without lengths."""

    query_lengths_ptr: Any
    key_lengths_ptr: Any
    order_ptr: Any
    ends_ptr: Any
    B: Any
    T: Any
    S: Any


class Tile(NamedTuple):
    """CONSUMERS * BLOCK_Q queries of one head; of padding where the key length is 0."""

    position: Any  # of the sequence in the order
    batch: Any
    head: Any
    start: Any  # first query
    query_length: Any
    key_length: Any


class Keys(NamedTuple):
    """The keys of a consumer's rows; blocks from inner to inner_end need no mask."""

    begin: Any
    inner: Any
    inner_end: Any
    end: Any


class Upcoming(NamedTuple):
    """What tile_after needs to find the tile after a consumer's taken-th."""

    queue: Any
    taken: Any
    program: Any  # which it is, where there is no queue
    position: Any
    tiles: Any  # how many there are
    schedule: Schedule


@gluon.jit
def tile_keys(tile, schedule, ranges_ptr, options):
    """(whether there are any, begin, end): the keys of a tile, from a block's begin on.

    The producer copies these blocks and every consumer counts them, computing or not.
    """
    if options.LEFT is None and ranges_ptr is None:
        some = tile.key_length > 0
        begin = 0
        end = tile.key_length
        if options.RIGHT is not None:
            end = gl.minimum(end, tile.start + options.CONSUMERS * options.BLOCK_Q)
    else:
        begin, end = keys_of_tile(
            tile.start, tile.query_length, tile.key_length, ranges_ptr, tile.batch, schedule.T,
            options.BLOCK_Q, options.BLOCK_K, options.CONSUMERS, options.LEFT, options.RIGHT,
        )  # fmt: skip
        begin = uniform(begin)
        end = uniform(end)
        some = end > 0
    return some, begin, end


@gluon.jit
def own_keys(tile, row, begin, end, schedule, ranges_ptr, options):
    """The keys of a consumer's rows, from row on, of those of the tile, from begin to end.

    Without window and segments all consumers take all of the tile's.
    """
    BLOCK_K: gl.constexpr = options.BLOCK_K
    if options.LEFT is None and ranges_ptr is None:
        inner = 0
        inner_end = tile.key_length // BLOCK_K * BLOCK_K
        if options.RIGHT is not None:
            inner_end = gl.minimum(inner_end, (tile.start + 1) // BLOCK_K * BLOCK_K)
    else:
        begin, inner, inner_end, end = keys_of_rows(
            row, tile.query_length, tile.key_length, ranges_ptr, tile.batch, schedule.T,
            options.BLOCK_Q, BLOCK_K, options.LEFT, options.RIGHT,
        )  # fmt: skip
        begin = uniform(begin)
        inner = uniform(inner)
        inner_end = uniform(inner_end)
        end = uniform(end)
    return Keys(begin, inner, inner_end, end)


@gluon.jit
def tiles_of(schedule, options):
    """Number of tiles of all heads and sequences."""
    ROWS: gl.constexpr = options.CONSUMERS * options.BLOCK_Q
    return gl.cdiv(schedule.T, ROWS) * options.N * schedule.B


@gluon.jit
def tile_of(program, position, schedule, options):
    """One of the tiles; position is where in the order of the sequences to look from on.

    Without lengths a head's tiles are neighbours, to
    share L2; with lengths the longest sequences come first, see schedule.py.

    SHARERS are neighbours that take the same tile one after the other, as they share its part of
    a matrix of pairs: so many heads; or with ALL_SEQUENCES, where there are no lengths, one head
    of every sequence; 0 is nobody.
    """
    N: gl.constexpr = options.N
    ROWS: gl.constexpr = options.CONSUMERS * options.BLOCK_Q
    SHARERS: gl.constexpr = options.SHARERS
    ends_ptr, B = schedule.ends_ptr, schedule.B
    per_head = gl.cdiv(schedule.T, ROWS)
    if schedule.order_ptr is None:
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
        query_length = gl.to_tensor(schedule.T)
        key_length = gl.to_tensor(schedule.S)
        used = gl.to_tensor(per_head)
        first = tile * 0
    else:
        end = gl.load(ends_ptr + position + 1)
        while program >= end:
            position += 1
            end = gl.load(ends_ptr + position + 1)
        tile = program - gl.load(ends_ptr + position)
        batch = uniform(gl.load(schedule.order_ptr + position))
        query_length = uniform(gl.load(schedule.query_lengths_ptr + batch))
        key_length = uniform(gl.load(schedule.key_lengths_ptr + batch))
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
    if options.IS_CAUSAL:
        # Every other head from the end, so that a program gets long and short tiles.
        if group % 2 == 0:
            tile = used - 1 - tile
    start = uniform((first + tile) * ROWS)
    return Tile(uniform(position), uniform(batch), uniform(head), start, query_length, key_length)


@gluon.jit
def tile_after(upcoming, options):
    """(tile, its program): the next one, the last of all where the program is past it."""
    program = upcoming.program
    if upcoming.queue is not None:
        program = hear(upcoming.queue, upcoming.taken)
    last = gl.minimum(program, upcoming.tiles - 1)
    return tile_of(last, upcoming.position, upcoming.schedule, options), program


@gluon.jit
def rotated(tile, head, tiles):
    """Another tile of the same head: programs take every so many-th, and not all are as long."""
    return (tile + head // 2) % tiles
