"""Buffers and turns of the Hopper kernels: nobody is overtaken, whoever is slow.

The kernels' source runs in NumPy, see emulated_hopper, one warpgroup of it slow.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax import reference
from sigjax.kernels.tiles import ForwardTile, hopper_forward_tile
from sigjax.operands import Operands, Settings
from tests import emulated_hopper

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
orders = pytest.mark.parametrize(
    "order",
    [{"turns": True, "lag": 0}, {"turns": True, "lag": 1, "stages": 4}, {"turns": False}],
    ids=["turns", "lag", "free"],
)
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
    order: dict[str, Any], head_size: int, shape: tuple[int, int], slow: int
):
    operands = operands_of(head_size, shape)
    tile = replace(exact(head_size), **order)
    got = emulated_hopper.forward(operands, SETTINGS, tile, programs=1, slow=slow)
    assert_near(got, reference.attention(operands, SETTINGS))


@warpgroups
@orders
def test_so_they_are_with_lengths(order: dict[str, Any], head_size: int, slow: int):
    lengths = [jnp.array(x, jnp.int32) for x in LENGTHS]
    operands = operands_of(head_size, (60, 100), batch=3)
    operands = operands._replace(query_lengths=lengths[0], key_lengths=lengths[1])
    tile = replace(exact(head_size), **order)
    got = emulated_hopper.forward(operands, SETTINGS, tile, programs=1, slow=slow)
    assert_near(got, reference.attention(operands, SETTINGS))


@warpgroups
@orders
def test_so_they_are_in_a_window(order: dict[str, Any], head_size: int, slow: int):
    settings = replace(SETTINGS, window=(100, 30))
    operands = operands_of(head_size, (400, 400), batch=1)
    tile = replace(exact(head_size), **order)
    got = emulated_hopper.forward(operands, settings, tile, programs=1, slow=slow)
    assert_near(got, reference.attention(operands, settings))


@warpgroups
def test_gradients_are_those_of_the_definition(head_size: int, slow: int):
    operands = operands_of(head_size, SHAPES["several"], batch=1)
    gradient = jnp.asarray(
        np.random.default_rng(1).standard_normal(operands.query.shape), jnp.float32
    )
    arrays = (operands.query, operands.key, operands.value)
    _, pull = jax.vjp(lambda *x: reference.attention(Operands(*x), SETTINGS), *arrays)
    got, _ = emulated_hopper.backward(operands, SETTINGS, gradient, slow=slow)
    for found, want in zip((got.query, got.key, got.value), pull(gradient), strict=True):
        assert_near(found, want)
