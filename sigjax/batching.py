"""The rule of vmap: mapped axes join the batch, so that one call serves all, without a loop.

An array that is not mapped is repeated for every mapped call, except a bias or a mask that
broadcasts over the batch in the forward pass: it serves all of them as it is.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from sigjax import partitioning
from sigjax.choice import Implementation, gpu_capability
from sigjax.operands import Gradients, Operands, Settings


def forward(implementation: Implementation, settings: Settings, operands: Operands) -> Array:
    """The output [B, T, N, H]."""
    call = _forward(implementation, settings, gpu_capability())
    return partitioning.automatic(call, (operands,), operands.query)


def backward(
    implementation: Implementation, settings: Settings, operands: Operands, cotangent: Array
) -> Gradients:
    """The gradient of every floating operand."""
    call = _backward(implementation, settings, gpu_capability())
    like = Gradients(*(getattr(operands, name) for name in Gradients._fields))
    return partitioning.automatic(call, (operands, cotangent), like)


# The capability is part of the key: what was traced for one GPU must not serve another.
@functools.cache
def _forward(
    implementation: Implementation, settings: Settings, capability: int | None
) -> Callable[[Operands], Array]:
    @custom_vmap
    def call(operands: Operands) -> Array:
        return partitioning.forward(implementation, settings, capability, operands)

    @call.def_vmap
    def rule(size: int, in_axes: list[Operands], operands: Operands) -> tuple[Array, bool]:
        batch = _batch(in_axes[0], operands)
        output = call(_fold_operands(size, in_axes[0], operands, shared=("bias", "mask")))
        return _unfold(size, batch, output), True

    return call


@functools.cache
def _backward(
    implementation: Implementation, settings: Settings, capability: int | None
) -> Callable[[Operands, Array], Gradients]:
    @custom_vmap
    def call(operands: Operands, cotangent: Array) -> Gradients:
        return partitioning.backward(implementation, settings, capability, operands, cotangent)

    @call.def_vmap
    def rule(
        size: int, in_axes: list[Any], operands: Operands, cotangent: Array
    ) -> tuple[Gradients, Gradients]:
        mapped, batch = in_axes[0], _batch(in_axes[0], operands)
        # Every mapped call has a bias gradient of its own, so no two may share a bias.
        folded = _fold_operands(size, mapped, operands, shared=("mask",))
        gradients = call(folded, _fold(size, cotangent, is_mapped=in_axes[1]))
        results = Gradients._make(x if x is None else _unfold(size, batch, x) for x in gradients)
        if operands.bias is not None and results.bias is not None:
            own_batch = operands.bias.shape[int(mapped.bias)]
            if own_batch != batch:
                results = results._replace(bias=results.bias.sum(1, keepdims=True))
        return results, jax.tree.map(lambda _: True, results)

    return call


def _batch(mapped: Operands, operands: Operands) -> int:
    return operands.query.shape[int(bool(mapped.query))]


def _fold_operands(
    size: int, mapped: Operands, operands: Operands, *, shared: tuple[str, ...]
) -> Operands:
    """Every operand as [M · B, ...]; those in shared keep a batch axis of 1 where not mapped."""
    batch = _batch(mapped, operands)

    def fold(name: str) -> Array | None:
        x, is_mapped = getattr(operands, name), bool(getattr(mapped, name))
        if x is None:
            return None
        own_batch = x.shape[int(is_mapped)]
        if name in shared and own_batch == 1 and not is_mapped:
            return x
        if own_batch != batch:  # of a bias or a mask: 1
            x = jnp.broadcast_to(x, (*x.shape[:-4], batch, *x.shape[-3:]))
        return _fold(size, x, is_mapped=is_mapped)

    return Operands._make(fold(name) for name in Operands._fields)


def _fold(size: int, x: Array, *, is_mapped: bool) -> Array:
    """[M, B, ...], or [B, ...] where it is not mapped, to [M · B, ...]."""
    if not is_mapped:
        x = jnp.broadcast_to(x[None], (size, *x.shape))
    return x.reshape(size * x.shape[1], *x.shape[2:])


def _unfold(size: int, batch: int, x: Array) -> Array:
    return x.reshape(size, batch, *x.shape[1:])
