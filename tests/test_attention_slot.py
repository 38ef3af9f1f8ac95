"""The attention_fn slot of Flax's modules, nnx and linen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import sigjax
from sigjax.attention_slot import attention_fn

FEATURES, HEADS, B, T, S = 24, 4, 3, 13, 17
LENGTHS_Q = np.array([13, 6, 0], np.int32)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["inferred", "bfloat16"])
@pytest.mark.parametrize("batch", [(), (B,), (2, B)], ids=lambda batch: f"{len(batch)}_axes")
@pytest.mark.parametrize("masked", [False, True], ids=["no_mask", "mask"])
def test_it_fits_the_slot_of_nnx_multi_head_attention(dtype, batch, masked):
    module = nnx.MultiHeadAttention(
        HEADS, FEATURES, attention_fn=attention_fn, dtype=dtype, decode=False, rngs=nnx.Rngs(0)
    )
    x = normal(0, *batch, T, FEATURES)
    mask = normal(1, *batch, 1, T, T) > 0 if masked else None
    flat = x.reshape(-1, T, FEATURES)
    expected = module.out(
        sigjax.sigmoid_attention(
            *(project(flat) for project in (module.query, module.key, module.value)),
            mask=None if mask is None else mask.reshape(-1, 1, T, T),
        )
    )
    np.testing.assert_array_equal(module(x, mask=mask), expected.reshape(x.shape))


def test_it_fits_the_slot_of_linen_multi_head_attention():
    module = linen.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn)
    x, mask = normal(0, B, T, FEATURES), linen.make_causal_mask(jnp.ones((B, T)))
    variables = module.init(jax.random.key(0), x)
    p = variables["params"]
    heads = (
        jnp.einsum("btf,fnh->btnh", x, p[name]["kernel"]) for name in ("query", "key", "value")
    )
    encoded = sigjax.sigmoid_attention(*heads, is_causal=True)
    expected = jnp.einsum("btnh,nho->bto", encoded, p["out"]["kernel"])
    actual = module.apply(variables, x, mask=mask)
    assert isinstance(actual, jax.Array)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_is_causal_reaches_the_op_from_nnx():
    module = nnx.MultiHeadAttention(
        HEADS, FEATURES, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0)
    )
    x = normal(0, B, T, FEATURES)
    causal = nnx.make_causal_mask(jnp.ones((B, T)))
    np.testing.assert_allclose(
        module(x, is_causal=True), module(x, mask=causal), rtol=1e-6, atol=1e-7
    )


def test_the_ops_own_arguments_are_set_with_partial():
    own = partial(attention_fn, sigmoid_bias=-1.0, key_value_seq_lengths=LENGTHS_Q)
    module = linen.MultiHeadDotProductAttention(HEADS, attention_fn=own)
    x = normal(0, B, T, FEATURES)
    variables = module.init(jax.random.key(0), x)
    dirty = jnp.where(np.arange(T)[None, :, None] < LENGTHS_Q[:, None, None], x, x + 9)
    own_rows = np.arange(T)[None, :] < LENGTHS_Q[:, None]
    np.testing.assert_array_equal(
        module.apply(variables, x)[own_rows], module.apply(variables, dirty)[own_rows]
    )


def test_a_bias_per_sequence_and_head_spans_all_batch_axes():
    query = normal(0, 2, 3, T, HEADS, 8)
    bias = normal(1, 3, HEADS)
    out = attention_fn(query, query, query, sigmoid_bias=bias)
    flat = query.reshape(6, T, HEADS, 8)
    expected = sigjax.sigmoid_attention(flat, flat, flat, sigmoid_bias=jnp.tile(bias, (2, 1)))
    np.testing.assert_array_equal(out, expected.reshape(query.shape))


def test_dropout_that_is_off_is_served():
    module = nnx.MultiHeadAttention(
        HEADS, FEATURES, attention_fn=attention_fn, dropout_rate=0.5, decode=False, rngs=nnx.Rngs(0)
    )
    assert module(normal(0, B, T, FEATURES), deterministic=True).shape == (B, T, FEATURES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"dropout_rate": 0.1}, "dropout_rate must be 0 or deterministic", id="drop"),
        pytest.param({"module": linen.Dense(3)}, r"sow_weights=False.*got Dense", id="sow"),
        pytest.param({"qk_attn_weights_einsum": jnp.einsum}, "qk_attn_weights_einsum", id="qk"),
        pytest.param({"attn_weights_value_einsum": jnp.einsum}, "attn_weights_value", id="value"),
    ],
)
def test_what_sigmoid_attention_has_not_is_refused(arguments, message):
    x = jnp.ones((1, T, 2, 8))
    with pytest.raises(NotImplementedError, match=message):
        attention_fn(x, x, x, **arguments)


def test_active_dropout_and_sown_weights_of_flax_are_refused():
    x = normal(0, B, T, FEATURES)
    module = nnx.MultiHeadAttention(
        HEADS, FEATURES, attention_fn=attention_fn, dropout_rate=0.5, decode=False, rngs=nnx.Rngs(0)
    )
    with pytest.raises(NotImplementedError, match="no dropout of attention weights"):
        module(x, deterministic=False)
    flax_linen = linen.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn)
    with pytest.raises(NotImplementedError, match="never holds its weights"):
        flax_linen.init(jax.random.key(0), x, sow_weights=True)


@pytest.mark.parametrize(
    ("shapes", "arguments", "message"),
    [
        pytest.param([(T, 8)] * 3, {}, r"query must have shape \[B..., T, N, H\]", id="rank"),
        pytest.param(
            [(2, 3, T, 2, 8), (3, 2, T, 2, 8), (2, 3, T, 2, 8)],
            {},
            "key must have the batch axes of query",
            id="batch",
        ),
        pytest.param(
            [(2, 3, T, 2, 8)] * 3,
            {"bias": np.zeros((3, 2, 2, T, T))},
            r"bias must have leading axes broadcastable to \(2, 3\)",
            id="bias",
        ),
        pytest.param(
            [(2, T, 2, 8)] * 3,
            {"key_value_seq_lengths": np.ones(3, np.int32)},
            "key_value_seq_lengths must have leading axes",
            id="lengths",
        ),
    ],
)
def test_operands_that_do_not_fit_the_slot_are_refused(shapes, arguments, message):
    with pytest.raises(ValueError, match=message):
        attention_fn(*(jnp.ones(shape) for shape in shapes), **arguments)
