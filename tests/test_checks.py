# One line an error, however long.
# ruff: noqa: E501
"""Every error a user can cause says which argument, what was expected and what came."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax import sigmoid_attention

X = jnp.ones((2, 8, 4, 16), jnp.bfloat16)
Y = jnp.ones((2, 6, 2, 16), jnp.bfloat16)

WRONG = {
    "query rank": ((X[0, 0], Y, Y), {}, ValueError, "query must have shape [B, T, N, H] or [T, N, H], got (4, 16)"),
    "query kind": (("text", Y, Y), {}, TypeError, "query must be an array, got str"),
    "query dtype": ((X.astype(int),) * 3, {}, TypeError, "query must be bfloat16, float16, float32 or float64, got int32"),
    "key rank": ((X, Y[0], Y), {}, ValueError, "key must have shape [B, S, K, H] beside query (2, 8, 4, 16), got (6, 2, 16)"),
    "key batch": ((X, Y[:1], Y), {}, ValueError, "key must have shape [B, S, K, H] with the B and H of query"),
    "value head size": ((X, Y, Y[..., :8]), {}, ValueError, "value must have shape [B, S, K, H] with the B and H of query"),
    "value length": ((X, Y, Y[:, :5]), {}, ValueError, "value must have the shape of key [B, S, K, H] = (2, 6, 2, 16), got (2, 5, 2, 16)"),
    "key dtype": ((X, Y.astype(jnp.float32), Y), {}, TypeError, "key must have query's dtype bfloat16, got float32"),
    "heads": ((X, jnp.ones((2, 6, 3, 16), X.dtype), jnp.ones((2, 6, 3, 16), X.dtype)), {}, ValueError, "N must be a multiple of key's K, got N = 4 and K = 3"),
    "no head size": ((X[..., :0], Y[..., :0], Y[..., :0]), {}, ValueError, "head size H of at least 1"),
    "bias shape": ((X, Y, Y, np.ones((3, 1, 1, 1))), {}, ValueError, "bias must be broadcastable to [B, N, T, S] = (2, 4, 8, 6), got (3, 1, 1, 1)"),
    "bias dtype": ((X, Y, Y, np.ones((8, 6), bool)), {}, TypeError, "bias must have a floating dtype, got bool"),
    "mask shape": ((X, Y, Y, None, np.ones((5, 6), bool)), {}, ValueError, "mask must be broadcastable to [B, N, T, S] = (2, 4, 8, 6), got (5, 6)"),
    "mask dtype": ((X, Y, Y, None, np.ones((8, 6))), {}, TypeError, "mask must have dtype bool"),
    "scale kind": ((X, Y, Y), {"scale": "1"}, TypeError, "scale must be a Python number, got str"),
    "scale value": ((X, Y, Y), {"scale": float("nan")}, ValueError, "scale must be one finite number, got nan"),
    "sigmoid_bias shape": ((X, Y, Y), {"sigmoid_bias": np.ones(3)}, ValueError, "sigmoid_bias must broadcast to [B, N] = (2, 4), got (3,)"),
    "sigmoid_bias dtype": ((X, Y, Y), {"sigmoid_bias": np.ones(4, bool)}, TypeError, "sigmoid_bias must be a float or a floating array, got bool"),
    "key_bias shape": ((X, Y, Y), {"key_bias": np.ones((2, 8))}, ValueError, "key_bias must have shape [B, S] = (2, 6), got (2, 8)"),
    "key_bias dtype": ((X, Y, Y), {"key_bias": np.ones((2, 6), int)}, TypeError, "key_bias must have a floating dtype, got int"),
    "is_causal": ((X, Y, Y), {"is_causal": "yes"}, TypeError, "is_causal must be a Python bool, got str"),
    "deterministic": ((X, Y, Y), {"deterministic": 1}, TypeError, "deterministic must be a Python bool, got int"),
    "fast_sigmoid": ((X, Y, Y), {"fast_sigmoid": "yes"}, TypeError, "fast_sigmoid must be a Python bool, got str"),
    "fast_sigmoid None": ((X, Y, Y), {"fast_sigmoid": None}, TypeError, "fast_sigmoid must be a Python bool, got NoneType"),
    "precision": ((X, Y, Y), {"precision": "fast"}, ValueError, "precision must be None, 'default', 'high', 'highest' or a jax.lax.Precision, got 'fast'"),
    "lengths shape": ((X, Y, Y), {"query_seq_lengths": np.ones(3, int)}, ValueError, "query_seq_lengths must have shape [B] = (2,), got (3,)"),
    "lengths dtype": ((X, Y, Y), {"key_value_seq_lengths": np.ones(2)}, TypeError, "key_value_seq_lengths must be an int32 array, got float32"),
    "one side of segments": ((X, Y, Y), {"query_segment_ids": np.ones((2, 8), int)}, ValueError, "key_value_segment_ids must be given beside query_segment_ids, got None"),
    "other side of segments": ((X, Y, Y), {"key_value_segment_ids": np.ones((2, 6), int)}, ValueError, "query_segment_ids must be given beside key_value_segment_ids, got None"),
    "segments shape": ((X, Y, Y), {"query_segment_ids": np.ones((2, 6), int), "key_value_segment_ids": np.ones((2, 6), int)}, ValueError, "query_segment_ids must have shape [B, T] = (2, 8), got (2, 6)"),
    "segments dtype": ((X, Y, Y), {"query_segment_ids": np.ones((2, 8), int), "key_value_segment_ids": np.ones((2, 6))}, TypeError, "key_value_segment_ids must be an int32 array, got float32"),
    "window kind": ((X, Y, Y), {"local_window_size": 2.0}, TypeError, "local_window_size must be an int or (left, right), got 2.0"),
    "window items": ((X, Y, Y), {"local_window_size": (1, 2.0)}, TypeError, "local_window_size must hold ints, got (1, 2.0)"),
    "window value": ((X, Y, Y), {"local_window_size": (-1, 2)}, ValueError, "local_window_size must not be negative, got (-1, 2)"),
    "implementation": ((X, Y, Y), {"implementation": "cudnn"}, ValueError, "implementation must be None, 'triton' or 'xla', got 'cudnn'"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"), WRONG.values(), ids=list(WRONG)
)
def test_a_wrong_argument_is_named(arguments: tuple, options: dict, kind: type, message: str):
    with pytest.raises(kind, match=re.escape(message)):
        sigmoid_attention(*arguments, **options)


def test_a_traced_scale_is_refused():
    with pytest.raises(TypeError, match="scale must be a Python number"):
        jax.jit(lambda scale: sigmoid_attention(X, Y, Y, scale=scale))(2.0)


@pytest.mark.parametrize("scale", [1, 0.5, np.float32(0.5), np.array(2.0)])
def test_any_concrete_number_is_a_scale(scale: float):
    assert sigmoid_attention(X, Y, Y, scale=scale).shape == X.shape
