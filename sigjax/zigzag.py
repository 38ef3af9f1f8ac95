"""How causal sequences are dealt out over devices, so that all have the same work.

Of 2P parts of a sequence, device i of P computes the i-th and the i-th last: what the one
sees too little of, the other sees too much of. Without causality a device keeps what it has.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

# Arrays of a device's parts, first to last.
type Parts = tuple[Array, ...]


class Order(NamedTuple):
    """Over what a sequence is dealt out, and whether in two parts a device."""

    axis_name: str
    devices: int
    is_causal: bool


def spread(order: Order, x: Array) -> Parts:
    """This device's parts of a sequence along axis 1, of which it holds a stretch."""
    if not order.is_causal:
        return (x,)
    # Device d holds parts 2d and 2d + 1, and is to have d and 2P - 1 - d: one even, one odd.
    even, odd = (
        lax.ppermute(half, order.axis_name, [(d, owner) for d, owner in _moves(order, parity)])
        for parity, half in enumerate(jnp.split(x, 2, axis=1))
    )
    is_even = lax.axis_index(order.axis_name) % 2 == 0
    return jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)


def gather(order: Order, parts: Parts) -> Array:
    """Undoes spread."""
    if not order.is_causal:
        return parts[0]
    is_even = lax.axis_index(order.axis_name) % 2 == 0
    first, last = parts
    halves = (jnp.where(is_even, first, last), jnp.where(is_even, last, first))
    moved = [
        lax.ppermute(half, order.axis_name, [(owner, d) for d, owner in _moves(order, parity)])
        for parity, half in enumerate(halves)
    ]
    return jnp.concatenate(moved, axis=1)


def _moves(order: Order, parity: int) -> list[tuple[int, int]]:
    """(device that holds a part, device that computes with it) of all even or all odd parts."""
    last = 2 * order.devices - 1
    return [(d, min(2 * d + parity, last - 2 * d - parity)) for d in range(order.devices)]
