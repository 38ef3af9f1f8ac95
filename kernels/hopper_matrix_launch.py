"""Host side of a bias or mask with a number for each pair, for the Hopper forward kernel."""

import jax.numpy as jnp
import jax_triton
from jax import Array
from triton.experimental.gluon import language as gl

from sigjax.kernels.hopper_matrix import MASK_CODES
from sigjax.kernels.hopper_tiles import ALL_SEQUENCES
from sigjax.kernels.tiles import ForwardTile
from sigjax.operands import Operands

# Bytes of keys and values that programs at work at the same time may read again and again: about a
# third of the L2 cache of an H100. The rest is for what streams past.
_CACHED = 16 * 2**20


def matrix_of(operands: Operands) -> Array | None:
    """The bias, or the mask in MASK_CODES, [B or 1, N or 1, T, S]; None of none."""
    if operands.mask is None:
        return operands.bias
    odd = jnp.arange(operands.mask.shape[3]) % 2 == 1
    takes_part, excluded = (
        jnp.where(odd, *codes[::-1]).astype(jnp.int16) for codes in zip(*MASK_CODES, strict=True)
    )
    return jnp.where(operands.mask, takes_part, excluded)


def matrix_view(operands: Operands, tile: ForwardTile) -> jax_triton.TensorDescriptor | None:
    """The matrices one after the other, [matrices, T, S], in a consumer's tiles."""
    matrix = matrix_of(operands)
    if matrix is None:
        return None
    sequences, heads, length, keys = matrix.shape
    shape = (sequences * heads, length, keys)
    block = (1, tile.block_q, tile.block_k)
    # The layout asks for the size of an element alone.
    layout = gl.NVMMASharedLayout.get_default_for(list(block), gl.float16)
    return jax_triton.TensorDescriptor(
        matrix.reshape(shape), shape, (length * keys, keys, 1), block, layout
    )


def axes_of_matrix(operands: Operands) -> tuple[bool, bool]:
    """Whether there is a matrix for each sequence, and for each head."""
    matrix = operands.bias if operands.mask is None else operands.mask
    if matrix is None:
        return False, False
    return matrix.shape[0] > 1, matrix.shape[1] > 1


def sharers(operands: Operands) -> int:
    """Which programs share a tile of the matrix and so run at the same time: see tile_of.

    Of heads as many as leave their keys and values in the cache, which other tiles read.
    """
    if operands.bias is None and operands.mask is None:
        return 0
    batch, _, heads, head_size = operands.query.shape
    keys, kv_heads = operands.key.shape[1:3]
    of_sequence, of_head = axes_of_matrix(operands)
    if not of_head and heads > 1:
        head_bytes = 2 * keys * head_size * operands.key.dtype.itemsize * kv_heads // heads
        most = max(_CACHED // max(head_bytes, 1), 1)
        return max(count for count in range(1, heads + 1) if heads % count == 0 and count <= most)
    has_lengths = operands.query_lengths is not None or operands.key_lengths is not None
    if not of_sequence and batch > 1 and not has_lengths:
        return ALL_SEQUENCES.value
    return 0
