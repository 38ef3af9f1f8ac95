"""What the Hopper kernels share (Gluon device code): weights, rings of buffers, tile lookup.

Tile arithmetic is that of tile_math: logits are kept as t = -log2(exp(logit)); for the weights
TANH as half the logit.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

from sigjax.kernels.tile_math import (
    CLAMP,
    FLOAT16_WEIGHT_SCALE,
    LOG2_E,
    ONE,
    PTX_BFLOAT16,
    PTX_FLOAT16,
    pair_ptx,
)

# Row offset and length of the ragged view of a [B * S, W] array, launch.ragged_rows.
RAGGED = gl.constexpr(1 << 30)


def _column_ptx() -> str:
    """PTX for the weights of four elements of an accumulator: columns of row r and of row r + 8.

    As tile_math.pair_ptx, but what shares a reciprocal shares a column, so that a NaN does not
    reach the neighbouring column's query; and weights below 2^-62 end there, not at 0: in a
    gradient that is as good, and an instruction an element less.
    """
    pairs = "".join(
        f"min.NaN.ftz.f32 d, ${4 + i}, {CLAMP}; min.NaN.ftz.f32 e, ${6 + i}, {CLAMP};"
        "ex2.approx.ftz.f32 d, d; ex2.approx.ftz.f32 e, e;"
        f"add.ftz.f32 d, d, {ONE}; fma.rn.ftz.f32 r, d, e, d; rcp.approx.ftz.f32 r, r;"
        f"fma.rn.ftz.f32 ${i}, r, e, r; mul.ftz.f32 ${2 + i}, r, d;"
        for i in range(2)
    )
    return f"{{ .reg .f32 d, e, r; {pairs} }}"


_COLUMNS = gl.constexpr(_column_ptx())


def _open_ptx() -> str:
    """PTX for the weights of _AT_ONCE elements t of a thread, as pairs of bfloat16.

    As tile_math.pair_ptx without its clamp, and with 1 + 2^t of one of two elements alone: with
    d = 1 + 2^t0 and e = 2^t1 the product is d e + d, and the weights are r e + r and r d. Where a
    product overflows its reciprocal r is 0 or NaN: then the warp computes pair_ptx instead.
    """
    count = _AT_ONCE // 2
    inputs = [f"${count + i}" for i in range(_AT_ONCE)]
    lines = [
        f"{{ .reg .f32 d, e, r, w0, w1, m<{_MINIMA}>; .reg .pred p;",
        *(f"mov.f32 m{i}, {ONE};" for i in range(_MINIMA)),
        *(
            f"ex2.approx.ftz.f32 d, {inputs[2 * i]}; ex2.approx.ftz.f32 e, {inputs[2 * i + 1]}; "
            f"add.ftz.f32 d, d, {ONE}; fma.rn.ftz.f32 r, d, e, d; rcp.approx.ftz.f32 r, r; "
            f"fma.rn.ftz.f32 w0, r, e, r; mul.ftz.f32 w1, r, d; cvt.rn.bf16x2.f32 ${i}, w1, w0; "
            f"min.NaN.ftz.f32 m{i % _MINIMA}, m{i % _MINIMA}, r;"
            for i in range(count)
        ),
        *_tree("min.NaN.ftz.f32", "m", _MINIMA),
    ]
    return "\n".join(
        [
            *lines,
            "setp.gt.f32 p, m0, 0f00000000; vote.sync.all.pred p, p, 0xffffffff; @p bra.uni DONE;",
            *_exact_pairs(inputs),
            "DONE: }",
        ]
    )


def _tree(instruction: str, name: str, width: int) -> list[str]:
    """Reduces registers name0.. to name0; as a tree: in a chain each waits for the one before."""
    lines = []
    while width > 1:
        half = (width + 1) // 2
        lines += [
            f"{instruction} {name}{i}, {name}{i}, {name}{i + half};" for i in range(width - half)
        ]
        width = half
    return lines


def _exact_pairs(inputs: list[str]) -> list[str]:
    """The weights of all pairs as pair_ptx computes them, to the operands $0.."""
    return [
        pair_ptx(first, second) + f" cvt.rn.relu.bf16x2.f32 ${i}, w1, w0; }}"
        for i, (first, second) in enumerate(zip(inputs[::2], inputs[1::2], strict=True))
    ]


def _tanh_ptx(*, float16: bool = False) -> str:
    """PTX for the weights of two elements x / 2: 0.5 + 0.5 tanh(x / 2), one special function each.

    The hardware's tanh is not exact: a weight around 1 / 16,384 is off by up to 5.3 %. Of -inf it
    is -1, so that the weight is exactly 0; a NaN stays one, and in its own element.
    """
    kind, half = ("f16x2", _HALF_FLOAT16) if float16 else ("bf16x2", _HALF)
    return f"""{{ .reg .f32 w0, w1; tanh.approx.f32 w0, $1; tanh.approx.f32 w1, $2;
      fma.rn.ftz.f32 w0, w0, {half}, {half}; fma.rn.ftz.f32 w1, w1, {half}, {half};
      cvt.rn.{kind}.f32 $0, w1, w0; }}"""


_HALF, _HALF_FLOAT16 = "0f3F000000", "0f46800000"  # 0.5, 2^14
_TANH_BFLOAT16 = gl.constexpr(_tanh_ptx())
_TANH_FLOAT16 = gl.constexpr(_tanh_ptx(float16=True))

# How the forward kernel computes weights: PAIR everywhere, or ADAPTIVE, a polynomial where all of a
# warp's weights are small and PAIR elsewhere; or OPEN, without a clamp where none of a warp's needs
# one; or TANH, not exact, where fast_sigmoid asks for it.
PAIR = gl.constexpr(0)
ADAPTIVE = gl.constexpr(1)
TANH = gl.constexpr(2)
OPEN = gl.constexpr(3)

# With e = exp(logit) a weight is e / (1 + e) = e - e^2 + e^3 - ..: up to a weight of 0.0729, which
# bfloat16 rounds to these bits, three terms are within 4.9e-4 of it.
_SMALL_WEIGHTS = "0x3D953D95"
SMALL_T = gl.constexpr(3.67)  # where weights are as small
_MINIMA = 4  # of reciprocals, kept side by side
_AT_ONCE = 64  # elements of a thread that are decided on together: of a key block, all
_PAUSE = 4  # decisions that are not tried after a large weight; four times as many after the next


def _adaptive_ptx(consumer: int) -> str:
    """PTX for the weights of _AT_ONCE elements t of a thread, as pairs of bfloat16.

    What is tried and fails costs more than PAIR alone: after a failure a warp pauses. Its two
    registers are declared by _begin_ptx, one set a consumer.
    """
    count = _AT_ONCE // 2
    inputs = [f"${count + i}" for i in range(_AT_ONCE)]
    tried, pause = f"pausing{consumer}", f"pause{consumer}"
    lines = [
        f"{{ .reg .f32 e, u, w0, w1; .reg .pred p, q; .reg .b32 limit, m<{count}>;",
        f"setp.gt.s32 p, {tried}, 0; @p bra.uni PAUSING;",
    ]
    for pair in range(count):
        for i in range(2):
            lines.append(
                f"neg.f32 e, {inputs[2 * pair + i]}; ex2.approx.ftz.f32 e, e; neg.f32 u, e; "
                f"fma.rn.ftz.f32 u, e, e, u; fma.rn.ftz.f32 w{i}, u, e, e;"
            )
        lines += [f"cvt.rn.bf16x2.f32 ${pair}, w1, w0;", f"mov.b32 m{pair}, ${pair};"]
    return "\n".join(
        [
            *lines,
            *_tree("max.NaN.bf16x2", "m", count),
            f"mov.b32 limit, {_SMALL_WEIGHTS}; setp.gtu.bf16x2 p|q, m0, limit;",
            "or.pred p, p, q; vote.sync.any.pred p, p, 0xffffffff; @!p bra.uni DONE;",
            f"mov.b32 {tried}, {pause}; shl.b32 {pause}, {pause}, 2; bra.uni EXACT;",
            f"PAUSING: sub.s32 {tried}, {tried}, 1;",
            "EXACT:",
            *_exact_pairs(inputs),
            "DONE: }",
        ]
    )


def _declare_ptx(consumer: int) -> str:
    return f".reg .b32 pausing{consumer}, pause{consumer}; mov.b32 $0, $1;"


def _begin_ptx(consumer: int) -> str:
    return f"mov.b32 pausing{consumer}, 0; mov.b32 pause{consumer}, {_PAUSE}; mov.b32 $0, $1;"


_OPEN = gl.constexpr(_open_ptx())
_ADAPTIVE_0, _ADAPTIVE_1, _ADAPTIVE_2 = (gl.constexpr(_adaptive_ptx(i)) for i in range(3))
_DECLARE_0, _DECLARE_1, _DECLARE_2 = (gl.constexpr(_declare_ptx(i)) for i in range(3))
_BEGIN_0, _BEGIN_1, _BEGIN_2 = (gl.constexpr(_begin_ptx(i)) for i in range(3))
_AT_ONCE_OPERANDS = gl.constexpr(",".join(["=&r"] * (_AT_ONCE // 2) + ["f"] * _AT_ONCE))
_PACK = gl.constexpr(_AT_ONCE)


@gluon.aggregate
class Ring:
    """Buffers in shared memory that one side fills and the other frees, stage by stage."""

    buffers: gl.shared_memory_descriptor  # [buffers, ROWS, H]
    full: gl.shared_memory_descriptor  # [stages, 1] mbarriers
    free: gl.shared_memory_descriptor  # [stages, 1] mbarriers
    stages: gl.constexpr

    @gluon.jit
    def buffer(self, count):
        """The buffer of the count-th use."""
        return self.buffers.index(count % self.stages)

    @gluon.jit
    def wait_full(self, count):
        """Waits until the count-th use is filled."""
        mbarrier.wait(self.full.index(count % self.stages), (count // self.stages) & 1)

    @gluon.jit
    def wait_free(self, count):
        """Waits until the buffer of the count-th use may be filled."""
        mbarrier.wait(self.free.index(count % self.stages), ((count // self.stages) & 1) ^ 1)

    @gluon.jit
    def release(self, count):
        """One of those who read the count-th use is done with it."""
        mbarrier.arrive(self.free.index(count % self.stages), count=1)


@gluon.jit
def new_ring(
    dtype: gl.constexpr, BUFFERS: gl.constexpr, ROWS: gl.constexpr, H: gl.constexpr,
    layout: gl.constexpr, STAGES: gl.constexpr, READERS: gl.constexpr,
):  # fmt: skip
    """A ring of BUFFERS tiles [ROWS, H] in STAGES, each stage freed by READERS arrivals."""
    buffers = gl.allocate_shared_memory(dtype, [BUFFERS, ROWS, H], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=READERS)
    return Ring(buffers, full, free, STAGES)


@gluon.jit
def copy_rows(
    desc, batch, first, length, full_length, column, barrier, buffer,
    ROWS: gl.constexpr, H: gl.constexpr, IS_RAGGED: gl.constexpr,
):  # fmt: skip
    """Starts the copy of rows first.. of one head; rows at or past length arrive as zeros.

    A plain descriptor is [B, full_length, W] and knows no length but the full one.
    """
    if IS_RAGGED:
        coordinates = [RAGGED, batch * full_length + length, RAGGED - length + first, column]
        tma.async_load(desc, coordinates, barrier, buffer.reshape([1, 1, ROWS, H]))
    else:
        tma.async_load(desc, [batch, first, column], barrier, buffer.reshape([1, ROWS, H]))


@gluon.jit
def weights_as_operand(t, dtype: gl.constexpr):
    """1 / (1 + 2^t) rounded to a matrix operand; in float16 times FLOAT16_WEIGHT_SCALE."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            PTX_BFLOAT16, "=r,f,f", [t], dtype=gl.bfloat16, is_pure=False, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            PTX_FLOAT16, "=r,f,f", [t], dtype=gl.float16, is_pure=False, pack=2
        )


@gluon.jit
def tanh_weights(half, dtype: gl.constexpr):
    """0.5 + 0.5 tanh(half) by the hardware's tanh; scaled as in weights_as_operand."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            _TANH_BFLOAT16, "=r,f,f", [half], dtype=gl.bfloat16, is_pure=False, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            _TANH_FLOAT16, "=r,f,f", [half], dtype=gl.float16, is_pure=False, pack=2
        )


@gluon.jit
def adaptive_weights(t, CONSUMER: gl.constexpr):
    """1 / (1 + 2^t) in bfloat16, within 4.9e-4 where all of a warp's elements are small.

    declare_adaptive and, before the first block of a tile, begin_adaptive come before it.
    """
    ptx: gl.constexpr = _of_consumer(CONSUMER, _ADAPTIVE_0, _ADAPTIVE_1, _ADAPTIVE_2)
    return gl.inline_asm_elementwise(
        ptx, _AT_ONCE_OPERANDS, [t], dtype=gl.bfloat16, is_pure=False, pack=_PACK
    )


@gluon.jit
def open_weights(t):
    """1 / (1 + 2^t) in bfloat16, clamped where a warp has an element that needs it."""
    return gl.inline_asm_elementwise(
        _OPEN, _AT_ONCE_OPERANDS, [t], dtype=gl.bfloat16, is_pure=False, pack=_PACK
    )


@gluon.jit
def declare_adaptive(x, CONSUMER: gl.constexpr):
    """Declares the registers of adaptive_weights, once a consumer; gives x back."""
    ptx: gl.constexpr = _of_consumer(CONSUMER, _DECLARE_0, _DECLARE_1, _DECLARE_2)
    return gl.inline_asm_elementwise(ptx, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def begin_adaptive(x, CONSUMER: gl.constexpr):
    """Forgets what earlier tiles met, so that a row depends on its tile alone; gives x back."""
    ptx: gl.constexpr = _of_consumer(CONSUMER, _BEGIN_0, _BEGIN_1, _BEGIN_2)
    return gl.inline_asm_elementwise(ptx, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def _of_consumer(consumer, *choices):
    return choices[consumer]


@gluon.jit
def weights_float32(t):
    """1 / (1 + 2^t) in float32; a NaN stays in its column of an accumulator."""
    return gl.inline_asm_elementwise(
        _COLUMNS, "=&f,=&f,=&f,=&f,f,f,f,f", [t], dtype=gl.float32, is_pure=True, pack=4
    )


@gluon.jit
def as_operand(weights, dtype: gl.constexpr):
    """Rounds float32 weights to a matrix operand; in float16 times FLOAT16_WEIGHT_SCALE."""
    if dtype == gl.float16:
        weights = weights * FLOAT16_WEIGHT_SCALE
    return weights.to(dtype)


@gluon.jit
def unscale(total, dtype: gl.constexpr):
    """Takes FLOAT16_WEIGHT_SCALE out of a sum over weights from weights_as_operand."""
    if dtype == gl.float16:
        total = total * (1.0 / FLOAT16_WEIGHT_SCALE)
    return total


@gluon.jit
def head_offset(sigmoid_bias_ptr, batch_head, key_length):
    """What a head adds to every t: the caller's bias, or log2 of the number of keys."""
    if sigmoid_bias_ptr is None:
        return gl.log2(gl.maximum(key_length, 1).to(gl.float32))
    else:
        return gl.load(sigmoid_bias_ptr + batch_head) * -LOG2_E


@gluon.jit
def uniform(x):
    """Tells ptxas that a loaded scalar is the same in all threads of a warp."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 0x1f, -1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.constexpr_function
def accumulator_layout(columns):
    """Of a product [64, columns] in the registers of a warpgroup."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16]
    )


@gluon.jit
def begin_scores(rows, columns):
    """Starts rows [64, H] · columns [L, H] transposed, float32 [64, L]."""
    layout: gl.constexpr = accumulator_layout(columns.shape[0])
    scores = gl.zeros([rows.shape[0], columns.shape[0]], gl.float32, layout=layout)
    return warpgroup_mma(rows, columns.permute((1, 0)), scores, use_acc=False, is_async=True)


@gluon.constexpr_function
def row_layout(columns):
    """Of a tile whose rows are stored 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@gluon.jit
def store_rows(ptr, buffer, row, end, valid, stride: gl.constexpr):
    """Stores a buffer's rows below end; those at or past valid become 0."""
    layout: gl.constexpr = row_layout(buffer.shape[1])
    rows = gl.arange(0, buffer.shape[0], layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, buffer.shape[1], layout=gl.SliceLayout(0, layout))
    tile = buffer.load(layout)
    tile = gl.where((row + rows < valid)[:, None], tile, gl.zeros_like(tile))
    offsets = rows[:, None] * stride + columns[None, :]
    gl.store(ptr + offsets, tile, mask=(row + rows < end)[:, None])


@gluon.jit
def store_accumulator(ptr, tile, row, end, valid, stride: gl.constexpr):
    """Stores float32 rows below end from registers; those at or past valid become 0."""
    layout: gl.constexpr = tile.type.layout
    rows = gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, layout))
    tile = gl.where((row + rows < valid)[:, None], tile, 0.0)
    offsets = rows[:, None] * stride + columns[None, :]
    gl.store(ptr + offsets, tile, mask=(row + rows < end)[:, None])


@gluon.jit
def store_zeros(
    ptr, row, end, dtype: gl.constexpr, stride: gl.constexpr, ROWS: gl.constexpr, H: gl.constexpr
):
    """Stores zeros into a tile's rows below end."""
    layout: gl.constexpr = row_layout(H)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, H, layout=gl.SliceLayout(0, layout))
    zeros = gl.zeros([ROWS, H], dtype, layout=layout)
    gl.store(
        ptr + rows[:, None] * stride + columns[None, :], zeros, mask=(row + rows < end)[:, None]
    )
