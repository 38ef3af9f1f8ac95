"""The op's derivative rules, over every implementation.

Residuals are the operands: weights are recomputed in the backward pass. The backward pass has
a rule of its own, so that second and higher derivatives exist: they differentiate the "xla"
implementation, whatever computed the first, and take memory linear in the lengths.
"""

from functools import partial

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from sigjax import batching, chunked
from sigjax.choice import Implementation
from sigjax.operands import Gradients, Operands, Settings, vary, varying_axes

# What jax.checkpoint_policies.save_only_these_names keeps the output by.
OUTPUT_NAME = "sigjax_attention"


def attention(implementation: Implementation, settings: Settings, operands: Operands) -> Array:
    """The output [B, T, N, H], by the named implementation."""
    # Outside of the rule, so that shard_map adds up the gradients of what devices share.
    axes = varying_axes(*jax.tree.leaves(operands))
    operands = jax.tree.map(lambda x: vary(x, axes), operands)
    return checkpoint_name(forward(implementation, settings, operands), OUTPUT_NAME)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def forward(implementation: Implementation, settings: Settings, operands: Operands) -> Array:
    """The output, differentiable."""
    return batching.forward(implementation, settings, operands)


def _forward_rule(
    implementation: Implementation, settings: Settings, operands: Operands
) -> tuple[Array, Operands]:
    # By its own name: an outer derivative finds the rule again.
    return forward(implementation, settings, operands), operands


def _backward_rule(
    implementation: Implementation, settings: Settings, operands: Operands, cotangent: Array
) -> tuple[Operands]:
    gradients = backward(implementation, settings, operands, cotangent)
    # None is a zero cotangent: masks, lengths and segments have no derivative.
    return (Operands(**gradients._asdict()),)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def backward(
    implementation: Implementation, settings: Settings, operands: Operands, cotangent: Array
) -> Gradients:
    """The gradients of forward, differentiable in their turn."""
    return batching.backward(implementation, settings, operands, cotangent)


def _gradients_forward_rule(
    implementation: Implementation, settings: Settings, operands: Operands, cotangent: Array
) -> tuple[Gradients, tuple[Operands, Array]]:
    return backward(implementation, settings, operands, cotangent), (operands, cotangent)


def _gradients_backward_rule(
    implementation: Implementation,
    settings: Settings,
    residuals: tuple[Operands, Array],
    cotangents: Gradients,
) -> tuple[Operands, Array]:
    del implementation

    def gradients(operands: Operands, cotangent: Array) -> Gradients:
        return chunked.backward(operands, settings, cotangent)

    return jax.vjp(gradients, *residuals)[1](cotangents)


forward.defvjp(_forward_rule, _backward_rule)
backward.defvjp(_gradients_forward_rule, _gradients_backward_rule)
