"""What holds for sigmoid attention whatever the operands; shapes are few, so that few compile."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sigjax import sigmoid_attention

BATCH, LENGTH, KEYS, HEADS, KV_HEADS, HEAD_SIZE = 3, 12, 17, 4, 2, 8
attend = jax.jit(partial(sigmoid_attention, implementation="xla"), static_argnames="is_causal")
examples = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**32 - 1)


def lengths(longest: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, longest), min_size=BATCH, max_size=BATCH)


def operands(seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = (LENGTH, HEADS), (KEYS, KV_HEADS), (KEYS, KV_HEADS)
    query, key, value = (rng.standard_normal((BATCH, *x, HEAD_SIZE)) for x in shapes)
    return jnp.float32(query), jnp.float32(key), jnp.float32(value)


def assert_close(got: jax.Array, want: jax.Array) -> None:
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@examples
@given(seeds, lengths(LENGTH), lengths(KEYS), st.sampled_from([0.0, np.nan, np.inf, 1e30]))
def test_padding_does_not_matter(seed: int, rows: list[int], keys: list[int], filling: float):
    query, key, value = operands(seed)
    given_lengths = {
        "query_seq_lengths": jnp.array(rows, jnp.int32),
        "key_value_seq_lengths": jnp.array(keys, jnp.int32),
    }
    want = attend(query, key, value, **given_lengths)
    is_row = jnp.arange(LENGTH)[None] < jnp.array(rows)[:, None]
    is_key = (jnp.arange(KEYS)[None] < jnp.array(keys)[:, None])[..., None, None]
    query = jnp.where(is_row[..., None, None], query, filling)
    key, value = jnp.where(is_key, key, filling), jnp.where(is_key, value, -filling)
    assert jnp.array_equal(attend(query, key, value, **given_lengths), want)
    assert not want[~is_row].any()


@examples
@given(seeds, st.permutations(range(KEYS)), st.permutations(range(LENGTH)))
def test_keys_may_come_in_any_order_and_queries_take_their_outputs_along(
    seed: int, keys: list[int], rows: list[int]
):
    query, key, value = operands(seed)
    keys_, rows_ = jnp.array(keys), jnp.array(rows)
    got = attend(query[:, rows_], key[:, keys_], value[:, keys_])
    assert_close(got, attend(query, key, value)[:, rows_])


@examples
@given(seeds, st.permutations(range(KV_HEADS)))
def test_heads_may_come_in_any_order(seed: int, order: list[int]):
    query, key, value = operands(seed)
    groups = HEADS // KV_HEADS
    heads = jnp.concatenate([jnp.arange(groups) + groups * head for head in order])
    got = attend(query[:, :, heads], key[:, :, jnp.array(order)], value[:, :, jnp.array(order)])
    assert_close(got, attend(query, key, value)[:, :, heads])


@examples
@given(seeds, seeds, st.integers(0, BATCH - 1), st.booleans())
def test_a_sequence_does_not_see_the_others(seed: int, other: int, row: int, is_causal: bool):
    mine, others = operands(seed), operands(other)
    mixed = [theirs.at[row].set(ours[row]) for ours, theirs in zip(mine, others, strict=True)]
    got = attend(*mixed, is_causal=is_causal)[row]
    assert jnp.array_equal(got, attend(*mine, is_causal=is_causal)[row])


@examples
@given(seeds, st.floats(-3, 3), st.floats(-3, 3), st.booleans())
def test_the_output_is_linear_in_the_values(seed: int, a: float, b: float, is_causal: bool):
    query, key, value = operands(seed)
    other = operands(seed + 1)[2]
    got = attend(query, key, a * value + b * other, is_causal=is_causal)
    first, second = (attend(query, key, x, is_causal=is_causal) for x in (value, other))
    assert_close(got, a * first + b * second)


@examples
@given(seeds, st.integers(0, KEYS), st.floats(-4, 0))
def test_the_outputs_of_a_split_of_the_keys_add_up(seed: int, cut: int, bias: float):
    """Lengths and key_bias -inf hide either side, so that one shape serves every split."""
    query, key, value = operands(seed)
    first = attend(query, key, value, sigmoid_bias=bias, key_value_seq_lengths=jnp.full(BATCH, cut))
    hidden = jnp.where(jnp.arange(KEYS) < cut, -jnp.inf, 0.0)
    last = attend(
        query, key, value, sigmoid_bias=bias, key_bias=jnp.broadcast_to(hidden, (BATCH, KEYS))
    )
    assert_close(first + last, attend(query, key, value, sigmoid_bias=bias))


@examples
@given(seeds, st.integers(0, LENGTH), st.integers(0, KEYS))
def test_packed_sequences_are_those_alone(seed: int, rows: int, keys: int):
    query, key, value = operands(seed)
    ids = [
        jnp.broadcast_to(jnp.where(jnp.arange(size) < cut, 1, 2), (BATCH, size))
        for size, cut in ((LENGTH, rows), (KEYS, keys))
    ]
    packed = attend(query, key, value, query_segment_ids=ids[0], key_value_segment_ids=ids[1])
    alone = attend(
        query,
        key,
        value,
        query_seq_lengths=jnp.full(BATCH, rows),
        key_value_seq_lengths=jnp.full(BATCH, keys),
    )
    assert_close(packed[:, :rows], alone[:, :rows])
