"""The Flax module over the op."""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import DotGeneralT, Dtype, Initializer, PrecisionLike, PromoteDtypeFn
from jax import Array
from jax.typing import ArrayLike

from sigjax.attention_slot import Implementation, attend
from sigjax.attention_slot import attention_fn as attention_fn
from sigjax.checks import check_bool, check_implementation
from sigjax.decoding import Cache, advance, new_cache
from sigjax.module_arguments import (
    Padding,
    check_decoding,
    check_features,
    check_shorthand,
    head_size,
    initial_bias,
)

_NONE: Mapping[str, Any] = MappingProxyType({})


class SigmoidAttention(nnx.Module):
    """Multi-head sigmoid attention between projections.

    Takes the arguments of ``flax.nnx.MultiHeadAttention`` and holds the same
    parameters (query, key, value, out), so that one can stand in for the other. It takes no
    dropout, which would need the weights that a fused kernel never holds: drop from the
    output instead; and no ``attention_fn``.

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
        qkv_promote_dtype: how the first projections find their dtype; see
            ``flax.nnx.LinearGeneral``, as for all up to out_dot_general_cls.
        out_promote_dtype: likewise, of the last projection.
        ln_promote_dtype: likewise, of the normalisations.
        qkv_dot_general: the first projections' product, for quantisation.
        out_dot_general: likewise, of the last projection.
        qkv_dot_general_cls: a class that makes qkv_dot_general.
        out_dot_general_cls: likewise.
        kernel_metadata: of the first projections' kernels, such as out_sharding; likewise
            out_kernel_metadata, bias_metadata and out_bias_metadata.
        out_kernel_metadata: see kernel_metadata.
        bias_metadata: see kernel_metadata.
        out_bias_metadata: see kernel_metadata.
        query_ln_scale_metadata: of the scale of the queries' normalisation.
        key_ln_scale_metadata: of the scale of the keys' normalisation.
        normalize_qk: RMS-normalises each head's queries and keys over H, with a learned
            scale [H], as in https://arxiv.org/abs/2302.05442 (with LayerNorm there).
        sigmoid_bias: added to every logit. "per_sequence" is -log(number of valid keys)
            of each sequence; a float is that number, such as -math.log(n); "learnable" is
            a parameter [N], one per head.
        initial_length: number of keys n where the learnable bias begins: at -log(n).
        hybrid_norm: RMS-normalises the output over its features, with a learned scale, so
            that a pre-norm block adds x + norm(attention(norm(x))): keeps large attention
            norms of long sequences in check, https://arxiv.org/abs/2409.04431.
        layer_scale: initial value, such as 1e-4, of a learned factor [out_features] of the
            output, https://arxiv.org/abs/2103.17239; None is no factor.
        decode: whether calls decode token by token with the cache, see ``init_cache``.
        fast_sigmoid: of the op, see ``sigjax.sigmoid_attention``.
        implementation: of the op, see ``sigjax.sigmoid_attention``.
        rngs: for the initial parameters.

    Raises:
        ValueError: the sizes do not fit together, or sigmoid_bias or initial_length is
            none of the values above.
        TypeError: fast_sigmoid is no bool.

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
        qkv_promote_dtype: PromoteDtypeFn = promote_dtype,
        out_promote_dtype: PromoteDtypeFn = promote_dtype,
        ln_promote_dtype: PromoteDtypeFn = promote_dtype,
        qkv_dot_general: DotGeneralT | None = None,
        out_dot_general: DotGeneralT | None = None,
        qkv_dot_general_cls: Any = None,
        out_dot_general_cls: Any = None,
        kernel_metadata: Mapping[str, Any] = _NONE,
        out_kernel_metadata: Mapping[str, Any] = _NONE,
        bias_metadata: Mapping[str, Any] = _NONE,
        out_bias_metadata: Mapping[str, Any] = _NONE,
        query_ln_scale_metadata: Mapping[str, Any] = _NONE,
        key_ln_scale_metadata: Mapping[str, Any] = _NONE,
        normalize_qk: bool = False,
        sigmoid_bias: Literal["per_sequence", "learnable"] | float = "per_sequence",
        initial_length: float | None = None,
        hybrid_norm: bool = False,
        layer_scale: float | None = None,
        decode: bool = False,
        fast_sigmoid: bool = False,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ) -> None:
        check_implementation(implementation)
        self.num_heads, self.in_features = num_heads, in_features
        self.qkv_features = in_features if qkv_features is None else qkv_features
        self.out_features = in_features if out_features is None else out_features
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.in_kv_features = in_features if in_kv_features is None else in_kv_features
        self.head_dim = head_size(self.num_heads, self.num_kv_heads, self.qkv_features)
        self.implementation = implementation
        self.fast_sigmoid = check_bool("fast_sigmoid", fast_sigmoid)

        projection = partial(
            nnx.LinearGeneral,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            rngs=rngs,
        )
        heads, kv_heads = (num_heads, self.head_dim), (self.num_kv_heads, self.head_dim)
        initial = {
            "kernel_init": kernel_init,
            "bias_init": bias_init,
            "promote_dtype": qkv_promote_dtype,
            "dot_general": qkv_dot_general,
            "dot_general_cls": qkv_dot_general_cls,
            "kernel_metadata": kernel_metadata,
            "bias_metadata": bias_metadata,
        }
        self.query = projection(in_features, heads, **initial)
        self.key = projection(self.in_kv_features, kv_heads, **initial)
        self.value = projection(self.in_kv_features, kv_heads, **initial)
        norm = partial(
            nnx.RMSNorm,
            dtype=dtype,
            param_dtype=param_dtype,
            promote_dtype=ln_promote_dtype,
            rngs=rngs,
        )
        scales = (query_ln_scale_metadata, key_ln_scale_metadata)
        self.query_norm, self.key_norm = (
            norm(self.head_dim, scale_metadata=metadata) if normalize_qk else None
            for metadata in scales
        )
        self.out = projection(
            heads,
            self.out_features,
            axis=(-2, -1),
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
            promote_dtype=out_promote_dtype,
            dot_general=out_dot_general,
            dot_general_cls=out_dot_general_cls,
            kernel_metadata=out_kernel_metadata,
            bias_metadata=out_bias_metadata,
        )
        self.output_norm = norm(self.out_features) if hybrid_norm else None
        self.layer_scale = (
            None
            if layer_scale is None
            else nnx.Param(jnp.full(self.out_features, layer_scale, param_dtype))
        )
        self.decode = decode
        self.cache: Cache | None = nnx.data(None)
        self.sigmoid_bias = initial_bias(sigmoid_bias, initial_length, num_heads, param_dtype)

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
        query_segment_ids: ArrayLike | None = None,
        key_value_segment_ids: ArrayLike | None = None,
        decode: bool | None = None,
        out_sharding: Any = None,
        qkv_sharding: Any = None,
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
            query_segment_ids: int32 [B..., T], see ``sigjax.sigmoid_attention``; outputs
                where it is 0 or below are exactly 0. In self-attention it is that of the
                keys too.
            key_value_segment_ids: int32 [B..., S].
            decode: as in the constructor, over which it goes. One token a call, T = 1, is
                added to the cache and attends to all before it; lengths, segments, key_bias
                and local_window_size are not served then, and is_causal has no effect.
            out_sharding: of the output, on a mesh with explicit axes, see ``flax.nnx.Linear``.
            qkv_sharding: of the queries, keys and values, likewise.

        Returns:
            [B..., T, out_features].

        Raises:
            ValueError: inputs or lengths do not fit the module or each other.
            TypeError: an argument's dtype or kind is wrong.
            NotImplementedError: the implementation cannot serve the call.
        """
        if sequence_lengths is not None:
            check_shorthand(inputs_k, inputs_v, query_seq_lengths, key_value_seq_lengths)
            query_seq_lengths = key_value_seq_lengths = sequence_lengths
        if inputs_k is None and inputs_v is not None:
            msg = "inputs_k must be given beside inputs_v, got None"
            raise ValueError(msg)
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        check_features("inputs_q", inputs_q, self.in_features)
        check_features("inputs_k", inputs_k, self.in_kv_features)
        check_features("inputs_v", inputs_v, self.in_kv_features)
        if query_segment_ids is not None and key_value_segment_ids is None and inputs_k is inputs_q:
            key_value_segment_ids = query_segment_ids
        rows, keys = (
            Padding("query", query_seq_lengths, query_segment_ids),
            Padding("key_value", key_value_seq_lengths, key_value_segment_ids),
        )
        query = self.query(rows.zeroed(inputs_q), out_sharding=qkv_sharding)
        key = self.key(keys.zeroed(inputs_k), out_sharding=qkv_sharding)
        value = self.value(keys.zeroed(inputs_v), out_sharding=qkv_sharding)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        sigmoid_bias = self.sigmoid_bias
        if isinstance(sigmoid_bias, nnx.Variable):
            sigmoid_bias = sigmoid_bias[...]
        key_lengths = key_value_seq_lengths
        if self.decode if decode is None else decode:
            check_decoding(
                query_seq_lengths=query_seq_lengths,
                key_value_seq_lengths=key_value_seq_lengths,
                query_segment_ids=query_segment_ids,
                key_value_segment_ids=key_value_segment_ids,
                key_bias=key_bias,
                local_window_size=local_window_size,
            )
            key, value, key_lengths, bias_of_length = advance(self.cache, key, value)
            sigmoid_bias = bias_of_length if sigmoid_bias is None else sigmoid_bias
            is_causal = False  # the lengths say it
        output = attend(
            query,
            key,
            value,
            bias=bias,
            mask=mask,
            sigmoid_bias=sigmoid_bias,
            key_bias=key_bias,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_lengths,
            query_segment_ids=query_segment_ids,
            key_value_segment_ids=key_value_segment_ids,
            is_causal=is_causal,
            local_window_size=local_window_size,
            fast_sigmoid=self.fast_sigmoid,
            implementation=self.implementation,
        )
        output = self.out(output, out_sharding=out_sharding)
        if self.output_norm is not None:
            output = self.output_norm(output)
        if self.layer_scale is not None:
            scale = self.layer_scale[...].astype(output.dtype)
            output = output * jnp.expand_dims(scale, tuple(range(output.ndim - 1)))
        return rows.zeroed(output)

    def init_cache(self, input_shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> None:
        """Makes an empty cache for decoding, as that of ``nnx.MultiHeadAttention``.

        With the "per_sequence" bias, decoding uses -log(length of the cache) at every step,
        so that all steps together equal one causal call of that many tokens.

        Args:
            input_shape: [B..., length, features] of the inputs to come, one token a call;
                the length is the most tokens that fit. More overwrite the last.
            dtype: of the cached keys and values.

        Raises:
            ValueError: input_shape has no length.

        Example:
            >>> import jax.numpy as jnp
            >>> from flax import nnx
            >>> import sigjax
            >>> attention = sigjax.SigmoidAttention(4, 64, decode=True, rngs=nnx.Rngs(0))
            >>> attention.init_cache((2, 100, 64))
            >>> attention(jnp.ones((2, 1, 64))).shape
            (2, 1, 64)
        """
        self.cache = nnx.data(new_cache(input_shape, self.num_kv_heads, self.head_dim, dtype))
