"""From scores to weights, a block of keys at a time (device code of the Hopper forward kernel).

pairs is the block's tile of a bias or mask, see hopper_matrix, or None. WEIGHTS stands apart from
the options: a tile of ADAPTIVE may take exact ones.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sigjax.kernels.hopper_math import accumulator_layout, of_keys
from sigjax.kernels.hopper_matrix import (
    IN_SCORES,
    add_pairs,
    peek_pairs,
    release_pairs,
)
from sigjax.kernels.hopper_pairs import LANE_BITS, exclude_pairs
from sigjax.kernels.hopper_weights import (
    ADAPTIVE,
    LOG2_SMALL,
    MANY_KEYS,
    TANH,
    adaptive_weights,
    adaptive_weights_of,
    exceeds,
    tanh_weights,
    weights_as_operand,
)

HALF_LN_2 = gl.constexpr(0.34657359027997264)


class ToLogits(NamedTuple):
    """How scores become t: score * factor + offset, and what its key adds, if it has not yet."""

    factor: Any
    offset: Any
    key_bias_ptr: Any  # None where scores begin with it
    key_row: Any  # of which row of it
    batch: Any
    key_length: Any
    S: Any


class Span(NamedTuple):
    """Which pairs there are for a consumer's rows; key blocks from inner to inner_end are whole."""

    row: Any  # first
    begin: Any
    inner: Any
    inner_end: Any
    end: Any
    row_segments: Any
    key_segments_ptr: Any  # None without segments


@gluon.jit
def weights_of(
    scores, matrix, used, first, to_logits, span, dtype: gl.constexpr, options,
    WEIGHTS: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Weights [BLOCK_Q, BLOCK_K] of key block used, in the registers of a product [BLOCK_Q, H]."""
    layout: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(options.H), 2)
    pairs = peek_pairs(matrix, used, CONSUMER, options.CONSUMERS)
    # Not after the weights: 513 TFLOPS for 545 with a mask at 128.
    release_pairs(matrix, used, CONSUMER, options.CONSUMERS)
    if WEIGHTS == ADAPTIVE and pairs is not None:
        t = logits(scores, pairs, first, to_logits, span, options, WEIGHTS)
        weights = adaptive_weights_of(t, CONSUMER)
    elif WEIGHTS == ADAPTIVE:
        # The fma that makes logits of scores runs among the special functions.
        if to_logits.key_bias_ptr is not None:
            x = logits(scores, None, first, to_logits, span, options, WEIGHTS)
            factor, offset = gl.to_tensor(1.0), gl.to_tensor(0.0)
        else:
            x = scores_with_part(scores, first, to_logits, span, options)
            factor, offset = to_logits.factor, to_logits.offset
        weights = adaptive_weights(x, factor, offset, CONSUMER)
    else:
        t = logits(scores, pairs, first, to_logits, span, options, WEIGHTS)
        if WEIGHTS == TANH:
            weights = tanh_weights(t, dtype)
        else:
            weights = weights_as_operand(t, dtype)
    return gl.convert_layout(weights, layout)


@gluon.jit
def has_large(scores, matrix, used, to_logits, span, options, CONSUMER: gl.constexpr):
    """Whether a sample of the first block is too large for the polynomial of ADAPTIVE.

    Or whether another block is likely to, see exceeds: a warp that meets a large weight later
    computes exact ones; but where many do, some warps run one code and some the other, more in all
    than the instruction cache holds: half the throughput.
    """
    factor, offset = to_logits.factor, to_logits.offset
    OF_PAIRS: gl.constexpr = matrix is not None and matrix.place < IN_SCORES
    if to_logits.key_bias_ptr is not None or OF_PAIRS:
        pairs = peek_pairs(matrix, used, CONSUMER, options.CONSUMERS)
        x = offset - logits(scores, pairs, span.begin, to_logits, span, options, ADAPTIVE)
        limit = LOG2_SMALL + offset
    else:
        # Logits grow with scores, as the scale is positive. A choice where nothing is left to
        # choose: without it ptxas schedules other parts worse, 727 TFLOPS for 740 at 128.
        x = scores_with_part(scores, span.begin, to_logits, span, options)
        limit = gl.where(factor < 0, (LOG2_SMALL + offset) / -factor, float("-inf"))
    few = span.end - span.begin < MANY_KEYS
    deviations = gl.where(few, options.DEVIATIONS[0], options.DEVIATIONS[1])
    return exceeds(x, limit, deviations, CONSUMER)


@gluon.jit
def logits(scores, pairs, first, to_logits, span, options, WEIGHTS: gl.constexpr):
    """Scores [BLOCK_Q, BLOCK_K] to t = -log2(exp(logit)); inf where a pair takes no part.

    For TANH to half the logit, and -inf there.
    """
    offset = to_logits.offset
    if to_logits.key_bias_ptr is not None:
        added = of_keys(
            to_logits.key_bias_ptr, to_logits.key_row, first, to_logits.S, scores.shape[1],
            scores.type.layout,
        )  # fmt: skip
        offset = offset + added[None, :]
    t = gl.fma(scores, to_logits.factor, offset)
    if pairs is not None:
        t = add_pairs(t, pairs, WEIGHTS == TANH)
    return without_excluded(t, first, to_logits, span, options, no_part(WEIGHTS))


@gluon.jit
def scores_with_part(scores, first, to_logits, span, options):
    """Scores, -inf where a pair takes no part: t is inf there, as the factor is negative."""
    return without_excluded(scores, first, to_logits, span, options, no_part(TANH))


@gluon.jit
def without_excluded(x, first, to_logits, span, options, NO_PART: gl.constexpr):
    """X [BLOCK_Q, BLOCK_K] of a block of keys, NO_PART where a pair takes no part."""
    if options.MASKED:
        if is_edge(first, span, x.shape[1], options.LEFT):
            if options.LEFT is None and span.key_segments_ptr is None:
                x = masked(x, first, span.row, to_logits.key_length, options.RIGHT, NO_PART)
            else:
                x = exclude_pairs(
                    x, first, span.row, to_logits.key_length, to_logits.S, to_logits.batch,
                    span.row_segments, span.key_segments_ptr, options.LEFT, options.RIGHT, NO_PART,
                )  # fmt: skip
    return x


@gluon.jit
def is_edge(first, span, BLOCK_K: gl.constexpr, LEFT: gl.constexpr):
    """Whether lengths, window or segments may exclude pairs of a block."""
    if LEFT is None and span.key_segments_ptr is None:
        return first + BLOCK_K > span.inner_end
    else:
        return (first < span.inner) | (first >= span.inner_end)


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
