"""Host side of query_sums.py: what the Hopper backward kernel adds to, and what comes of it."""

import jax
import jax.numpy as jnp
import jax_triton
from jax import Array
from triton.experimental.gluon import language as gl

from sigjax.kernels import launch
from sigjax.kernels.query_sums import COLUMNS, ROWS, query_sums_kernel
from sigjax.kernels.tiles import BackwardTile
from sigjax.operands import Operands, Settings


def cleared(
    operands: Operands, query_lengths: Array | None, tile: BackwardTile
) -> jax_triton.TensorDescriptor:
    """Zeros [B, T, N * H] float32 up to the lengths, in the blocks in which the kernel adds."""
    head_size = operands.query.shape[3]
    sums = _call(operands, None, None, query_lengths, 1.0, jnp.float32)
    block = (1, tile.block_q, head_size if tile.helper else head_size // 2)
    return jax_triton.TensorDescriptor(
        sums,
        sums.shape,
        (sums.shape[1] * sums.shape[2], sums.shape[2], 1),
        block,
        gl.NVMMASharedLayout.get_default_for(list(block), gl.float32),
    )


def query_gradient(
    sums: Array,
    operands: Operands,
    settings: Settings,
    query_lengths: Array | None,
    range_scale: Array | None,
) -> Array:
    """The query's gradient [B, T, N, H], of sums that are not yet times the scale; 0 past a length.

    range_scale [B, K] is what the output's gradient was multiplied by, or None.
    """
    dtype = settings.result_dtype or operands.query.dtype
    gradient = _call(operands, sums, range_scale, query_lengths, settings.scale, dtype)
    return gradient.reshape(operands.query.shape)


def _call(
    operands: Operands,
    sums: Array | None,
    range_scale: Array | None,
    query_lengths: Array | None,
    scale: float,
    dtype: jax.typing.DTypeLike,
) -> Array:
    batch, length, heads, head_size = operands.query.shape
    width = heads * head_size
    blocks = -(-length // ROWS.value) * -(-width // COLUMNS.value)
    return launch.call(
        query_sums_kernel,
        (sums, range_scale, query_lengths, length, scale),
        jax.ShapeDtypeStruct((batch, length, width), dtype),
        (blocks * batch,),
        {"N": heads, "K": operands.key.shape[2], "H": head_size, "num_warps": 4}
        | launch.compiler_options(),
    )
