"""What a step of the backward kernel computes of scores (Gluon device code): weights, gradients."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sigjax.kernels.hopper_backward_matrix import (
    bias_of,
    weights_of_pairs,
    without_masked,
    zero_unless_allowed,
)
from sigjax.kernels.hopper_backward_pairs import (
    key_ids_of,
    where_negative,
    where_weighted,
    without_excluded_gradients,
    without_excluded_weights,
)
from sigjax.kernels.hopper_biases import (
    common_offset,
    key_offset_of,
    offset_of,
    range_scale_at,
    scaled,
    with_sums,
)
from sigjax.kernels.hopper_math import computed_here
from sigjax.kernels.tile_math import LOG2_E


class Side(NamedTuple):
    """What a side has in all steps: a step would wait for these loads."""

    row: Any  # first key
    range_scale: Any
    offset: Any  # common_offset
    key_offset: Any
    key_ids: Any


@gluon.jit
def side_of(factors, sequences, work, row, options):
    """What the side of keys row.. has in all steps."""
    range_scale = range_scale_at(factors, work.batch * options.K + work.kv_head)
    offset = common_offset(factors, work, options)
    key_ids = key_ids_of(sequences, work, row, options)
    key_offset = key_offset_of(factors, sequences, work, row, key_ids, options)
    return Side(row, range_scale, offset, key_offset, key_ids)


@gluon.jit
def is_plain(sequences, matrix, options):
    """Whether nothing says which pairs take part; known when compiling."""
    return (
        sequences.order_ptr is None and sequences.ranges_ptr is None
        and options.LEFT is None and options.RIGHT is None
        and matrix.bias_desc is None and matrix.mask_ptr is None
    )  # fmt: skip


@gluon.jit
def in_step(x, sequences, outputs, options):
    """X; what follows from it is computed in the step where registers are short, not held in them.

    That is with segments, and with a window whose logits' gradients are summed up.
    """
    if sequences.ranges_ptr is not None or (
        options.LEFT is not None and outputs.logit_sums_ptr is not None
    ):
        return computed_here(gl.to_tensor(x))
    else:
        return x


@gluon.jit
def weights_of_step(
    scores, step, head, start, side, row_offset, query_ids, span, allowed, factors, work, common,
    options, SIDE: gl.constexpr,
):  # fmt: skip
    """Weights [SIDE_KEYS, BLOCK_Q] of a step's pairs, float32.

    row_offset is of spread, query_ids and span are as in without_excluded_weights.
    """
    tiles, sequences, matrix = common
    bias = bias_of(matrix, tiles.query_ring, step, sequences, work, side.row, start, options, SIDE)
    offset = offset_of(factors, work, head, side.offset, options)
    t = to_t(scores, factors, offset, side.key_offset, row_offset, sequences)
    weights = weights_of_pairs(t, bias, allowed, matrix)
    return without_excluded_weights(
        weights, side.key_ids, query_ids, span, sequences, work, side.row, start, options
    )


@gluon.jit
def to_t(scores, factors, offset, key_offset, row_offset, sequences):
    """Scores to t = -log2(exp(logit)), without a bias of pairs."""
    scale = factors.scale
    if sequences.row_bias_ptr is not None:
        added = row_offset[None, :]
        if factors.key_bias_ptr is not None:
            added = added + key_offset[:, None]
        return gl.fma(scores, -scale * LOG2_E, added)
    elif factors.key_bias_ptr is not None:
        return gl.fma(scores, -scale * LOG2_E, (offset + key_offset)[:, None])
    else:
        return gl.fma(scores, -scale * LOG2_E, offset)


@gluon.jit
def gradients_of_step(
    weights, weight_gradient, logit_sums, signs, span, start, side, allowed, factors, outputs,
    common, options,
):  # fmt: skip
    """(operand, logit_sums): the logits' gradients for the products, the sums with them."""
    tiles, sequences, matrix = common
    dtype: gl.constexpr = tiles.key_sides.dtype
    gradient = without_excluded_gradients(
        logit_gradient(weights, weight_gradient), weights, signs, span, sequences, outputs,
        side.row, start, options, dtype,
    )  # fmt: skip
    gradient = without_masked(gradient, allowed, matrix, outputs)
    logit_sums = with_sums(logit_sums, gradient, outputs)
    operand = scaled(gradient, factors, side.range_scale).to(dtype)
    operand = zero_unless_allowed(operand, allowed, matrix)
    operand = where_negative(operand, signs, sequences, options)
    operand = where_weighted(operand, weights, span, start, sequences, outputs)
    return operand, logit_sums


@gluon.jit
def logit_gradient(weights, weight_gradient):
    """The logits' gradients [SIDE_KEYS, BLOCK_Q], from the weights' gradients."""
    product = weights * weight_gradient
    return gl.fma(-weights, product, product)
