"""The portable kernel for the gradient of a bias (device code, sm_80 and newer).

It computes the logits' gradients anew, and sums them over the axes that the bias broadcasts over
in one program and a fixed order: no atomics, the same bits in every run. The bias has a number for
each query: of others the key and value gradient kernel knows the gradient.
"""

import triton
import triton.language as tl

from sigjax.kernels.backward import logit_gradient_of_queries
from sigjax.kernels.pairs import key_range, pair_array_at, pairs_of_head, store_pairs
from sigjax.kernels.tile_math import (
    head_offset,
    length_at,
    range_at,
    row_offset,
    row_tile,
    sequence_at,
)


@triton.jit
def bias_gradient_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, S, K, H]
    value_ptr,  # [B, S, K, H]
    output_gradient_ptr,  # [B, T, N, H]
    query_lengths_ptr,  # [B] int32, or None
    key_lengths_ptr,  # [B] int32, or None
    sigmoid_bias_ptr,  # [B, N] float32, or None: -log(number of keys)
    key_bias_ptr,  # [B, S] float32, or None
    bias_ptr,  # [B or 1, N or 1, T, S or 1]
    mask_ptr,  # NaN takes part, inf does not, broadcasts to [B, N, T, S]; or None
    query_segments_ptr,  # [B, T] int32, 0 and below is padding; or None as the next three
    key_segments_ptr,  # [B, S] int32
    row_bias_ptr,  # [B, T] float32, added to the logits of a row
    ranges_ptr,  # [B, query tiles, 3] int32: the keys of a tile's segments, segments.tile_ranges
    B,
    T,
    S,
    scale,  # factor of the logits
    bias_gradient_ptr,  # shape of the bias
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    LEFT: tl.constexpr,  # window: query - LEFT <= key <= query + RIGHT; None is no bound
    RIGHT: tl.constexpr,
    BIAS_AXES: tl.constexpr,  # which of B, N, T, S the bias has
    MASK_AXES: tl.constexpr,
    SHARED: tl.constexpr,  # of no use here: one program goes over all that share a tile
    ARITHMETIC: tl.constexpr,
):
    """One program: a tile of the bias, summed over every axis that it broadcasts over."""
    # Where an axis broadcasts, one program goes over all of it.
    program = tl.program_id(0)
    first_begin, first_end, program = part_of_axis(program, S, BLOCK_K, BIAS_AXES[3])
    start, start_end, program = part_of_axis(program, T, BLOCK_Q, True)
    head_begin, head_end, program = part_of_axis(program, N, 1, BIAS_AXES[1])
    batch_begin, batch_end, program = part_of_axis(program, B, 1, BIAS_AXES[0])
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    heads = head_end - head_begin
    repeats = (batch_end - batch_begin) * heads
    # One block of keys: a loop over it alone would not be pipelined.
    if BIAS_AXES[3] and ranges_ptr is None:
        begin, inner, inner_end, end = key_range(start, S, None, BLOCK_Q, BLOCK_K, LEFT, RIGHT)
        if (first_end > begin) & (first_begin < end):
            for repeat in tl.range(0, repeats, num_stages=STAGES):
                batch = batch_begin + repeat // heads
                total += logit_gradient_of_tile(
                    query_ptr, key_ptr, value_ptr, output_gradient_ptr, query_lengths_ptr,
                    key_lengths_ptr, sigmoid_bias_ptr, key_bias_ptr, bias_ptr, mask_ptr, batch,
                    head_begin + repeat % heads, start, first_begin, T, S, scale, N, K, H, BLOCK_H,
                    BLOCK_Q, BLOCK_K, LEFT, RIGHT, BIAS_AXES, MASK_AXES, ARITHMETIC,
                )  # fmt: skip
    else:
        for repeat in tl.range(0, repeats):
            batch = batch_begin + repeat // heads
            head = head_begin + repeat % heads
            query_length = length_at(query_lengths_ptr, batch, T)
            key_length = length_at(key_lengths_ptr, batch, S)
            rows = (tl.cast(batch, tl.int64) * T * N + head) * H
            columns = (tl.cast(batch, tl.int64) * S * K + head // (N // K)) * H
            keys_ptr = sequence_at(key_bias_ptr, batch, S)
            pairs = pairs_of_head(
                bias_ptr, mask_ptr, query_segments_ptr, key_segments_ptr, row_bias_ptr, batch,
                head, N, T, S, BIAS_AXES, MASK_AXES,
            )  # fmt: skip
            if start < query_length:
                query = row_tile(
                    query_ptr + rows, start, None, query_length, N * H, pairs[2], BLOCK_Q, H,
                    BLOCK_H, True,
                )  # fmt: skip
                output_gradient = row_tile(
                    output_gradient_ptr + rows, start, None, query_length, N * H, pairs[2],
                    BLOCK_Q, H, BLOCK_H, True,
                )  # fmt: skip
                offset = head_offset(sigmoid_bias_ptr, batch * N + head, key_length)
                offset = row_offset(offset, pairs[4], start, T, BLOCK_Q)
                range_ptr = range_at(ranges_ptr, batch, start, T, BLOCK_Q)
                begin, inner, inner_end, end = key_range(
                    start, key_length, range_ptr, BLOCK_Q, BLOCK_K, LEFT, RIGHT
                )
                begin = tl.maximum(begin, first_begin)
                end = tl.minimum(end, first_end)
                for first in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
                    key = row_tile(
                        key_ptr + columns, first, None, key_length, K * H, pairs[3], BLOCK_K, H,
                        BLOCK_H, True,
                    )  # fmt: skip
                    edge = (first < inner) | (first >= inner_end)
                    total += logit_gradient_of_queries(
                        query, output_gradient, key, value_ptr + columns, keys_ptr, pairs[3],
                        start, first, None, key_length, scale, offset, pairs, edge, K * H, H,
                        BLOCK_H, BLOCK_Q, BLOCK_K, LEFT, RIGHT, BIAS_AXES, MASK_AXES, True,
                        ARITHMETIC,
                    )  # fmt: skip
    if not BIAS_AXES[3]:
        total = tl.sum(total, 1, keep_dims=True)
    store_pairs(
        pair_array_at(bias_gradient_ptr, batch_begin, head_begin, N, T, S, BIAS_AXES),
        total, start, first_begin, T, S, BIAS_AXES,
    )  # fmt: skip


@triton.jit
def logit_gradient_of_tile(
    query_ptr, key_ptr, value_ptr, output_gradient_ptr, query_lengths_ptr, key_lengths_ptr,
    sigmoid_bias_ptr, key_bias_ptr, bias_ptr, mask_ptr, batch, head, start, first, T, S, scale,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BIAS_AXES: tl.constexpr, MASK_AXES: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of one head's logits, [BLOCK_Q, BLOCK_K] float32; no segments."""
    query_length = length_at(query_lengths_ptr, batch, T)
    key_length = length_at(key_lengths_ptr, batch, S)
    rows = (tl.cast(batch, tl.int64) * T * N + head) * H
    columns = (tl.cast(batch, tl.int64) * S * K + head // (N // K)) * H
    pairs = pairs_of_head(
        bias_ptr, mask_ptr, None, None, None, batch, head, N, T, S, BIAS_AXES, MASK_AXES
    )
    query = row_tile(
        query_ptr + rows, start, None, query_length, N * H, None, BLOCK_Q, H, BLOCK_H, True
    )
    output_gradient = row_tile(
        output_gradient_ptr + rows, start, None, query_length, N * H, None, BLOCK_Q, H, BLOCK_H,
        True,
    )  # fmt: skip
    key = row_tile(
        key_ptr + columns, first, None, key_length, K * H, None, BLOCK_K, H, BLOCK_H, True
    )
    begin, inner, inner_end, end = key_range(start, key_length, None, BLOCK_Q, BLOCK_K, LEFT, RIGHT)
    edge = (first < inner) | (first >= inner_end)
    offset = head_offset(sigmoid_bias_ptr, batch * N + head, key_length)
    return logit_gradient_of_queries(
        query, output_gradient, key, value_ptr + columns, sequence_at(key_bias_ptr, batch, S),
        None, start, first, None, key_length, scale, offset, pairs, edge, K * H, H, BLOCK_H,
        BLOCK_Q, BLOCK_K, LEFT, RIGHT, BIAS_AXES, MASK_AXES, True, ARITHMETIC,
    )  # fmt: skip


@triton.jit
def part_of_axis(program, size, BLOCK: tl.constexpr, HAS_AXIS: tl.constexpr):
    """(begin, end, rest of the program number): one block of an axis, or all of it."""
    if HAS_AXIS:
        blocks = tl.cdiv(size, BLOCK)
        begin = program % blocks * BLOCK
        return begin, begin + BLOCK, program // blocks
    else:
        return program * 0, program * 0 + size, program
