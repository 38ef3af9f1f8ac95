"""What the keys of one tile add to its outputs (Gluon device code of the Hopper forward kernel).

A consumer has the tensor cores for one turn a key block: the scores of the next block and the
product of this block's weights with its values. The weights are computed between two turns,
while others multiply. Where nobody takes turns, see hopper_turns, it multiplies when it can.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from sigjax.kernels.hopper_logits import HALF_LN_2, has_large, weights_of
from sigjax.kernels.hopper_math import accumulator_layout, begin_scores, key_bias_row
from sigjax.kernels.hopper_matrix import (
    IN_SCALED_SCORES,
    initial_scores,
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


@gluon.jit
def add_keys(
    rows, shared, agreement, used, turn, biases, segments, tile, upcoming, N: gl.constexpr,
    H: gl.constexpr, MASKED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    WEIGHTS: gl.constexpr, EARLY: gl.constexpr, FEW: gl.constexpr, DEVIATIONS: gl.constexpr,
    KEY_AXES: gl.constexpr, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """(outputs [BLOCK_Q, H] float32, used, turn) after all keys of the rows, and the next tile.

    agreement is that of hopper_turns, upcoming are the arguments of tile_after. What is shared ends
    in the factor of a bias in the scores; below in initial: the factor, and a bias per key over the
    scale or None, its row and S.
    """
    keys, values, turns, matrix, bias_factor = shared
    batch, head, row, query_length, key_length, own, T, S = tile
    sigmoid_bias_ptr, row_bias_ptr, key_bias_ptr, score_bias_ptr, scale = biases
    layout: gl.constexpr = accumulator_layout(keys.buffers.shape[1])
    offset = row_offset(
        sigmoid_bias_ptr, row_bias_ptr, batch, batch * N + head, row, key_length, T, rows.shape[0],
        layout,
    )  # fmt: skip
    key_row = key_bias_row(batch, head, N, KEY_AXES)
    initial = (bias_factor, score_bias_ptr, key_row, S)
    shared = (keys, values, turns, matrix, initial)
    if matrix is not None and matrix.place == IN_SCALED_SCORES:
        scale_rows(rows, scale)
        scale = gl.to_tensor(1.0)
    row_segments = segments_of_rows(segments[0], batch, row, T, rows.shape[0], layout)
    if WEIGHTS == TANH:
        # Half the logit is -t * ln(2) / 2, by one fma of the scores as t is.
        to_logits = (scale * 0.5, offset * -HALF_LN_2, key_bias_ptr, key_row, batch, key_length, S)
    else:
        to_logits = (-scale * LOG2_E, offset, key_bias_ptr, key_row, batch, key_length, S)
    span = (row, own[0], own[1], own[2], own[3], row_segments, segments[1])
    first_scores = initial_scores(rows, shared, used, own[0], CONSUMER, CONSUMERS)
    keys.wait_full(used)
    take_turn(turns, turn, CONSUMER)
    scores = begin_scores(rows, keys.buffer(used), first_scores)
    # While the product is computed: where a tile begins it would wait for the divisions.
    queue, taken, program, position, tiles, work = upcoming
    following = tile_after(queue, taken, program, position, tiles, work)
    scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))
    pass_turn(turns, CONSUMER, CONSUMERS)
    keys.release(used)
    turn = after(turns, turn)
    if WEIGHTS != ADAPTIVE:
        total, used, turn = add_blocks(
            scores, rows, shared, used, turn, to_logits, span, H, MASKED, LEFT, RIGHT, WEIGHTS,
            EARLY, CONSUMER, CONSUMERS,
        )  # fmt: skip
    else:
        # Decided once a tile: where the first block says so others have large weights, and a loop
        # without the choice is faster than one that always chooses the same.
        exact = key_length < FEW
        if matrix is not None:
            # Rows past the length, of which a matrix may hold anything, would decide as well.
            exact = exact | (row + rows.shape[0] > query_length)
        if not exact:
            exact = has_large(
                scores, matrix, used, to_logits, span, MASKED, LEFT, RIGHT, DEVIATIONS, CONSUMER,
                CONSUMERS,
            )  # fmt: skip
        decide(agreement, exact, CONSUMER, CONSUMERS)
        if exact:
            # Early they depend on where ptxas puts them, 525 to 600 TFLOPS at 128, T = 1,024, for
            # 587; behind a mask 506 for 485.
            EXACT_EARLY: gl.constexpr = EARLY and matrix is not None
            of_tile = (keys, values, turns_of_exact(agreement), matrix, initial)
            total, used, turn = add_blocks(
                scores, rows, of_tile, used, turn, to_logits, span, H, MASKED, LEFT, RIGHT, PAIR,
                EXACT_EARLY, CONSUMER, CONSUMERS,
            )  # fmt: skip
        else:
            total, used, turn = add_blocks_adaptively(
                scores, rows, shared, used, turn, to_logits, span, H, MASKED, LEFT, RIGHT, EARLY,
                CONSUMER, CONSUMERS,
            )  # fmt: skip
    return total, used, turn, following


@gluon.jit
def add_blocks_adaptively(
    scores, rows, shared, used, turn, to_logits, span, H: gl.constexpr, MASKED: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, EARLY: gl.constexpr, CONSUMER: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    """As add_blocks, for ADAPTIVE."""
    factor, offset, key_bias_ptr, key_row, batch, key_length, S = to_logits
    to_logits = (factor, offset - LOG2_STRETCH, key_bias_ptr, key_row, batch, key_length, S)
    row, begin, inner, inner_end, end, row_segments, key_segments_ptr = span
    end = begin_adaptive(end, CONSUMER)
    span = (row, begin, inner, inner_end, end, row_segments, key_segments_ptr)
    total, used, turn = add_blocks(
        scores, rows, shared, used, turn, to_logits, span, H, MASKED, LEFT, RIGHT, ADAPTIVE, EARLY,
        CONSUMER, CONSUMERS,
    )  # fmt: skip
    return total * SHRINK, used, turn


@gluon.jit
def add_blocks(
    scores, rows, shared, used, turn, to_logits, span, H: gl.constexpr, MASKED: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, WEIGHTS: gl.constexpr, EARLY: gl.constexpr,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """(outputs [BLOCK_Q, H] float32, used, turn), from the scores of the first block."""
    if EARLY:
        return add_blocks_early(
            scores, rows, shared, used, turn, to_logits, span, H, MASKED, LEFT, RIGHT, WEIGHTS,
            CONSUMER, CONSUMERS,
        )  # fmt: skip
    else:
        return add_blocks_late(
            scores, rows, shared, used, turn, to_logits, span, H, MASKED, LEFT, RIGHT, WEIGHTS,
            CONSUMER, CONSUMERS,
        )  # fmt: skip


@gluon.jit
def add_blocks_early(
    scores, rows, shared, used, turn, to_logits, span, H: gl.constexpr, MASKED: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, WEIGHTS: gl.constexpr, CONSUMER: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    """As add_blocks; a block's weights are computed while the last ones are multiplied.

    A thread then has to hold the weights of two blocks.
    """
    keys, values, turns, matrix, initial = shared
    BLOCK_K: gl.constexpr = keys.buffers.shape[1]
    weights = weights_of(
        scores, matrix, used, span[1], to_logits, span, rows.dtype, H, MASKED, LEFT, RIGHT, WEIGHTS,
        CONSUMER, CONSUMERS,
    )  # fmt: skip
    shared = (keys, values, agreed(turns, CONSUMERS), matrix, initial)
    turns = shared[2]
    KEEPS: gl.constexpr = WEIGHTS == ADAPTIVE
    # Adaptive weights end in a branch as it is, exact ones gain nothing, and windows would spill.
    DENSE: gl.constexpr = LEFT is None and span[6] is None
    HOLDS: gl.constexpr = WEIGHTS == TANH and turns is None and DENSE
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(H), 2)
    if KEEPS:
        keep(weights, CONSUMER)
    total = gl.zeros([rows.shape[0], H], gl.float32, layout=accumulator_layout(H))
    for first in range(span[1] + BLOCK_K, span[4], BLOCK_K):
        if KEEPS:
            weights = kept(rows.shape[0], BLOCK_K, OPERAND, CONSUMER)
        scores, total = begin_multiply(
            rows, weights, total, shared, used, turn, first, CONSUMER, CONSUMERS
        )
        following = weights_of(
            scores, matrix, used + 1, first, to_logits, span, rows.dtype, H, MASKED, LEFT, RIGHT,
            WEIGHTS, CONSUMER, CONSUMERS,
        )  # fmt: skip
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
    total = multiply_last(weights, total, values, turns, used, turn, CONSUMER, CONSUMERS)
    return total, used + 1, after(turns, turn)


@gluon.jit
def add_blocks_late(
    scores, rows, shared, used, turn, to_logits, span, H: gl.constexpr, MASKED: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, WEIGHTS: gl.constexpr, CONSUMER: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    """As add_blocks; the weights' code is there once, as it is long."""
    keys, values, turns, matrix, initial = shared
    shared = (keys, values, agreed(turns, CONSUMERS), matrix, initial)
    turns = shared[2]
    BLOCK_K: gl.constexpr = keys.buffers.shape[1]
    total = gl.zeros([rows.shape[0], H], gl.float32, layout=accumulator_layout(H))
    for first in range(span[1], span[4], BLOCK_K):
        weights = weights_of(
            scores, matrix, used, first, to_logits, span, rows.dtype, H, MASKED, LEFT, RIGHT,
            WEIGHTS, CONSUMER, CONSUMERS,
        )  # fmt: skip
        if first + BLOCK_K < span[4]:
            scores, total = multiply(
                rows, weights, total, shared, used, turn, first + BLOCK_K, CONSUMER, CONSUMERS
            )
        else:
            total = multiply_last(weights, total, values, turns, used, turn, CONSUMER, CONSUMERS)
        used += 1
        turn = after(turns, turn)
    return total, used, turn


@gluon.jit
def skip_keys(shared, used, turn, begin, end, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """(used, turn) past a tile in which a consumer has no work: the others count on its part."""
    take_turn(shared[2], turn, CONSUMER)
    pass_turn(shared[2], CONSUMER, CONSUMERS)
    turn = after(shared[2], turn)
    return pass_blocks(shared, used, turn, begin, end, CONSUMER, CONSUMERS)


@gluon.jit
def pass_blocks(shared, used, turn, begin, end, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """(used, turn) past key blocks that a consumer's rows do not meet, one turn each."""
    keys, values, turns, matrix, initial = shared
    BLOCK_K: gl.constexpr = keys.buffers.shape[1]
    for _ in range(begin, end, BLOCK_K):
        keys.wait_full(used)
        keys.release(used)
        take_turn(turns, turn, CONSUMER)
        pass_turn(turns, CONSUMER, CONSUMERS)
        values.wait_full(used)
        values.release(used)
        skip_pairs(matrix, used, CONSUMER, CONSUMERS)
        used += 1
        turn = after(turns, turn)
    return used, turn


@gluon.jit
def multiply(
    rows, weights, total, shared, used, turn, following, CONSUMER: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    """In one turn: the scores of key block used + 1, and total + weights · value block used.

    following is the first key of block used + 1.
    """
    keys, values, turns, matrix, initial = shared
    first_scores = initial_scores(rows, shared, used + 1, following, CONSUMER, CONSUMERS)
    keys.wait_full(used + 1)
    values.wait_full(used)
    take_turn(turns, turn, CONSUMER)
    scores = begin_scores(rows, keys.buffer(used + 1), first_scores)
    total = warpgroup_mma(weights, values.buffer(used), total, is_async=True)
    scores, total = warpgroup_mma_wait(num_outstanding=0, deps=(scores, total))
    pass_turn(turns, CONSUMER, CONSUMERS)
    keys.release(used + 1)
    values.release(used)
    return scores, total


@gluon.jit
def multiply_last(
    weights, total, values, turns, used, turn, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr
):
    """In one turn: total + weights · value block used, the last one."""
    values.wait_full(used)
    take_turn(turns, turn, CONSUMER)
    total = warpgroup_mma(weights, values.buffer(used), total, is_async=True)
    pass_turn(turns, CONSUMER, CONSUMERS)
    total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
    values.release(used)
    return total


@gluon.jit
def begin_multiply(
    rows, weights, total, shared, used, turn, following, CONSUMER: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    """As multiply, but the total is still being added to."""
    keys, values, turns, matrix, initial = shared
    first_scores = initial_scores(rows, shared, used + 1, following, CONSUMER, CONSUMERS)
    keys.wait_full(used + 1)
    take_turn(turns, turn, CONSUMER)
    scores = begin_scores(rows, keys.buffer(used + 1), first_scores)
    values.wait_full(used)
    total = warpgroup_mma(weights, values.buffer(used), total, is_async=True)
    scores = warpgroup_mma_wait(num_outstanding=1, deps=(scores,))
    pass_turn(turns, CONSUMER, CONSUMERS)
    keys.release(used + 1)
    return scores, total
