"""The definition of sigmoid attention in plain jnp: the oracle of every test.

It forms all T x S weights. Everything else in this package computes the same
numbers with less memory or less time.
"""

import jax
import jax.numpy as jnp
from jax import Array

from sigjax.checks import compute_dtype
from sigjax.operands import Operands, Settings


def attention(operands: Operands, settings: Settings) -> Array:
    """sigmoid(query keyᵀ · scale + biases) value, in the operands' dtype.

    Logits and weights are computed in float32 (float64 for float64 operands),
    the weights rounded to the operands' dtype before they meet the values, as
    in jax.nn.dot_product_attention.

    Returns:
        [B, T, N, H] in query's dtype; rows past the query length are exactly 0.
    """
    query, key, value = masked_inputs(operands)
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    weights = attention_weights(operands, settings, query, key).astype(value.dtype)
    encoded = jnp.einsum("bnts,bsnh->btnh", weights, value)
    return jnp.where(valid_queries(operands)[:, :, None, None], encoded, 0).astype(query.dtype)


def attention_weights(operands: Operands, settings: Settings, query: Array, key: Array) -> Array:
    """The weights, [B, N, T, S], 0 wherever a pair takes no part."""
    dtype = compute_dtype(query.dtype)
    logits = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=dtype)
    logits = logits * jnp.asarray(settings.scale, dtype)
    logits = logits + row_bias(operands, dtype)[..., None]
    if operands.key_bias is not None:
        logits = logits + operands.key_bias.astype(dtype)[:, None, None, :]
    if operands.bias is not None:
        logits = logits + operands.bias.astype(dtype)
    # -inf before the sigmoid, not a product after it: a NaN outside never gets in.
    return jax.nn.sigmoid(jnp.where(pairs(operands, settings), logits, -jnp.inf))


def masked_inputs(operands: Operands) -> tuple[Array, Array, Array]:
    """Query, key and value with 0 past the lengths, whatever was there."""
    rows = valid_queries(operands)[:, :, None, None]
    keys = valid_keys(operands)[:, :, None, None]
    return (
        jnp.where(rows, operands.query, 0),
        jnp.where(keys, operands.key, 0),
        jnp.where(keys, operands.value, 0),
    )


def row_bias(operands: Operands, dtype: jnp.dtype) -> Array:
    """What is added to a row's logits, [B, N, T] or [B, N, 1].

    The caller's sigmoid_bias, or -log(number of valid keys), of the query's own segment
    where there are segments.
    """
    if operands.sigmoid_bias is not None:
        return operands.sigmoid_bias.astype(dtype)[:, :, None]
    batch, _, heads, _ = operands.query.shape
    keys = key_counts(operands)
    bias = -jnp.log(jnp.maximum(keys, 1).astype(dtype))
    return jnp.broadcast_to(bias[:, None, :], (batch, heads, keys.shape[1]))


def key_counts(operands: Operands) -> Array:
    """How many valid keys a query may see, int32 [B, T] with segments, else [B, 1]."""
    valid = valid_keys(operands)
    if operands.query_segments is None or operands.key_segments is None:
        return jnp.sum(valid, axis=1, dtype=jnp.int32)[:, None]
    # Sorted, so that memory grows with T + S. Padding is 0, below every segment.
    ordered = jnp.sort(jnp.where(valid, operands.key_segments, 0), axis=1)

    def count(keys: Array, queries: Array) -> Array:
        first, last = (jnp.searchsorted(keys, queries, side=side) for side in ("left", "right"))
        return (last - first).astype(jnp.int32)

    return jax.vmap(count)(ordered, operands.query_segments)


def valid_queries(operands: Operands) -> Array:
    """Which query rows lie before their sequence's length and in a segment: bool [B, T]."""
    return _valid(operands.query, operands.query_lengths, operands.query_segments)


def valid_keys(operands: Operands) -> Array:
    """Which keys lie before their sequence's length and in a segment: bool [B, S]."""
    return _valid(operands.key, operands.key_lengths, operands.key_segments)


def pairs(operands: Operands, settings: Settings) -> Array:
    """Which (query, key) pairs take part: bool, broadcastable to [B, N, T, S]."""
    rows, keys = valid_queries(operands), valid_keys(operands)
    allowed = rows[:, :, None] & keys[:, None, :]
    if operands.query_segments is not None and operands.key_segments is not None:
        same = operands.query_segments[:, :, None] == operands.key_segments[:, None, :]
        allowed = allowed & same
    allowed = allowed[:, None]
    query_positions = jnp.arange(rows.shape[1])[None, None, :, None]
    key_positions = jnp.arange(keys.shape[1])[None, None, None, :]
    allowed = allowed & band(query_positions, key_positions, settings)
    return allowed if operands.mask is None else allowed & operands.mask


def band(query_positions: Array, key_positions: Array, settings: Settings) -> Array:
    """The causal triangle and the local window, for positions that broadcast."""
    allowed = jnp.ones((), bool)
    if settings.is_causal:
        allowed = allowed & (key_positions <= query_positions)
    if settings.window is not None:
        left, right = settings.window
        allowed = allowed & (key_positions >= query_positions - left)
        allowed = allowed & (key_positions <= query_positions + right)
    return allowed


def _valid(x: Array, lengths: Array | None, segments: Array | None) -> Array:
    valid = jnp.ones(x.shape[:2], bool)
    if lengths is not None:
        valid = valid & (jnp.arange(x.shape[1])[None, :] < lengths[:, None])
    return valid if segments is None else valid & (segments > 0)
