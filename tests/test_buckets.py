"""Length buckets: the fit against brute force, assignment, padding and every error."""

import doctest
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigjax import buckets as documented
from sigjax.buckets import LengthBuckets


def padding(edges: tuple[int, ...], lengths: list[int]) -> int:
    return sum(min(edge for edge in edges if edge >= length) - length for length in lengths)


def least_padding_by_brute_force(lengths: list[int], count: int, multiple: int) -> int:
    last = max(1, -(-max(lengths) // multiple)) * multiple
    below = range(multiple, last, multiple)
    subsets = itertools.chain.from_iterable(
        itertools.combinations(below, size) for size in range(count)
    )
    return min(padding((*subset, last), lengths) for subset in subsets)


@settings(deadline=None, max_examples=300)
@given(
    lengths=st.lists(st.integers(0, 36), min_size=1, max_size=40),
    count=st.integers(1, 5),
    multiple=st.integers(3, 9),
)
def test_the_fit_pads_no_more_than_any_set_of_edges(lengths, count, multiple):
    edges = LengthBuckets.fit(lengths, count=count, multiple=multiple).edges

    assert len(edges) <= count
    assert list(edges) == sorted(set(edges))
    assert all(edge > 0 and edge % multiple == 0 for edge in edges)
    assert edges[-1] >= max(lengths)
    assert padding(edges, lengths) == least_padding_by_brute_force(lengths, count, multiple)


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(0, 14), min_size=1, max_size=30), count=st.integers(1, 6))
def test_the_fit_is_least_where_every_length_may_be_an_edge(lengths, count):
    edges = LengthBuckets.fit(lengths, count=count, multiple=1).edges
    assert padding(edges, lengths) == least_padding_by_brute_force(lengths, count, 1)


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(0, 5000), min_size=1, max_size=60), count=st.integers(1, 9))
def test_assigning_takes_the_smallest_edge_that_holds_the_length(lengths, count):
    buckets = LengthBuckets.fit(lengths, count=count, multiple=64)
    for length, bucket in zip(lengths, buckets.assign(lengths), strict=True):
        assert length <= buckets.edges[bucket]
        assert bucket == 0 or buckets.edges[bucket - 1] < length


def test_a_million_lengths_are_fitted_to_single_tokens():
    lengths = np.random.default_rng(0).integers(200, 17_055, 1_000_000)
    buckets = LengthBuckets.fit(lengths, count=16, multiple=1)
    coarse = LengthBuckets.fit(lengths, count=16, multiple=128)
    assert len(buckets.edges) == 16
    assert buckets.waste(lengths) < coarse.waste(lengths) < 0.07


def test_the_fit_uses_no_more_edges_than_there_are_lengths():
    assert LengthBuckets.fit([5, 5, 200], count=9, multiple=128).edges == (128, 256)


def test_sequences_without_tokens_go_into_the_first_bucket():
    buckets = LengthBuckets.fit([0, 0], count=3, multiple=128)
    assert buckets.edges == (128,)
    assert buckets.assign([0]).tolist() == [0]


def test_lengths_may_be_a_jax_array_of_any_shape():
    lengths = jnp.array([[3, 9], [120, 8]], jnp.int32)
    buckets = LengthBuckets.fit(lengths, count=2, multiple=4)
    assert buckets.edges == (12, 120)
    np.testing.assert_array_equal(buckets.assign(lengths), [[0, 0], [1, 0]])


def test_no_lengths_are_assigned_to_no_buckets():
    assigned = LengthBuckets((8,)).assign([])
    assert assigned.shape == (0,)
    assert assigned.dtype.kind == "i"


def test_the_waste_is_the_share_of_padding_tokens():
    assert LengthBuckets((10, 20)).waste([5, 10, 15]) == pytest.approx(10 / 40)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("axis", [1, -1])
def test_padding_fills_the_end_of_one_axis(kind, axis):
    array = kind(np.arange(6, dtype=np.int32).reshape(2, 3))
    padded = LengthBuckets((2, 5)).pad(array, axis=axis, fill_value=-1)
    assert type(padded) is type(array)
    assert padded.dtype == array.dtype
    np.testing.assert_array_equal(padded, [[0, 1, 2, -1, -1], [3, 4, 5, -1, -1]])


def test_padding_is_static_under_jit():
    buckets = LengthBuckets((4, 8))
    padded = jax.jit(lambda x: buckets.pad(x, axis=0, fill_value=np.nan))(jnp.ones(5))
    assert padded.shape == (8,)
    assert bool(jnp.isnan(padded[5:]).all())


def test_an_array_that_fills_its_bucket_is_left_alone():
    array = np.ones((4, 2))
    np.testing.assert_array_equal(LengthBuckets((4,)).pad(array, axis=0), array)


def test_buckets_are_static_arguments_of_jit():
    pad = jax.jit(lambda x, buckets: buckets.pad(x, axis=0), static_argnums=1)
    assert pad(jnp.ones(3), LengthBuckets((4,))).shape == (4,)
    assert hash(LengthBuckets((4,))) == hash(LengthBuckets((4,)))


@pytest.mark.parametrize(
    ("length", "edge"), [(0, 128), (1, 128), (128, 128), (129, 256), (256, 256)]
)
def test_a_length_is_padded_to_its_edge(length, edge):
    assert LengthBuckets((128, 256)).padded_length(length) == edge


@pytest.mark.parametrize("method", ["fit", "waste"])
def test_no_lengths_at_all_are_refused(method):
    call = (
        (lambda: LengthBuckets.fit([], count=2))
        if method == "fit"
        else (lambda: LengthBuckets((8,)).waste([]))
    )
    with pytest.raises(ValueError, match="lengths must hold at least one length"):
        call()


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        pytest.param([3, -2], ValueError, "lengths must not be negative, got -2", id="negative"),
        pytest.param([3.0], TypeError, "lengths must be integers, got float64", id="floats"),
        pytest.param([True], TypeError, "lengths must be integers, got bool", id="bools"),
        pytest.param(["3"], TypeError, "lengths must be integers, got", id="strings"),
    ],
)
def test_lengths_that_are_no_lengths_are_refused(lengths, error, message):
    with pytest.raises(error, match=message):
        LengthBuckets.fit(lengths, count=2)
    with pytest.raises(error, match=message):
        LengthBuckets((8,)).assign(lengths)


@pytest.mark.parametrize("name", ["count", "multiple"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "must be at least 1, got 0"),
        (-3, ValueError, "must be at least 1, got -3"),
        (2.0, TypeError, "must be an integer, got 2.0"),
        (True, TypeError, "must be an integer, got True"),
    ],
)
def test_count_and_multiple_are_integers_from_1(name, value, error, message):
    with pytest.raises(error, match=f"{name} {message}"):
        LengthBuckets.fit([3], **{"count": 2, "multiple": 8, name: value})


def test_a_length_beyond_the_last_edge_is_named():
    with pytest.raises(ValueError, match="must not exceed the last edge 256, got 300"):
        LengthBuckets((128, 256)).assign([5, 300])
    with pytest.raises(ValueError, match="must not exceed the last edge 256, got 257"):
        LengthBuckets((128, 256)).pad(np.zeros(257), axis=0)


@pytest.mark.parametrize(
    ("edges", "error", "message"),
    [
        pytest.param((), ValueError, "edges must be at least one length", id="empty"),
        pytest.param((0, 4), ValueError, "at least 1 and increasing", id="zero"),
        pytest.param((4, 4), ValueError, "at least 1 and increasing", id="repeated"),
        pytest.param((8, 4), ValueError, "at least 1 and increasing", id="falling"),
        pytest.param((4.5,), TypeError, "edges must be an integer, got 4.5", id="float"),
    ],
)
def test_edges_that_are_no_buckets_are_refused(edges, error, message):
    with pytest.raises(error, match=message):
        LengthBuckets(edges)


@pytest.mark.parametrize("length", [2.5, None, True])
def test_a_single_length_must_be_an_integer(length):
    with pytest.raises(TypeError, match="length must be an integer"):
        LengthBuckets((8,)).padded_length(length)


@pytest.mark.parametrize(
    ("array", "axis", "fill", "error", "message"),
    [
        pytest.param(np.ones(3), 1, 0, ValueError, "axis must be an axis of array", id="axis"),
        pytest.param([1, 2], 0, 0, TypeError, "array must be a NumPy or JAX array", id="list"),
        pytest.param(np.ones(3, int), 0, 0.5, ValueError, "value of dtype int64", id="half"),
        pytest.param(np.ones(3, int), 0, np.nan, ValueError, "value of dtype int64", id="nan"),
        pytest.param(np.ones(3, bool), 0, 2, ValueError, "value of dtype bool", id="bool"),
        pytest.param(np.ones(3, np.int8), 0, 200, ValueError, "value of dtype int8", id="int8"),
    ],
)
def test_padding_that_cannot_be_is_refused(array, axis, fill, error, message):
    with pytest.raises(error, match=message):
        LengthBuckets((8,)).pad(array, axis=axis, fill_value=fill)


def test_the_documented_example_runs():
    result = doctest.testmod(documented)
    assert (result.attempted > 0, result.failed) == (True, 0)
