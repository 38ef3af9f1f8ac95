"""From scores to weights, a block of keys at a time (device code of the Hopper forward kernel).

to_logits is (factor, offset, key bias or None, its row, batch, key length, S): t is score * factor
+ offset and what its key adds, where scores have not begun with it. span is (first row, begin,
inner, inner end and end of the keys, segments of the rows, pointer to those of the keys): key
blocks from inner to inner end need no mask. pairs is the block's tile of a bias or mask, see
hopper_matrix, or None.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sigjax.kernels.hopper_math import accumulator_layout, of_keys
from sigjax.kernels.hopper_matrix import (
    IN_SCORES,
    add_pairs,
    peek_pairs,
    take_pairs,
)
from sigjax.kernels.hopper_pairs import LANE_BITS, exclude_pairs
from sigjax.kernels.hopper_weights import (
    ADAPTIVE,
    LOG2_SMALL,
    TANH,
    adaptive_weights,
    adaptive_weights_of,
    exceeds,
    tanh_weights,
    weights_as_operand,
)

HALF_LN_2 = gl.constexpr(0.34657359027997264)


@gluon.jit
def weights_of(
    scores, matrix, used, first, to_logits, span, dtype: gl.constexpr, H: gl.constexpr,
    MASKED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, WEIGHTS: gl.constexpr,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Weights [BLOCK_Q, BLOCK_K] of key block used, in the registers of a product [BLOCK_Q, H]."""
    layout: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(H), 2)
    pairs = take_pairs(matrix, used, CONSUMER, CONSUMERS)
    if WEIGHTS == ADAPTIVE and pairs is not None:
        t = logits(scores, matrix, pairs, first, to_logits, span, MASKED, LEFT, RIGHT, WEIGHTS)
        weights = adaptive_weights_of(t, CONSUMER)
    elif WEIGHTS == ADAPTIVE:
        # The fma that makes logits of scores runs among the special functions.
        if to_logits[2] is not None:
            x = logits(scores, matrix, None, first, to_logits, span, MASKED, LEFT, RIGHT, WEIGHTS)
            factor, offset = gl.to_tensor(1.0), gl.to_tensor(0.0)
        else:
            x = scores_with_part(scores, first, to_logits, span, MASKED, LEFT, RIGHT)
            factor, offset = to_logits[0], to_logits[1]
        weights = adaptive_weights(x, factor, offset, CONSUMER)
    else:
        t = logits(scores, matrix, pairs, first, to_logits, span, MASKED, LEFT, RIGHT, WEIGHTS)
        if WEIGHTS == TANH:
            weights = tanh_weights(t, dtype)
        else:
            weights = weights_as_operand(t, dtype)
    return gl.convert_layout(weights, layout)


@gluon.jit
def has_large(
    scores, matrix, used, to_logits, span, MASKED: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr, DEVIATIONS: gl.constexpr, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Whether the first block has a weight that is too large for the polynomial of ADAPTIVE.

    Or whether another block is likely to, see exceeds: a warp that meets a large weight later
    computes exact ones; but where many do, some warps run one code and some the other, more in all
    than the instruction cache holds: half the throughput.
    """
    factor, offset, key_bias_ptr = to_logits[0], to_logits[1], to_logits[2]
    if key_bias_ptr is not None or (matrix is not None and matrix.place < IN_SCORES):
        pairs = peek_pairs(matrix, used, CONSUMER, CONSUMERS)
        x = offset - logits(
            scores, matrix, pairs, span[1], to_logits, span, MASKED, LEFT, RIGHT, ADAPTIVE
        )
        limit = LOG2_SMALL + offset
    else:
        # Logits grow with scores, as the scale is positive. A choice where nothing is left to
        # choose: without it ptxas schedules other parts worse, 727 TFLOPS for 740 at 128.
        x = scores_with_part(scores, span[1], to_logits, span, MASKED, LEFT, RIGHT)
        limit = gl.where(factor < 0, (LOG2_SMALL + offset) / -factor, float("-inf"))
    return exceeds(x, limit, DEVIATIONS, CONSUMER)


@gluon.jit
def logits(
    scores, matrix, pairs, first, to_logits, span, MASKED: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr, WEIGHTS: gl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_Q, BLOCK_K] to t = -log2(exp(logit)); inf where a pair takes no part.

    For TANH to half the logit, and -inf there.
    """
    factor, offset, key_bias_ptr, key_row, batch, key_length, S = to_logits
    if key_bias_ptr is not None:
        added = of_keys(key_bias_ptr, key_row, first, S, scores.shape[1], scores.type.layout)
        offset = offset + added[None, :]
    t = gl.fma(scores, factor, offset)
    if pairs is not None:
        t = add_pairs(t, pairs, WEIGHTS == TANH)
    return without_excluded(t, first, to_logits, span, MASKED, LEFT, RIGHT, no_part(WEIGHTS))


@gluon.jit
def scores_with_part(
    scores, first, to_logits, span, MASKED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr
):
    """Scores, -inf where a pair takes no part: t is inf there, as the factor is negative."""
    return without_excluded(scores, first, to_logits, span, MASKED, LEFT, RIGHT, no_part(TANH))


@gluon.jit
def without_excluded(
    x, first, to_logits, span, MASKED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    NO_PART: gl.constexpr,
):  # fmt: skip
    """X [BLOCK_Q, BLOCK_K] of a block of keys, NO_PART where a pair takes no part."""
    batch, key_length, S = to_logits[4], to_logits[5], to_logits[6]
    if MASKED:
        if is_edge(first, span, x.shape[1], LEFT):
            if LEFT is None and span[6] is None:
                x = masked(x, first, span[0], key_length, RIGHT, NO_PART)
            else:
                x = exclude_pairs(
                    x, first, span[0], key_length, S, batch, span[5], span[6], LEFT, RIGHT, NO_PART
                )
    return x


@gluon.jit
def is_edge(first, span, BLOCK_K: gl.constexpr, LEFT: gl.constexpr):
    """Whether lengths, window or segments may exclude pairs of a block."""
    if LEFT is None and span[6] is None:
        return first + BLOCK_K > span[3]
    else:
        return (first < span[2]) | (first >= span[3])


@gluon.jit
def masked(t, first, row, key_length, RIGHT: gl.constexpr, NO_PART: gl.constexpr):
    """T, or scores, with NO_PART where lengths, or causality by RIGHT = 0, exclude a pair."""
    columns = gl.arange(0, t.shape[1], layout=gl.SliceLayout(0, t.type.layout))
    lane, steps = columns & LANE_BITS, columns & ~LANE_BITS  # as in exclude_pairs
    limit = key_length - first
    if RIGHT is not None:
        # One comparison an element: how many keys of the block each row may see.
        rows = gl.arange(0, t.shape[0], layout=gl.SliceLayout(1, t.type.layout))
        limit = gl.minimum(limit, row - first + 1 + rows)[:, None]
    return gl.where(steps[None, :] < limit - lane[None, :], t, NO_PART)


@gluon.constexpr_function
def no_part(weights):
    """What logits holds where the weight has to be exactly 0."""
    return float("-inf") if weights == TANH else float("inf")
