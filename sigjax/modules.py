"""The Flax module over the op."""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import Array
from jax.typing import ArrayLike

from sigjax.attention_slot import Implementation, attend
from sigjax.attention_slot import attention_fn as attention_fn
from sigjax.checks import check_implementation

type SigmoidBias = Literal["per_sequence", "learnable"] | float


class SigmoidAttention(nnx.Module):
    """Multi-head sigmoid attention between projections.

    Takes the arguments of ``flax.nnx.MultiHeadAttention`` and holds the same
    parameters (query, key, value, out), so that one can stand in for the other.
    It takes no dropout, decode cache or ``attention_fn``.

    B batch (any number of axes), T query length, S key length, N query heads,
    K key and value heads, H head size.

    Args:
        num_heads: N.
        in_features: features of the queries' inputs.
        qkv_features: N · H, default in_features.
        out_features: features of the output, default in_features.
        num_kv_heads: K, a divisor of N, default N.
        in_kv_features: features of the keys' and values' inputs, default in_features.
        dtype: of the computation; None is inferred from inputs and parameters.
        param_dtype: of the parameters.
        precision: of the projections' products.
        kernel_init: for the projections; out_kernel_init, where given, for the last.
        out_kernel_init: see kernel_init.
        bias_init: for the projections' biases; out_bias_init, where given, for the last.
        out_bias_init: see bias_init.
        use_bias: whether the projections have biases.
        normalize_qk: RMS-normalises each head's queries and keys over H, with a learned
            scale [H], as in https://arxiv.org/abs/2302.05442 (with LayerNorm there).
        sigmoid_bias: added to every logit. "per_sequence" is -log(number of valid keys)
            of each sequence; a float is that number, such as -math.log(n); "learnable" is
            a parameter [N], one per head.
        initial_length: number of keys n where the learnable bias begins: at -log(n).
        implementation: of the op, see ``sigjax.sigmoid_attention``.
        rngs: for the initial parameters.

    Raises:
        ValueError: the sizes do not fit together, or sigmoid_bias or initial_length is
            none of the values above.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import sigjax
        >>> attention = sigjax.SigmoidAttention(num_heads=4, in_features=64, rngs=nnx.Rngs(0))
        >>> x, lengths = jnp.ones((2, 300, 64)), jnp.array([300, 211], jnp.int32)
        >>> attention(x, sequence_lengths=lengths).shape
        (2, 300, 64)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),  # noqa: B008 (a function)
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = nnx.initializers.zeros_init(),  # noqa: B008 (a function)
        out_bias_init: Initializer | None = None,
        use_bias: bool = True,
        normalize_qk: bool = False,
        sigmoid_bias: Literal["per_sequence", "learnable"] | float = "per_sequence",
        initial_length: float | None = None,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ) -> None:
        check_implementation(implementation)
        self.num_heads, self.in_features = num_heads, in_features
        self.qkv_features = in_features if qkv_features is None else qkv_features
        self.out_features = in_features if out_features is None else out_features
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.in_kv_features = in_features if in_kv_features is None else in_kv_features
        self.head_dim = _head_size(self.num_heads, self.num_kv_heads, self.qkv_features)
        self.implementation = implementation

        projection = partial(
            nnx.LinearGeneral,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            rngs=rngs,
        )
        heads, kv_heads = (num_heads, self.head_dim), (self.num_kv_heads, self.head_dim)
        initial = {"kernel_init": kernel_init, "bias_init": bias_init}
        self.query = projection(in_features, heads, **initial)
        self.key = projection(self.in_kv_features, kv_heads, **initial)
        self.value = projection(self.in_kv_features, kv_heads, **initial)
        norm = partial(nnx.RMSNorm, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.query_norm = norm(self.head_dim) if normalize_qk else None
        self.key_norm = norm(self.head_dim) if normalize_qk else None
        self.out = projection(
            heads,
            self.out_features,
            axis=(-2, -1),
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
        )
        self.sigmoid_bias = _initial_bias(sigmoid_bias, initial_length, num_heads, param_dtype)

    def __call__(
        self,
        inputs_q: Array,
        inputs_k: Array | None = None,
        inputs_v: Array | None = None,
        *,
        mask: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        key_bias: ArrayLike | None = None,
        is_causal: bool = False,
        sequence_lengths: ArrayLike | None = None,
        query_seq_lengths: ArrayLike | None = None,
        key_value_seq_lengths: ArrayLike | None = None,
        local_window_size: int | tuple[int, int] | None = None,
    ) -> Array:
        """Attends from inputs_q to inputs_k and inputs_v.

        What padded tokens hold, NaN and inf included, reaches no output and no
        gradient, those of the parameters included.

        Args:
            inputs_q: [B..., T, in_features].
            inputs_k: [B..., S, in_kv_features]; None is inputs_q: self-attention.
            inputs_v: shape of inputs_k; None is inputs_k.
            mask: bool or 0 and 1, broadcastable to [B..., N, T, S]; a pair takes part
                where it is True. It does not change the per-sequence bias.
            bias: added to the logits, broadcastable to [B..., N, T, S].
            key_bias: added to the logits of each key, [B..., S].
            is_causal: query i sees key j only where j <= i.
            sequence_lengths: int32 [B...], both lengths of self-attention at once.
            query_seq_lengths: int32 [B...]; outputs at or past it are exactly 0.
            key_value_seq_lengths: int32 [B...]; keys at or past it contribute nothing.
            local_window_size: int or (left, right), see ``sigjax.sigmoid_attention``.

        Returns:
            [B..., T, out_features].

        Raises:
            ValueError: inputs or lengths do not fit the module or each other.
            TypeError: an argument's dtype or kind is wrong.
            NotImplementedError: the implementation cannot serve the call.
        """
        if sequence_lengths is not None:
            _check_shorthand(inputs_k, inputs_v, query_seq_lengths, key_value_seq_lengths)
            query_seq_lengths = key_value_seq_lengths = sequence_lengths
        if inputs_k is None and inputs_v is not None:
            msg = "inputs_k must be given beside inputs_v, got None"
            raise ValueError(msg)
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        _check_features("inputs_q", inputs_q, self.in_features)
        _check_features("inputs_k", inputs_k, self.in_kv_features)
        _check_features("inputs_v", inputs_v, self.in_kv_features)
        query = self.query(_without_padding("query_seq_lengths", inputs_q, query_seq_lengths))
        key, value = (
            project(_without_padding("key_value_seq_lengths", inputs, key_value_seq_lengths))
            for project, inputs in ((self.key, inputs_k), (self.value, inputs_v))
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        sigmoid_bias = self.sigmoid_bias
        if isinstance(sigmoid_bias, nnx.Variable):
            sigmoid_bias = sigmoid_bias[...]
        output = attend(
            query,
            key,
            value,
            bias=bias,
            mask=mask,
            sigmoid_bias=sigmoid_bias,
            key_bias=key_bias,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            is_causal=is_causal,
            local_window_size=local_window_size,
            implementation=self.implementation,
        )
        return _without_padding("query_seq_lengths", self.out(output), query_seq_lengths)


def _without_padding(name: str, x: Array, lengths: ArrayLike | None) -> Array:
    """Tokens [B..., T, F] with exact zeros from lengths [B...] on.

    Padding that holds NaN would otherwise reach the projections' gradients, as 0 · NaN.
    """
    if lengths is None:
        return x
    lengths = jnp.asarray(lengths)
    if lengths.shape != x.shape[:-2]:
        msg = f"{name} must have shape [B...] = {x.shape[:-2]}, got {lengths.shape}"
        raise ValueError(msg)
    # Not in the lengths' dtype, which may be too narrow for positions.
    positions = jax.lax.broadcasted_iota(jnp.int32, x.shape[:-1], x.ndim - 2)
    valid = positions < lengths[..., None]
    return jnp.where(valid[..., None], x, jnp.zeros_like(x))


def _head_size(num_heads: int, num_kv_heads: int, qkv_features: int) -> int:
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


def _initial_bias(
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


def _check_shorthand(*others: ArrayLike | None) -> None:
    if any(other is not None for other in others):
        msg = (
            "sequence_lengths is both lengths of self-attention and stands alone: beside "
            "inputs_k or inputs_v give query_seq_lengths and key_value_seq_lengths instead"
        )
        raise ValueError(msg)


def _check_features(name: str, x: Array, features: int) -> None:
    if x.ndim < 2 or x.shape[-1] != features:
        msg = f"{name} must have shape [B..., length, {features}], got {x.shape}"
        raise ValueError(msg)
