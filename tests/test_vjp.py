"""The derivative rule composes with JAX's transformations."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from sigjax import reference, sigmoid_attention
from sigjax.operands import Operands, Settings

KEYS = jax.random.split(jax.random.key(0), 3)
QUERY = jax.random.normal(KEYS[0], (2, 9, 2, 8))
KEY = jax.random.normal(KEYS[1], (2, 11, 1, 8))


def test_gradients_agree_with_finite_differences():
    with jax.enable_x64(True):
        query, key = (jnp.asarray(np.asarray(x), jnp.float64) for x in (QUERY, KEY))
        bias = jnp.array([-1.0, -2.0])
        check_grads(
            lambda q, k, v, b: sigmoid_attention(q, k, v, sigmoid_bias=b),
            (query, key, key, bias),
            order=2,
            modes=["rev"],
        )


def test_second_derivatives_equal_those_of_the_definition():
    def ours(query: jax.Array) -> jax.Array:
        return sigmoid_attention(query, KEY, KEY, implementation="xla").sum()

    def definition(query: jax.Array) -> jax.Array:
        return reference.attention(Operands(query, KEY, KEY), Settings(scale=8**-0.5)).sum()

    # Reverse over reverse: a custom_vjp has no forward mode. As one program, not op by op.
    got, want = (jax.jit(jax.jacrev(jax.grad(f)))(QUERY) for f in (ours, definition))
    chex.assert_trees_all_close(got, want, atol=1e-5)


def test_no_gradient_flows_into_masks_and_lengths():
    lengths = jnp.array([9, 4], jnp.int32)
    mask = jnp.ones((9, 11), bool)

    def loss(query: jax.Array, lengths: jax.Array, mask: jax.Array) -> jax.Array:
        return sigmoid_attention(query, KEY, KEY, None, mask, query_seq_lengths=lengths).sum()

    gradients = jax.grad(loss, argnums=(0, 1, 2), allow_int=True)(QUERY, lengths, mask)
    assert gradients[0].shape == QUERY.shape
    assert gradients[1].dtype == gradients[2].dtype == jax.dtypes.float0


TRANSFORMED = {
    "jit": lambda f: jax.jit(f)(QUERY),
    "vmap": lambda f: jax.vmap(f)(QUERY[:, None])[:, 0],
    "remat": lambda f: jax.checkpoint(f)(QUERY),
    "scan": lambda f: jax.lax.scan(lambda c, x: (c, f(x[None])[0]), 0, QUERY)[1],
}


@pytest.mark.parametrize("transform", TRANSFORMED.values(), ids=list(TRANSFORMED))
def test_transformed_calls_equal_plain_ones(transform):
    def op(query: jax.Array) -> jax.Array:
        return sigmoid_attention(
            query, KEY[:1].repeat(query.shape[0], 0), KEY[:1].repeat(query.shape[0], 0)
        )

    chex.assert_trees_all_close(transform(op), op(QUERY), rtol=1e-6, atol=1e-6)


def test_a_bias_keeps_its_dtype_in_the_gradient():
    bias = jnp.array([-1.0, -2.0], jnp.bfloat16)
    gradient = jax.grad(lambda b: sigmoid_attention(QUERY, KEY, KEY, sigmoid_bias=b).sum())(bias)
    assert gradient.dtype == jnp.bfloat16
    assert gradient.shape == (2,)
