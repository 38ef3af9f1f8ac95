"""Tile arithmetic shared by the forward and backward kernels (device code).

Logits are kept as t = -log2(exp(logit)), so that the weight is 1 / (1 + 2^t).
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# How weights and products are computed. PAIR: two weights share one reciprocal, inline PTX,
# 16-bit operands only. PLAIN: one weight at a time, portable (float32, the interpreter); products
# of float32 are exact. TF32X3 and TF32: weights as PLAIN, and products of float32 on the tensor
# cores, as three products of 10-bit fractions or one.
PAIR = tl.constexpr(0)
PLAIN = tl.constexpr(1)
TF32X3 = tl.constexpr(2)
TF32 = tl.constexpr(3)

# A weight of about 1/16384 would be subnormal in float16: there it is held times 2^15.
FLOAT16_WEIGHT_SCALE = tl.constexpr(32768.0)

# How many float32 products one running sum takes. One sum over a head of 256 or over
# thousands of keys has several times the error of the plain definition's.
SUMMED_AT_ONCE = tl.constexpr(64)

# float32 literals of PTX.
_FLOAT16_SCALE = "0f47000000"  # 2^15
ONE, _ZERO, CLAMP = "0f3F800000", "0f00000000", "0f427B999A"  # 1, 0, 62.9
_BELOW, _BELOW_FLOAT16 = "0fA0800000", "0fA8000000"  # -2^-62, -2^-47


def pair_ptx(first: str, second: str, *, float16: bool = False, add: str = "") -> str:
    """PTX for the weights of two elements t: two ex2 and one rcp for both.

    With d = 1 + 2^t, w0 = d1 / (d0 d1) and w1 = d0 / (d0 d1). t is clamped so that
    d0 d1 stays finite; what the clamp leaves, 2^-62.9, is below the subtracted 2^-62 and
    ends at exactly 0 when the caller clips at 0. min.NaN keeps a NaN logit a NaN. add is what
    makes 1 + 2^t of 2^t in a register, where that is not all.
    """
    scale = f"mul.ftz.f32 r, r, {_FLOAT16_SCALE};" if float16 else ""
    add = add or f"add.ftz.f32 {{0}}, {{0}}, {ONE};"
    below = _BELOW_FLOAT16 if float16 else _BELOW
    return f"""{{ .reg .f32 d0, d1, r, w0, w1;
      min.NaN.ftz.f32 d0, {first}, {CLAMP}; min.NaN.ftz.f32 d1, {second}, {CLAMP};
      ex2.approx.ftz.f32 d0, d0; ex2.approx.ftz.f32 d1, d1;
      {add.format("d0")} {add.format("d1")}
      mul.ftz.f32 r, d0, d1; rcp.approx.ftz.f32 r, r; {scale}
      fma.rn.ftz.f32 w0, r, d1, {below}; fma.rn.ftz.f32 w1, r, d0, {below};"""


PTX_BFLOAT16 = tl.constexpr(pair_ptx("$1", "$2") + " cvt.rn.relu.bf16x2.f32 $0, w1, w0; }")
PTX_FLOAT16 = tl.constexpr(
    pair_ptx("$1", "$2", float16=True) + " cvt.rn.relu.f16x2.f32 $0, w1, w0; }"
)
PTX_FLOAT32 = tl.constexpr(
    pair_ptx("$2", "$3") + f" max.NaN.ftz.f32 $0, w0, {_ZERO}; max.NaN.ftz.f32 $1, w1, {_ZERO}; }}"
)


@triton.jit
def dot_rows(a, b, ARITHMETIC: tl.constexpr):
    """Products of the rows of a [M, D] with those of b [L, D]: [M, L] float32.

    Exact products of float32 are summed in parts of at most SUMMED_AT_ONCE columns.
    """
    if a.dtype == tl.float32 and ARITHMETIC == PLAIN and a.shape[1] > SUMMED_AT_ONCE:
        a_even, a_odd = even_and_odd_columns(a)
        b_even, b_odd = even_and_odd_columns(b)
        return dot_rows(a_even, b_even, ARITHMETIC) + dot_rows(a_odd, b_odd, ARITHMETIC)
    else:
        return dot(a, tl.trans(b), ARITHMETIC)


@triton.jit
def add_dot(total, a, b, ARITHMETIC: tl.constexpr):
    """Total [M, L] plus a [M, D] times b [D, L]; a float32 total joins no running sum."""
    if a.dtype == tl.float32:
        return total + dot(a, b, ARITHMETIC)
    else:
        return tl.dot(a, b, acc=total)


@triton.jit
def dot(a, b, ARITHMETIC: tl.constexpr):
    """A [M, D] times b [D, L] in float32."""
    if a.dtype == tl.float32 and ARITHMETIC == TF32:
        return tl.dot(a, b, input_precision="tf32")
    elif a.dtype == tl.float32 and ARITHMETIC == TF32X3:
        return tl.dot(a, b, input_precision="tf32x3")
    elif a.dtype == tl.float32:
        # The limit means nothing to float32. It keeps Triton from turning total + dot into one
        # running sum that begins at the total.
        return tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        return tl.dot(a, b)


@triton.jit
def even_and_odd_columns(x):
    """[M, D] to twice [M, D / 2], within a thread's registers."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def weights_float32(t, ARITHMETIC: tl.constexpr):
    """1 / (1 + 2^t) in float32: exactly 0 for t = inf, NaN for NaN."""
    if ARITHMETIC == PAIR:
        return tl.inline_asm_elementwise(
            PTX_FLOAT32, "=f,=f,f,f", [t], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        return 1.0 / (1.0 + tl.exp2(t))


@triton.jit
def weights_as_operand(t, dtype: tl.constexpr, ARITHMETIC: tl.constexpr):
    """1 / (1 + 2^t) rounded to a matrix operand; in float16 times FLOAT16_WEIGHT_SCALE."""
    if ARITHMETIC == PAIR:
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                PTX_BFLOAT16, "=r,f,f", [t], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                PTX_FLOAT16, "=r,f,f", [t], dtype=tl.float16, is_pure=True, pack=2
            )
    else:
        return as_operand(weights_float32(t, ARITHMETIC), dtype)


@triton.jit
def as_operand(weights, dtype: tl.constexpr):
    """Rounds float32 weights to a matrix operand; in float16 times FLOAT16_WEIGHT_SCALE."""
    if dtype == tl.float16:
        weights = weights * FLOAT16_WEIGHT_SCALE
    return weights.to(dtype)


@triton.jit
def unscale(total, dtype: tl.constexpr):
    """Takes FLOAT16_WEIGHT_SCALE out of a sum over weights from as_operand."""
    if dtype == tl.float16:
        total = total * (1.0 / FLOAT16_WEIGHT_SCALE)
    return total


@triton.jit
def row_tile(
    ptr,
    start,
    least,  # or None
    limit,
    stride,
    segments_ptr,  # of the rows' sequence, or None
    ROWS: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Loads rows start..start+ROWS of one head, [ROWS, BLOCK_H]; 0 for padding.

    Padding are rows below least, at or past limit and, with segments, those in none.
    """
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_H)
    # The tile's start is an int64 scalar; offsets within a tile fit int32.
    pointers = ptr + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if MASKED:
        valid = start + rows < limit
        if least is not None:
            valid = valid & (start + rows >= least)
        if segments_ptr is not None:
            valid = valid & (tl.load(segments_ptr + start + rows, mask=valid, other=0) > 0)
        mask = valid[:, None]
        if H != BLOCK_H:
            mask = mask & (columns < H)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    elif H != BLOCK_H:
        return tl.load(pointers, mask=(columns < H)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_row_tile(
    ptr, tile, start, end, valid, stride, ROWS: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Stores [ROWS, BLOCK_H] into rows start.. below end; rows at or past valid become 0."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_H)
    pointers = ptr + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    mask = (start + rows < end)[:, None]
    if H != BLOCK_H:
        mask = mask & (columns < H)[None, :]
    tile = tl.where((start + rows < valid)[:, None], tile, 0.0)
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def length_at(lengths_ptr, batch, full):
    """The length of one sequence, 0..full; full where no lengths are given."""
    if lengths_ptr is None:
        return full
    else:
        return tl.minimum(tl.maximum(tl.load(lengths_ptr + batch), 0), full)


@triton.jit
def row_offset(offset, row_bias_ptr, start, T, BLOCK_Q: tl.constexpr):
    """What is added to every t of a row, [BLOCK_Q, 1]; the head's offset where rows have none."""
    if row_bias_ptr is None:
        return offset
    else:
        queries = start + tl.arange(0, BLOCK_Q)
        row_bias = tl.load(row_bias_ptr + queries, mask=queries < T, other=0.0)
        return (row_bias * -LOG2_E)[:, None]


@triton.jit
def head_offset(sigmoid_bias_ptr, batch_head, key_length):
    """What a head adds to every t: the caller's bias, or log2 of the number of keys."""
    if sigmoid_bias_ptr is None:
        return tl.log2(tl.maximum(key_length, 1).to(tl.float32))
    else:
        return tl.load(sigmoid_bias_ptr + batch_head) * -LOG2_E


@triton.jit
def sequence_at(ptr, batch, length):
    """Where one sequence of an array [B, length] begins; None for None."""
    if ptr is None:
        return None
    else:
        return ptr + tl.cast(batch, tl.int64) * length


@triton.jit
def range_at(ranges_ptr, batch, start, length, BLOCK: tl.constexpr):
    """Where the range of the tile that begins at start is, of [B, tiles, 3]; None for None."""
    if ranges_ptr is None:
        return None
    else:
        return ranges_ptr + (batch * tl.cdiv(length, BLOCK) + start // BLOCK) * 3
