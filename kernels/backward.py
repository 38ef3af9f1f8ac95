"""The portable backward kernels (device code, sm_80 and newer).

With w = sigmoid(logit): the gradient of a logit is w (1 - w) (output gradient · value).
Nothing is normalised, so neither pass needs a row statistic of the other.
"""

import triton
import triton.language as tl

from sigjax.kernels.forward import logits_of_queries, tile_of_program
from sigjax.kernels.pairs import (
    add_pair_terms,
    exclude_pairs,
    key_range,
    pairs_of_head,
    pipelined_part,
    query_range,
)
from sigjax.kernels.tile_math import (
    LOG2_E,
    add_dot,
    as_operand,
    dot_rows,
    head_offset,
    length_at,
    range_at,
    row_offset,
    row_tile,
    sequence_at,
    store_row_tile,
    unscale,
    weights_float32,
)


@triton.jit
def query_gradient_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, S, K, H]
    value_ptr,  # [B, S, K, H]
    output_gradient_ptr,  # [B, T, N, H]
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
    range_scale_ptr,  # [B, K] float32, powers of two: launch.range_scale; or None
    T,
    S,
    scale,  # factor of the logits
    query_gradient_ptr,  # [B, T, N, H]
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
    SHARED: tl.constexpr,  # as in the forward kernel
    ARITHMETIC: tl.constexpr,
):
    """One program: the gradient of BLOCK_Q queries of one head over all their keys."""
    batch, head, start = tile_of_program(T, N, BLOCK_Q, RIGHT is not None, SHARED)
    query_length = length_at(query_lengths_ptr, batch, T)
    key_length = length_at(key_lengths_ptr, batch, S)
    rows = (batch.to(tl.int64) * T * N + head) * H
    columns = (batch.to(tl.int64) * S * K + head // (N // K)) * H
    key_ptr += columns
    value_ptr += columns
    if key_bias_ptr is not None:
        key_bias_ptr += batch.to(tl.int64) * S
    pairs = pairs_of_head(
        bias_ptr, mask_ptr, query_segments_ptr, key_segments_ptr, row_bias_ptr, batch, head, N,
        T, S, BIAS_AXES, MASK_AXES,
    )  # fmt: skip
    FEW_EDGES: tl.constexpr = (
        LEFT is None and bias_ptr is None and mask_ptr is None and ranges_ptr is None
    )
    range_scale = range_scale_at(range_scale_ptr, batch * K + head // (N // K))
    total = tl.zeros([BLOCK_Q, BLOCK_H], tl.float32)
    if start < query_length:
        query = row_tile(
            query_ptr + rows, start, None, query_length, N * H, pairs[2], BLOCK_Q, H, BLOCK_H, True
        )
        output_gradient = row_tile(
            output_gradient_ptr + rows, start, None, query_length, N * H, pairs[2], BLOCK_Q, H,
            BLOCK_H, True,
        )  # fmt: skip
        offset = head_offset(sigmoid_bias_ptr, batch * N + head, key_length)
        offset = row_offset(offset, pairs[4], start, T, BLOCK_Q)
        range_ptr = range_at(ranges_ptr, batch, start, T, BLOCK_Q)
        begin, inner, inner_end, end = key_range(
            start, key_length, range_ptr, BLOCK_Q, BLOCK_K, LEFT, RIGHT
        )
        if FEW_EDGES:
            for first in tl.range(inner, inner_end, BLOCK_K, num_stages=STAGES):
                total = add_keys_gradient(
                    total, query, output_gradient, key_ptr, value_ptr, key_bias_ptr, None, start,
                    first, None, key_length, scale, offset, range_scale, pairs, False, K * H, H,
                    BLOCK_H, BLOCK_Q, BLOCK_K, LEFT, RIGHT, BIAS_AXES, MASK_AXES, False, ARITHMETIC,
                )  # fmt: skip
            for first in tl.range(inner_end, end, BLOCK_K, num_stages=1):
                total = add_keys_gradient(
                    total, query, output_gradient, key_ptr, value_ptr, key_bias_ptr, None, start,
                    first, None, key_length, scale, offset, range_scale, pairs, True, K * H, H,
                    BLOCK_H, BLOCK_Q, BLOCK_K, LEFT, RIGHT, BIAS_AXES, MASK_AXES, True, ARITHMETIC,
                )  # fmt: skip
        else:
            least, part_end = pipelined_part(begin, end, range_ptr)
            for first in tl.range(begin, part_end, BLOCK_K, num_stages=STAGES):
                edge = (first < inner) | (first >= inner_end)
                total = add_keys_gradient(
                    total, query, output_gradient, key_ptr, value_ptr, key_bias_ptr, None, start,
                    first, least, end, scale, offset, range_scale, pairs, edge, K * H, H, BLOCK_H,
                    BLOCK_Q, BLOCK_K, LEFT, RIGHT, BIAS_AXES, MASK_AXES, True, ARITHMETIC,
                )  # fmt: skip
            if ranges_ptr is not None:
                for first in tl.range(part_end, end, BLOCK_K, num_stages=1):
                    total = add_keys_gradient(
                        total, query, output_gradient, key_ptr, value_ptr, key_bias_ptr, pairs[3],
                        start, first, least, end, scale, offset, range_scale, pairs, True, K * H,
                        H, BLOCK_H, BLOCK_Q, BLOCK_K, LEFT, RIGHT, BIAS_AXES, MASK_AXES, True,
                        ARITHMETIC,
                    )  # fmt: skip
    total = total * (scale / range_scale)
    store_row_tile(
        query_gradient_ptr + rows, total, start, T, query_length, N * H, BLOCK_Q, H, BLOCK_H
    )


@triton.jit
def add_keys_gradient(
    total, query, output_gradient, key_ptr, value_ptr, key_bias_ptr, segments_ptr, start, first,
    least, key_length, scale, offset, range_scale, pairs, edge, STRIDE: tl.constexpr,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BIAS_AXES: tl.constexpr, MASK_AXES: tl.constexpr,
    MASKED: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """Adds what BLOCK_K keys from first on contribute to a tile of query gradients."""
    key = row_tile(
        key_ptr, first, least, key_length, STRIDE, segments_ptr, BLOCK_K, H, BLOCK_H, MASKED
    )
    logit_gradient = logit_gradient_of_queries(
        query, output_gradient, key, value_ptr, key_bias_ptr, segments_ptr, start, first, least,
        key_length, scale, offset, pairs, edge, STRIDE, H, BLOCK_H, BLOCK_Q, BLOCK_K, LEFT, RIGHT,
        BIAS_AXES, MASK_AXES, MASKED, ARITHMETIC,
    )  # fmt: skip
    operand = (logit_gradient * range_scale).to(key.dtype)
    return add_dot(total, operand, key, ARITHMETIC)


@triton.jit
def logit_gradient_of_queries(
    query, output_gradient, key, value_ptr, key_bias_ptr, segments_ptr, start, first, least,
    key_length, scale, offset, pairs, edge, STRIDE: tl.constexpr, H: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, BIAS_AXES: tl.constexpr, MASK_AXES: tl.constexpr, MASKED: tl.constexpr,
    ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of logits, [BLOCK_Q, BLOCK_K] float32."""
    value = row_tile(
        value_ptr, first, least, key_length, STRIDE, segments_ptr, BLOCK_K, H, BLOCK_H, MASKED
    )
    scores = dot_rows(query, key, ARITHMETIC)
    weight_gradient = dot_rows(output_gradient, value, ARITHMETIC)
    t = logits_of_queries(
        scores, key_bias_ptr, start, first, key_length, scale, offset, pairs, edge, BLOCK_Q,
        BLOCK_K, LEFT, RIGHT, BIAS_AXES, MASK_AXES,
    )  # fmt: skip
    weights = weights_float32(t, ARITHMETIC)
    return gradient_of_logits(weights, weight_gradient, t, edge, pairs)


@triton.jit
def key_value_gradient_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, S, K, H]
    value_ptr,  # [B, S, K, H]
    output_gradient_ptr,  # [B, T, N, H]
    query_lengths_ptr,  # [B] int32, or None
    key_lengths_ptr,  # [B] int32, or None
    sigmoid_bias_ptr,  # [B, N] float32, or None: -log(number of keys)
    key_bias_ptr,  # [B, S] float32, or None
    bias_ptr,  # broadcasts to [B, N, T, S], or None
    mask_ptr,  # NaN takes part, inf does not, broadcasts to [B, N, T, S]; or None
    query_segments_ptr,  # [B, T] int32, 0 and below is padding; or None as the next three
    key_segments_ptr,  # [B, S] int32
    row_bias_ptr,  # [B, T] float32, added to the logits of a row
    ranges_ptr,  # [B, key tiles, 3] int32: the queries of a tile's segments
    range_scale_ptr,  # [B, K] float32, or None
    T,
    S,
    scale,  # factor of the logits
    key_gradient_ptr,  # [B, S, K, H]
    value_gradient_ptr,  # [B, S, K, H]
    logit_sums_ptr,  # [B, N, S] float32: logit gradients summed over the queries; or None
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
    SHARED: tl.constexpr,  # as in the forward kernel
    ARITHMETIC: tl.constexpr,
):
    """One program: the gradients of BLOCK_K keys and values over all their queries."""
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    batch, kv_head, first = tile_of_program(S, K, BLOCK_K, False, SHARED)
    query_length = length_at(query_lengths_ptr, batch, T)
    key_length = length_at(key_lengths_ptr, batch, S)
    columns = (batch.to(tl.int64) * S * K + kv_head) * H
    key_total = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    value_total = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    key_positions = first + tl.arange(0, BLOCK_K)
    if first < key_length:
        key_segments_here = sequence_at(key_segments_ptr, batch, S)
        key = row_tile(
            key_ptr + columns, first, None, key_length, K * H, key_segments_here, BLOCK_K, H,
            BLOCK_H, True,
        )  # fmt: skip
        value = row_tile(
            value_ptr + columns, first, None, key_length, K * H, key_segments_here, BLOCK_K, H,
            BLOCK_H, True,
        )  # fmt: skip
        range_scale = range_scale_at(range_scale_ptr, batch * K + kv_head)
        key_offset = tl.zeros([BLOCK_K], tl.float32)
        if key_bias_ptr is not None:
            key_bias = tl.load(
                key_bias_ptr + batch.to(tl.int64) * S + key_positions,
                mask=key_positions < key_length,
                other=0.0,
            )
            key_offset = key_bias * -LOG2_E
        range_ptr = range_at(ranges_ptr, batch, first, S, BLOCK_K)
        begin, inner, inner_end, end = query_range(
            first, query_length, range_ptr, BLOCK_Q, BLOCK_K, LEFT, RIGHT
        )
        FEW_EDGES: tl.constexpr = (
            LEFT is None and bias_ptr is None and mask_ptr is None and ranges_ptr is None
        )
        for group in tl.range(0, N // K):
            head = kv_head * (N // K) + group
            rows = (batch.to(tl.int64) * T * N + head) * H
            offset = key_offset
            if row_bias_ptr is None:
                offset = head_offset(sigmoid_bias_ptr, batch * N + head, key_length) + key_offset
            pairs = pairs_of_head(
                bias_ptr, mask_ptr, query_segments_ptr, key_segments_ptr, row_bias_ptr, batch,
                head, N, T, S, BIAS_AXES, MASK_AXES,
            )  # fmt: skip
            logit_sums = tl.zeros([BLOCK_K], tl.float32)
            if FEW_EDGES:
                if RIGHT is not None:
                    for start in tl.range(begin, inner, BLOCK_Q, num_stages=1):
                        key_total, value_total, logit_sums = add_queries_gradient(
                            key_total, value_total, logit_sums, key, value, query_ptr + rows,
                            output_gradient_ptr + rows, None, start, first, None, query_length,
                            key_length, scale, offset, range_scale, pairs, True, N * H, H, BLOCK_H,
                            BLOCK_Q, BLOCK_K, LEFT, RIGHT, BIAS_AXES, MASK_AXES, True, ARITHMETIC,
                            logit_sums_ptr is not None,
                        )  # fmt: skip
                for start in tl.range(inner, inner_end, BLOCK_Q, num_stages=STAGES):
                    key_total, value_total, logit_sums = add_queries_gradient(
                        key_total, value_total, logit_sums, key, value, query_ptr + rows,
                        output_gradient_ptr + rows, None, start, first, None, query_length,
                        key_length, scale, offset, range_scale, pairs, False, N * H, H, BLOCK_H,
                        BLOCK_Q, BLOCK_K, LEFT, RIGHT, BIAS_AXES, MASK_AXES, False, ARITHMETIC,
                        logit_sums_ptr is not None,
                    )  # fmt: skip
                for start in tl.range(inner_end, end, BLOCK_Q, num_stages=1):
                    key_total, value_total, logit_sums = add_queries_gradient(
                        key_total, value_total, logit_sums, key, value, query_ptr + rows,
                        output_gradient_ptr + rows, None, start, first, None, query_length,
                        key_length, scale, offset, range_scale, pairs, True, N * H, H, BLOCK_H,
                        BLOCK_Q, BLOCK_K, LEFT, RIGHT, BIAS_AXES, MASK_AXES, True, ARITHMETIC,
                        logit_sums_ptr is not None,
                    )  # fmt: skip
            else:
                least, part_end = pipelined_part(begin, end, range_ptr)
                for start in tl.range(begin, part_end, BLOCK_Q, num_stages=STAGES):
                    edge = (start < inner) | (start >= inner_end)
                    key_total, value_total, logit_sums = add_queries_gradient(
                        key_total, value_total, logit_sums, key, value, query_ptr + rows,
                        output_gradient_ptr + rows, None, start, first, least, end,
                        key_length, scale, offset, range_scale, pairs, edge, N * H, H, BLOCK_H,
                        BLOCK_Q, BLOCK_K, LEFT, RIGHT, BIAS_AXES, MASK_AXES, True, ARITHMETIC,
                        logit_sums_ptr is not None,
                    )  # fmt: skip
                if ranges_ptr is not None:
                    for start in tl.range(part_end, end, BLOCK_Q, num_stages=1):
                        key_total, value_total, logit_sums = add_queries_gradient(
                            key_total, value_total, logit_sums, key, value, query_ptr + rows,
                            output_gradient_ptr + rows, pairs[2], start, first, least, end,
                            key_length, scale, offset, range_scale, pairs, True, N * H, H, BLOCK_H,
                            BLOCK_Q, BLOCK_K, LEFT, RIGHT, BIAS_AXES, MASK_AXES, True, ARITHMETIC,
                            logit_sums_ptr is not None,
                        )  # fmt: skip
            if logit_sums_ptr is not None:
                sums = logit_sums_ptr + (batch.to(tl.int64) * N + head) * S + key_positions
                logit_sums = tl.where(key_positions < key_length, logit_sums, 0.0)
                tl.store(sums, logit_sums, mask=key_positions < S)
        key_total = key_total * (scale / range_scale)
    elif logit_sums_ptr is not None:
        for group in tl.range(0, N // K):
            head = kv_head * (N // K) + group
            sums = logit_sums_ptr + (batch.to(tl.int64) * N + head) * S + key_positions
            tl.store(sums, tl.zeros([BLOCK_K], tl.float32), mask=key_positions < S)
    value_total = unscale(value_total, dtype)
    store_row_tile(
        key_gradient_ptr + columns, key_total, first, S, key_length, K * H, BLOCK_K, H, BLOCK_H
    )
    store_row_tile(
        value_gradient_ptr + columns, value_total, first, S, key_length, K * H, BLOCK_K, H, BLOCK_H
    )


@triton.jit
def add_queries_gradient(
    key_total, value_total, logit_sums, key, value, query_ptr, output_gradient_ptr, segments_ptr,
    start, first, least, query_length, key_length, scale, offset, range_scale, pairs, edge,
    STRIDE: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BIAS_AXES: tl.constexpr,
    MASK_AXES: tl.constexpr, MASKED: tl.constexpr, ARITHMETIC: tl.constexpr,
    WITH_SUMS: tl.constexpr,
):  # fmt: skip
    """Adds what BLOCK_Q queries from start on contribute to a tile of keys and values."""
    query = row_tile(
        query_ptr, start, least, query_length, STRIDE, segments_ptr, BLOCK_Q, H, BLOCK_H, MASKED
    )
    output_gradient = row_tile(
        output_gradient_ptr, start, least, query_length, STRIDE, segments_ptr, BLOCK_Q, H, BLOCK_H,
        MASKED,
    )  # fmt: skip
    scores = dot_rows(key, query, ARITHMETIC)
    queries = start + tl.arange(0, BLOCK_Q)
    keys = first + tl.arange(0, BLOCK_K)
    t = tl.fma(scores, -scale * LOG2_E, offset[:, None])
    row_bias_ptr, T = pairs[4], pairs[5]
    if row_bias_ptr is not None:
        row_bias = tl.load(row_bias_ptr + queries, mask=queries < T, other=0.0)
        t = tl.fma(row_bias[None, :], -LOG2_E, t)
    t = add_pair_terms(t, start, first, pairs, BLOCK_Q, BLOCK_K, BIAS_AXES, True)
    t = exclude_pairs(
        t, (queries < query_length)[None, :], queries[None, :], keys[:, None], start, first, pairs,
        edge, BLOCK_Q, BLOCK_K, MASK_AXES, LEFT, RIGHT, True,
    )  # fmt: skip
    weights = weights_float32(t, ARITHMETIC)
    value_total = add_dot(
        value_total, as_operand(weights, query.dtype), output_gradient, ARITHMETIC
    )
    weight_gradient = dot_rows(value, output_gradient, ARITHMETIC)
    logit_gradient = gradient_of_logits(weights, weight_gradient, t, edge, pairs)
    operand = (logit_gradient * range_scale).to(query.dtype)
    key_total = add_dot(key_total, operand, query, ARITHMETIC)
    if WITH_SUMS:
        logit_sums += tl.sum(logit_gradient, 1)
    return key_total, value_total, logit_sums


@triton.jit
def gradient_of_logits(weights, weight_gradient, t, edge, pairs):
    """W (1 - w) times the weight's gradient; 0 for a pair that takes no part."""
    product = weights * weight_gradient
    logit_gradient = tl.fma(-weights, product, product)
    if pairs[1] is not None:
        edge = True  # a mask excludes pairs in every block
    if edge:
        # 0 times an infinite neighbour would be NaN.
        logit_gradient = tl.where(t == float("inf"), 0.0, logit_gradient)
    return logit_gradient


@triton.jit
def range_scale_at(range_scale_ptr, batch_head):
    """The power of two by which float16 logit gradients are held; 1 for other dtypes."""
    if range_scale_ptr is None:
        return 1.0
    else:
        return tl.load(range_scale_ptr + batch_head)
