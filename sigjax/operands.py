"""What every implementation of the op receives: checked arrays and static settings."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax import Array, lax


class Operands(NamedTuple):
    """The arrays of one call, checked and in the batched layout.

    B batch, T query length, S key length, N query heads, K key heads, H head size.

    Attributes:
        query: [B, T, N, H], bfloat16, float16 or float32 (float64 in "xla").
        key: [B, S, K, H], dtype of query.
        value: [B, S, K, H], dtype of query.
        bias: added to the logits, four axes, broadcastable to [B, N, T, S]; or None.
        mask: bool, four axes, broadcastable to [B, N, T, S], True takes part; or None.
        sigmoid_bias: [B, N], added to every logit of a head; or None for -log(number of keys).
        key_bias: [B, S], added per key; or None.
        query_lengths: [B] int32; or None where every row is full.
        key_lengths: [B] int32; or None where every row is full.
        query_segments: [B, T] int32, from 1 on, 0 and below is padding; or None.
        key_segments: [B, S] int32; given where query_segments is.
    """

    query: Array
    key: Array
    value: Array
    bias: Array | None = None
    mask: Array | None = None
    sigmoid_bias: Array | None = None
    key_bias: Array | None = None
    query_lengths: Array | None = None
    key_lengths: Array | None = None
    query_segments: Array | None = None
    key_segments: Array | None = None


class Gradients(NamedTuple):
    """Cotangents of the differentiable operands; None where the operand is None."""

    query: Array
    key: Array
    value: Array
    bias: Array | None
    sigmoid_bias: Array | None
    key_bias: Array | None


type Precision = Literal["highest", "high", "default"]


@dataclass(frozen=True)
class Settings:
    """Static settings of one call; hashable, so that jit and custom_vjp can key on it.

    Attributes:
        scale: factor of the logits.
        is_causal: query i sees key j only where j <= i.
        window: (left, right): query i sees key j only where i - left <= j <= i + right; or None.
        result_dtype: of the output and the gradients; None is each operand's own.
        deterministic: the gradients have the same bits in every run.
        precision: of products of float32: "highest" is exact, "high" three products of the tensor
            cores, "default" one.
        fast_sigmoid: the Hopper forward kernel may take the hardware's tanh; all else is exact.
        bias_gradients: whether anybody asks for those of sigmoid_bias and key_bias; where not,
            they are whatever is cheapest.
    """

    scale: float
    is_causal: bool = False
    window: tuple[int, int] | None = None
    result_dtype: np.dtype | None = None
    deterministic: bool = False
    precision: Precision = "highest"
    fast_sigmoid: bool = False
    bias_gradients: bool = True


def varying_axes(*arrays: Array) -> tuple[str, ...]:
    """The mesh axes of a surrounding shard_map over which one of the arrays varies."""
    axes: set[str] = set()
    for x in arrays:
        axes.update(jax.typeof(x).manual_axis_type.varying)
    return tuple(sorted(axes))


def vary(x: Array, axes: tuple[str, ...]) -> Array:
    """Says that x may differ along mesh axes of a surrounding shard_map."""
    missing = tuple(axis for axis in axes if axis not in varying_axes(x))
    return lax.pcast(x, missing, to="varying") if missing else x
