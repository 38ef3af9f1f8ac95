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
    """(head, first query, rest) of one of a sequence's tiles: a head's whole ones, joint ones."""
    blocks = gl.cdiv(length, ROWS // JOINS)
    whole = blocks // JOINS
    if tile < whole * N:
        head = tile // whole
        start = (tile - head * whole) * ROWS
        rest = whole * 0
    else:
        head = (tile - whole * N) * JOINS
        start = whole * ROWS
        rest = blocks - whole * JOINS
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
def pass_others(keys, values, used, count):
    """Lets so many key blocks of other heads go, from the used-th on."""
    for i in range(count):
        keys.wait_full(used + i)
        keys.release(used + i)
        values.wait_full(used + i)
        values.release(used + i)
