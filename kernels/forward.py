"""The portable forward kernel (device code, sm_80 and newer)."""

import triton
import triton.language as tl

from sigjax.kernels.pairs import add_pair_terms, key_range, pairs_of_head, takes_part
from sigjax.kernels.tile_math import (
    LOG2_E,
    add_dot,
    dot_rows,
    head_offset,
    length_at,
    range_at,
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
    mask_ptr,  # uint8, broadcasts to [B, N, T, S], or None
    query_segments_ptr,  # [B, T] int32, 0 and below is padding; or None as the next three
    key_segments_ptr,  # [B, S] int32
    row_bias_ptr,  # [B, T] float32, added to the logits of a row
    ranges_ptr,  # [B, query tiles, 2] int32: keys that a tile's segments have
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
    BIAS_AXES: tl.constexpr,  # which of B, N, T, S the bias has; or None
    MASK_AXES: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    """One program: BLOCK_Q queries of one head over all their keys."""
    tl.static_assert(BLOCK_H >= H)
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    batch, head, start = query_tile_of_program(T, N, BLOCK_Q, RIGHT is not None)
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
    # Pairs that only a mask or segments exclude may lie in any block.
    ALWAYS: tl.constexpr = mask_ptr is not None or query_segments_ptr is not None
    total = tl.zeros([BLOCK_Q, BLOCK_H], tl.float32)
    if start < query_length:
        query = row_tile(query_ptr, start, query_length, N * H, pairs[2], BLOCK_Q, H, BLOCK_H, True)
        offset = head_offset(sigmoid_bias_ptr, batch * N + head, key_length)
        begin, inner, inner_end, end = key_range(
            start, key_length, range_at(ranges_ptr, batch, start, T, BLOCK_Q), BLOCK_Q, BLOCK_K,
            LEFT, RIGHT,
        )  # fmt: skip
        if LEFT is not None or ranges_ptr is not None:
            for first in tl.range(begin, inner, BLOCK_K, num_stages=1):
                total = add_keys(
                    total, query, key_ptr, value_ptr, key_bias_ptr, start, first, key_length,
                    scale, offset, pairs, K * H, H, BLOCK_H, BLOCK_Q, BLOCK_K, LEFT, RIGHT,
                    BIAS_AXES, MASK_AXES, True, SIGMOID,
                )  # fmt: skip
        for first in tl.range(inner, inner_end, BLOCK_K, num_stages=STAGES):
            total = add_keys(
                total, query, key_ptr, value_ptr, key_bias_ptr, start, first, key_length, scale,
                offset, pairs, K * H, H, BLOCK_H, BLOCK_Q, BLOCK_K, LEFT, RIGHT, BIAS_AXES,
                MASK_AXES, ALWAYS, SIGMOID,
            )  # fmt: skip
        for first in tl.range(inner_end, end, BLOCK_K, num_stages=1):
            total = add_keys(
                total, query, key_ptr, value_ptr, key_bias_ptr, start, first, key_length, scale,
                offset, pairs, K * H, H, BLOCK_H, BLOCK_Q, BLOCK_K, LEFT, RIGHT, BIAS_AXES,
                MASK_AXES, True, SIGMOID,
            )  # fmt: skip
    total = unscale(total, dtype)
    store_row_tile(output_ptr, total, start, T, query_length, N * H, BLOCK_Q, H, BLOCK_H)


@triton.jit
def add_keys(
    total, query, key_ptr, value_ptr, key_bias_ptr, start, first, key_length, scale, offset,
    pairs, STRIDE: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BIAS_AXES: tl.constexpr,
    MASK_AXES: tl.constexpr, MASKED: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Adds what BLOCK_K keys from first on contribute to a tile of outputs."""
    key = row_tile(key_ptr, first, key_length, STRIDE, pairs[3], BLOCK_K, H, BLOCK_H, MASKED)
    value = row_tile(value_ptr, first, key_length, STRIDE, pairs[3], BLOCK_K, H, BLOCK_H, MASKED)
    scores = dot_rows(query, key)
    t = logits_of_queries(
        scores, key_bias_ptr, start, first, key_length, scale, offset, pairs, BLOCK_Q, BLOCK_K,
        LEFT, RIGHT, BIAS_AXES, MASK_AXES, MASKED,
    )  # fmt: skip
    weights = weights_as_operand(t, value.dtype, SIGMOID)
    return add_dot(total, weights, value)


@triton.jit
def logits_of_queries(
    scores, key_bias_ptr, start, first, key_length, scale, offset, pairs,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BIAS_AXES: tl.constexpr, MASK_AXES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_Q, BLOCK_K] to t = -log2(exp(logit)); inf where a pair takes no part."""
    keys = first + tl.arange(0, BLOCK_K)
    queries = start + tl.arange(0, BLOCK_Q)
    t = tl.fma(scores, -scale * LOG2_E, offset)
    if key_bias_ptr is not None:
        t -= (tl.load(key_bias_ptr + keys, mask=keys < key_length, other=0.0) * LOG2_E)[None, :]
    t = add_pair_terms(t, queries[:, None], keys[None, :], pairs, BIAS_AXES)
    if MASKED:
        allowed = takes_part(
            (keys < key_length)[None, :], queries[:, None], keys[None, :], pairs, MASK_AXES, LEFT,
            RIGHT,
        )  # fmt: skip
        t = tl.where(allowed, t, float("inf"))
    return t


@triton.jit
def query_tile_of_program(T, N: tl.constexpr, BLOCK_Q: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(batch, head, first query) of this program: tiles of a head are neighbours, to share L2."""
    tiles = tl.cdiv(T, BLOCK_Q)
    program = tl.program_id(0)
    tile = program % tiles
    if LAST_FIRST:
        tile = tiles - 1 - tile  # the longest first, where later queries see more keys
    head = (program // tiles) % N
    return program // (tiles * N), head, tile * BLOCK_Q
