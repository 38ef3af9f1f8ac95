"""Sigmoid attention for the attention_fn slot of Flax's own modules."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from flax.typing import Dtype, PrecisionLike
from jax import Array
from jax.typing import ArrayLike

from sigjax.attention import sigmoid_attention

type Implementation = Literal["triton", "xla"] | None


def attention_fn(
    query: Array,
    key: Array,
    value: Array,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    is_causal: bool = False,
    dtype: Dtype | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    precision: PrecisionLike = None,
    module: Any = None,
    qk_attn_weights_einsum: Callable[..., Array] | None = None,
    attn_weights_value_einsum: Callable[..., Array] | None = None,
    scale: float | None = None,
    sigmoid_bias: ArrayLike | None = None,
    key_bias: ArrayLike | None = None,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    fast_sigmoid: bool = False,
    implementation: Implementation = None,
) -> Array:
    """Sigmoid attention for the ``attention_fn`` of Flax's modules.

    Serves ``nnx.MultiHeadAttention`` and ``linen.MultiHeadDotProductAttention``; the
    arguments from scale on are the op's own, to be set by ``functools.partial``.

    B batch (any number of axes), T query length, S key length, N query heads,
    K key and value heads, H head size.

    Args:
        query: [B..., T, N, H].
        key: [B..., S, K, H].
        value: shape of key.
        bias: added to the logits, broadcastable to [B..., N, T, S].
        mask: bool or 0 and 1, broadcastable to [B..., N, T, S]. The default sigmoid_bias
            counts the keys up to key_value_seq_lengths, masked ones too: with a mask that
            hides many keys, or a decode cache, give sigmoid_bias.
        is_causal: query i sees key j only where j <= i.
        dtype: of query, key and value; None is what they promote to.
        broadcast_dropout: no dropout is served, so it has no effect.
        dropout_rng: no dropout is served, so it has no effect.
        dropout_rate: 0, unless deterministic.
        deterministic: that dropout is off.
        precision: Flax passes on that of its projections; the op takes float32
            products in full precision whatever it is.
        module: None; Flax sets it to sow attention weights.
        qk_attn_weights_einsum: None; a quantised product of linen's.
        attn_weights_value_einsum: None; a quantised product of linen's.
        scale: see ``sigjax.sigmoid_attention``.
        sigmoid_bias: a float, or an array broadcastable to [B..., N]; None is
            -log(number of valid keys).
        key_bias: added to the logits of each key, [B..., S].
        query_seq_lengths: int32 [B...].
        key_value_seq_lengths: int32 [B...].
        local_window_size: see ``sigjax.sigmoid_attention``.
        query_segment_ids: int32 [B..., T], see ``sigjax.sigmoid_attention``.
        key_value_segment_ids: int32 [B..., S].
        fast_sigmoid: see ``sigjax.sigmoid_attention``.
        implementation: see ``sigjax.sigmoid_attention``.

    Returns:
        [B..., T, N, H].

    Raises:
        ValueError: an argument's shape or value is wrong.
        TypeError: an argument's dtype or kind is wrong.
        NotImplementedError: dropout of attention weights, sowing them or einsums were
            asked for, or the implementation cannot serve the call.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import sigjax
        >>> attention = nnx.MultiHeadAttention(
        ...     4, 64, attention_fn=sigjax.attention_fn, decode=False, rngs=nnx.Rngs(0)
        ... )
        >>> attention(jnp.ones((2, 300, 64))).shape
        (2, 300, 64)
    """
    del broadcast_dropout, dropout_rng, precision  # as documented above
    if dropout_rate > 0.0 and not deterministic:
        msg = (
            "dropout_rate must be 0 or deterministic True: sigmoid attention has no dropout of "
            f"attention weights, got dropout_rate {dropout_rate}; drop from its output instead"
        )
        raise NotImplementedError(msg)
    if module is not None:
        msg = (
            "module must be None (sow_weights=False): sigmoid attention never holds its "
            f"weights, got {type(module).__name__}"
        )
        raise NotImplementedError(msg)
    for name, einsum in (
        ("qk_attn_weights_einsum", qk_attn_weights_einsum),
        ("attn_weights_value_einsum", attn_weights_value_einsum),
    ):
        if einsum is not None:
            msg = f"{name} must be None: sigmoid attention takes its own products, got {einsum}"
            raise NotImplementedError(msg)
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    return attend(
        query.astype(dtype),
        key.astype(dtype),
        value.astype(dtype),
        bias=bias,
        mask=mask,
        scale=scale,
        sigmoid_bias=sigmoid_bias,
        key_bias=key_bias,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        is_causal=is_causal,
        local_window_size=local_window_size,
        fast_sigmoid=fast_sigmoid,
        implementation=implementation,
    )


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    bias: ArrayLike | None,
    mask: ArrayLike | None,
    sigmoid_bias: ArrayLike | None,
    key_bias: ArrayLike | None,
    query_seq_lengths: ArrayLike | None,
    key_value_seq_lengths: ArrayLike | None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    **options: Any,
) -> Array:
    """The op over any number of batch axes, with masks of any dtype, as Flax gives them."""
    batch = query.shape[:-3]
    if query.ndim < 3:
        msg = f"query must have shape [B..., T, N, H], got {query.shape}"
        raise ValueError(msg)
    for name, x in (("key", key), ("value", value)):
        if x.ndim != query.ndim or x.shape[:-3] != batch:
            msg = f"{name} must have the batch axes of query {query.shape}, got {x.shape}"
            raise ValueError(msg)
    if mask is not None:
        mask = jnp.asarray(mask).astype(jnp.bool_)
    output = sigmoid_attention(
        query.reshape(math.prod(batch), *query.shape[-3:]),
        key.reshape(math.prod(batch), *key.shape[-3:]),
        value.reshape(math.prod(batch), *value.shape[-3:]),
        _fold("bias", bias, batch, 3),
        _fold("mask", mask, batch, 3),
        sigmoid_bias=_fold("sigmoid_bias", sigmoid_bias, batch, 1),
        key_bias=_fold("key_bias", key_bias, batch, 1),
        query_seq_lengths=_fold("query_seq_lengths", query_seq_lengths, batch, 0),
        key_value_seq_lengths=_fold("key_value_seq_lengths", key_value_seq_lengths, batch, 0),
        query_segment_ids=_fold("query_segment_ids", query_segment_ids, batch, 1),
        key_value_segment_ids=_fold("key_value_segment_ids", key_value_segment_ids, batch, 1),
        **options,
    )
    return output.reshape(query.shape)


def _fold(name: str, x: ArrayLike | None, batch: tuple[int, ...], own_axes: int) -> Array | None:
    """Brings the axes before the last own_axes, which broadcast to batch, to a single one."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.ndim <= own_axes:
        return x
    leading, own = x.shape[: x.ndim - own_axes], x.shape[x.ndim - own_axes :]
    if math.prod(leading) == 1:
        return x.reshape(1, *own)
    try:
        return jnp.broadcast_to(x, batch + own).reshape(math.prod(batch), *own)
    except ValueError as error:
        msg = f"{name} must have leading axes broadcastable to {batch}, got shape {x.shape}"
        raise ValueError(msg) from error
