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
    logits = logits + sigmoid_bias(operands, dtype)[:, :, None, None]
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


def sigmoid_bias(operands: Operands, dtype: jnp.dtype) -> Array:
    """The bias of each head, [B, N]: the caller's, or -log(number of valid keys)."""
    if operands.sigmoid_bias is not None:
        return operands.sigmoid_bias.astype(dtype)
    batch, _, heads, _ = operands.query.shape
    keys = jnp.sum(valid_keys(operands), axis=1)
    return jnp.broadcast_to(-jnp.log(jnp.maximum(keys, 1).astype(dtype))[:, None], (batch, heads))


def valid_queries(operands: Operands) -> Array:
    """Which query rows lie before their sequence's length: bool [B, T]."""
    return _before(operands.query, operands.query_lengths)


def valid_keys(operands: Operands) -> Array:
    """Which keys lie before their sequence's length: bool [B, S]."""
    return _before(operands.key, operands.key_lengths)


def pairs(operands: Operands, settings: Settings) -> Array:
    """Which (query, key) pairs take part: bool, broadcastable to [B, N, T, S]."""
    rows, keys = valid_queries(operands), valid_keys(operands)
    allowed = (rows[:, :, None] & keys[:, None, :])[:, None]
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


def _before(x: Array, lengths: Array | None) -> Array:
    if lengths is None:
        return jnp.ones(x.shape[:2], bool)
    return jnp.arange(x.shape[1])[None, :] < lengths[:, None]
