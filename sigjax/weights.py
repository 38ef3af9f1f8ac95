"""Read-out: the weights of chosen pairs, exactly, without those of all the others."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from sigjax import reference
from sigjax.checks import check, compute_dtype
from sigjax.operands import Operands, Settings


def attention_weights(
    query: ArrayLike,
    key: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    query_positions: ArrayLike | None = None,
    key_positions: ArrayLike | None = None,
    scale: float | None = None,
    sigmoid_bias: ArrayLike | None = None,
    key_bias: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
) -> Array:
    """The weights that ``sigmoid_attention`` gives chosen pairs of queries and keys.

    A weight depends on its own query and key alone, so those of a few positions cost no more
    than these positions: memory grows with the pairs asked for and with T + S.

    B batch, T query length, S key length, N query heads, K key heads, H head size, p and r
    positions asked for.

    Args:
        query: [B, T, N, H] or [T, N, H], as in ``sigmoid_attention``.
        key: [B, S, K, H] or [S, K, H].
        bias: see ``sigmoid_attention``, as all other arguments but the positions.
        mask: see ``sigmoid_attention``.
        query_positions: [p] or, for positions of its own in each sequence, [B, p] integers
            from 0 to T - 1; None is every query. Within jit their values are not checked.
        key_positions: [r] or [B, r] integers from 0 to S - 1; None is every key.
        scale: see ``sigmoid_attention``.
        sigmoid_bias: see ``sigmoid_attention``.
        key_bias: see ``sigmoid_attention``.
        is_causal: see ``sigmoid_attention``.
        query_seq_lengths: see ``sigmoid_attention``.
        key_value_seq_lengths: see ``sigmoid_attention``.
        local_window_size: see ``sigmoid_attention``.
        query_segment_ids: see ``sigmoid_attention``.
        key_value_segment_ids: see ``sigmoid_attention``.

    Returns:
        [B, N, p, r], [N, p, r] for unbatched operands, in float32 (float64 for float64):
        exactly 0 where a pair takes no part, padding included. Differentiable.

    Raises:
        ValueError: an argument's shape or value is wrong, or a known position is out of range.
        TypeError: an argument's dtype or kind is wrong.

    Example:
        >>> import jax, jax.numpy as jnp, sigjax
        >>> x = jax.random.normal(jax.random.key(0), (2, 300, 4, 64))
        >>> first, some = jnp.array([0]), jnp.array([7, 8, 9])
        >>> sigjax.attention_weights(x, x, query_positions=first, key_positions=some).shape
        (2, 4, 1, 3)
    """
    operands, settings = check(
        query,
        key,
        key,
        bias,
        mask,
        scale=scale,
        sigmoid_bias=sigmoid_bias,
        key_bias=key_bias,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
    )
    batch, length, _, _ = operands.query.shape
    keys = operands.key.shape[1]
    weights = _weights(
        operands,
        settings,
        _positions("query_positions", "p", query_positions, batch, length),
        _positions("key_positions", "r", key_positions, batch, keys),
    )
    return weights[0] if jnp.ndim(query) == 3 else weights


@partial(jax.jit, static_argnames="settings")
def _weights(operands: Operands, settings: Settings, rows: Array, columns: Array) -> Array:
    """[B, N, p, r] for positions rows [B, p] and columns [B, r]."""
    dtype = compute_dtype(operands.query.dtype)
    query, key, _ = reference.masked_inputs(operands)
    query, key = _take(query, rows, 1), _take(key, columns, 1)
    batch, chosen, heads, head_size = query.shape
    grouped = query.reshape(batch, chosen, key.shape[2], -1, head_size)
    logits = jnp.einsum("bpkgh,brkh->bkgpr", grouped, key, preferred_element_type=dtype)
    logits = logits.reshape(batch, heads, chosen, columns.shape[1])
    logits = logits * jnp.asarray(settings.scale, dtype)
    logits = logits + _pairs(reference.row_bias(operands, dtype)[..., None], rows, columns)
    if operands.key_bias is not None:
        key_bias = _take(operands.key_bias.astype(dtype), columns, 1)
        logits = logits + key_bias[:, None, None, :]
    if operands.bias is not None:
        logits = logits + _pairs(operands.bias, rows, columns).astype(dtype)
    allowed = _allowed(operands, settings, rows, columns)
    return jax.nn.sigmoid(jnp.where(allowed, logits, -jnp.inf))


def _allowed(operands: Operands, settings: Settings, rows: Array, columns: Array) -> Array:
    valid = _take(reference.valid_queries(operands), rows, 1)[:, :, None]
    valid = valid & _take(reference.valid_keys(operands), columns, 1)[:, None, :]
    if operands.query_segments is not None and operands.key_segments is not None:
        own = _take(operands.query_segments, rows, 1)[:, :, None]
        valid = valid & (own == _take(operands.key_segments, columns, 1)[:, None, :])
    valid = valid & reference.band(rows[:, :, None], columns[:, None, :], settings)
    if operands.mask is None:
        return valid[:, None]
    return valid[:, None] & _pairs(operands.mask, rows, columns)


def _pairs(x: Array, rows: Array, columns: Array) -> Array:
    """Of an array that broadcasts to [B, N, T, S], the chosen pairs; an axis of 1 stays."""
    if x.shape[2] != 1:
        x = _take(x, rows[:, None], 2)
    return x if x.shape[3] == 1 else _take(x, columns[:, None, None], 3)


def _take(x: Array, positions: Array, axis: int) -> Array:
    """Takes positions, [B, 1..., p], along an axis of x."""
    index = positions.reshape(positions.shape + (1,) * (x.ndim - axis - 1))
    return jnp.take_along_axis(x, index, axis=axis)


def _positions(name: str, letter: str, x: Any, batch: int, length: int) -> Array:
    """As int32 [B, p]."""
    if x is None:
        return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        msg = f"{name} must be integers, got {x.dtype}"
        raise TypeError(msg)
    if x.ndim not in (1, 2) or (x.ndim == 2 and x.shape[0] != batch):
        msg = f"{name} must have shape [{letter}] or [B, {letter}] with B = {batch}, got {x.shape}"
        raise ValueError(msg)
    if not isinstance(x, jax.core.Tracer) and x.size:
        known = np.asarray(x)  # NumPy: jnp would trace the comparison within jit
        smallest, largest = int(known.min()), int(known.max())
        if smallest < 0 or largest >= length:
            msg = f"{name} must lie from 0 to {length - 1}, got {smallest} to {largest}"
            raise ValueError(msg)
    return jnp.broadcast_to(x.astype(jnp.int32), (batch, x.shape[-1]))
