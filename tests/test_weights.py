"""attention_weights reads out exactly the weights that the op uses."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sigjax
from tests.calls import ARGUMENTS, CALLS, SHAPES, Arrays, Call

pytestmark = pytest.mark.usefixtures("code_is_not_optimised")


def weights_of(call: Call, arrays: Arrays, **positions: jax.Array | None) -> jax.Array:
    given: dict[str, Any] = {**call.options, **positions}
    given |= {ARGUMENTS.get(name, name): x for name, x in arrays.items() if name != "value"}
    return sigjax.attention_weights(**given)


def encoded(weights: jax.Array, value: jax.Array) -> jax.Array:
    groups = weights.shape[1] // value.shape[2]
    return jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(value, groups, axis=2))


calls = pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))


@calls
def test_the_weights_times_the_values_are_the_ops_output(call: Call):
    arrays = call.arrays()
    output = encoded(weights_of(call, arrays), arrays["value"])
    np.testing.assert_allclose(output, call(arrays), rtol=1e-5, atol=1e-6)


@calls
def test_chosen_pairs_are_those_of_all_pairs(call: Call):
    arrays = call.arrays()
    rows, columns = jnp.array([4, 0, 0]), jnp.array([[6, 2], [0, 3]])
    every = weights_of(call, arrays)
    chosen = weights_of(call, arrays, query_positions=rows, key_positions=columns)
    for row in range(2):
        want = every[row][:, rows][:, :, columns[row]]
        np.testing.assert_allclose(chosen[row], want, rtol=1e-6, atol=1e-7)


@calls
def test_the_gradient_of_the_weights_is_that_of_the_op(call: Call):
    arrays = call.arrays()

    def through_weights(query: jax.Array) -> jax.Array:
        weights = weights_of(call, {**arrays, "query": query})
        return jnp.sin(encoded(weights, arrays["value"])).sum()

    got = jax.grad(through_weights)(arrays["query"])
    want = jax.grad(lambda q: jnp.sin(call({**arrays, "query": q})).sum())(arrays["query"])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_padding_has_weight_0_whatever_it_holds():
    x = jnp.ones((2, 5, 2, 8)).at[1, 3:].set(jnp.nan)
    lengths = jnp.array([5, 3], jnp.int32)
    weights = sigjax.attention_weights(
        x, x, query_seq_lengths=lengths, key_value_seq_lengths=lengths
    )
    assert jnp.isfinite(weights).all()
    assert not weights[1, :, 3:].any()
    assert not weights[1, :, :, 3:].any()


def test_unbatched_operands_have_unbatched_weights():
    x = jax.random.normal(jax.random.key(0), (5, 2, 8))
    weights = sigjax.attention_weights(x, x, query_positions=jnp.array([2]))
    assert weights.shape == (2, 1, 5)
    every = sigjax.attention_weights(x[None], x[None])
    np.testing.assert_allclose(weights, every[0, :, 2:3], rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1)], ids=str)
def test_a_single_query_or_key_may_be_asked_for_repeatedly(shape: tuple[int, int]):
    length, keys = shape
    query, key = jnp.ones((1, length, 2, 8)), jnp.ones((1, keys, 2, 8))
    zeros = jnp.zeros(3, jnp.int32)
    weights = sigjax.attention_weights(query, key, query_positions=zeros, key_positions=zeros)
    assert weights.shape == (1, 2, 3, 3)
    assert np.ptp(weights) == 0


def test_bfloat16_weights_are_float32():
    x = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    assert sigjax.attention_weights(x, x).dtype == jnp.float32


def test_memory_is_that_of_the_chosen_pairs():
    x = jax.ShapeDtypeStruct((1, 16384, 2, 32), jnp.float32)
    some = jnp.arange(64)
    compiled = (
        jax.jit(lambda x: sigjax.attention_weights(x, x, query_positions=some)).lower(x).compile()
    )
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 64e6  # all weights would be 2 GB


X = jnp.ones(SHAPES["query"])
WRONG = {
    "kind": (jnp.array([0.5]), TypeError, "query_positions must be integers, got float32"),
    "rank": (jnp.zeros((1, 1, 1), int), ValueError, "must have shape [p] or [B, p] with B = 2"),
    "batch": (jnp.zeros((3, 1), int), ValueError, "must have shape [p] or [B, p] with B = 2"),
    "negative": (jnp.array([-1]), ValueError, "must lie from 0 to 4, got -1 to -1"),
    "too large": (jnp.array([0, 5]), ValueError, "must lie from 0 to 4, got 0 to 5"),
}


@pytest.mark.parametrize(("positions", "kind", "text"), WRONG.values(), ids=list(WRONG))
def test_wrong_positions_are_named(positions: jax.Array, kind: type[Exception], text: str):
    with pytest.raises(kind, match=re.escape(text)):
        sigjax.attention_weights(X, X, query_positions=positions)
