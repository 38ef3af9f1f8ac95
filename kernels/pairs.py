"""Which pairs of a tile take part and what is added to their logits (device code).

A tile is query by key in the forward and query gradient kernels and key by query in the key and
value gradient kernel (OF_KEYS): positions come as [rows, 1] and [1, columns], whichever is which.
"""

import triton
import triton.language as tl

from sigjax.kernels.tile_math import LOG2_E, sequence_at

# What the range of a tile's segments holds: rows of other segments or padding among them; rows of
# the tile's segments alone; rows of the one segment that the whole tile belongs to.
MIXED = tl.constexpr(0)
PACKED = tl.constexpr(1)
UNIFORM = tl.constexpr(2)


@triton.jit
def pairs_of_head(
    bias_ptr, mask_ptr, query_segments_ptr, key_segments_ptr, row_bias_ptr, batch, head,
    N: tl.constexpr, T, S, BIAS_AXES: tl.constexpr, MASK_AXES: tl.constexpr,
):  # fmt: skip
    """What concerns single pairs, from one sequence's and head's first element on.

    (bias, mask, query segments, key segments, row bias, T, S); None for what is not given.
    """
    return (
        pair_array_at(bias_ptr, batch, head, N, T, S, BIAS_AXES),
        pair_array_at(mask_ptr, batch, head, N, T, S, MASK_AXES),
        sequence_at(query_segments_ptr, batch, T),
        sequence_at(key_segments_ptr, batch, S),
        sequence_at(row_bias_ptr, batch, T),
        T,
        S,
    )


@triton.jit
def pair_array_at(ptr, batch, head, N: tl.constexpr, T, S, AXES: tl.constexpr):
    """Where one head of an array that broadcasts to [B, N, T, S] begins; None for None."""
    if ptr is None:
        return None
    else:
        return ptr + pair_array_offset(batch, head, N, T, S, AXES)


@triton.jit
def pair_array_offset(batch, head, N: tl.constexpr, T, S, AXES: tl.constexpr):
    """Elements before one head; AXES tells for B, N, T, S whether the array has them."""
    size = tl.cast(row_size(S, AXES), tl.int64)
    if AXES[2]:
        size *= T
    offset = tl.cast(0, tl.int64)
    if AXES[1]:
        offset += size * head
        size *= N
    if AXES[0]:
        offset += size * batch
    return offset


@triton.jit
def row_size(S, AXES: tl.constexpr):
    """Elements of a row of an array that broadcasts to [B, N, T, S].

    AXES[4] tells that S is a multiple of 16. The compiler has to see it: without it elements are
    loaded one at a time, and such loads are not pipelined.
    """
    if AXES[3]:
        if AXES[4]:
            return S // 16 * 16
        else:
            return S
    else:
        return 1


@triton.jit
def load_pairs(
    ptr, start, first, T, S, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, AXES: tl.constexpr,
    OF_KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of one head's array, 0 outside the array: query by key, or with OF_KEYS key by query.

    An axis that the array lacks has size 1. Rows are read as they lie in memory and turned then.
    """
    pointers, inside = pair_pointers(ptr, start, first, T, S, BLOCK_Q, BLOCK_K, AXES)
    tile = tl.load(pointers, mask=inside, other=0)
    if OF_KEYS:
        tile = tl.trans(tile)
    return tile


@triton.jit
def store_pairs(ptr, values, start, first, T, S, AXES: tl.constexpr):
    """Stores a tile of one head's array, query by key, where it lies inside the array."""
    pointers, inside = pair_pointers(
        ptr, start, first, T, S, values.shape[0], values.shape[1], AXES
    )
    tl.store(pointers, values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def pair_pointers(
    ptr, start, first, T, S, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, AXES: tl.constexpr
):
    """(pointers to a tile of one head's array, which of them lie inside it), query by key."""
    row = row_size(S, AXES)
    # The tile's start is an int64 scalar; offsets within a tile fit int32.
    offsets = tl.zeros([1, 1], tl.int32)
    inside = tl.full([1, 1], True, tl.int1)
    if AXES[2]:
        ptr += tl.cast(start, tl.int64) * row
        rows = tl.arange(0, BLOCK_Q)[:, None]
        offsets = offsets + rows * row
        inside = inside & (start + rows < T)
    if AXES[3]:
        ptr += first
        columns = tl.arange(0, BLOCK_K)[None, :]
        offsets = offsets + columns
        inside = inside & (first + columns < row)
    return ptr + offsets, inside


@triton.jit
def add_pair_terms(
    t, start, first, pairs, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BIAS_AXES: tl.constexpr,
    OF_KEYS: tl.constexpr,
):  # fmt: skip
    """T = -log2(exp(logit)) with what the bias adds to the logits."""
    bias_ptr, mask_ptr, query_segments_ptr, key_segments_ptr, row_bias_ptr, T, S = pairs
    if bias_ptr is not None:
        bias = load_pairs(bias_ptr, start, first, T, S, BLOCK_Q, BLOCK_K, BIAS_AXES, OF_KEYS)
        t = tl.fma(bias.to(tl.float32), -LOG2_E, t)
    return t


@triton.jit
def exclude_pairs(
    t, allowed, queries, keys, start, first, pairs, edge, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, MASK_AXES: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    OF_KEYS: tl.constexpr,
):  # fmt: skip
    """T, with inf where a pair takes no part.

    Allowed are the pairs within the lengths. Lengths, window and segments exclude pairs in blocks
    at an edge alone, edge tells whether this is one: a constexpr, or a scalar.
    """
    bias_ptr, mask_ptr, query_segments_ptr, key_segments_ptr, row_bias_ptr, T, S = pairs
    if edge:
        t = tl.where(takes_part(allowed, queries, keys, pairs, LEFT, RIGHT), t, float("inf"))
    if mask_ptr is not None:
        # The greater of two numbers, and of a number and NaN the number: inf excludes a pair
        # whatever its t is, NaN leaves t as it is, a NaN too.
        mask = load_pairs(mask_ptr, start, first, T, S, BLOCK_Q, BLOCK_K, MASK_AXES, OF_KEYS)
        t = tl.maximum(t, mask.to(tl.float32))
    return t


@triton.jit
def takes_part(allowed, queries, keys, pairs, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Which pairs take part as to window and segments, of those allowed by the lengths."""
    bias_ptr, mask_ptr, query_segments_ptr, key_segments_ptr, row_bias_ptr, T, S = pairs
    if RIGHT == 0:
        allowed = allowed & (keys <= queries)
    elif RIGHT is not None:
        allowed = allowed & (keys - RIGHT <= queries)
    if LEFT is not None:
        allowed = allowed & (keys + LEFT >= queries)
    if query_segments_ptr is not None:
        query_segments = tl.load(query_segments_ptr + queries, mask=queries < T, other=-1)
        key_segments = tl.load(key_segments_ptr + keys, mask=keys < S, other=-2)
        allowed = allowed & (query_segments == key_segments) & (query_segments > 0)
    return allowed


@triton.jit
def key_range(
    start, key_length, range_ptr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """(begin, inner, inner_end, end): the keys of a tile of queries.

    Key blocks from inner to inner_end lie within the lengths, the window and the segment of every
    query, those before and after may not. range_ptr points to the tile's range, see
    segments.tile_ranges, or is None.
    """
    inner_end = key_length // BLOCK_K * BLOCK_K
    end = key_length
    if RIGHT is not None:
        inner_end = tl.minimum(inner_end, tl.maximum(start + 1 + RIGHT, 0) // BLOCK_K * BLOCK_K)
        end = tl.minimum(end, start + BLOCK_Q + RIGHT)
    begin = 0
    inner = 0
    if LEFT is not None:
        begin = tl.maximum(start - LEFT, 0) // BLOCK_K * BLOCK_K
        inner = tl.cdiv(tl.maximum(start + BLOCK_Q - 1 - LEFT, 0), BLOCK_K) * BLOCK_K
    if range_ptr is not None:
        begin, inner, inner_end, end = within_range(
            begin, inner, inner_end, end, range_ptr, BLOCK_K
        )
    return begin, inner, inner_end, end


@triton.jit
def query_range(
    first, query_length, range_ptr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """(begin, inner, inner_end, end): the queries of a tile of keys, as key_range has its keys."""
    inner_end = query_length // BLOCK_Q * BLOCK_Q
    end = query_length
    begin = 0
    inner = 0
    if RIGHT is not None:
        begin = tl.maximum(first - RIGHT, 0) // BLOCK_Q * BLOCK_Q
        inner = tl.cdiv(tl.maximum(first + BLOCK_K - 1 - RIGHT, 0), BLOCK_Q) * BLOCK_Q
    if LEFT is not None:
        inner_end = tl.minimum(inner_end, (first + 1 + LEFT) // BLOCK_Q * BLOCK_Q)
        end = tl.minimum(end, first + BLOCK_K + LEFT)
    if range_ptr is not None:
        begin, inner, inner_end, end = within_range(
            begin, inner, inner_end, end, range_ptr, BLOCK_Q
        )
    if RIGHT is not None:
        inner_end = tl.maximum(inner_end, begin)
        inner = tl.minimum(tl.maximum(inner, begin), inner_end)
    return begin, inner, inner_end, end


@triton.jit
def within_range(begin, inner, inner_end, end, range_ptr, BLOCK: tl.constexpr):
    """The part of the blocks that lies within the range of a tile's segments."""
    least = tl.load(range_ptr)
    begin = tl.maximum(begin, least // BLOCK * BLOCK)
    end = tl.minimum(end, tl.load(range_ptr + 1))
    inner = tl.maximum(inner, tl.cdiv(least, BLOCK) * BLOCK)
    inner_end = tl.minimum(inner_end, end // BLOCK * BLOCK)
    inner_end = tl.where(tl.load(range_ptr + 2) == UNIFORM, inner_end, 0)
    return begin, inner, inner_end, end


@triton.jit
def pipelined_part(begin, end, range_ptr):
    """(first row, end of the blocks) for a loop that looks at no row's segment.

    Blocks from there on hold padding between segments: their rows are looked at one by one.
    """
    if range_ptr is None:
        return None, end
    else:
        return tl.load(range_ptr), tl.where(tl.load(range_ptr + 2) == MIXED, begin, end)
