"""Window and packed segments in the Hopper forward kernel: which keys, which pairs (device code).

Which keys a row has is plain Triton, that of the portable kernels: Triton's interpreter runs it.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from sigjax.kernels.hopper_math import clear_padding, copy_rows, fill, head_offset
from sigjax.kernels.pairs import key_range
from sigjax.kernels.tile_math import LOG2_E, range_at

# Bits of a column of an accumulator that are the thread's.
LANE_BITS = gl.constexpr(6)


@triton.jit
def keys_of_rows(
    row, query_length, key_length, ranges_ptr, batch, T, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """(begin, inner, inner_end, end): the keys of BLOCK_Q rows; all 0 where they have none.

    As pairs.key_range, begin is that of a block, and blocks from inner to inner_end need no mask.
    """
    # Rows past the array have no range of their own.
    range_ptr = range_at(ranges_ptr, batch, tl.minimum(row, T - 1), T, BLOCK_Q)
    begin, inner, inner_end, end = key_range(
        row, key_length, range_ptr, BLOCK_Q, BLOCK_K, LEFT, RIGHT
    )
    meets = (row < query_length) & (begin < end)
    return (
        tl.where(meets, begin, 0),
        tl.where(meets, inner, 0),
        tl.where(meets, inner_end, 0),
        tl.where(meets, end, 0),
    )


@triton.jit
def keys_of_tile(
    start, query_length, key_length, ranges_ptr, batch, T, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, CONSUMERS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """(begin, end): from the first to the last key of any consumer's rows; end is 0 without any.

    So a tile with keys has a consumer that computes and waits for the tile's queries.
    """
    begin = key_length
    end = key_length * 0
    for i in tl.static_range(CONSUMERS):
        own_begin, _inner, _inner_end, own_end = keys_of_rows(
            start + i * BLOCK_Q, query_length, key_length, ranges_ptr, batch, T, BLOCK_Q, BLOCK_K,
            LEFT, RIGHT,
        )  # fmt: skip
        begin = tl.where(own_end > 0, tl.minimum(begin, own_begin), begin)
        end = tl.maximum(end, own_end)
    return begin, end


@gluon.jit
def row_offset(
    sigmoid_bias_ptr, row_bias_ptr, batch, batch_head, row, key_length, T, ROWS: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """What is added to every t: a number of the head's, or of each row's, [ROWS, 1]."""
    if row_bias_ptr is None:
        return head_offset(sigmoid_bias_ptr, batch_head, key_length)
    else:
        rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
        row_bias = gl.load(row_bias_ptr + batch.to(gl.int64) * T + rows, mask=rows < T, other=0.0)
        return (row_bias * -LOG2_E)[:, None]


@gluon.jit
def segments_of_rows(segments_ptr, batch, row, T, ROWS: gl.constexpr, layout: gl.constexpr):
    """The rows' segments [ROWS], -1 for padding; 0, which nobody reads, without segments."""
    if segments_ptr is None:
        return 0
    else:
        rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
        ids = gl.load(segments_ptr + batch.to(gl.int64) * T + rows, mask=rows < T, other=0)
        return gl.where(ids > 0, ids, -1)


@gluon.jit
def segments_of_keys(segments_ptr, batch, keys, key_length, S):
    """The keys' segments, 0 for padding: equal to no row's."""
    ids = gl.load(segments_ptr + batch.to(gl.int64) * S + keys, mask=keys < key_length, other=0)
    return gl.maximum(ids, 0)


@gluon.constexpr_function
def value_layout(columns):
    """Of the rows of a value block that fill_values reads and stores.

    At head size 64 no other addresses are as these: the compiler would share what they have in
    common with the consumers, who have no register to spare.
    """
    return gl.BlockedLayout([1, columns // 16], [2, 16], [4, 1], [1, 0])


@gluon.jit
def has_padding(ids_ptr, count, BLOCK_K: gl.constexpr):
    """Whether a block of keys, of which count lie within the length, has some in no segment."""
    # Every warp has all of the block: they agree without shared memory.
    layout: gl.constexpr = gl.BlockedLayout([BLOCK_K // 32], [32], [4], [0])
    keys = gl.arange(0, BLOCK_K, layout=layout)
    LOW: gl.constexpr = BLOCK_K // 32 - 1
    inside = (keys & ~LOW) < count - (keys & LOW)  # as in exclude_pairs
    return gl.min(gl.load(ids_ptr + keys, mask=inside, other=1), 0) <= 0


@gluon.jit
def fill_values(
    ring, count, segments_ptr, cleared, phase, desc, batch, first, key_length, S, column,
    BLOCK_K: gl.constexpr, H: gl.constexpr, IS_RAGGED: gl.constexpr,
):  # fmt: skip
    """As hopper_math.fill, with zeros for padding: its weights are 0, and 0 times NaN is NaN.

    A block with padding is waited for, at the barrier cleared, and mended before anyone is told
    that it is there. Gives the barrier's next phase back.
    """
    ids_ptr = segments_ptr + batch.to(gl.int64) * S + first
    if has_padding(ids_ptr, key_length - first, BLOCK_K):
        ring.wait_free(count)
        buffer = ring.buffer(count)
        mbarrier.expect(cleared, desc.nbytes_per_cta)
        copy_rows(desc, batch, first, key_length, S, column, cleared, buffer, BLOCK_K, H, IS_RAGGED)
        mbarrier.wait(cleared, phase)
        phase ^= 1
        clear_padding(buffer, ids_ptr, value_layout(H), key_length - first)
        fence_async_shared()
        mbarrier.arrive(ring.full.index(count % ring.stages), count=1)
    else:
        fill(ring, count, desc, batch, first, key_length, S, column, BLOCK_K, H, IS_RAGGED)
    return phase


@gluon.jit
def exclude_pairs(
    t, first, row, key_length, S, batch, row_segments, key_segments_ptr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr, NO_PART: gl.constexpr,
):  # fmt: skip
    """T with NO_PART where lengths, window or segments exclude a pair."""
    layout: gl.constexpr = t.type.layout
    columns = gl.arange(0, t.shape[1], layout=gl.SliceLayout(0, layout))
    # A thread's columns of an accumulator differ in bits other than these: what they are compared
    # with takes these off, and a comparison with the rest needs no register of its own.
    lane = (columns & LANE_BITS)[None, :]
    steps = (columns & ~LANE_BITS)[None, :]
    rows = row - first + gl.arange(0, t.shape[0], layout=gl.SliceLayout(1, layout))
    limit = key_length - first
    if RIGHT is not None:
        limit = gl.minimum(limit, rows + 1 + RIGHT)[:, None]
    allowed = steps < limit - lane
    if LEFT is not None:
        allowed = allowed & (steps >= (rows - LEFT)[:, None] - lane)
    if key_segments_ptr is not None:
        ids = segments_of_keys(key_segments_ptr, batch, first + columns, key_length, S)
        allowed = allowed & (row_segments[:, None] == ids[None, :])
    return gl.where(allowed, t, NO_PART)
