"""Token-by-token decoding, packing and the block options of SigmoidAttention."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sigjax
from sigjax import SigmoidAttention

FEATURES, HEADS, LENGTH = 24, 4, 6
X = jax.random.normal(jax.random.key(0), (2, LENGTH, FEATURES))


def module(**arguments: Any) -> SigmoidAttention:
    return SigmoidAttention(HEADS, FEATURES, rngs=nnx.Rngs(0), **arguments)


VARIANTS: dict[str, dict[str, Any]] = {
    "per sequence": {},
    "fixed": {"sigmoid_bias": -1.5},
    "learnable": {"sigmoid_bias": "learnable", "initial_length": 9},
    "grouped, normalised": {"num_kv_heads": 2, "normalize_qk": True},
}


def decoded(attention: Any, tokens: jax.Array) -> jax.Array:
    step = nnx.jit(lambda attention, x: attention(x, decode=True))
    outputs = [step(attention, tokens[:, i : i + 1]) for i in range(tokens.shape[1])]
    return jnp.concatenate(outputs, axis=1)


@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=list(VARIANTS))
def test_all_decoding_steps_together_are_one_causal_call(arguments: dict[str, Any]):
    attention = module(**arguments)
    want = attention(X, is_causal=True)
    attention.init_cache(X.shape)
    np.testing.assert_allclose(decoded(attention, X), want, rtol=1e-5, atol=1e-6)


def test_decoding_equals_that_of_nnx_multi_head_attention():
    bias = partial(sigjax.attention_fn, sigmoid_bias=-math.log(LENGTH))
    flax = nnx.MultiHeadAttention(HEADS, FEATURES, attention_fn=bias, rngs=nnx.Rngs(0))
    ours = module()
    for name in ("query", "key", "value", "out"):
        nnx.update(getattr(ours, name), nnx.state(getattr(flax, name)))
    flax.init_cache(X.shape)
    ours.init_cache(X.shape)
    np.testing.assert_allclose(decoded(ours, X), decoded(flax, X), rtol=1e-5, atol=1e-6)


def test_the_cache_is_state_and_no_parameter():
    attention = module(decode=True)
    attention.init_cache((2, 3, FEATURES), jnp.bfloat16)
    cache = nnx.state(attention, nnx.Cache)
    assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16"), jnp.dtype("int32")}
    assert attention(X[:, :1]).shape == (2, 1, FEATURES)
    assert not any(
        "cache" in str(path) for path, _ in nnx.to_flat_state(nnx.state(attention, nnx.Param))
    )


def test_decoding_without_a_cache_is_refused():
    with pytest.raises(ValueError, match="call init_cache first"):
        module()(X[:, :1], decode=True)


def test_more_than_one_token_is_refused():
    attention = module(decode=True)
    attention.init_cache(X.shape)
    with pytest.raises(ValueError, match="must hold one token a sequence"):
        attention(X[:, :2])


def test_a_cache_without_a_length_is_refused():
    with pytest.raises(ValueError, match="input_shape must be"):
        module().init_cache((FEATURES,))


NOT_WITH_A_CACHE: dict[str, dict[str, Any]] = {
    "sequence_lengths": {"sequence_lengths": jnp.array([1, 1])},
    "key_bias": {"key_bias": jnp.zeros((2, 1))},
    "local_window_size": {"local_window_size": 3},
    "segments": {"query_segment_ids": jnp.ones((2, 1), int)},
}


@pytest.mark.parametrize("arguments", NOT_WITH_A_CACHE.values(), ids=list(NOT_WITH_A_CACHE))
def test_what_a_cache_cannot_serve_is_refused(arguments: dict[str, Any]):
    attention = module(decode=True)
    attention.init_cache(X.shape)
    with pytest.raises(NotImplementedError, match="must be None where decode is True"):
        attention(X[:, :1], **arguments)


def test_packed_sequences_give_what_they_give_alone():
    attention = module()
    ids = jnp.array([[1, 1, 2, 2, 2, 0]])
    packed = attention(X[:1], query_segment_ids=ids)
    np.testing.assert_allclose(packed[:, :2], attention(X[:1, :2]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(packed[:, 2:5], attention(X[:1, 2:5]), rtol=1e-5, atol=1e-6)


def test_layer_scale_multiplies_the_output_and_is_learned():
    plain, scaled = module(), module(layer_scale=1e-4)
    np.testing.assert_allclose(scaled(X), 1e-4 * plain(X), rtol=1e-5)
    gradients = nnx.grad(lambda attention: attention(X).sum())(scaled)
    assert gradients["layer_scale"][...].shape == (FEATURES,)
    assert np.abs(gradients["layer_scale"][...]).min() > 0


def test_hybrid_norm_gives_outputs_of_unit_mean_square():
    output = module(hybrid_norm=True)(100 * X)
    np.testing.assert_allclose((output**2).mean(-1), 1, rtol=1e-3)


def test_padding_stays_0_through_the_block_options():
    attention = module(hybrid_norm=True, layer_scale=0.1)
    lengths = jnp.array([LENGTH, 2])
    output = attention(X.at[1, 2:].set(jnp.nan), sequence_lengths=lengths)
    assert not output[1, 2:].any()
    assert jnp.isfinite(output).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf], ids=["nan", "inf"])
def test_padding_between_segments_reaches_no_output_and_no_gradient(poison: float):
    attention = module()
    ids = jnp.array([[1, 1, 0, 2, 2, 0]])

    def loss(attention: SigmoidAttention, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        output = attention(x, query_segment_ids=ids)
        return (output**2).sum(), output

    dirty = jnp.where(ids[..., None] > 0, X[:1], poison)
    results = [nnx.value_and_grad(loss, has_aux=True)(attention, x) for x in (X[:1], dirty)]
    assert not results[1][0][1][0, jnp.array([2, 5])].any()
    for clean, poisoned in zip(*map(jax.tree.leaves, results), strict=True):
        assert jnp.array_equal(clean, poisoned)


def test_segments_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="query_segment_ids must have shape"):
        module()(X, query_segment_ids=jnp.ones((2, 3), int))
