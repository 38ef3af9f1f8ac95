"""The portable forward kernel (device code, sm_80 and newer)."""

import triton
import triton.language as tl

from sigjax.kernels.tile_math import (
    LOG2_E,
    add_dot,
    dot_rows,
    head_offset,
    length_at,
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
    IS_CAUSAL: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    """One program: BLOCK_Q queries of one head over all their keys."""
    tl.static_assert(BLOCK_H >= H)
    dtype: tl.constexpr = output_ptr.dtype.element_ty
    batch, head, start = query_tile_of_program(T, N, BLOCK_Q, IS_CAUSAL)
    query_length = length_at(query_lengths_ptr, batch, T)
    key_length = length_at(key_lengths_ptr, batch, S)
    query_ptr += (batch.to(tl.int64) * T * N + head) * H
    output_ptr += (batch.to(tl.int64) * T * N + head) * H
    key_ptr += (batch.to(tl.int64) * S * K + head // (N // K)) * H
    value_ptr += (batch.to(tl.int64) * S * K + head // (N // K)) * H
    if key_bias_ptr is not None:
        key_bias_ptr += batch.to(tl.int64) * S
    total = tl.zeros([BLOCK_Q, BLOCK_H], tl.float32)
    if start < query_length:
        query = row_tile(query_ptr, start, query_length, N * H, BLOCK_Q, H, BLOCK_H, True)
        offset = head_offset(sigmoid_bias_ptr, batch * N + head, key_length)
        inner, end = key_range(start, key_length, BLOCK_Q, BLOCK_K, IS_CAUSAL)
        for first in tl.range(0, inner, BLOCK_K, num_stages=STAGES):
            total = add_keys(
                total, query, key_ptr, value_ptr, key_bias_ptr, start, first, key_length,
                scale, offset, K * H, H, BLOCK_H, BLOCK_Q, BLOCK_K, IS_CAUSAL, False, SIGMOID,
            )  # fmt: skip
        for first in tl.range(inner, end, BLOCK_K, num_stages=1):
            total = add_keys(
                total, query, key_ptr, value_ptr, key_bias_ptr, start, first, key_length,
                scale, offset, K * H, H, BLOCK_H, BLOCK_Q, BLOCK_K, IS_CAUSAL, True, SIGMOID,
            )  # fmt: skip
    total = unscale(total, dtype)
    store_row_tile(output_ptr, total, start, T, query_length, N * H, BLOCK_Q, H, BLOCK_H)


@triton.jit
def add_keys(
    total, query, key_ptr, value_ptr, key_bias_ptr, start, first, key_length, scale, offset,
    STRIDE: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Adds what BLOCK_K keys from first on contribute to a tile of outputs."""
    key = row_tile(key_ptr, first, key_length, STRIDE, BLOCK_K, H, BLOCK_H, MASKED)
    value = row_tile(value_ptr, first, key_length, STRIDE, BLOCK_K, H, BLOCK_H, MASKED)
    scores = dot_rows(query, key)
    t = logits_of_queries(
        scores, key_bias_ptr, start, first, key_length, scale, offset,
        BLOCK_Q, BLOCK_K, IS_CAUSAL, MASKED,
    )  # fmt: skip
    weights = weights_as_operand(t, value.dtype, SIGMOID)
    return add_dot(total, weights, value)


@triton.jit
def logits_of_queries(
    scores, key_bias_ptr, start, first, key_length, scale, offset,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_Q, BLOCK_K] to t = -log2(exp(logit)); inf where a pair takes no part."""
    keys = first + tl.arange(0, BLOCK_K)
    t = tl.fma(scores, -scale * LOG2_E, offset)
    if key_bias_ptr is not None:
        t -= (tl.load(key_bias_ptr + keys, mask=keys < key_length, other=0.0) * LOG2_E)[None, :]
    if MASKED:
        allowed = (keys < key_length)[None, :]
        if IS_CAUSAL:
            queries = start + tl.arange(0, BLOCK_Q)
            allowed = allowed & (keys[None, :] <= queries[:, None])
        t = tl.where(allowed, t, float("inf"))
    return t


@triton.jit
def query_tile_of_program(T, N: tl.constexpr, BLOCK_Q: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """(batch, head, first query) of this program: tiles of a head are neighbours, to share L2."""
    tiles = tl.cdiv(T, BLOCK_Q)
    program = tl.program_id(0)
    tile = program % tiles
    if IS_CAUSAL:
        tile = tiles - 1 - tile  # the longest first
    head = (program // tiles) % N
    return program // (tiles * N), head, tile * BLOCK_Q


@triton.jit
def key_range(
    start, key_length, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, IS_CAUSAL: tl.constexpr
):
    """(inner, end): key blocks below inner need no mask, those from inner to end do."""
    inner = key_length // BLOCK_K * BLOCK_K
    end = key_length
    if IS_CAUSAL:
        inner = tl.minimum(inner, (start + 1) // BLOCK_K * BLOCK_K)
        end = tl.minimum(end, start + BLOCK_Q)
    return inner, end
