"""The forward and backward pass by name, on the operands of one device: no vmap, no sharding."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax

from sigjax import chunked
from sigjax.choice import Implementation
from sigjax.operands import Gradients, Operands, Settings, vary, varying_axes


def forward(implementation: Implementation, settings: Settings, operands: Operands) -> Array:
    """The output [B, T, N, H]."""

    def xla(operands: Operands) -> Array:
        return chunked.forward(operands, settings)

    def triton(operands: Operands) -> Array:
        # jax-triton is imported only where it is used: a CPU host need not have it.
        from sigjax.kernels import launch

        return _finished(launch.forward(operands, settings), settings, operands)

    return _by_name(implementation, xla, triton, operands)


def backward(
    implementation: Implementation, settings: Settings, operands: Operands, cotangent: Array
) -> Gradients:
    """The gradient of every floating operand."""

    def xla(operands: Operands, cotangent: Array) -> Gradients:
        return chunked.backward(operands, settings, cotangent)

    def triton(operands: Operands, cotangent: Array) -> Gradients:
        from sigjax.kernels import launch

        return _finished(launch.backward(operands, settings, cotangent), settings, operands)

    return _by_name(implementation, xla, triton, operands, cotangent)


def _by_name(
    implementation: Implementation,
    xla: Callable[..., Any],
    triton: Callable[..., Any],
    *arguments: Any,
) -> Any:
    if implementation == "xla":
        return xla(*arguments)
    if implementation == "triton":
        return triton(*arguments)
    return lax.platform_dependent(*arguments, cuda=triton, default=xla)


def _finished(results: Any, settings: Settings, operands: Operands) -> Any:
    """What kernels do not do: the dtype of settings, and what shard_map wants to know.

    That results vary over the axes over which operands do, triton_call does not say.
    """
    axes = varying_axes(*jax.tree.leaves(operands))

    def finish(x: Array) -> Array:
        return vary(x.astype(settings.result_dtype or x.dtype), axes)

    return jax.tree.map(finish, results)
