"""A bias or mask with a number for each pair (Gluon device code of the Hopper forward kernel).

The producer copies a tile [BLOCK_Q, BLOCK_K] of it for each consumer and key block. A bias is of
two bytes. A mask is int16, and what it holds depends on its column: MASK_CODES.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from sigjax.kernels.hopper_math import accumulator_layout, new_ring
from sigjax.kernels.tile_math import LOG2_E

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


_BIAS = gl.constexpr(_bias_ptx("0fBFB8AA3B"))  # -log2(e)
_BIAS_TANH = gl.constexpr(_bias_ptx("0f3F000000"))  # 0.5


@gluon.jit
def new_matrix_ring(
    dtype: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    """A ring in which each consumer has STAGES of its own, with barriers of their own."""
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return new_ring(
        dtype, STAGES * CONSUMERS, BLOCK_Q, BLOCK_K, layout, STAGES * CONSUMERS, READERS=1
    )


@gluon.jit
def place_of(ring, count, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """(buffer and barriers, parity) of a consumer's count-th key block.

    Counted by key blocks and not by uses, as keys and values are: the compiler divides once.
    """
    STAGES: gl.constexpr = ring.stages // CONSUMERS
    return count % STAGES * CONSUMERS + CONSUMER, (count // STAGES) & 1


@gluon.jit
def fill_pairs(
    ring, count, desc, batch, head, start, first, N: gl.constexpr, BLOCK_Q: gl.constexpr,
    CONSUMERS: gl.constexpr, AXES: gl.constexpr,
):  # fmt: skip
    """Starts the copies of a tile for each consumer, once its buffer is free.

    AXES tells whether the array [matrices, T, S] has one for each sequence and for each head. What
    lies past T and S arrives as zeros, what lies past the lengths as it is.
    """
    matrix = 0
    if AXES[0]:
        matrix = batch
    if AXES[1]:
        matrix = matrix * N + head
    for i in gl.static_range(CONSUMERS):
        place, parity = place_of(ring, count, i, CONSUMERS)
        mbarrier.wait(ring.free.index(place), parity ^ 1)
        full = ring.full.index(place)
        mbarrier.expect(full, desc.nbytes_per_cta)
        buffer = ring.buffers.index(place).reshape([1, BLOCK_Q, ring.buffers.shape[2]])
        tma.async_load(desc, [matrix, start + i * BLOCK_Q, first], full, buffer)


@gluon.jit
def peek_pairs(ring, count, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """A consumer's tile of its count-th key block, where an accumulator has it; None of no ring."""
    if ring is None:
        return None
    else:
        place, parity = place_of(ring, count, CONSUMER, CONSUMERS)
        mbarrier.wait(ring.full.index(place), parity)
        return ring.buffers.index(place).load(accumulator_layout(ring.buffers.shape[2]))


@gluon.jit
def take_pairs(ring, count, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """As peek_pairs, and lets the buffer go."""
    if ring is None:
        return None
    else:
        pairs = peek_pairs(ring, count, CONSUMER, CONSUMERS)
        place, parity = place_of(ring, count, CONSUMER, CONSUMERS)
        mbarrier.arrive(ring.free.index(place), count=1)
        return pairs


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
