"""The op's derivative rule: one custom_vjp over both implementations.

Residuals are the operands: weights are recomputed in the backward pass.
"""

from functools import partial

import jax
from jax import Array, lax

from sigjax import chunked
from sigjax.choice import Implementation
from sigjax.operands import Gradients, Operands, Settings


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention(implementation: Implementation, settings: Settings, operands: Operands) -> Array:
    """The output [B, T, N, H], by the named implementation."""
    if implementation == "xla":
        return chunked.forward(operands, settings)
    # jax-triton is imported only where it is used: a CPU host need not have it.
    from sigjax.kernels import launch

    if implementation == "triton":
        return launch.forward(operands, settings)
    return lax.platform_dependent(
        operands,
        cuda=partial(launch.forward, settings=settings),
        default=partial(chunked.forward, settings=settings),
    )


def _forward_rule(
    implementation: Implementation, settings: Settings, operands: Operands
) -> tuple[Array, Operands]:
    return attention(implementation, settings, operands), operands


def _backward_rule(
    implementation: Implementation, settings: Settings, operands: Operands, cotangent: Array
) -> tuple[Operands]:
    gradients = _gradients(implementation, settings, operands, cotangent)
    # None is a zero cotangent: masks and lengths have no derivative.
    return (
        Operands(
            query=gradients.query,
            key=gradients.key,
            value=gradients.value,
            bias=gradients.bias,
            sigmoid_bias=gradients.sigmoid_bias,
            key_bias=gradients.key_bias,
        ),
    )


def _gradients(
    implementation: Implementation, settings: Settings, operands: Operands, cotangent: Array
) -> Gradients:
    if implementation == "xla":
        return chunked.backward(operands, settings, cotangent)
    from sigjax.kernels import launch

    if implementation == "triton":
        return launch.backward(operands, settings, cotangent)
    return lax.platform_dependent(
        operands,
        cotangent,
        cuda=lambda x, dy: launch.backward(x, settings, dy),
        default=lambda x, dy: chunked.backward(x, settings, dy),
    )


attention.defvjp(_forward_rule, _backward_rule)
