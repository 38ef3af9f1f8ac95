"""Buffers and turns of the Hopper kernels: nobody is overtaken, whoever is slow.

The kernels' source runs in NumPy, see emulated_hopper, one warpgroup of it slow.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax.kernels.tiles import ForwardTile, Turns, hopper_forward_tile
from sigjax.operands import Operands, Settings
from tests import definition, emulated_hopper
from tests.in_turn import in_turn

# Tiles of one block of keys, with a single consumer that has rows, so that those without are soon
# ahead; and tiles of several blocks.
SHAPES = {"one-block": (40, 100), "several": (200, 300)}
LENGTHS = ([40, 0, 30], [100, 70, 0])
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
# At 128 both kernels have a warpgroup less.
warpgroups = pytest.mark.parametrize(
    ("head_size", "slow"),
    [(64, 0), (64, 1), (64, 2), (64, 3), (128, 0), (128, 1), (128, 2)],
    ids=lambda x: f"H{x}" if x > 3 else f"slow{x}",
)
orders = pytest.mark.parametrize("turns", ["always", "never"])
SETTINGS = Settings(scale=0.1)


def operands_of(head_size: int, shape: tuple[int, int], batch: int = 2) -> Operands:
    rng = np.random.default_rng(0)
    length, keys = shape
    return Operands(
        *(
            jnp.asarray(rng.standard_normal((batch, rows, 3, head_size)), jnp.float32)
            for rows in (length, keys, keys)
        )
    )


def exact(head_size: int) -> ForwardTile:
    """The table's tile with exact weights, in turn or early as that of the adaptive ones."""
    return replace(hopper_forward_tile(head_size), weights="pair")


def assert_near(got: jax.Array, want: jax.Array) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@warpgroups
@shapes
@orders
def test_outputs_are_those_of_the_definition(
    turns: Turns, head_size: int, shape: tuple[int, int], slow: int
):
    operands = operands_of(head_size, shape)
    tile = replace(exact(head_size), turns=turns)
    got = emulated_hopper.forward(operands, SETTINGS, tile, programs=1, slow=slow)
    assert_near(got, definition.attention(operands, SETTINGS))


@warpgroups
@orders
def test_so_they_are_with_lengths(turns: Turns, head_size: int, slow: int):
    lengths = [jnp.array(x, jnp.int32) for x in LENGTHS]
    operands = operands_of(head_size, (60, 100), batch=3)
    operands = operands._replace(query_lengths=lengths[0], key_lengths=lengths[1])
    tile = replace(exact(head_size), turns=turns)
    got = emulated_hopper.forward(operands, SETTINGS, tile, programs=1, slow=slow)
    assert_near(got, definition.attention(operands, SETTINGS))


@warpgroups
def test_so_they_are_in_a_window(head_size: int, slow: int):
    settings = replace(SETTINGS, window=(100, 30))
    operands = operands_of(head_size, (400, 400), batch=1)
    tile = replace(exact(head_size), turns="always" if head_size == 64 else "never")
    got = emulated_hopper.forward(operands, settings, tile, programs=1, slow=slow)
    assert_near(got, definition.attention(operands, settings))


@warpgroups
def test_gradients_are_those_of_the_definition(head_size: int, slow: int):
    operands = operands_of(head_size, SHAPES["several"], batch=1)
    gradient = jnp.asarray(
        np.random.default_rng(1).standard_normal(operands.query.shape), jnp.float32
    )
    got, _ = emulated_hopper.backward(operands, SETTINGS, gradient, slow=slow)
    for name, want in definition.gradients(operands, SETTINGS, gradient).items():
        assert_near(getattr(got, name), want)


CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({}, {}),
    "one-block": ({"shape": (180, 100)}, {}),
    "causal": ({}, {"is_causal": True}),
    "ragged": ({"lengths": ([200, 40, 0, 130], [300, 100, 70, 0])}, {}),
    "ragged-causal": ({"lengths": ([200, 40, 77, 130], [300, 100, 128, 0])}, {"is_causal": True}),
    "window": ({}, {"window": (40, 90)}),
}


def with_large_rows(
    head_size: int, shape: tuple[int, int] = (300, 300), lengths: Any = None
) -> Operands:
    """Of 64 rows one has large logits, or none: of a tile's consumers' all do, some or none."""
    length = shape[0]
    rng = np.random.default_rng(2)
    operands = operands_of(head_size, shape, batch=len(lengths[0]) if lengths else 2)
    batch, _, heads, _ = operands.query.shape
    blocks = -(-length // 64)
    large = np.zeros((batch, blocks * 64, heads, 1), bool)
    place = rng.integers(0, 64, (batch, blocks, heads))
    chosen = rng.random(place.shape) < 0.6
    for b, block, head in np.argwhere(chosen):
        large[b, block * 64 + place[b, block, head], head] = True
    query = operands.query * jnp.where(large[:, :length], 30.0, 0.1)
    operands = operands._replace(query=query)
    if lengths:
        queries, key_lengths = (jnp.array(x, jnp.int32) for x in lengths)
        operands = operands._replace(query_lengths=queries, key_lengths=key_lengths)
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, operands)


@in_turn("call", CALLS, slow=range(3), programs=(1, 3))
def test_turns_where_the_weights_of_all_are_exact_change_no_bit(
    call: tuple[dict[str, Any], dict[str, Any]], slow: int, programs: int
):
    """Some consumers of a tile are exact, all, or none; some have no rows."""
    operands = with_large_rows(128, **call[0])
    settings = Settings(scale=0.1, result_dtype=np.dtype("float32"), **call[1])
    tile = replace(hopper_forward_tile(128), few=0, few_in_window=0, turns_from=0)
    got = emulated_hopper.forward(operands, settings, tile, programs, slow=slow)
    free = replace(tile, turns="never")
    want = emulated_hopper.forward(operands, settings, free, programs=1)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, operands)
    assert_near(got, definition.attention(wide, settings))


@in_turn("call", {name: x for name, x in CALLS.items() if name != "window"}, slow=range(3))
def test_a_row_has_the_same_bits_by_the_tile_for_short_arrays(
    call: tuple[dict[str, Any], dict[str, Any]], slow: int
):
    arrays, options = call
    operands = with_large_rows(64, **arrays)
    settings = Settings(scale=0.1, result_dtype=np.dtype("float32"), **options)
    short, long = (hopper_forward_tile(64, short=x) for x in (True, False))
    got = emulated_hopper.forward(operands, settings, short, programs=1, slow=slow)
    want = emulated_hopper.forward(operands, settings, long.exact(), programs=1)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@warpgroups
def test_so_they_are_with_the_tanh_of_the_hardware(head_size: int, slow: int):
    operands = operands_of(head_size, SHAPES["several"])
    settings = replace(SETTINGS, fast_sigmoid=True)
    tile = hopper_forward_tile(head_size, fast_sigmoid=True)
    got = emulated_hopper.forward(operands, settings, tile, programs=1, slow=slow)
    assert_near(got, definition.attention(operands, SETTINGS))
