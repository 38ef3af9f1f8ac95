"""What the Flax module checks, and its padding."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import Array
from jax.typing import ArrayLike

type SigmoidBias = Literal["per_sequence", "learnable"] | float


@dataclass(frozen=True)
class Padding:
    """Which tokens of one side are padding.

    Attributes:
        side: "query" or "key_value".
        lengths: [B...], tokens at or past it are padding; or None.
        segments: [B..., T], tokens of 0 and below are padding; or None.
    """

    side: str
    lengths: ArrayLike | None
    segments: ArrayLike | None

    def zeroed(self, x: Array) -> Array:
        """Tokens [B..., T, F] with exact zeros where they are padding.

        Padding that holds NaN would otherwise reach the projections' gradients, as 0 · NaN.
        """
        if self.lengths is not None:
            lengths = jnp.asarray(self.lengths)
            if lengths.shape != x.shape[:-2]:
                msg = (
                    f"{self.side}_seq_lengths must have shape [B...] = {x.shape[:-2]}, "
                    f"got {lengths.shape}"
                )
                raise ValueError(msg)
            # Not in the lengths' dtype, which may be too narrow for positions.
            positions = jax.lax.broadcasted_iota(jnp.int32, x.shape[:-1], x.ndim - 2)
            x = _where(positions < lengths[..., None], x)
        if self.segments is not None:
            segments = jnp.asarray(self.segments)
            if segments.shape != x.shape[:-1]:
                msg = (
                    f"{self.side}_segment_ids must have shape [B..., length] = {x.shape[:-1]}, "
                    f"got {segments.shape}"
                )
                raise ValueError(msg)
            x = _where(segments > 0, x)
        return x


def _where(valid: Array, x: Array) -> Array:
    return jnp.where(valid[..., None], x, jnp.zeros_like(x))


def check_decoding(**arguments: ArrayLike | tuple[int, int] | None) -> None:
    """Raises NotImplementedError for an argument that a cache does not serve."""
    given = [name for name, x in arguments.items() if x is not None]
    if given:
        msg = f"{given[0]} must be None where decode is True: it is not served with a cache"
        raise NotImplementedError(msg)


def head_size(num_heads: int, num_kv_heads: int, qkv_features: int) -> int:
    """H, or ValueError where the sizes do not fit together."""
    for name, size in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if size < 1:
            msg = f"{name} must be at least 1, got {size}"
            raise ValueError(msg)
    if num_heads % num_kv_heads:
        msg = f"num_kv_heads must divide num_heads = {num_heads}, got {num_kv_heads}"
        raise ValueError(msg)
    if qkv_features < 1 or qkv_features % num_heads:
        msg = f"qkv_features must be a multiple of num_heads = {num_heads}, got {qkv_features}"
        raise ValueError(msg)
    return qkv_features // num_heads


def initial_bias(
    sigmoid_bias: SigmoidBias, initial_length: float | None, num_heads: int, param_dtype: Dtype
) -> nnx.Param[Array] | float | None:
    """What is added to the logits; None is -log(number of valid keys), the op's default."""
    if sigmoid_bias == "learnable":
        if initial_length is None or not 0 < initial_length < math.inf:
            msg = (
                "initial_length must be the usual number of keys, above 0, where sigmoid_bias "
                f"is 'learnable', got {initial_length}"
            )
            raise ValueError(msg)
        return nnx.Param(jnp.full(num_heads, -math.log(initial_length), param_dtype))
    if initial_length is not None:
        msg = (
            "initial_length must be None unless sigmoid_bias is 'learnable', "
            f"got {initial_length} and {sigmoid_bias!r}"
        )
        raise ValueError(msg)
    if sigmoid_bias == "per_sequence":
        return None
    if isinstance(sigmoid_bias, str) or not math.isfinite(sigmoid_bias):
        msg = (
            "sigmoid_bias must be 'per_sequence', 'learnable' or a finite number, "
            f"got {sigmoid_bias!r}"
        )
        raise ValueError(msg)
    return float(sigmoid_bias)


def check_shorthand(*others: ArrayLike | None) -> None:
    """Raises ValueError where sequence_lengths does not stand alone."""
    if any(other is not None for other in others):
        msg = (
            "sequence_lengths is both lengths of self-attention and stands alone: beside "
            "inputs_k or inputs_v give query_seq_lengths and key_value_seq_lengths instead"
        )
        raise ValueError(msg)


def check_features(name: str, x: Array, features: int) -> None:
    """Raises ValueError where inputs do not have the module's features."""
    if x.ndim < 2 or x.shape[-1] != features:
        msg = f"{name} must have shape [B..., length, {features}], got {x.shape}"
        raise ValueError(msg)
