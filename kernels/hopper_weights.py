"""How the Hopper kernels compute weights (Gluon device code, by inline PTX).

As in tile_math logits are kept as t = -log2(exp(logit)); for the weights TANH as half the logit.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sigjax.kernels.hopper_math import uniform
from sigjax.kernels.tile_math import (
    CLAMP,
    FLOAT16_WEIGHT_SCALE,
    ONE,
    PTX_BFLOAT16,
    PTX_FLOAT16,
    pair_ptx,
)


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


def _slope_ptx() -> str:
    """PTX for w (1 - w) of two elements t, columns of one row of an accumulator.

    As _column_ptx, but what shares a reciprocal shares a row: a NaN stays in its query.
    """
    return f"""{{ .reg .f32 d, e, r, w, v;
      min.NaN.ftz.f32 d, $2, {CLAMP}; min.NaN.ftz.f32 e, $3, {CLAMP};
      ex2.approx.ftz.f32 d, d; ex2.approx.ftz.f32 e, e;
      add.ftz.f32 d, d, {ONE}; fma.rn.ftz.f32 r, d, e, d; rcp.approx.ftz.f32 r, r;
      fma.rn.ftz.f32 w, r, e, r; mul.ftz.f32 v, r, d;
      neg.f32 d, w; neg.f32 e, v;
      fma.rn.ftz.f32 $0, d, w, w; fma.rn.ftz.f32 $1, e, v, v; }}"""


_SLOPES = gl.constexpr(_slope_ptx())


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


def _exact_pairs(names: list[str], *, of_t: bool) -> list[str]:
    """The weights of all pairs over SHRINK, to the operands $0..; of t less LOG2_STRETCH.

    As pair_ptx, where both 1 + 2^t are times SHRINK. With of_t names are those of t, else of
    scores.
    """
    if of_t:
        to_t = "mov.f32 t0, {0}; mov.f32 t1, {1};"
    else:
        to_t = "fma.rn.ftz.f32 t0, {0}, factor, offset; fma.rn.ftz.f32 t1, {1}, factor, offset;"
    add = f"fma.rn.ftz.f32 {{0}}, {{0}}, {_STRETCH_SHRINK}, {_SHRINK};"
    return [
        to_t.format(first, second)
        + pair_ptx("t0", "t1", add=add)
        + f" cvt.rn.relu.bf16x2.f32 ${i}, w1, w0; }}"
        for i, (first, second) in enumerate(zip(names[::2], names[1::2], strict=True))
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
# warp's weights are small and PAIR elsewhere; or TANH, not exact, where fast_sigmoid asks for it.
PAIR = gl.constexpr(0)
ADAPTIVE = gl.constexpr(1)
TANH = gl.constexpr(2)

# A weight e / (1 + e), e = exp(logit), is within 4.0e-4 of SHRINK (E - E^2 + E^3), E = 1.0176 e,
# where E is up to 0.122: a minimax, the series itself is as close up to 0.074 alone. There the
# bracket has these bits of bfloat16.
_SMALL_WEIGHTS = "0x3DDF3DDF"
LOG2_STRETCH = gl.constexpr(0.025170575734906053)  # of 1.0176
SHRINK = gl.constexpr(0.983088)
_SHRINK, _STRETCH_SHRINK = "0f3F7BABA8", "0f3F800CCA"  # 0.983088, 1.0176 * 0.983088
LOG2_SMALL = gl.constexpr(-3.0588936890535687)  # exponents of e up to 0.12 are as small
_MINUS_INF = "0fFF800000"
_LEAST_OF_GREATEST = "0fBF2F1763"  # -LEAST / GREATEST
_AT_ONCE = 64  # elements of a thread that are decided on together: of a key block, all
# Of these the ones whose greatest and whose least a tile is judged by, half and an eighth of them
# of both of a thread's rows: 40 instructions for 126. And medians of the largest of 32 and of 8
# normal numbers.
GREATEST_OF = tuple(i for i in range(_AT_ONCE) if i // 4 % 2 == 0)
LEAST_OF = tuple(8 * i + i % 2 * 2 for i in range(_AT_ONCE // 8))
GREATEST, LEAST = gl.constexpr(2.025), gl.constexpr(1.385)
MANY_KEYS = gl.constexpr(3072)  # of a tile, from which on it is judged by other deviations
# Of a program's barriers those from 8 on, which Triton leaves free, one a consumer of so many.
_FREE_BARRIER, _THREADS = 8, 128
_PAUSE = 4  # decisions that are not tried after a large weight; four times as many after the next


def _adaptive_ptx(consumer: int, kind: str = "scores") -> str:
    """PTX for the weights, over SHRINK, of _AT_ONCE elements of a thread, as pairs of bfloat16.

    What is tried and fails costs more than the exact form alone: after a failure a warp pauses. Its
    registers are declared by _declare_ptx, one set a consumer. Of kind "t" the elements are t less
    LOG2_STRETCH themselves, else scores, of which t is made by the declared factor and offset.
    """
    count = _AT_ONCE // 2
    of_t = kind == "t"
    inputs = [f"${count + i}" for i in range(_AT_ONCE)]
    tried, pause = f"pausing{consumer}", f"pause{consumer}"
    lines = [
        f"{{ .reg .f32 e, u, w0, w1, t0, t1, factor, offset; .reg .b32 limit, m<{count}>;",
        ".reg .pred p, q;",
    ]
    if not of_t:
        lines += [f"mov.f32 factor, factor{consumer}; mov.f32 offset, offset{consumer};"]
    lines += [f"setp.gt.s32 p, {tried}, 0; @p bra.uni PAUSING;"]
    if not of_t:
        lines += ["neg.f32 t0, factor; neg.f32 t1, offset;"]
    for pair in range(count):
        for i in range(2):
            element = inputs[2 * pair + i]
            exponent = f"neg.f32 e, {element};" if of_t else f"fma.rn.ftz.f32 e, {element}, t0, t1;"
            lines.append(
                f"{exponent} ex2.approx.ftz.f32 e, e; "
                f"neg.f32 u, e; fma.rn.ftz.f32 u, e, e, u; fma.rn.ftz.f32 w{i}, u, e, e;"
            )
        lines += [f"cvt.rn.bf16x2.f32 ${pair}, w1, w0; mov.b32 m{pair}, ${pair};"]
    return "\n".join(
        [
            *lines,
            *_tree("max.NaN.bf16x2", "m", count),
            f"mov.b32 limit, {_SMALL_WEIGHTS}; setp.gtu.bf16x2 p|q, m0, limit;",
            "or.pred p, p, q; vote.sync.any.pred p, p, 0xffffffff; @!p bra.uni DONE;",
            f"mov.b32 {tried}, {pause}; shl.b32 {pause}, {pause}, 2; bra.uni EXACT;",
            f"PAUSING: sub.s32 {tried}, {tried}, 1;",
            "EXACT:",
            *_exact_pairs(inputs, of_t=of_t),
            "DONE: }",
        ]
    )


def _exceeds_ptx(consumer: int) -> str:
    """PTX that tells in found whether elements of a consumer's block exceed limit, or others will.

    Others will if most threads say so: by above times the largest and below times the least of a
    sample of their elements; as -inf is no element, where that is the least by the largest alone,
    as if the mean were 0. Other elements decide nothing. limit, above, below and found are declared
    by _declare_ptx. What comes out are zeros, a byte an element.
    """
    zeros, chains = _AT_ONCE // 4, 4  # in one chain each waits for the last
    inputs = [f"${zeros + i}" for i in range(_AT_ONCE)]
    names = [f"{kind}{i}" for kind in ("most", "least") for i in range(chains)]
    lines = [f"{{ .reg .f32 {', '.join(names)}; .reg .b32 votes; .reg .pred p, q;"]
    lines += [f"mov.b32 ${i}, 0;" for i in range(zeros)]
    sampled = (("most", "max", GREATEST_OF), ("least", "min", LEAST_OF))
    for kind, extreme, sample in sampled:
        for i, element in enumerate(sample):
            register = f"{kind}{i % chains}"
            begin = f"mov.f32 {register}" if i < chains else f"{extreme}.f32 {register}, {register}"
            lines.append(f"{begin}, {inputs[element]};")
        lines += [f"{extreme}.f32 {kind}0, {kind}0, {kind}{i};" for i in range(1, chains)]
    barrier = f"{_FREE_BARRIER + consumer}, {_THREADS}"
    return "\n".join(
        [
            *lines,
            f"setp.gt.f32 q, most0, limit{consumer}; setp.eq.f32 p, least0, {_MINUS_INF};",
            f"@p mul.f32 least0, most0, {_LEAST_OF_GREATEST};",
            f"mul.f32 most0, most0, above{consumer};",
            f"fma.rn.f32 most0, least0, below{consumer}, most0;",
            f"setp.gt.f32 p, most0, limit{consumer};",
            f"barrier.cta.red.popc.u32 votes, {barrier}, p;",
            f"barrier.cta.red.or.pred q, {barrier}, q;",
            f"setp.gt.u32 p, votes, {_THREADS // 2}; or.pred p, p, q;",
            f"selp.b32 found{consumer}, 1, 0, p; }}",
        ]
    )


def _declare_ptx(consumer: int) -> str:
    integers, floats = (
        ", ".join(f"{name}{consumer}" for name in names)
        for names in (
            ("pausing", "pause", "found"),
            ("factor", "offset", "limit", "above", "below"),
        )
    )
    return f".reg .b32 {integers}; .reg .f32 {floats}; mov.b32 $0, $1;"


def _declare_kept_ptx(consumer: int) -> str:
    kept = ", ".join(f"kept{consumer}_{i}" for i in range(_AT_ONCE // 2))
    return f".reg .b32 {kept}; mov.b32 $0, $1;"


def _keep_ptx(consumer: int) -> str:
    zeros = _AT_ONCE // 4
    lines = [f"mov.b32 ${i}, 0;" for i in range(zeros)]
    lines += [f"mov.b32 kept{consumer}_{i}, ${zeros + i};" for i in range(_AT_ONCE // 2)]
    return " ".join(lines)


def _kept_ptx(consumer: int) -> str:
    return " ".join(f"mov.b32 ${i}, kept{consumer}_{i};" for i in range(_AT_ONCE // 2))


def _begin_ptx(consumer: int) -> str:
    return f"mov.b32 pausing{consumer}, 0; mov.b32 pause{consumer}, {_PAUSE}; mov.b32 $0, $1;"


def _to_t_ptx(consumer: int) -> str:
    return f"mov.f32 factor{consumer}, $1; mov.f32 offset{consumer}, $2; mov.b32 $0, 0;"


_ADAPTIVE_0, _ADAPTIVE_1, _ADAPTIVE_2 = (gl.constexpr(_adaptive_ptx(i)) for i in range(3))
_ADAPTIVE_T_0, _ADAPTIVE_T_1, _ADAPTIVE_T_2 = (
    gl.constexpr(_adaptive_ptx(i, "t")) for i in range(3)
)
_DECLARE_0, _DECLARE_1, _DECLARE_2 = (gl.constexpr(_declare_ptx(i)) for i in range(3))
_BEGIN_0, _BEGIN_1, _BEGIN_2 = (gl.constexpr(_begin_ptx(i)) for i in range(3))
_TO_T_0, _TO_T_1, _TO_T_2 = (gl.constexpr(_to_t_ptx(i)) for i in range(3))
_EXCEEDS_OPERANDS = gl.constexpr(",".join(["=&r"] * (_AT_ONCE // 4) + ["f"] * _AT_ONCE))
_LIMIT_0, _LIMIT_1, _LIMIT_2 = (
    gl.constexpr(
        f"mov.f32 limit{i}, $1; mov.f32 above{i}, $2; mov.f32 below{i}, $3; mov.b32 $0, 0;"
    )
    for i in range(3)
)
_EXCEEDS_0, _EXCEEDS_1, _EXCEEDS_2 = (gl.constexpr(_exceeds_ptx(i)) for i in range(3))
_FOUND_0, _FOUND_1, _FOUND_2 = (gl.constexpr(f"add.s32 $0, found{i}, $1;") for i in range(3))
_AT_ONCE_OPERANDS = gl.constexpr(",".join(["=&r"] * (_AT_ONCE // 2) + ["f"] * _AT_ONCE))
_PACK = gl.constexpr(_AT_ONCE)
_DECLARE_KEPT_0, _DECLARE_KEPT_1, _DECLARE_KEPT_2 = (
    gl.constexpr(_declare_kept_ptx(i)) for i in range(3)
)
_KEEP_0, _KEEP_1, _KEEP_2 = (gl.constexpr(_keep_ptx(i)) for i in range(3))
_KEPT_0, _KEPT_1, _KEPT_2 = (gl.constexpr(_kept_ptx(i)) for i in range(3))
_KEEP_OPERANDS = gl.constexpr(",".join(["=r"] * (_AT_ONCE // 4) + ["r"] * (_AT_ONCE // 2)))
_KEPT_OPERANDS = gl.constexpr(",".join(["=r"] * (_AT_ONCE // 2) + ["r"] * (_AT_ONCE // 4)))


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
def set_to_t(factor, offset, CONSUMER: gl.constexpr):
    """Sets the registers that make t of scores."""
    to_t: gl.constexpr = _of_consumer(CONSUMER, _TO_T_0, _TO_T_1, _TO_T_2)
    gl.inline_asm_elementwise(
        to_t, "=r,f,f", [factor, offset], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def adaptive_weights(x, factor, offset, CONSUMER: gl.constexpr):
    """1 / (1 + 2^t) over SHRINK in bfloat16, t - LOG2_STRETCH = x * factor + offset.

    Within 4.0e-4 where all of a warp's elements are small, exact elsewhere. declare_adaptive and,
    before the first block of a tile, begin_adaptive come before it.
    """
    set_to_t(factor, offset, CONSUMER)
    ptx: gl.constexpr = _of_consumer(CONSUMER, _ADAPTIVE_0, _ADAPTIVE_1, _ADAPTIVE_2)
    return gl.inline_asm_elementwise(
        ptx, _AT_ONCE_OPERANDS, [x], dtype=gl.bfloat16, is_pure=False, pack=_PACK
    )


@gluon.jit
def adaptive_weights_of(t, CONSUMER: gl.constexpr):
    """As adaptive_weights, of t - LOG2_STRETCH."""
    ptx: gl.constexpr = _of_consumer(CONSUMER, _ADAPTIVE_T_0, _ADAPTIVE_T_1, _ADAPTIVE_T_2)
    return gl.inline_asm_elementwise(
        ptx, _AT_ONCE_OPERANDS, [t], dtype=gl.bfloat16, is_pure=False, pack=_PACK
    )


@gluon.jit
def exceeds(x, limit, deviations, CONSUMER: gl.constexpr):
    """Whether an element of a consumer's block [64, BLOCK_K] exceeds the limit, or others will.

    Of these half are looked at. Others will where one so many standard deviations from the mean
    does: a thread's extremes are GREATEST and LEAST of them away. A NaN does not, and -inf is no
    element.
    """
    above = 1 + (deviations - GREATEST) / (GREATEST + LEAST)
    set_limit: gl.constexpr = _of_consumer(CONSUMER, _LIMIT_0, _LIMIT_1, _LIMIT_2)
    gl.inline_asm_elementwise(
        set_limit, "=r,f,f,f", [limit, above, 1 - above], dtype=gl.int32, is_pure=False, pack=1
    )
    ptx: gl.constexpr = _of_consumer(CONSUMER, _EXCEEDS_0, _EXCEEDS_1, _EXCEEDS_2)
    gl.inline_asm_elementwise(ptx, _EXCEEDS_OPERANDS, [x], dtype=gl.int8, is_pure=False, pack=_PACK)
    found: gl.constexpr = _of_consumer(CONSUMER, _FOUND_0, _FOUND_1, _FOUND_2)
    zero = gl.to_tensor(0)
    result = gl.inline_asm_elementwise(found, "=r,r", [zero], dtype=gl.int32, is_pure=False, pack=1)
    return uniform(result) > 0


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


@gluon.jit
def declare_kept(x, CONSUMER: gl.constexpr):
    """Declares the registers of keep, once a consumer; gives x back."""
    ptx: gl.constexpr = _of_consumer(CONSUMER, _DECLARE_KEPT_0, _DECLARE_KEPT_1, _DECLARE_KEPT_2)
    return gl.inline_asm_elementwise(ptx, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def keep(weights, CONSUMER: gl.constexpr):
    """Puts weights [64, 128] in registers of their own, in pairs, for kept.

    What a loop carries in variables it carries as single bfloat16: at 128 that is 37 byte
    permutations a block.
    """
    ptx: gl.constexpr = _of_consumer(CONSUMER, _KEEP_0, _KEEP_1, _KEEP_2)
    return gl.inline_asm_elementwise(
        ptx, _KEEP_OPERANDS, [weights], dtype=gl.int8, is_pure=False, pack=_PACK
    )


@gluon.jit
def kept(ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr, CONSUMER: gl.constexpr):
    """What keep was last given, [ROWS, COLUMNS] in the layout that it had."""
    ptx: gl.constexpr = _of_consumer(CONSUMER, _KEPT_0, _KEPT_1, _KEPT_2)
    nothing = gl.zeros([ROWS, COLUMNS], gl.int8, layout=layout)
    return gl.inline_asm_elementwise(
        ptx, _KEPT_OPERANDS, [nothing], dtype=gl.bfloat16, is_pure=False, pack=_PACK
    )


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
def sigmoid_slopes(t):
    """Slopes w (1 - w) in float32, w = 1 / (1 + 2^t); a NaN stays in its row of an accumulator."""
    return gl.inline_asm_elementwise(
        _SLOPES, "=&f,=&f,f,f", [t], dtype=gl.float32, is_pure=True, pack=2
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
