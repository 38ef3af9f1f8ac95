"""One device's part of context parallelism: what runs inside of shard_map.

A device has one part of the sequence, or two with causality, see ``zigzag``. Of any two
devices, each has two pairs of parts to compute with the other's keys, all of them full.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from sigjax import vjp, zigzag
from sigjax.choice import Implementation
from sigjax.operands import Gradients, Operands, Settings
from sigjax.zigzag import Order, Parts


@dataclass(frozen=True)
class Ring:
    """What is static about a call.

    Attributes:
        implementation: what computes a pair of parts.
        settings: of the call; its result_dtype is that of the partial sums.
        axis_name: mesh axis of the ring.
        head_axis_name: mesh axis of the heads, or None.
        devices: P, along axis_name.
    """

    implementation: Implementation
    settings: Settings
    axis_name: str
    head_axis_name: str | None
    devices: int

    @property
    def order(self) -> Order:
        """How sequences are dealt out."""
        return Order(self.axis_name, self.devices, self.settings.is_causal)


class Block(NamedTuple):
    """What travels: the keys of one device."""

    key: Parts  # [B, c, K, H] each
    value: Parts  # [B, c, K, H] each
    key_bias: Parts | None  # [B, c] each


class Pairing(NamedTuple):
    """Which parts of the queries meet which parts of a block, stacked along the batch."""

    queries: tuple[int | Array, ...]
    keys: tuple[int | Array, ...]
    is_causal: bool


class Sums(NamedTuple):
    """The gradients that a device adds up for its own queries, and those of the block."""

    query: Parts
    sigmoid_bias: Array
    block: Block


def forward(ring: Ring, operands: Operands) -> Array:
    """The output of this device's queries, [B, T / P, N, H]."""
    queries, block = zigzag.spread(ring.order, operands.query), _block(ring, operands)
    dtype = ring.settings.result_dtype

    def add(total: Parts, block: Block, source: Array, pairing: Pairing) -> Parts:
        part = _operands(ring, operands, queries, block, source, pairing)
        settings = replace(ring.settings, is_causal=pairing.is_causal)
        output = vjp.forward(ring.implementation, settings, part)
        return _added(total, output, pairing.queries)

    def step(carry: tuple[Parts, Block], steps: Array) -> tuple[tuple[Parts, Block], None]:
        total, block = carry
        following = _send(ring, block)
        return (add(total, block, *_other(ring, steps)), following), None

    total = tuple(jnp.zeros(x.shape, dtype) for x in queries)
    own, following = block, _send(ring, block)
    for pairing in _own_pairings(ring):
        total = add(total, own, lax.axis_index(ring.axis_name), pairing)
    if ring.devices > 1:
        carry = (total, following)
        if ring.devices > 2:
            carry, _ = lax.scan(step, carry, jnp.arange(1, ring.devices - 1))
        total = add(*carry, *_other(ring, jnp.asarray(ring.devices - 1)))
    return zigzag.gather(ring.order, total).astype(operands.query.dtype)


def backward(ring: Ring, operands: Operands, cotangent: Array) -> Gradients:
    """The gradients of this device's operands."""
    queries, block = zigzag.spread(ring.order, operands.query), _block(ring, operands)
    cotangents = zigzag.spread(ring.order, cotangent)
    dtype = ring.settings.result_dtype

    def add(sums: Sums, block: Block, source: Array, pairing: Pairing) -> Sums:
        part = _operands(ring, operands, queries, block, source, pairing)
        settings = replace(ring.settings, is_causal=pairing.is_causal)
        gradients = vjp.backward(
            ring.implementation, settings, part, _stacked(cotangents, pairing.queries)
        )
        biases = gradients.sigmoid_bias
        return Sums(
            query=_added(sums.query, gradients.query, pairing.queries),
            sigmoid_bias=sums.sigmoid_bias
            + biases.reshape(len(pairing.queries), *sums.sigmoid_bias.shape).sum(0),
            block=Block(
                key=_added(sums.block.key, gradients.key, pairing.keys),
                value=_added(sums.block.value, gradients.value, pairing.keys),
                key_bias=None
                if sums.block.key_bias is None or gradients.key_bias is None
                else _added(sums.block.key_bias, gradients.key_bias, pairing.keys),
            ),
        )

    def sent(sums: Sums) -> Sums:
        return sums._replace(block=_send(ring, sums.block))

    def step(carry: tuple[Sums, Block], steps: Array) -> tuple[tuple[Sums, Block], None]:
        sums, block = carry
        following = _send(ring, block)
        return (sent(add(sums, block, *_other(ring, steps))), following), None

    head_sums = jnp.zeros((operands.query.shape[0], operands.query.shape[2]), dtype)
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), Sums(queries, head_sums, block))
    following = _send(ring, block)
    for pairing in _own_pairings(ring):
        sums = add(sums, block, lax.axis_index(ring.axis_name), pairing)
    carry = (sent(sums), following)
    if ring.devices > 2:
        carry, _ = lax.scan(step, carry, jnp.arange(1, ring.devices - 1))
    sums = carry[0]
    if ring.devices > 1:
        # The gradients' last journey brings them home.
        sums = sent(add(*carry, *_other(ring, jnp.asarray(ring.devices - 1))))
    return _finished(ring, operands, sums)


def _finished(ring: Ring, operands: Operands, sums: Sums) -> Gradients:
    key_bias = None
    if operands.key_bias is not None and sums.block.key_bias is not None:
        key_bias = zigzag.gather(ring.order, sums.block.key_bias)
        if ring.head_axis_name is not None:
            key_bias = lax.psum(key_bias, ring.head_axis_name)
        key_bias = key_bias.astype(operands.key_bias.dtype)
    sigmoid_bias = lax.psum(sums.sigmoid_bias, ring.axis_name)
    if operands.sigmoid_bias is not None:
        sigmoid_bias = sigmoid_bias.astype(operands.sigmoid_bias.dtype)
    return Gradients(
        query=zigzag.gather(ring.order, sums.query).astype(operands.query.dtype),
        key=zigzag.gather(ring.order, sums.block.key).astype(operands.key.dtype),
        value=zigzag.gather(ring.order, sums.block.value).astype(operands.value.dtype),
        bias=None,
        sigmoid_bias=sigmoid_bias,
        key_bias=key_bias,
    )


def _own_pairings(ring: Ring) -> list[Pairing]:
    """A device's queries with its own keys."""
    if not ring.settings.is_causal:
        return [Pairing((0,), (0,), is_causal=False)]
    return [
        Pairing((0, 1), (0, 1), is_causal=True),
        Pairing((1,), (0,), is_causal=False),
    ]


def _other(ring: Ring, steps: Array) -> tuple[Array, Pairing]:
    """Which device's keys arrive after so many steps, and what meets what."""
    device = lax.axis_index(ring.axis_name)
    source = (device - steps) % ring.devices
    if not ring.settings.is_causal:
        return source, Pairing((0,), (0,), is_causal=False)
    # The last part sees the other's first. An earlier device's first part is seen by this
    # one's first too; a later device's last part by this one's last.
    part = jnp.where(source < device, 0, 1)
    return source, Pairing((1, part), (0, part), is_causal=False)


def _operands(
    ring: Ring,
    operands: Operands,
    queries: Parts,
    block: Block,
    source: Array,
    pairing: Pairing,
) -> Operands:
    """The pairing as one call, its pairs of parts along the batch."""
    count = len(pairing.queries)
    size, keys = queries[0].shape[1], block.key[0].shape[1]
    device, bias = lax.axis_index(ring.axis_name), operands.sigmoid_bias
    return Operands(
        query=_stacked(queries, pairing.queries),
        key=_stacked(block.key, pairing.keys),
        value=_stacked(block.value, pairing.keys),
        sigmoid_bias=None if bias is None else jnp.concatenate([bias] * count),
        key_bias=None if block.key_bias is None else _stacked(block.key_bias, pairing.keys),
        query_lengths=_lengths(ring, operands.query_lengths, device, size, pairing.queries),
        key_lengths=_lengths(ring, operands.key_lengths, source, keys, pairing.keys),
    )


def _lengths(
    ring: Ring,
    lengths: Array | None,
    device: Array,
    size: int,
    parts: tuple[int | Array, ...],
) -> Array | None:
    """How much of a device's parts lies before the whole sequences' lengths."""
    if lengths is None:
        return None
    numbers = [device, 2 * ring.devices - 1 - device]
    starts = [size * _pick(numbers, part) for part in parts]
    return jnp.concatenate([jnp.clip(lengths - start, 0, size) for start in starts])


def _stacked(parts: Parts, chosen: tuple[int | Array, ...]) -> Array:
    return jnp.concatenate([_pick(parts, part) for part in chosen])


def _pick(parts: Sequence[Array], part: int | Array) -> Array:
    if isinstance(part, int):
        return parts[part]
    return jnp.where(part == 0, parts[0], parts[1])


def _added(totals: Parts, stacked: Array, chosen: tuple[int | Array, ...]) -> Parts:
    """Adds each of the stacked results to the part that it belongs to."""
    results = list(totals)
    for part, x in zip(chosen, jnp.split(stacked, len(chosen)), strict=True):
        for index in range(len(results)):
            if isinstance(part, int):
                results[index] = results[index] + x if part == index else results[index]
            else:
                results[index] = results[index] + jnp.where(part == index, x, 0)
    return tuple(results)


def _block(ring: Ring, operands: Operands) -> Block:
    bias = operands.key_bias
    return Block(
        key=zigzag.spread(ring.order, operands.key),
        value=zigzag.spread(ring.order, operands.value),
        key_bias=None if bias is None else zigzag.spread(ring.order, bias),
    )


def _send(ring: Ring, block: Block) -> Block:
    """To the next device; from the one before."""
    following = [(i, (i + 1) % ring.devices) for i in range(ring.devices)]
    return jax.tree.map(lambda x: lax.ppermute(x, ring.axis_name, following), block)
