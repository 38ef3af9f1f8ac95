"""The "xla" implementation: the definition, one block of keys at a time.

Nothing is normalised over the keys, so blocks simply add up: memory grows with
T + S, not with T x S. The backward pass recomputes each block's weights.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from sigjax import reference
from sigjax.checks import compute_dtype
from sigjax.operands import Gradients, Operands, Settings, vary, varying_axes

# Elements of one block's logits over all batches, heads and queries: 128 MB in float32.
BLOCK_ELEMENTS = 2**25
MIN_BLOCK, MAX_BLOCK = 64, 1024


class KeyBlock(NamedTuple):
    """What one step of the scan reads: j keys of every sequence."""

    positions: Array  # [j] int32
    valid: Array  # [B, j] bool
    key: Array  # [B, j, K, H]
    value: Array  # [B, j, K, H]
    bias: Array | None  # [B|1, N|1, T|1, j|1]
    mask: Array | None  # [B|1, N|1, T|1, j|1]
    key_bias: Array | None  # [B, j]
    segments: Array | None  # [B, j]


# Jitted here, so that a call outside jit does not compile its scan anew.
@partial(jax.jit, static_argnames="settings")
def forward(operands: Operands, settings: Settings) -> Array:
    """The output, [B, T, N, H] in query's dtype, or the one in settings."""
    query, blocks = _prepare(operands)
    context = _Context(operands, settings, query)

    def step(total: Array, block: KeyBlock) -> tuple[Array, None]:
        weights = context.weights(block).astype(query.dtype)
        return total + _einsum("bkgtj,bjkh->btkgh", weights, block.value, settings), None

    total = _zeros(query.shape, compute_dtype(query.dtype), query)
    total, _ = lax.scan(step, total, blocks)
    output = total.astype(settings.result_dtype or query.dtype).reshape(operands.query.shape)
    return jnp.where(reference.valid_queries(operands)[:, :, None, None], output, 0)


@partial(jax.jit, static_argnames="settings")
def backward(operands: Operands, settings: Settings, output_gradient: Array) -> Gradients:
    """The gradients of every floating operand, in its own dtype, or the one in settings."""
    query, blocks = _prepare(operands)
    context = _Context(operands, settings, query)
    rows = reference.valid_queries(operands)[:, :, None, None]
    cotangent = jnp.where(rows, output_gradient, 0).reshape(query.shape)
    wide = compute_dtype(query.dtype)

    # Checkpointed for second derivatives: their memory stays linear too.
    @partial(jax.checkpoint, prevent_cse=False)
    def step(carry: tuple[Array, Array, Array | None], block: KeyBlock) -> tuple:
        query_sum, head_sum, bias_sum = carry
        weights = context.weights(block)
        weight_gradient = _einsum("btkgh,bjkh->bkgtj", cotangent, block.value, settings)
        # sigmoid' = w (1 - w); outside the pairs w is 0, but its neighbour may be inf or NaN.
        logit_gradient = jnp.where(
            context.pairs(block), weights * (1 - weights) * weight_gradient, 0
        )
        value_gradient = _einsum(
            "bkgtj,btkgh->bjkh", weights.astype(query.dtype), cotangent, settings
        )
        rounded = _as_matrix_operand(logit_gradient, query.dtype)
        key_gradient = settings.scale * _einsum("bkgtj,btkgh->bjkh", rounded, query, settings)
        query_sum = query_sum + _einsum("bkgtj,bjkh->btkgh", rounded, block.key, settings)
        head_sum = head_sum + logit_gradient.sum((3, 4))
        flat = logit_gradient.reshape(context.logits_shape(block))
        bias_sum, bias_part = _bias_gradient(operands.bias, bias_sum, flat)
        key_bias_part = flat.sum((1, 2)) if operands.key_bias is not None else None
        outputs = (key_gradient, value_gradient, bias_part, key_bias_part)
        return (query_sum, head_sum, bias_sum), outputs

    start = (
        _zeros(query.shape, wide, query),
        _zeros((query.shape[0], *query.shape[2:4]), wide, query),
        _bias_start(operands.bias, wide),
    )
    (query_sum, head_sum, bias_sum), parts = lax.scan(step, start, blocks)
    key_parts, value_parts, bias_parts, key_bias_parts = parts
    query_gradient = (settings.scale * query_sum).reshape(operands.query.shape)
    keys = operands.key.shape[1]
    if operands.bias is not None and bias_sum is None:
        bias_sum = _join(bias_parts, 3, keys)
    valid = reference.valid_keys(operands)[:, :, None, None]
    sums = Gradients(
        query=jnp.where(rows, query_gradient, 0),
        key=jnp.where(valid, _join(key_parts, 1, keys), 0),
        value=jnp.where(valid, _join(value_parts, 1, keys), 0),
        bias=bias_sum,
        sigmoid_bias=None
        if operands.sigmoid_bias is None
        else head_sum.reshape(operands.sigmoid_bias.shape),
        key_bias=None if operands.key_bias is None else _join(key_bias_parts, 1, keys),
    )
    owners = operands.query, operands.key, operands.value, *_biases(operands)
    return Gradients._make(
        None if x is None or owner is None else x.astype(settings.result_dtype or owner.dtype)
        for x, owner in zip(sums, owners, strict=True)
    )


def block_size(batch: int, heads: int, query_length: int, key_length: int) -> int:
    """Keys per step: a power of two that bounds a block's logits to BLOCK_ELEMENTS."""
    rows = max(batch * heads * query_length, 1)
    size = MAX_BLOCK
    while size > MIN_BLOCK and (size * rows > BLOCK_ELEMENTS or size // 2 >= key_length):
        size //= 2
    return size


class _Context:
    """What every block of one call shares."""

    def __init__(self, operands: Operands, settings: Settings, query: Array) -> None:
        self._settings, self._query = settings, query
        self._dtype = compute_dtype(query.dtype)
        self._rows = reference.valid_queries(operands)
        self._segments = operands.query_segments
        row_bias = reference.row_bias(operands, self._dtype)
        self._row_bias = self._grouped(row_bias[..., None])

    def logits_shape(self, block: KeyBlock) -> tuple[int, int, int, int]:
        """(B, N, T, j)."""
        batch, length, kv_heads, groups, _ = self._query.shape
        return batch, kv_heads * groups, length, block.positions.shape[0]

    def pairs(self, block: KeyBlock) -> Array:
        """Which pairs of this block take part: bool, broadcastable to [B, K, G, T, j]."""
        allowed = self._rows[:, :, None] & block.valid[:, None, :]
        if self._segments is not None and block.segments is not None:
            allowed = allowed & (self._segments[:, :, None] == block.segments[:, None, :])
        allowed = allowed[:, None, None]
        query_positions = jnp.arange(self._rows.shape[1])[None, None, None, :, None]
        key_positions = block.positions[None, None, None, None, :]
        allowed = allowed & reference.band(query_positions, key_positions, self._settings)
        return allowed if block.mask is None else allowed & self._grouped(block.mask)

    def weights(self, block: KeyBlock) -> Array:
        """[B, K, G, T, j] in the compute dtype."""
        logits = _einsum("btkgh,bjkh->bkgtj", self._query, block.key, self._settings)
        logits = logits * jnp.asarray(self._settings.scale, self._dtype) + self._row_bias
        if block.key_bias is not None:
            logits = logits + block.key_bias.astype(self._dtype)[:, None, None, None, :]
        if block.bias is not None:
            logits = logits + self._grouped(block.bias.astype(self._dtype))
        return jax.nn.sigmoid(jnp.where(self.pairs(block), logits, -jnp.inf))

    def _grouped(self, x: Array) -> Array:
        """[B, N, T, j] or broadcastable -> [B, K, G, T, j] or broadcastable."""
        if x.shape[1] == 1:
            return x[:, :, None]
        return x.reshape(x.shape[0], *self._query.shape[2:4], *x.shape[2:])


def _prepare(operands: Operands) -> tuple[Array, KeyBlock]:
    """Query as [B, T, K, G, H] and the keys cut into blocks along a leading axis."""
    query, key, value = reference.masked_inputs(operands)
    batch, length, heads, head_size = query.shape
    keys, kv_heads = key.shape[1], key.shape[2]
    size = block_size(batch, heads, length, keys)
    count = -(-keys // size)
    positions = jnp.arange(count * size, dtype=jnp.int32).reshape(count, size)

    def cut(x: Array, axis: int) -> Array:
        if x.shape[axis] == 1 and keys != 1:  # a broadcast axis serves every block
            return jnp.broadcast_to(x[None], (count, *x.shape))
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, count * size - keys)
        x = jnp.pad(x, padding).reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    blocks = KeyBlock(
        positions=positions,
        valid=cut(reference.valid_keys(operands), 1),
        key=cut(key, 1),
        value=cut(value, 1),
        bias=None if operands.bias is None else cut(operands.bias, 3),
        mask=None if operands.mask is None else cut(operands.mask, 3),
        key_bias=None if operands.key_bias is None else cut(operands.key_bias, 1),
        segments=None if operands.key_segments is None else cut(operands.key_segments, 1),
    )
    return query.reshape(batch, length, kv_heads, heads // kv_heads, head_size), blocks


def _zeros(shape: tuple[int, ...], dtype: DTypeLike, like: Array) -> Array:
    """Where a sum begins: within shard_map it varies over the axes that like varies over."""
    return vary(jnp.zeros(shape, dtype), varying_axes(like))


def _einsum(subscripts: str, x: Array, y: Array, settings: Settings) -> Array:
    dtype, precision = compute_dtype(y.dtype), settings.precision
    if x.dtype != y.dtype:
        x, y, precision = x.astype(dtype), y.astype(dtype), "highest"
    if x.dtype.itemsize == 2:
        precision = None  # exact in any case
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=dtype)


def _as_matrix_operand(x: Array, dtype: jnp.dtype) -> Array:
    """Rounds to bfloat16, but leaves float16 alone: its range would lose gradients near 1/n."""
    return x.astype(dtype) if dtype == jnp.bfloat16 else x


def _bias_start(bias: Array | None, dtype: jnp.dtype) -> Array | None:
    """The running sum of a bias without a key axis; a bias with one is summed per block."""
    if bias is None or bias.shape[3] != 1:
        return None
    return _zeros(bias.shape, dtype, bias)


def _biases(operands: Operands) -> tuple[Array | None, Array | None, Array | None]:
    return operands.bias, operands.sigmoid_bias, operands.key_bias


def _bias_gradient(
    bias: Array | None, total: Array | None, logit_gradient: Array
) -> tuple[Array | None, Array | None]:
    if bias is None:
        return None, None
    axes = tuple(axis for axis in range(4) if bias.shape[axis] == 1)
    part = logit_gradient.sum(axes, keepdims=True)
    return (None, part) if total is None else (total + part, None)


def _join(blocks: Array, axis: int, length: int) -> Array:
    """Undoes the cut of _prepare: [count, ..., size, ...] -> [..., length, ...]."""
    joined = jnp.moveaxis(blocks, 0, axis)
    shape = joined.shape
    joined = joined.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
    return lax.slice_in_dim(joined, 0, length, axis=axis)
