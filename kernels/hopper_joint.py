"""Tiles of several heads (Gluon device code of the Hopper forward kernel).

A sequence whose blocks of BLOCK_Q queries do not fill tiles leaves the same rest, 1 to JOINS - 1
blocks, in every head. With JOINS the rests of all heads, one after the other, make joint tiles, in
which no consumer is idle: the key blocks of their heads come in turn, and a consumer computes those
of its own head and lets the others go. The last joint tile of a sequence repeats its last block, to
the same bits. Weights are exact there: which rows are in a rest follows from the length alone, so
that their bits depend neither on bucket nor neighbours.

The head of a joint tile is the number of its first block of all heads' rests, its rest is not 0.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sigjax.kernels.hopper_math import fill


@gluon.jit
def heads_of(head, rest, N: gl.constexpr, JOINS: gl.constexpr):
    """(first head, number of heads) of a tile."""
    heads = 1
    if JOINS > 0:
        heads = gl.to_tensor(1)
        if rest > 0:
            first = head // rest
            heads = (gl.minimum(head + JOINS, N * rest) - 1) // rest - first + 1
            head = first
    return head, heads


@gluon.jit
def part_of(
    head, start, rest, N: gl.constexpr, BLOCK_Q: gl.constexpr, JOINS: gl.constexpr,
    CONSUMER: gl.constexpr,
):  # fmt: skip
    """(head, first query) of a consumer's rows of a tile."""
    row = start + CONSUMER * BLOCK_Q
    if JOINS > 0:
        if rest > 0:
            block = gl.minimum(head + CONSUMER, N * rest - 1)
            head = block // rest
            row = start + (block - head * rest) * BLOCK_Q
    return head, row


@gluon.jit
def tile_in_sequence(tile, length, N: gl.constexpr, ROWS: gl.constexpr, JOINS: gl.constexpr):
    """(head, first query, rest) of one of a sequence's tiles: joint ones, then each head's whole.

    Joint ones first: they may take longer, and what begins last should not.
    """
    blocks = gl.cdiv(length, ROWS // JOINS)
    whole = blocks // JOINS
    rest = blocks - whole * JOINS
    joint = gl.cdiv(N * rest, JOINS)
    if tile < joint:
        head = tile * JOINS
        start = whole * ROWS
    else:
        tile = tile - joint
        head = tile // whole
        start = (tile - head * whole) * ROWS
        rest = rest * 0
    return head, start, rest


@gluon.jit
def tiles_in_sequence(length, N: gl.constexpr, ROWS: gl.constexpr, JOINS: gl.constexpr):
    """How many tiles a sequence of so many queries has."""
    blocks = gl.cdiv(length, ROWS // JOINS)
    whole = blocks // JOINS
    return whole * N + gl.cdiv(N * (blocks - whole * JOINS), JOINS)


@gluon.jit
def padding_tile(tile, query_length, key_length, T, ROWS: gl.constexpr, JOINS: gl.constexpr):
    """(head, first query) of one of a sequence's tiles of padding: what follows its last block.

    Without keys all is padding.
    """
    BLOCK_Q: gl.constexpr = ROWS // JOINS
    begin = gl.cdiv(query_length, BLOCK_Q) * BLOCK_Q
    if key_length <= 0:
        begin = begin * 0
    per_head = gl.cdiv(T - begin, ROWS)
    head = tile // per_head
    return head, begin + (tile - head * per_head) * ROWS


@gluon.jit
def fill_joint(keys, values, copied, descs, tile, head, heads, S, options, IS_RAGGED: gl.constexpr):
    """Copies the key blocks of a joint tile of so many heads, from head on; the count after it.

    Values come a block later than keys, as they are needed: there are as many stages for one block
    of all heads.
    """
    BLOCK_K: gl.constexpr = options.BLOCK_K
    H: gl.constexpr = options.H
    batch, key_length = tile.batch, tile.key_length
    blocks = gl.cdiv(key_length, BLOCK_K)
    for block in range(blocks + 1):
        for i in range(heads):
            column = (head + i) // (options.N // options.K) * H
            if block < blocks:
                fill(
                    keys, copied + i, descs.key, batch, block * BLOCK_K, key_length, S, column,
                    BLOCK_K, H, IS_RAGGED,
                )  # fmt: skip
            if block > 0:
                fill(
                    values, copied - heads + i, descs.value, batch, (block - 1) * BLOCK_K,
                    key_length, S, column, BLOCK_K, H, IS_RAGGED,
                )  # fmt: skip
        copied += heads
    return copied - heads


@gluon.jit
def pass_uses(ring, begin, end):
    """Lets uses of a ring go that are of other heads."""
    for use in range(begin, end):
        ring.wait_full(use)
        ring.release(use)
