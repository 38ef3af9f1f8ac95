"""What the keys of one tile add to its outputs (Gluon device code of the Hopper forward kernel).

A consumer has the tensor cores for one turn a key block: the scores of the next block and the
product of this block's weights with its values. The weights are computed between two turns,
while others multiply. Where nobody takes turns, see hopper_turns, it multiplies when it can.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from sigjax.kernels.hopper_logits import HALF_LN_2, Span, ToLogits, has_large, weights_of
from sigjax.kernels.hopper_math import accumulator_layout, begin_scores, key_bias_row
from sigjax.kernels.hopper_matrix import (
    IN_SCALED_SCORES,
    Initial,
    initial_scores,
    release_initial,
    scale_rows,
    skip_pairs,
)
from sigjax.kernels.hopper_pairs import row_offset, segments_of_rows
from sigjax.kernels.hopper_tiles import tile_after
from sigjax.kernels.hopper_turns import (
    after,
    agreed,
    decide,
    pass_turn,
    take_turn,
    turns_of_exact,
)
from sigjax.kernels.hopper_weights import (
    ADAPTIVE,
    LOG2_STRETCH,
    PAIR,
    SHRINK,
    TANH,
    begin_adaptive,
    keep,
    kept,
)
from sigjax.kernels.tile_math import LOG2_E


class Shared(NamedTuple):
    """What the loops over key blocks of all consumers take."""

    key_ring: Any  # "values" is what Triton calls a tuple's own
    value_ring: Any
    turns: Any  # of the tile, see hopper_turns
    matrix: Any  # ring of a bias or mask, or None
    initial: Initial


@gluon.jit
def add_keys(
    rows, shared, agreement, used, turn, biases, segments, tile, row, own, upcoming, options,
    CONSUMER: gl.constexpr,
):  # fmt: skip
    """(outputs [BLOCK_Q, H] float32, used, turn) after all keys of the rows, and what is next.

    The rows, in shared memory, are from row on and have the keys own.
    """
    WEIGHTS: gl.constexpr = options.WEIGHTS
    keys, values, turns, matrix = shared.key_ring, shared.value_ring, shared.turns, shared.matrix
    batch, head, key_length, scale = tile.batch, tile.head, tile.key_length, biases.scale
    T, S = upcoming.schedule.T, upcoming.schedule.S
    layout: gl.constexpr = accumulator_layout(keys.buffers.shape[1])
    offset = row_offset(
        biases.sigmoid_bias_ptr, biases.row_bias_ptr, batch, batch * options.N + head, row,
        key_length, T, rows.shape[0], layout,
    )  # fmt: skip
    key_row = key_bias_row(batch, head, options.N, options.KEY_AXES)
    initial = Initial(shared.initial.factor, shared.initial.score_bias_ptr, key_row, S)
    shared = Shared(keys, values, turns, matrix, initial)
    if matrix is not None and matrix.place == IN_SCALED_SCORES:
        scale_rows(rows, scale)
        scale = gl.to_tensor(1.0)
    row_segments = segments_of_rows(segments.query_ptr, batch, row, T, rows.shape[0], layout)
    if WEIGHTS == TANH:
        # Half the logit is -t * ln(2) / 2, by one fma of the scores as t is.
        factor, offset = scale * 0.5, offset * -HALF_LN_2
    else:
        factor = -scale * LOG2_E
    to_logits = ToLogits(factor, offset, biases.key_bias_ptr, key_row, batch, key_length, S)
    span = Span(row, own.begin, own.inner, own.inner_end, own.end, row_segments, segments.key_ptr)
    first_scores = initial_scores(rows, shared, used, own.begin, CONSUMER, options.CONSUMERS)
    keys.wait_full(used)
    take_turn(turns, turn, CONSUMER)
    scores = begin_scores(rows, keys.buffer(used), first_scores)
    release_initial(matrix, used, CONSUMER, options.CONSUMERS)
    # While the product is computed: where a tile begins it would wait for the divisions.
    following = tile_after(upcoming, options)
    scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))
    pass_turn(turns, CONSUMER, options.CONSUMERS)
    keys.release(used)
    turn = after(turns, turn)
    if WEIGHTS != ADAPTIVE:
        total, used, turn = add_blocks(
            scores, rows, shared, used, turn, to_logits, span, options, WEIGHTS, options.EARLY,
            CONSUMER,
        )  # fmt: skip
    else:
        # Decided once a tile: where the first block says so others have large weights, and a loop
        # without the choice is faster than one that always chooses the same.
        exact = key_length < options.FEW
        if matrix is not None:
            # Rows past the length, of which a matrix may hold anything, would decide as well.
            exact = exact | (row + rows.shape[0] > tile.query_length)
        if not exact:
            exact = has_large(scores, matrix, used, to_logits, span, options, CONSUMER)
        decide(agreement, exact, CONSUMER, options.CONSUMERS)
        if exact:
            # Early ones may keep two consumers out of step or not, as ptxas happens to place them:
            # HOPPER.md. Behind a mask they are faster.
            EXACT_EARLY: gl.constexpr = options.EARLY and matrix is not None
            total, used, turn = add_blocks(
                scores, rows, with_turns(shared, turns_of_exact(agreement)), used, turn, to_logits,
                span, options, PAIR, EXACT_EARLY, CONSUMER,
            )  # fmt: skip
        else:
            total, used, turn = add_blocks_adaptively(
                scores, rows, shared, used, turn, to_logits, span, options, CONSUMER
            )
    return total, used, turn, following


@gluon.jit
def with_turns(shared, turns):
    """The same with the turns of another tile."""
    return Shared(shared.key_ring, shared.value_ring, turns, shared.matrix, shared.initial)


@gluon.jit
def add_blocks_adaptively(
    scores, rows, shared, used, turn, to_logits, span, options, CONSUMER: gl.constexpr
):
    """As add_blocks, for ADAPTIVE."""
    to_logits = ToLogits(
        to_logits.factor, to_logits.offset - LOG2_STRETCH, to_logits.key_bias_ptr,
        to_logits.key_row, to_logits.batch, to_logits.key_length, to_logits.S,
    )  # fmt: skip
    end = begin_adaptive(span.end, CONSUMER)
    span = Span(
        span.row, span.begin, span.inner, span.inner_end, end, span.row_segments,
        span.key_segments_ptr,
    )  # fmt: skip
    total, used, turn = add_blocks(
        scores, rows, shared, used, turn, to_logits, span, options, ADAPTIVE, options.EARLY,
        CONSUMER,
    )  # fmt: skip
    return total * SHRINK, used, turn


@gluon.jit
def add_blocks(
    scores, rows, shared, used, turn, to_logits, span, options, WEIGHTS: gl.constexpr,
    EARLY: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """(outputs [BLOCK_Q, H] float32, used, turn), from the scores of the first block."""
    if EARLY:
        return add_blocks_early(
            scores, rows, shared, used, turn, to_logits, span, options, WEIGHTS, CONSUMER
        )
    else:
        return add_blocks_late(
            scores, rows, shared, used, turn, to_logits, span, options, WEIGHTS, CONSUMER
        )


@gluon.jit
def add_blocks_early(
    scores, rows, shared, used, turn, to_logits, span, options, WEIGHTS: gl.constexpr,
    CONSUMER: gl.constexpr,
):  # fmt: skip
    """As add_blocks; a block's weights are computed while the last ones are multiplied.

    A thread then has to hold the weights of two blocks.
    """
    BLOCK_K: gl.constexpr = options.BLOCK_K
    H: gl.constexpr = options.H
    matrix, values = shared.matrix, shared.value_ring
    weights = weights_of(
        scores, matrix, used, span.begin, to_logits, span, rows.dtype, options, WEIGHTS, CONSUMER
    )
    shared = with_turns(shared, agreed(shared.turns, options.CONSUMERS))
    turns = shared.turns
    KEEPS: gl.constexpr = WEIGHTS == ADAPTIVE
    # Adaptive weights end in a branch as it is, exact ones gain nothing, and windows would spill.
    DENSE: gl.constexpr = options.LEFT is None and span.key_segments_ptr is None
    HOLDS: gl.constexpr = WEIGHTS == TANH and turns is None and DENSE
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(H), 2)
    if KEEPS:
        keep(weights, CONSUMER)
    total = gl.zeros([rows.shape[0], H], gl.float32, layout=accumulator_layout(H))
    for first in range(span.begin + BLOCK_K, span.end, BLOCK_K):
        if KEEPS:
            weights = kept(rows.shape[0], BLOCK_K, OPERAND, CONSUMER)
        scores, total = begin_multiply(
            rows, weights, total, shared, used, turn, first, options, CONSUMER
        )
        following = weights_of(
            scores, matrix, used + 1, first, to_logits, span, rows.dtype, options, WEIGHTS, CONSUMER
        )
        # A wait ends a basic block: ptxas would move the next one up among the weights.
        take_turn(turns, after(turns, turn), CONSUMER)
        if HOLDS:
            values.wait_full(used)  # which they are
        if KEEPS:
            total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
            keep(following, CONSUMER)
        else:
            total, weights = warpgroup_mma_wait(num_outstanding=0, deps=(total, following))
        values.release(used)
        used += 1
        turn = after(turns, turn)
    if KEEPS:
        weights = kept(rows.shape[0], BLOCK_K, OPERAND, CONSUMER)
    total = multiply_last(weights, total, shared, used, turn, options, CONSUMER)
    return total, used + 1, after(turns, turn)


@gluon.jit
def add_blocks_late(
    scores, rows, shared, used, turn, to_logits, span, options, WEIGHTS: gl.constexpr,
    CONSUMER: gl.constexpr,
):  # fmt: skip
    """As add_blocks; the weights' code is there once, as it is long."""
    BLOCK_K: gl.constexpr = options.BLOCK_K
    H: gl.constexpr = options.H
    shared = with_turns(shared, agreed(shared.turns, options.CONSUMERS))
    total = gl.zeros([rows.shape[0], H], gl.float32, layout=accumulator_layout(H))
    for first in range(span.begin, span.end, BLOCK_K):
        weights = weights_of(
            scores, shared.matrix, used, first, to_logits, span, rows.dtype, options, WEIGHTS,
            CONSUMER,
        )  # fmt: skip
        if first + BLOCK_K < span.end:
            scores, total = multiply(
                rows, weights, total, shared, used, turn, first + BLOCK_K, options, CONSUMER
            )
        else:
            total = multiply_last(weights, total, shared, used, turn, options, CONSUMER)
        used += 1
        turn = after(shared.turns, turn)
    return total, used, turn


@gluon.jit
def skip_keys(shared, used, turn, begin, end, options, CONSUMER: gl.constexpr):
    """(used, turn) past a tile in which a consumer has no work: the others count on its part."""
    take_turn(shared.turns, turn, CONSUMER)
    pass_turn(shared.turns, CONSUMER, options.CONSUMERS)
    turn = after(shared.turns, turn)
    return pass_blocks(shared, used, turn, begin, end, options, CONSUMER)


@gluon.jit
def pass_blocks(shared, used, turn, begin, end, options, CONSUMER: gl.constexpr):
    """(used, turn) past key blocks that a consumer's rows do not meet, one turn each."""
    keys, values, turns = shared.key_ring, shared.value_ring, shared.turns
    for _ in range(begin, end, options.BLOCK_K):
        keys.wait_full(used)
        keys.release(used)
        take_turn(turns, turn, CONSUMER)
        pass_turn(turns, CONSUMER, options.CONSUMERS)
        values.wait_full(used)
        values.release(used)
        skip_pairs(shared.matrix, used, CONSUMER, options.CONSUMERS)
        used += 1
        turn = after(turns, turn)
    return used, turn


@gluon.jit
def multiply(rows, weights, total, shared, used, turn, following, options, CONSUMER: gl.constexpr):
    """In one turn: the scores of key block used + 1, and total + weights · value block used.

    following is the first key of block used + 1.
    """
    keys, values, turns = shared.key_ring, shared.value_ring, shared.turns
    first_scores = initial_scores(rows, shared, used + 1, following, CONSUMER, options.CONSUMERS)
    keys.wait_full(used + 1)
    values.wait_full(used)
    take_turn(turns, turn, CONSUMER)
    scores = begin_scores(rows, keys.buffer(used + 1), first_scores)
    total = warpgroup_mma(weights, values.buffer(used), total, is_async=True)
    release_initial(shared.matrix, used + 1, CONSUMER, options.CONSUMERS)
    scores, total = warpgroup_mma_wait(num_outstanding=0, deps=(scores, total))
    pass_turn(turns, CONSUMER, options.CONSUMERS)
    keys.release(used + 1)
    values.release(used)
    return scores, total


@gluon.jit
def multiply_last(weights, total, shared, used, turn, options, CONSUMER: gl.constexpr):
    """In one turn: total + weights · value block used, the last one."""
    values, turns = shared.value_ring, shared.turns
    values.wait_full(used)
    take_turn(turns, turn, CONSUMER)
    total = warpgroup_mma(weights, values.buffer(used), total, is_async=True)
    pass_turn(turns, CONSUMER, options.CONSUMERS)
    total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
    values.release(used)
    return total


@gluon.jit
def begin_multiply(
    rows, weights, total, shared, used, turn, following, options, CONSUMER: gl.constexpr
):
    """As multiply, but the total is still being added to."""
    keys, values, turns = shared.key_ring, shared.value_ring, shared.turns
    first_scores = initial_scores(rows, shared, used + 1, following, CONSUMER, options.CONSUMERS)
    keys.wait_full(used + 1)
    take_turn(turns, turn, CONSUMER)
    scores = begin_scores(rows, keys.buffer(used + 1), first_scores)
    values.wait_full(used)
    total = warpgroup_mma(weights, values.buffer(used), total, is_async=True)
    release_initial(shared.matrix, used + 1, CONSUMER, options.CONSUMERS)
    scores = warpgroup_mma_wait(num_outstanding=1, deps=(scores,))
    pass_turn(turns, CONSUMER, options.CONSUMERS)
    keys.release(used + 1)
    return scores, total
