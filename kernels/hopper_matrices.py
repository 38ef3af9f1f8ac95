"""Host side of a bias or mask of single pairs in the Hopper kernels."""

import math
from typing import Literal

import jax.numpy as jnp
import jax_triton
from jax import Array
from triton.experimental.gluon import language as gl

from sigjax.kernels import hopper_choice
from sigjax.kernels.hopper_backward_matrix import WORD
from sigjax.kernels.hopper_backward_pairs import PROGRAM_KEYS
from sigjax.kernels.hopper_matrix import (
    IN_LOGITS,
    IN_SCALED_SCORES,
    IN_SCORES,
    MASK_CODES,
)
from sigjax.kernels.hopper_tiles import ALL_SEQUENCES
from sigjax.kernels.tiles import ForwardTile
from sigjax.operands import Operands, Settings

# Forward: bytes of keys and values that programs at work at the same time may read again and
# again: about a third of the L2 cache of an H100. The rest is for what streams past.
_CACHED = 16 * 2**20
_LARGEST_EXPONENT = 32  # of a scale by which queries are multiplied, or a bias divided
# Backward: programs that take the same tile of a bias at about the same time.
_TOGETHER = 4


def serves(direction: Literal["forward", "backward"], operands: Operands) -> bool:
    """Whether the Hopper kernel of a direction takes this mask, or bias that is not one per key."""
    bias, mask = operands.bias, operands.mask
    if operands.query_segments is not None or (bias is not None and mask is not None):
        return False
    length, keys = operands.query.shape[1], operands.key.shape[1]
    if bias is None:
        # Backward a mask comes in bits, of any shape.
        matrix = mask if direction == "forward" else None
    else:
        if bias.dtype.itemsize != 2:
            return False
        matrix = bias
    if matrix is None:
        return True
    return matrix.shape[2:] == (length, keys) and keys % hopper_choice.MATRIX_KEYS == 0


def matrix_view(x: Array, rows: int, columns: int) -> jax_triton.TensorDescriptor:
    """[B, N, T, S] of two bytes as [B * N, T, S], in blocks; zeros arrive past T and S."""
    batch, heads, length, keys = x.shape
    shape, block = (batch * heads, length, keys), (1, rows, columns)
    # The layout asks for the size of an element alone.
    layout = gl.NVMMASharedLayout.get_default_for(list(block), gl.float16)
    return jax_triton.TensorDescriptor(
        x.reshape(shape), shape, (length * keys, keys, 1), block, layout
    )


def leading_axes(x: Array | None) -> tuple[bool, bool] | None:
    """Whether an array has an axis of sequences, and one of heads, of more than 1."""
    return None if x is None else (x.shape[0] > 1, x.shape[1] > 1)


def matrix_of(operands: Operands) -> Array | None:
    """The bias, or the mask in codes, [B or 1, N or 1, T, S]; None of none."""
    if operands.mask is None:
        return operands.bias
    odd = jnp.arange(operands.mask.shape[3]) % 2 == 1
    takes_part, excluded = (
        jnp.where(odd, *codes[::-1]).astype(jnp.int16) for codes in zip(*MASK_CODES, strict=True)
    )
    return jnp.where(operands.mask, takes_part, excluded)


def place_of(operands: Operands, settings: Settings, tile: ForwardTile) -> gl.constexpr:
    """Where the bias or mask comes in: the tile's place if it may, see hopper_matrix."""
    fraction, exponent = math.frexp(settings.scale)
    divides = fraction != 0 and abs(exponent) <= _LARGEST_EXPONENT
    if tile.matrix == "scores" and operands.bias is not None and divides:
        # Queries times a power of two are exact, but for numbers that are subnormal in float16.
        exact = abs(fraction) == 0.5 and operands.query.dtype == jnp.bfloat16
        return IN_SCALED_SCORES if exact else IN_SCORES
    return IN_LOGITS


def scores_begin_with_bias_of_keys(
    operands: Operands, settings: Settings, tile: ForwardTile
) -> bool:
    """Whether scores begin with a bias per key, over the scale; operands are those without it.

    A product of H begins with it in float32: what a logit is off by is at most about H / 16 + 1
    roundings, to 2^-23, of the greatest sum on the way. With another bias, of pairs, they begin
    with that. A scale that is not above 0 divides nothing: adaptive weights count on scores of -inf
    where a weight is 0.
    """
    divides = settings.scale > 0 and abs(math.frexp(settings.scale)[1]) <= _LARGEST_EXPONENT
    return tile.key_bias != "logits" and divides and operands.bias is None


def forward_matrix(
    operands: Operands, settings: Settings, tile: ForwardTile
) -> jax_triton.TensorDescriptor | None:
    """The bias or mask as the forward kernel takes it, in a consumer's tiles."""
    matrix = matrix_of(operands)
    return None if matrix is None else matrix_view(matrix, tile.block_q, tile.block_k)


def axes_of_matrix(operands: Operands) -> tuple[bool, bool]:
    """Whether there is a matrix for each sequence, and for each head."""
    matrix = operands.bias if operands.mask is None else operands.mask
    return leading_axes(matrix) or (False, False)


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


def mask_bits(mask: Array, operands: Operands, block_q: int, block_k: int) -> Array:
    """A mask as [B or 1, N or 1, T / 32, S] int32, T and S up to multiples of the blocks.

    A word has the bits of 32 queries in the order of hopper_backward_matrix.bits_of_thread; those
    past T, and all of keys past S, are 0: such pairs take no part.
    """
    length, keys = operands.query.shape[1], operands.key.shape[1]
    leading = mask.shape[:2]
    mask = jnp.broadcast_to(mask, (*leading, length, keys))
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, -length % block_q), (0, -keys % block_k)))
    words = mask.reshape(*leading, -1, WORD.value, mask.shape[3]).astype(jnp.uint32)
    query = jnp.arange(WORD.value, dtype=jnp.uint32)
    bit = (query >> 3 & 1) * 16 + (query & 1) * 8 + 7 - (query & 6) - (query >> 4)
    words = words << jnp.broadcast_to(bit[:, None], words.shape)
    return words.sum(3, dtype=jnp.uint32).astype(jnp.int32)


def backward_matrices(
    operands: Operands, block_q: int, block_k: int
) -> tuple[jax_triton.TensorDescriptor | None, Array | None]:
    """The bias and the mask as the backward kernel takes them."""
    bias, mask = operands.bias, operands.mask
    return (
        None if bias is None else matrix_view(bias, block_q, block_k),
        None if mask is None else mask_bits(mask, operands, block_q, PROGRAM_KEYS.value),
    )


def neighbours(operands: Operands) -> tuple[int, int] | None:
    """How many sequences, and key heads, of one tile of keys are neighbours in the programs' order.

    Those that share a bias; None where none does.
    """
    if operands.bias is None:
        return None
    sequences = heads = 1
    if operands.bias.shape[0] == 1:
        sequences = math.gcd(operands.query.shape[0], _TOGETHER)
    if operands.bias.shape[1] == 1:
        heads = math.gcd(operands.key.shape[2], _TOGETHER // sequences)
    return None if sequences * heads == 1 else (sequences, heads)
