"""Which pairs of a tile take part and what is added to their logits (device code).

A tile is query by key in the forward and query gradient kernels and key by query in the key and
value gradient kernel: positions come as [rows, 1] and [1, columns], whichever is which.
"""

import triton
import triton.language as tl

from sigjax.kernels.tile_math import LOG2_E, sequence_at


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
    size = tl.cast(1, tl.int64)
    if AXES[2]:
        size *= T
    if AXES[3]:
        size *= S
    offset = tl.cast(0, tl.int64)
    if AXES[1]:
        offset += size * head
        size *= N
    if AXES[0]:
        offset += size * batch
    return offset


@triton.jit
def load_pairs(ptr, queries, keys, T, S, AXES: tl.constexpr):
    """The elements of one head for some positions, 0 outside the array."""
    offsets, inside = pair_positions(queries, keys, T, S, AXES)
    return tl.load(ptr + offsets, mask=inside, other=0)


@triton.jit
def store_pairs(ptr, values, queries, keys, T, S, AXES: tl.constexpr):
    """Stores the elements of one head at some positions, those inside the array."""
    offsets, inside = pair_positions(queries, keys, T, S, AXES)
    tl.store(ptr + offsets, values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def pair_positions(queries, keys, T, S, AXES: tl.constexpr):
    """(offsets within one head's array, which positions lie inside it)."""
    offsets = tl.zeros([1, 1], tl.int64)
    inside = tl.full([1, 1], True, tl.int1)
    if AXES[2]:
        row = 1
        if AXES[3]:
            row = S
        offsets = offsets + queries.to(tl.int64) * row
        inside = inside & (queries < T)
    if AXES[3]:
        offsets = offsets + keys
        inside = inside & (keys < S)
    return offsets, inside


@triton.jit
def add_pair_terms(t, queries, keys, pairs, BIAS_AXES: tl.constexpr):
    """T = -log2(exp(logit)) with what bias and row bias add to the logits."""
    bias_ptr, mask_ptr, query_segments_ptr, key_segments_ptr, row_bias_ptr, T, S = pairs
    if bias_ptr is not None:
        t -= load_pairs(bias_ptr, queries, keys, T, S, BIAS_AXES).to(tl.float32) * LOG2_E
    if row_bias_ptr is not None:
        t -= tl.load(row_bias_ptr + queries, mask=queries < T, other=0.0) * LOG2_E
    return t


@triton.jit
def takes_part(
    allowed, queries, keys, pairs, MASK_AXES: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr
):
    """Which pairs take part, of those allowed by the lengths."""
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
    if mask_ptr is not None:
        allowed = allowed & (load_pairs(mask_ptr, queries, keys, T, S, MASK_AXES) != 0)
    return allowed


@triton.jit
def key_range(
    start, key_length, range_ptr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """(begin, inner, inner_end, end): the keys of a tile of queries.

    Key blocks from inner to inner_end lie within the lengths and the window of every query, those
    before and after may not. range_ptr points to the first key and the end that the tile's
    segments have, or is None.
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
        begin = tl.maximum(begin, tl.load(range_ptr))
        end = tl.minimum(end, tl.load(range_ptr + 1))
        inner_end = tl.minimum(inner_end, end // BLOCK_K * BLOCK_K)
    if LEFT is not None or range_ptr is not None:
        inner_end = tl.maximum(inner_end, begin)
        inner = tl.minimum(tl.maximum(inner, begin), inner_end)
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
        begin = tl.maximum(begin, tl.load(range_ptr))
        end = tl.minimum(end, tl.load(range_ptr + 1))
        inner_end = tl.minimum(inner_end, end // BLOCK_Q * BLOCK_Q)
    if RIGHT is not None or range_ptr is not None:
        inner_end = tl.maximum(inner_end, begin)
        inner = tl.minimum(tl.maximum(inner, begin), inner_end)
    return begin, inner, inner_end, end
