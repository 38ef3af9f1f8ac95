"""The cache of one-token-at-a-time decoding, as that of ``flax.nnx.MultiHeadAttention``."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import Array, lax


class Cache(NamedTuple):
    """The variables of a module that decodes.

    Attributes:
        key: [B..., S, K, H], what was decoded so far, then zeros.
        value: shape of key.
        index: how many tokens were decoded.
    """

    key: nnx.Cache[Array]
    value: nnx.Cache[Array]
    index: nnx.Cache[Array]


class Decoded(NamedTuple):
    """What one decoded token attends with.

    Attributes:
        key: [B..., S, K, H].
        value: shape of key.
        lengths: int32 [B...], up to and with the token.
        bias: -log(S), for a module whose bias is that of the number of keys: the same at
            every step, so that all steps together are one causal call of S tokens.
    """

    key: Array
    value: Array
    lengths: Array
    bias: float


def new_cache(shape: tuple[int, ...], kv_heads: int, head_size: int, dtype: Dtype) -> Cache:
    """An empty cache for inputs [B..., S, features]."""
    if len(shape) < 2 or shape[-2] < 1:
        msg = f"input_shape must be [B..., length, features] with a length above 0, got {shape}"
        raise ValueError(msg)
    zeros = jnp.zeros((*shape[:-1], kv_heads, head_size), dtype)
    index = nnx.Cache(jnp.array(0, jnp.int32))
    return Cache(nnx.Cache(zeros), nnx.Cache(zeros), index)


def advance(cache: Cache | None, key: Array, value: Array) -> Decoded:
    """Adds a token's key and value, [B..., 1, K, H], to the cache.

    Raises:
        ValueError: there is no cache, or the token does not fit it.
    """
    if cache is None:
        msg = "decode needs a cache: call init_cache first"
        raise ValueError(msg)
    *batch, length, kv_heads, head_size = cache.key.shape
    expected = (*batch, 1, kv_heads, head_size)
    if key.shape != expected:
        msg = f"inputs_q must hold one token a sequence, keys {expected}, got keys {key.shape}"
        raise ValueError(msg)
    index = cache.index[...]
    start = (*(0,) * len(batch), index, 0, 0)
    for variable, x in ((cache.key, key), (cache.value, value)):
        variable[...] = lax.dynamic_update_slice(variable[...], x.astype(variable.dtype), start)
    cache.index[...] = index + 1
    return Decoded(
        key=cache.key[...].astype(key.dtype),
        value=cache.value[...].astype(value.dtype),
        lengths=jnp.broadcast_to(index + 1, tuple(batch)),
        bias=-math.log(length),
    )
