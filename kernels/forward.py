"""The portable forward kernel (device code, sm_80 and newer)."""

import triton
import triton.language as tl

from sigjax.kernels.pairs import (
    add_pair_terms,
    exclude_pairs,
    key_range,
    pairs_of_head,
    pipelined_part,
)
from sigjax.kernels.tile_math import (
    LOG2_E,
    add_dot,
    dot_rows,
    head_offset,
    length_at,
    range_at,
    row_offset,
    row_tile,
    store_row_tile,
    unscale,
    weights_as_operand,
)


@triton.jit
def forward_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, S, K, H]
    value_ptr,  # [B, S, K, H]
    query_lengths_ptr,  # [B] int32, or None
    key_lengths_ptr,  # [B] int32, or None
    sigmoid_bias_ptr,  # [B, N] float32, or None: -log(number of keys)
    key_bias_ptr,  # [B, S] float32, or None
    bias_ptr,  # broadcasts to [B, N, T, S], or None
    mask_ptr,  # NaN takes part, inf does not, broadcasts to [B, N, T, S]; or None
    query_segments_ptr,  # [B, T] int32, 0 and below is padding; or None as the next three
    key_segments_ptr,  # [B, S] int32
    row_bias_ptr,  # [B, T] float32, added to the logits of a row
    ranges_ptr,  # [B, query tiles, 3] int32: the keys of a tile's segments, segments.tile_ranges
    T,
    S,
    scale,  # factor of the logits
    output_ptr,  # [B, T, N, H]
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    LEFT: tl.constexpr,  # window: query - LEFT <= key <= query + RIGHT; None is no bound
    RIGHT: tl.constexpr,
    BIAS_AXES: tl.constexpr,  # which of B, N, T, S the bias has, see row_size; or None
    MASK_AXES: tl.constexpr,
    SHARED: tl.constexpr,  # (batch, head): whether tiles that differ in it alone are neighbours
    ARITHMETIC: tl.constexpr,
):
    """One program: BLOCK_Q queries of one head over all their keys."""
    tl.static_assert(BLOCK_H >= H)
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    batch, head, start = tile_of_program(T, N, BLOCK_Q, RIGHT is not None, SHARED)
    query_length = length_at(query_lengths_ptr, batch, T)
    key_length = length_at(key_lengths_ptr, batch, S)
    query_ptr += (batch.to(tl.int64) * T * N + head) * H
    output_ptr += (batch.to(tl.int64) * T * N + head) * H
    key_ptr += (batch.to(tl.int64) * S * K + head // (N // K)) * H
    value_ptr += (batch.to(tl.int64) * S * K + head // (N // K)) * H
    if key_bias_ptr is not None:
        key_bias_ptr += batch.to(tl.int64) * S
    pairs = pairs_of_head(
        bias_ptr, mask_ptr, query_segments_ptr, key_segments_ptr, row_bias_ptr, batch, head, N,
        T, S, BIAS_AXES, MASK_AXES,
    )  # fmt: skip
    # Blocks at an edge are few where nothing but lengths and causality excludes pairs.
    FEW_EDGES: tl.constexpr = (
        LEFT is None and bias_ptr is None and mask_ptr is None and ranges_ptr is None
    )
    total = tl.zeros([BLOCK_Q, BLOCK_H], tl.float32)
    if start < query_length:
        query = row_tile(
            query_ptr, start, None, query_length, N * H, pairs[2], BLOCK_Q, H, BLOCK_H, True
        )
        offset = head_offset(sigmoid_bias_ptr, batch * N + head, key_length)
        offset = row_offset(offset, pairs[4], start, T, BLOCK_Q)
        range_ptr = range_at(ranges_ptr, batch, start, T, BLOCK_Q)
        begin, inner, inner_end, end = key_range(
            start, key_length, range_ptr, BLOCK_Q, BLOCK_K, LEFT, RIGHT
        )
        if FEW_EDGES:
            for first in tl.range(inner, inner_end, BLOCK_K, num_stages=STAGES):
                total = add_keys(
                    total, query, key_ptr, value_ptr, key_bias_ptr, None, start, first, None,
                    key_length, scale, offset, pairs, False, K * H, H, BLOCK_H, BLOCK_Q, BLOCK_K,
                    LEFT, RIGHT, BIAS_AXES, MASK_AXES, False, ARITHMETIC,
                )  # fmt: skip
            for first in tl.range(inner_end, end, BLOCK_K, num_stages=1):
                total = add_keys(
                    total, query, key_ptr, value_ptr, key_bias_ptr, None, start, first, None,
                    key_length, scale, offset, pairs, True, K * H, H, BLOCK_H, BLOCK_Q, BLOCK_K,
                    LEFT, RIGHT, BIAS_AXES, MASK_AXES, True, ARITHMETIC,
                )  # fmt: skip
        else:
            # One loop, so that loads run ahead at the edges too.
            least, part_end = pipelined_part(begin, end, range_ptr)
            for first in tl.range(begin, part_end, BLOCK_K, num_stages=STAGES):
                edge = (first < inner) | (first >= inner_end)
                total = add_keys(
                    total, query, key_ptr, value_ptr, key_bias_ptr, None, start, first, least, end,
                    scale, offset, pairs, edge, K * H, H, BLOCK_H, BLOCK_Q, BLOCK_K, LEFT, RIGHT,
                    BIAS_AXES, MASK_AXES, True, ARITHMETIC,
                )  # fmt: skip
            if ranges_ptr is not None:
                for first in tl.range(part_end, end, BLOCK_K, num_stages=1):
                    total = add_keys(
                        total, query, key_ptr, value_ptr, key_bias_ptr, pairs[3], start, first,
                        least, end, scale, offset, pairs, True, K * H, H, BLOCK_H, BLOCK_Q,
                        BLOCK_K, LEFT, RIGHT, BIAS_AXES, MASK_AXES, True, ARITHMETIC,
                    )  # fmt: skip
    total = unscale(total, dtype)
    store_row_tile(output_ptr, total, start, T, query_length, N * H, BLOCK_Q, H, BLOCK_H)


@triton.jit
def add_keys(
    total, query, key_ptr, value_ptr, key_bias_ptr, segments_ptr, start, first, least, key_length,
    scale, offset, pairs, edge, STRIDE: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BIAS_AXES: tl.constexpr, MASK_AXES: tl.constexpr, MASKED: tl.constexpr,
    ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """Adds what BLOCK_K keys from first on contribute to a tile of outputs.

    With MASKED, rows that row_tile calls padding are not read; edge as in exclude_pairs.
    """
    key = row_tile(
        key_ptr, first, least, key_length, STRIDE, segments_ptr, BLOCK_K, H, BLOCK_H, MASKED
    )
    value = row_tile(
        value_ptr, first, least, key_length, STRIDE, segments_ptr, BLOCK_K, H, BLOCK_H, MASKED
    )
    scores = dot_rows(query, key, ARITHMETIC)
    t = logits_of_queries(
        scores, key_bias_ptr, start, first, key_length, scale, offset, pairs, edge, BLOCK_Q,
        BLOCK_K, LEFT, RIGHT, BIAS_AXES, MASK_AXES,
    )  # fmt: skip
    weights = weights_as_operand(t, value.dtype, ARITHMETIC)
    return add_dot(total, weights, value, ARITHMETIC)


@triton.jit
def logits_of_queries(
    scores, key_bias_ptr, start, first, key_length, scale, offset, pairs, edge,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BIAS_AXES: tl.constexpr, MASK_AXES: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_Q, BLOCK_K] to t = -log2(exp(logit)); inf where a pair takes no part."""
    keys = first + tl.arange(0, BLOCK_K)
    queries = start + tl.arange(0, BLOCK_Q)
    t = tl.fma(scores, -scale * LOG2_E, offset)
    if key_bias_ptr is not None:
        t -= (tl.load(key_bias_ptr + keys, mask=keys < key_length, other=0.0) * LOG2_E)[None, :]
    t = add_pair_terms(t, start, first, pairs, BLOCK_Q, BLOCK_K, BIAS_AXES, False)
    return exclude_pairs(
        t, (keys < key_length)[None, :], queries[:, None], keys[None, :], start, first, pairs, edge,
        BLOCK_Q, BLOCK_K, MASK_AXES, LEFT, RIGHT, False,
    )  # fmt: skip


@triton.jit
def tile_of_program(
    length, HEADS: tl.constexpr, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr, SHARED: tl.constexpr
):
    """(batch, head, first row) of this program: tiles of a head are neighbours, to share L2.

    SHARED tells for batch and head whether they share what is read most, a tile of bias or mask:
    then the tiles of all of them are neighbours.
    """
    tiles = tl.cdiv(length, BLOCK)
    program = tl.program_id(0)
    sharing = 1
    if SHARED[0]:
        sharing = tl.num_programs(0) // (tiles * HEADS)
    if SHARED[1]:
        sharing = sharing * HEADS
    tile = program // sharing % tiles
    if LAST_FIRST:
        tile = tiles - 1 - tile  # the longest first, where later queries see more keys
    if SHARED[0] and SHARED[1]:
        head = program % HEADS
        batch = program % sharing // HEADS
    elif SHARED[0]:
        head = program // (sharing * tiles)
        batch = program % sharing
    elif SHARED[1]:
        head = program % HEADS
        batch = program // (sharing * tiles)
    else:
        head = (program // tiles) % HEADS
        batch = program // (tiles * HEADS)
    return batch, head, tile * BLOCK
