"""A bias or mask with a number for each pair (Gluon device code of the Hopper forward kernel).

The producer copies a tile [BLOCK_Q, BLOCK_K] of it for each consumer and key block. A bias is of
two bytes. A mask is int16, and what it holds depends on its column: MASK_CODES.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from sigjax.kernels.hopper_math import accumulator_layout, begun_with_keys, new_ring, row_layout
from sigjax.kernels.tile_math import LOG2_E

# Where a bias or mask of pairs comes in. IN_LOGITS: it is added to logits, or excludes them.
# IN_SCORES: the product of the scores begins with a bias over the scale; IN_SCALED_SCORES: with a
# bias as it is, without a multiplication a pair, and queries are scaled before.
IN_LOGITS = gl.constexpr(0)
IN_SCORES = gl.constexpr(1)
IN_SCALED_SCORES = gl.constexpr(2)
# What a mask holds where a pair takes part and where it does not, in even and in odd columns. An
# even and an odd column share a register, and each code works there without being unpacked: the
# odd one, above, is a NaN or 3.4e38 whatever lies below it; the even one chooses bytes for prmt,
# which looks at nothing above it.
MASK_CODES = ((0x3210, 0x7654), (0x7FFF, 0x7F7F))
# Logits t become inf where a pair takes no part; for TANH, half the logits, -inf.
_EXCLUDE = gl.constexpr("prmt.b32 $0, $2, 0x7F800000, $4; max.f32 $1, $3, $4;")
_EXCLUDE_TANH = gl.constexpr(
    "{ .reg .f32 m; neg.f32 m, $4; prmt.b32 $0, $2, 0xFF800000, $4; min.f32 $1, $3, m; }"
)


def _bias_ptx(factor: str) -> str:
    """PTX that adds bfloat16 biases times a factor to two elements, unpacked by one op each."""
    return f"""{{ .reg .b32 even, odd; shl.b32 even, $4, 16; and.b32 odd, $4, 0xFFFF0000;
      fma.rn.f32 $0, even, {factor}, $2; fma.rn.f32 $1, odd, {factor}, $3; }}"""


_UNPACK = gl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;")
_BIAS = gl.constexpr(_bias_ptx("0fBFB8AA3B"))  # -log2(e)
_BIAS_TANH = gl.constexpr(_bias_ptx("0f3F000000"))  # 0.5


@gluon.aggregate
class MatrixRing:
    """Tiles of a bias or mask, each consumer's own, see hopper_math.Ring."""

    buffers: gl.shared_memory_descriptor  # [stages, BLOCK_Q, BLOCK_K]
    full: gl.shared_memory_descriptor  # [stages, 1] mbarriers
    free: gl.shared_memory_descriptor  # [stages, 1] mbarriers
    stages: gl.constexpr
    place: gl.constexpr  # where they come in


class Initial(NamedTuple):
    """What products of the scores begin with, besides a matrix of pairs."""

    factor: Any  # of a bias IN_SCORES
    score_bias_ptr: Any  # a bias per key over the scale, or None
    key_row: Any  # of which row
    S: Any


@gluon.jit
def new_matrix_ring(
    dtype: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, PLACE: gl.constexpr,
):  # fmt: skip
    """A ring in which each consumer has STAGES of its own, with barriers of their own."""
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ring = new_ring(
        dtype, STAGES * CONSUMERS, BLOCK_Q, BLOCK_K, layout, STAGES * CONSUMERS, READERS=1
    )
    return MatrixRing(ring.buffers, ring.full, ring.free, ring.stages, PLACE)


@gluon.jit
def place_of(ring, count, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """(buffer and barriers, parity) of a consumer's count-th key block.

    Counted by key blocks and not by uses, as keys and values are: the compiler divides once.
    """
    STAGES: gl.constexpr = ring.stages // CONSUMERS
    return count % STAGES * CONSUMERS + CONSUMER, (count // STAGES) & 1


@gluon.jit
def fill_pairs(ring, count, desc, tile, first, options):
    """Starts the copies of a tile for each consumer, once its buffer is free.

    MATRIX_AXES tells whether the array [matrices, T, S] has one for each sequence and for each
    head. What lies past T and S arrives as zeros, what lies past the lengths as it is.
    """
    BLOCK_Q: gl.constexpr = options.BLOCK_Q
    matrix = 0
    if options.MATRIX_AXES[0]:
        matrix = tile.batch
    if options.MATRIX_AXES[1]:
        matrix = matrix * options.N + tile.head
    for i in gl.static_range(options.CONSUMERS):
        place, parity = place_of(ring, count, i, options.CONSUMERS)
        mbarrier.wait(ring.free.index(place), parity ^ 1)
        full = ring.full.index(place)
        mbarrier.expect(full, desc.nbytes_per_cta)
        buffer = ring.buffers.index(place).reshape([1, BLOCK_Q, ring.buffers.shape[2]])
        tma.async_load(desc, [matrix, tile.start + i * BLOCK_Q, first], full, buffer)


@gluon.jit
def peek_pairs(matrix, count, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """A consumer's tile of its count-th key block, where an accumulator has it.

    None where there is none, or scores have begun with it.
    """
    if matrix is None or matrix.place >= IN_SCORES:
        return None
    else:
        return peek_tile(matrix, count, CONSUMER, CONSUMERS)


@gluon.jit
def release_pairs(matrix, count, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """Lets go what peek_pairs read."""
    if matrix is not None and matrix.place < IN_SCORES:
        release_tile(matrix, count, CONSUMER, CONSUMERS)


@gluon.jit
def release_initial(matrix, count, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """Lets go what initial_scores read."""
    if matrix is not None and matrix.place >= IN_SCORES:
        release_tile(matrix, count, CONSUMER, CONSUMERS)


@gluon.jit
def peek_tile(ring, count, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """A tile in the registers of an accumulator, once it has come."""
    place, parity = place_of(ring, count, CONSUMER, CONSUMERS)
    mbarrier.wait(ring.full.index(place), parity)
    return ring.buffers.index(place).load(accumulator_layout(ring.buffers.shape[2]))


@gluon.jit
def release_tile(ring, count, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """Lets a tile go that peek_tile read: TMA may overwrite it.

    The fence waits for reads that are on their way, which TMA's writes would overtake: with one
    stage and without it outputs are wrong on a GPU, see HOPPER.md.
    """
    fence_async_shared()
    place, parity = place_of(ring, count, CONSUMER, CONSUMERS)
    mbarrier.arrive(ring.free.index(place), count=1)


@gluon.jit
def bias_factor(matrix, scale):
    """What a bias IN_SCORES is multiplied by."""
    if matrix is not None and matrix.place == IN_SCORES:
        return 1.0 / scale
    else:
        return gl.to_tensor(1.0)


@gluon.jit
def initial_scores(
    rows, shared, count, first, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr
):  # fmt: skip
    """What a product of the scores begins with: the tile of a bias, a bias of its keys, or None.

    first is the first key of block count, the rest is as in hopper_keys.multiply. release_initial
    has to follow.
    """
    matrix, initial = shared.matrix, shared.initial
    if initial.score_bias_ptr is not None:
        BLOCK_K: gl.constexpr = shared.key_ring.buffers.shape[1]
        return begun_with_keys(
            initial.score_bias_ptr, initial.key_row, first, initial.S, rows.shape[0], BLOCK_K
        )
    elif matrix is None or matrix.place < IN_SCORES:
        return None
    else:
        bias = peek_tile(matrix, count, CONSUMER, CONSUMERS)
        if bias.dtype == gl.bfloat16:
            bias = as_float32(bias)
        else:
            bias = bias.to(gl.float32)
        return bias * initial.factor if matrix.place == IN_SCORES else bias


@gluon.jit
def scale_rows(rows, scale):
    """Rows [64, H] in shared memory times a power of two, which is exact in bfloat16.

    Triton puts a barrier of the warpgroup before the first product, which reads other warps' rows.
    """
    tile = rows.load(row_layout(rows.shape[1]))
    rows.store((tile.to(gl.float32) * scale).to(rows.dtype))
    fence_async_shared()


@gluon.jit
def as_float32(bias):
    """A bias in bfloat16 as float32, one op each."""
    return gl.inline_asm_elementwise(
        _UNPACK, "=f,=f,r", [bias], dtype=gl.float32, is_pure=True, pack=2
    )


@gluon.jit
def skip_pairs(ring, count, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """Lets a tile go unread; after it has come, or the producer would miss a phase."""
    if ring is not None:
        place, parity = place_of(ring, count, CONSUMER, CONSUMERS)
        mbarrier.wait(ring.full.index(place), parity)
        mbarrier.arrive(ring.free.index(place), count=1)


@gluon.jit
def add_pairs(t, pairs, IS_TANH: gl.constexpr):
    """T = -log2(exp(logit)) with the bias added, or inf or 3.4e38 where the mask excludes a pair.

    With IS_TANH half the logit, and the negative of these. An excluded pair's t may be NaN.
    """
    if pairs.dtype == gl.int16:
        return exclude(t, pairs, IS_TANH)
    elif pairs.dtype == gl.bfloat16:
        return add_bfloat16(t, pairs, IS_TANH)
    elif IS_TANH:
        return gl.fma(pairs.to(gl.float32), 0.5, t)
    else:
        return gl.fma(pairs.to(gl.float32), -LOG2_E, t)


@gluon.jit
def exclude(t, codes, IS_TANH: gl.constexpr):
    """As add_pairs, of a mask in MASK_CODES."""
    ptx: gl.constexpr = _EXCLUDE_TANH if IS_TANH else _EXCLUDE
    return gl.inline_asm_elementwise(
        ptx, "=&f,=&f,f,f,r", [t, codes], dtype=gl.float32, is_pure=True, pack=2
    )


@gluon.jit
def add_bfloat16(t, bias, IS_TANH: gl.constexpr):
    """As add_pairs, of a bias in bfloat16."""
    ptx: gl.constexpr = _BIAS_TANH if IS_TANH else _BIAS
    return gl.inline_asm_elementwise(
        ptx, "=&f,=&f,f,f,r", [t, bias], dtype=gl.float32, is_pure=True, pack=2
    )
