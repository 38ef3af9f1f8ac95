"""The public op: documents the contract and picks the implementation."""

from typing import Literal

from jax import Array, lax
from jax.typing import ArrayLike

from sigjax import vjp
from sigjax.checks import check, check_implementation
from sigjax.choice import choose


def sigmoid_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    sigmoid_bias: ArrayLike | None = None,
    key_bias: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    deterministic: bool = False,
    precision: Literal["highest", "high", "default"] | lax.Precision | None = None,
    fast_sigmoid: bool = False,
    implementation: Literal["triton", "xla"] | None = None,
) -> Array:
    """Sigmoid attention: ``sigmoid(query keyᵀ · scale + biases) value``.

    Takes the arguments of ``jax.nn.dot_product_attention``, so that one can be
    swapped for the other. Each weight depends on its own query and key alone;
    with the default bias, minus the logarithm of the number of keys, the weights
    of a row add up to about one, as in https://arxiv.org/abs/2409.04431.

    B batch, T query length, S key length, N query heads, K key and value heads
    (N a multiple of K), H head size.

    Args:
        query: [B, T, N, H] or [T, N, H]; bfloat16, float16, float32 (float64 in "xla").
        key: [B, S, K, H] or [S, K, H], dtype of query.
        value: shape and dtype of key.
        bias: added to the logits; floating, broadcastable to [B, N, T, S]. Differentiable.
        mask: bool, broadcastable to [B, N, T, S]; a pair takes part where it is True.
        scale: factor of the logits, a Python number; None is 1/sqrt(H).
        sigmoid_bias: added to every logit. None is -log(number of valid keys) per
            sequence, of the query's own segment where there are segments; else a float or
            an array that broadcasts to [B, N]: [N] is one bias per head. Differentiable.
        key_bias: [B, S], added to the logits of each key; floating. Differentiable.
        is_causal: query i sees key j only where j <= i.
        query_seq_lengths: [B] int32; rows at or past it are exactly 0 and pass no gradient.
        key_value_seq_lengths: [B] int32; keys at or past it contribute nothing,
            whatever they hold, NaN and inf included. (On a Hopper GPU the row of a query with an
            infinite element may be NaN: it meets zeros there.)
        local_window_size: int or (left, right): query i sees key j only where
            i - left <= j <= i + right.
        query_segment_ids: [B, T] int32: several sequences packed into a row, numbered from 1
            on. A query sees the keys with its own number; 0 and below is padding, like rows
            past a length. Positions (is_causal, local_window_size) are those in the row.
        key_value_segment_ids: [B, S] int32, given where query_segment_ids is.
        deterministic: the gradients have the same bits in every run. Otherwise query gradients
            may differ in their last bits on a Hopper GPU, whose faster kernel adds their parts
            up in any order. Outputs always have the same bits.
        precision: of products of float32: None and "highest" are exact; "high" takes three
            products of the tensor cores for each, "default" one, with fractions of 10 bits; the
            names are those of ``jax.lax.Precision``. Products of other dtypes are exact.
        fast_sigmoid: lets the Hopper forward kernel (bfloat16 and float16) compute weights by the
            hardware's tanh: single weights are then off by up to 5.3 % (0.85 % rms) at 16,384
            keys. NaN stays NaN and masked pairs still get exactly 0. Everything else, gradients
            included, stays exact and ignores it.
        implementation: "triton", fused kernels for NVIDIA GPUs from sm_80 on; "xla",
            memory-linear and for every backend; None is "triton" where it can serve.

    Returns:
        Shape and dtype of query. A row without any key is 0, never NaN. It depends
        on its own sequence alone, in any bucket and beside any neighbours: the same
        bits in "triton", the same up to rounding in "xla".

    Raises:
        ValueError: an argument's shape or value is wrong.
        TypeError: an argument's dtype or kind is wrong.
        NotImplementedError: the named implementation cannot serve the call.

    Example:
        >>> import jax, jax.numpy as jnp, sigjax
        >>> x = jax.random.normal(jax.random.key(0), (2, 300, 4, 64), jnp.bfloat16)
        >>> lengths = jnp.array([300, 211], jnp.int32)
        >>> y = sigjax.sigmoid_attention(
        ...     x, x, x, query_seq_lengths=lengths, key_value_seq_lengths=lengths
        ... )
        >>> y.shape, bool((y[1, 211:] == 0).all())
        ((2, 300, 4, 64), True)
    """
    check_implementation(implementation)
    operands, settings = check(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        sigmoid_bias=sigmoid_bias,
        key_bias=key_bias,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        deterministic=deterministic,
        precision=precision,
        fast_sigmoid=fast_sigmoid,
    )
    output = vjp.attention(choose(implementation, operands, settings), settings, operands)
    return output.reshape(getattr(query, "shape", output.shape))
