"""A bias and a mask of single pairs in the Hopper backward kernel (Gluon device code).

The tiles of a bias ride with the queries: the ring's barriers tell of both. A mask's bits are few
enough to be loaded from global memory, a step ahead of their use.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from sigjax.kernels.hopper_backward_pairs import PROGRAM_KEYS, head_and_query
from sigjax.kernels.hopper_biases import SIDE_KEYS
from sigjax.kernels.hopper_math import accumulator_layout, copy_rows, fill
from sigjax.kernels.hopper_weights import as_operand, weights_float32
from sigjax.kernels.tile_math import LOG2_E

WORD = gl.constexpr(32)  # queries whose bits are in one number of a mask

# Both elements of a register: left to itself the compiler takes three instructions, not two.
_TO_FLOAT32 = gl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")
# And here it collects all elements' bits in one register, to take them out of it again.
_WHERE_BIT = gl.constexpr(
    "{ .reg .b32 m; .reg .pred p; and.b32 m, $3, $4; setp.ne.u32 p, m, 0; selp.f32 $0, $1, $2, p; }"
)
_ZERO_UNLESS_HIGH = gl.constexpr("{ .reg .b32 m; prmt.b32 m, $2, $2, $4; and.b32 $0, $1, m; }")


class Matrix(NamedTuple):
    """What is given of pairs, a bias or a mask or both; None is what is not."""

    bias_desc: Any
    bias_tiles: Any  # in shared memory, [stages * sides, BLOCK_Q, SIDE_KEYS]
    mask_ptr: Any


class Allowed(NamedTuple):
    """A mask's bits of a side's keys, [SIDE_KEYS] each: a number has WORD queries of a block."""

    first: Any
    second: Any


@gluon.jit
def matrix_at(batch, head, heads: gl.constexpr, AXES: gl.constexpr):
    """Which of the matrices [B or 1, N or 1] a head has; AXES tells which axes there are."""
    index = batch * 0
    if AXES[0]:
        index += batch
    if AXES[1]:
        if AXES[0]:
            index *= heads
        index += head
    return index


@gluon.jit
def fill_with_biases(descs, tiles, matrix, step, sequences, work, head, start, options):
    """Starts the copies of a step's queries, biases of both sides and output gradients."""
    BLOCK_Q: gl.constexpr = options.BLOCK_Q
    H: gl.constexpr = options.H
    IS_RAGGED: gl.constexpr = sequences.order_ptr is not None
    T = sequences.T
    queries, bias_desc = tiles.query_ring, matrix.bias_desc
    queries.wait_free(step)
    full = queries.full.index(step % queries.stages)
    mbarrier.expect(full, descs.query.nbytes_per_cta + 2 * bias_desc.nbytes_per_cta)
    copy_rows(
        descs.query, work.batch, start, work.query_length, T, head * H, full, queries.buffer(step),
        BLOCK_Q, H, IS_RAGGED,
    )  # fmt: skip
    index = matrix_at(work.batch, head, options.N, options.BIAS_AXES)
    for side in gl.static_range(2):
        tma.async_load(
            bias_desc, [index, start, work.first + side * SIDE_KEYS], full,
            bias_buffer(matrix, queries, step, side).reshape([1, BLOCK_Q, SIDE_KEYS]),
        )  # fmt: skip
    fill(
        tiles.gradient_ring, step, descs.output_gradient, work.batch, start, work.query_length, T,
        head * H, BLOCK_Q, H, IS_RAGGED,
    )  # fmt: skip


@gluon.jit
def bias_buffer(matrix, queries, step, SIDE: gl.constexpr):
    """A side's tile [BLOCK_Q, SIDE_KEYS] of the bias, of the queries of a step."""
    return matrix.bias_tiles.index(step % queries.stages * 2 + SIDE)


@gluon.jit
def bias_of(matrix, queries, step, sequences, work, row, start, options, SIDE: gl.constexpr):
    """What is added to a step's logits, [SIDE_KEYS, BLOCK_Q], 0 past the lengths; 0 without bias.

    What lies past the lengths may be NaN, and reach other rows and sums by way of the weights.
    """
    if matrix.bias_desc is None:
        return 0
    else:
        BLOCK_Q: gl.constexpr = options.BLOCK_Q
        layout: gl.constexpr = accumulator_layout(BLOCK_Q)
        query_length, key_length = work.query_length, work.key_length
        # The fence of hopper_exchange.hand_over comes before TMA may overwrite what is read here.
        bias = bias_buffer(matrix, queries, step, SIDE).permute((1, 0)).load(layout)
        if sequences.order_ptr is not None:
            if (start + BLOCK_Q > query_length) | (row + SIDE_KEYS > key_length):
                keys = gl.arange(0, SIDE_KEYS, layout=gl.SliceLayout(1, layout))
                columns = gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(0, layout))
                inside = (keys < key_length - row)[:, None]
                inside = inside & (columns < query_length - start)[None, :]
                bias = gl.where(inside, bias, gl.zeros_like(bias))
        return bias


@gluon.jit
def weights_of_pairs(t, bias, allowed, matrix):
    """Weights of t = -log2(exp(logit)) without the bias; bias is bias_of, allowed is allowed_of.

    With a mask those of excluded pairs are as good as 0, see operand_of and without_masked.
    """
    if matrix.bias_desc is not None:
        t = gl.fma(as_float32(bias), -LOG2_E, t)
    if matrix.mask_ptr is None:
        return weights_float32(t)
    else:
        # Here and not on the weights: those of two keys are computed together, a NaN is in both.
        return weights_float32(where_allowed(t, float("inf"), allowed, matrix))


@gluon.jit
def operand_of(weights, dtype: gl.constexpr, allowed, matrix):
    """Weights rounded to a matrix operand, exactly 0 where the mask excludes a pair."""
    return zero_unless_allowed(as_operand(weights, dtype), allowed, matrix)


@gluon.jit
def without_masked(gradient, allowed, matrix, outputs):
    """The logits' gradients, 0 where the mask excludes a pair if somebody sums them up.

    Nobody else needs it: what goes to the products is for zero_unless_allowed.
    """
    if outputs.logit_sums_ptr is None:
        return gradient
    else:
        return where_allowed(gradient, 0.0, allowed, matrix)


@gluon.jit
def as_float32(x):
    """Elements of two bytes in float32."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            _TO_FLOAT32, "=r,=r,r", [x], dtype=gl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(gl.float32)


@gluon.jit
def allowed_of(matrix, sequences, work, head, row, start, options):
    """The bits of a side's keys and a block's queries; 0 without a mask."""
    if matrix.mask_ptr is None:
        return 0
    else:
        BLOCK_Q: gl.constexpr = options.BLOCK_Q
        layout: gl.constexpr = gl.SliceLayout(1, accumulator_layout(BLOCK_Q))
        blocks = gl.cdiv(sequences.T, BLOCK_Q)
        keys = gl.cdiv(sequences.S, PROGRAM_KEYS) * PROGRAM_KEYS
        index = matrix_at(work.batch, head, options.N, options.MASK_AXES)
        line = (index * blocks + start // BLOCK_Q).to(gl.int64)
        pointers = matrix.mask_ptr + line * (BLOCK_Q // WORD * keys) + row
        pointers += gl.arange(0, SIDE_KEYS, layout=layout)
        return Allowed(gl.load(pointers), gl.load(pointers + keys))


@gluon.jit
def allowed_at(matrix, sequences, work, row, step, options):
    """allowed_of a step; of one that does not come the last's, or the first's."""
    if matrix.mask_ptr is None:
        return 0
    else:
        step = gl.minimum(step, gl.maximum(work.steps - 1, 0))
        head, start = head_and_query(step, work, options)
        return allowed_of(matrix, sequences, work, head, row, start, options)


@gluon.jit
def bits_of_thread(allowed, layout: gl.constexpr, BLOCK_Q: gl.constexpr):
    """Words [SIDE_KEYS, BLOCK_Q], with each element's bit in a place that the compiler knows.

    Query 16 h + 8 j + 2 c + i of a word has bit 8 (2 j + i) + 7 - 2 c - h. A thread has the queries
    of one c: shifted once, they are in the lowest two bits of the bytes.
    """
    columns = gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(0, layout))[None, :]
    lane = 6 - (columns & 6)
    return gl.where(columns < WORD, allowed.first[:, None] >> lane, allowed.second[:, None] >> lane)


@gluon.jit
def where_allowed(x, excluded, allowed, matrix):
    """X [SIDE_KEYS, BLOCK_Q] float32 with a number where the mask excludes a pair."""
    if matrix.mask_ptr is None:
        return x
    else:
        words = bits_of_thread(allowed, x.type.layout, x.shape[1])
        columns = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, x.type.layout))[None, :]
        bit = 1 << ((columns & 1) * 8 + (columns & 8) * 2 + 1 - (columns >> 4 & 1))
        return where_bit(x, excluded + gl.zeros_like(x), words, bit + gl.zeros_like(words))


@gluon.jit
def zero_unless_allowed(x, allowed, matrix):
    """An operand [SIDE_KEYS, BLOCK_Q] of two bytes, exactly 0 where the mask excludes a pair."""
    if matrix.mask_ptr is None:
        return x
    else:
        words = bits_of_thread(allowed, x.type.layout, x.shape[1])
        columns = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, x.type.layout))[None, :]
        words = (words << 6) << (columns >> 4 & 1)
        chosen = gl.where((columns & 8) == 0, 0x9988, 0xBBAA) + gl.zeros_like(words)
        return zero_unless_high(x, words, chosen)


@gluon.jit
def where_bit(x, excluded, words, bit):
    """X where a word has a bit, else excluded, all of one shape."""
    return gl.inline_asm_elementwise(
        _WHERE_BIT, "=f,f,f,r,r", [x, excluded, words, bit], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def zero_unless_high(x, words, chosen):
    """Neighbours of two bytes, each 0 where the highest bit of a byte of their word is not set.

    chosen is for prmt: 0x9988 takes bytes 0 and 1, 0xBBAA 2 and 3.
    """
    return gl.inline_asm_elementwise(
        _ZERO_UNLESS_HIGH, "=r,r,r,r,r,r", [x, words, chosen], dtype=x.dtype, is_pure=True, pack=2
    )
