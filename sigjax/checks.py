"""Every argument check of the op and every error text."""

import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from sigjax.operands import Operands, Precision, Settings

PRECISIONS: dict[jax.lax.Precision, Precision] = {
    jax.lax.Precision.DEFAULT: "default",
    jax.lax.Precision.HIGH: "high",
    jax.lax.Precision.HIGHEST: "highest",
}
IMPLEMENTATIONS = (None, "triton", "xla")
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)


def check(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None,
    mask: ArrayLike | None,
    *,
    scale: float | None,
    sigmoid_bias: ArrayLike | None,
    key_bias: ArrayLike | None,
    is_causal: bool,
    query_seq_lengths: ArrayLike | None,
    key_value_seq_lengths: ArrayLike | None,
    local_window_size: int | tuple[int, int] | None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    deterministic: bool = False,
    precision: Precision | jax.lax.Precision | None = None,
    fast_sigmoid: bool = False,
) -> tuple[Operands, Settings]:
    """Turns the op's arguments into operands and settings, or raises.

    Raises:
        ValueError: an argument's shape or value is wrong.
        TypeError: an argument's dtype or kind is wrong.
    """
    arrays = _check_arrays(query, key, value)
    batch, query_length, heads, head_size = arrays[0].shape
    key_length = arrays[1].shape[1]
    logits_shape = (batch, heads, query_length, key_length)
    _check_both_segments(query_segment_ids, key_value_segment_ids)
    operands = Operands(
        *arrays,
        bias=_check_logit_array("bias", bias, logits_shape, boolean=False),
        mask=_check_logit_array("mask", mask, logits_shape, boolean=True),
        sigmoid_bias=_check_sigmoid_bias(sigmoid_bias, batch, heads),
        key_bias=_check_key_bias(key_bias, batch, key_length),
        query_lengths=_check_lengths("query_seq_lengths", query_seq_lengths, batch),
        key_lengths=_check_lengths("key_value_seq_lengths", key_value_seq_lengths, batch),
        query_segments=_check_segments("query", "T", query_segment_ids, (batch, query_length)),
        key_segments=_check_segments("key_value", "S", key_value_segment_ids, (batch, key_length)),
    )
    settings = Settings(
        is_causal=check_bool("is_causal", is_causal),
        deterministic=check_bool("deterministic", deterministic),
        fast_sigmoid=check_bool("fast_sigmoid", fast_sigmoid),
        scale=_check_scale(scale, head_size),
        window=_check_window(local_window_size),
        precision=_check_precision(precision),
    )
    return operands, settings


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError for a name that is no implementation."""
    if implementation not in IMPLEMENTATIONS:
        msg = f"implementation must be None, 'triton' or 'xla', got {implementation!r}"
        raise ValueError(msg)


def check_bool(name: str, x: object) -> bool:
    """A flag as a Python bool; raises TypeError for anything else, a traced one too."""
    if not isinstance(x, bool | np.bool_):
        msg = f"{name} must be a Python bool, got {type(x).__name__}"
        raise TypeError(msg)
    return bool(x)


def _check_precision(precision: Precision | jax.lax.Precision | None) -> Precision:
    if isinstance(precision, jax.lax.Precision):
        precision = PRECISIONS[precision]
    if precision not in (None, *PRECISIONS.values()):
        names = ", ".join(map(repr, PRECISIONS.values()))
        msg = f"precision must be None, {names} or a jax.lax.Precision, got {precision!r}"
        raise ValueError(msg)
    return "highest" if precision is None else precision


def _check_arrays(query: ArrayLike, key: ArrayLike, value: ArrayLike) -> tuple[Array, Array, Array]:
    query, key, value = (
        _as_array(name, x) for name, x in (("query", query), ("key", key), ("value", value))
    )
    if query.ndim not in (3, 4):
        msg = f"query must have shape [B, T, N, H] or [T, N, H], got {query.shape}"
        raise ValueError(msg)
    letters = "[B, S, K, H]" if query.ndim == 4 else "[S, K, H]"
    for name, x in (("key", key), ("value", value)):
        if x.ndim != query.ndim:
            msg = f"{name} must have shape {letters} beside query {query.shape}, got {x.shape}"
            raise ValueError(msg)
        if x.dtype != query.dtype:
            msg = f"{name} must have query's dtype {query.dtype}, got {x.dtype}"
            raise TypeError(msg)
        if x.shape[-1] != query.shape[-1] or x.shape[:-3] != query.shape[:-3]:
            msg = (
                f"{name} must have shape {letters} with the B and H of query {query.shape}, "
                f"got {x.shape}"
            )
            raise ValueError(msg)
    if value.shape != key.shape:
        msg = f"value must have the shape of key {letters} = {key.shape}, got {value.shape}"
        raise ValueError(msg)
    if query.shape[-1] == 0:
        msg = f"query must have a head size H of at least 1, got {query.shape}"
        raise ValueError(msg)
    if key.shape[-2] == 0 or query.shape[-2] % key.shape[-2]:
        msg = (
            "query's number of heads N must be a multiple of key's K, "
            f"got N = {query.shape[-2]} and K = {key.shape[-2]}"
        )
        raise ValueError(msg)
    if query.dtype not in DTYPES:
        msg = f"query must be bfloat16, float16, float32 or float64, got {query.dtype}"
        raise TypeError(msg)
    if query.ndim == 3:
        return query[None], key[None], value[None]
    return query, key, value


def _as_array(name: str, x: ArrayLike) -> Array:
    if not hasattr(x, "dtype") and not isinstance(x, numbers.Number | list | tuple):
        msg = f"{name} must be an array, got {type(x).__name__}"
        raise TypeError(msg)
    return jnp.asarray(x)


def _check_logit_array(
    name: str, x: ArrayLike | None, shape: tuple[int, int, int, int], *, boolean: bool
) -> Array | None:
    if x is None:
        return None
    x = _as_array(name, x)
    if boolean and x.dtype != jnp.bool_:
        msg = f"{name} must have dtype bool (True takes part; use bias to add), got {x.dtype}"
        raise TypeError(msg)
    if not boolean and not jnp.issubdtype(x.dtype, jnp.floating):
        msg = f"{name} must have a floating dtype, got {x.dtype}"
        raise TypeError(msg)
    given = x.shape
    if x.ndim > 4 or any(a not in (1, b) for a, b in zip(given[::-1], shape[::-1], strict=False)):
        msg = f"{name} must be broadcastable to [B, N, T, S] = {shape}, got {given}"
        raise ValueError(msg)
    return x.reshape((1,) * (4 - x.ndim) + given)


def _check_sigmoid_bias(x: ArrayLike | None, batch: int, heads: int) -> Array | None:
    if x is None:
        return None
    x = _as_array("sigmoid_bias", x)
    if not jnp.issubdtype(x.dtype, jnp.floating) and not jnp.issubdtype(x.dtype, jnp.integer):
        msg = f"sigmoid_bias must be a float or a floating array, got {x.dtype}"
        raise TypeError(msg)
    if x.ndim > 2 or any(
        a not in (1, b) for a, b in zip(x.shape[::-1], (heads, batch), strict=False)
    ):
        msg = f"sigmoid_bias must broadcast to [B, N] = {(batch, heads)}, got {x.shape}"
        raise ValueError(msg)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.float32)
    return jnp.broadcast_to(x, (batch, heads))


def _check_key_bias(x: ArrayLike | None, batch: int, key_length: int) -> Array | None:
    if x is None:
        return None
    x = _as_array("key_bias", x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        msg = f"key_bias must have a floating dtype, got {x.dtype}"
        raise TypeError(msg)
    if x.shape != (batch, key_length) and not (batch == 1 and x.shape == (key_length,)):
        msg = f"key_bias must have shape [B, S] = {(batch, key_length)}, got {x.shape}"
        raise ValueError(msg)
    return x.reshape(batch, key_length)


def _check_lengths(name: str, x: ArrayLike | None, batch: int) -> Array | None:
    if x is None:
        return None
    x = _as_array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        msg = f"{name} must be an int32 array, got {x.dtype}"
        raise TypeError(msg)
    if x.shape != (batch,) and not (batch == 1 and x.ndim == 0):
        msg = f"{name} must have shape [B] = {(batch,)}, got {x.shape}"
        raise ValueError(msg)
    return x.astype(jnp.int32).reshape(batch)


def _check_both_segments(query_ids: ArrayLike | None, key_ids: ArrayLike | None) -> None:
    if (query_ids is None) != (key_ids is None):
        given, missing = "query_segment_ids", "key_value_segment_ids"
        if query_ids is None:
            given, missing = missing, given
        msg = f"{missing} must be given beside {given}, got None"
        raise ValueError(msg)


def _check_segments(
    side: str, letter: str, x: ArrayLike | None, shape: tuple[int, int]
) -> Array | None:
    name = f"{side}_segment_ids"
    if x is None:
        return None
    x = _as_array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        msg = f"{name} must be an int32 array, got {x.dtype}"
        raise TypeError(msg)
    if x.shape != shape and not (shape[0] == 1 and x.shape == shape[1:]):
        msg = f"{name} must have shape [B, {letter}] = {shape}, got {x.shape}"
        raise ValueError(msg)
    return x.astype(jnp.int32).reshape(shape)


def _check_scale(scale: float | None, head_size: int) -> float:
    if scale is None:
        return head_size**-0.5
    if isinstance(scale, jax.core.Tracer) or not isinstance(
        scale, numbers.Real | np.ndarray | jax.Array
    ):
        msg = f"scale must be a Python number, got {type(scale).__name__}"
        raise TypeError(msg)
    if np.ndim(scale) != 0 or not np.isfinite(scale):
        msg = f"scale must be one finite number, got {scale}"
        raise ValueError(msg)
    return float(scale)


def _check_window(window: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if window is None:
        return None
    pair = (window, window) if isinstance(window, int | np.integer) else window
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        msg = f"local_window_size must be an int or (left, right), got {window!r}"
        raise TypeError(msg)
    if not all(isinstance(w, int | np.integer) and not isinstance(w, bool) for w in pair):
        msg = f"local_window_size must hold ints, got {window!r}"
        raise TypeError(msg)
    if min(pair) < 0:
        msg = f"local_window_size must not be negative, got {window!r}"
        raise ValueError(msg)
    return int(pair[0]), int(pair[1])


def compute_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of logits and sums: float32, or float64 for float64 operands."""
    return jnp.promote_types(dtype, jnp.float32)
