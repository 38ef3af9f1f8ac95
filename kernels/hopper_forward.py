"""The forward kernel for Hopper, sm_90 (Gluon device code).

One program a multiprocessor takes tile after tile. A warpgroup copies queries, keys and values
by TMA; CONSUMERS warpgroups, BLOCK_Q queries each, take turns at the tensor cores, so that the
weights of one are computed while another multiplies.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sigjax.kernels.hopper_math import (
    PAIR,
    accumulator_layout,
    adaptive_weights,
    begin_adaptive,
    copy_rows,
    declare_adaptive,
    head_offset,
    new_ring,
    store_rows,
    store_zeros,
    uniform,
    unscale,
    weights_as_operand,
)
from sigjax.kernels.tile_math import LOG2_E


@gluon.jit
def hopper_forward_kernel(
    query_desc,  # [B, T, N * H], a block of BLOCK_Q rows of a head; ragged where there are lengths
    key_desc,  # [B, S, K * H], a block of BLOCK_K rows of a head; ragged likewise
    value_desc,  # as key_desc
    query_lengths_ptr,  # [B] int32, or None as the next three
    key_lengths_ptr,  # [B] int32
    order_ptr,  # [2 B] int32: schedule.py
    ends_ptr,  # [2 B + 1] int32
    sigmoid_bias_ptr,  # [B, N] float32, or None: -log(number of keys)
    key_bias_ptr,  # [B, S] float32, or None
    B,
    T,
    S,
    scale,  # factor of the logits
    output_ptr,  # [B, T, N, H]
    N: gl.constexpr,
    K: gl.constexpr,
    H: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    REGISTERS: gl.constexpr,  # of a consumer's thread
    IS_CAUSAL: gl.constexpr,
    MASKED: gl.constexpr,  # whether any key block needs a mask
    WEIGHTS: gl.constexpr,  # how they are computed: PAIR or ADAPTIVE, see hopper_math
    EARLY: gl.constexpr,  # whether weights are computed while the last ones are multiplied
    ROLLED: gl.constexpr,  # whether one loop goes over all key blocks: less code
):
    """One program: tiles of CONSUMERS * BLOCK_Q queries of one head over all their keys."""
    dtype: gl.constexpr = query_desc.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=16, rank=2
    )
    query = new_ring(dtype, CONSUMERS, BLOCK_Q, H, tile_layout, 1, CONSUMERS)
    keys = new_ring(dtype, STAGES, BLOCK_K, H, tile_layout, STAGES, CONSUMERS)
    values = new_ring(dtype, STAGES, BLOCK_K, H, tile_layout, STAGES, CONSUMERS)
    output_s = gl.allocate_shared_memory(dtype, [CONSUMERS, BLOCK_Q, H], tile_layout)
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(i), count=1)
    schedule = (query_lengths_ptr, key_lengths_ptr, order_ptr, ends_ptr, B, T, S)
    rings = (query, keys, values)
    biases = (sigmoid_bias_ptr, key_bias_ptr, scale)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (produce, (query_desc, key_desc, value_desc, rings, schedule, N, K, H, BLOCK_Q,
                           BLOCK_K, CONSUMERS, IS_CAUSAL)),
                (consume, (output_ptr, output_s, rings, turns, schedule, biases, N, H, BLOCK_Q,
                           BLOCK_K, CONSUMERS, IS_CAUSAL, MASKED, WEIGHTS, EARLY, ROLLED, 0)),
                (consume, (output_ptr, output_s, rings, turns, schedule, biases, N, H, BLOCK_Q,
                           BLOCK_K, CONSUMERS, IS_CAUSAL, MASKED, WEIGHTS, EARLY, ROLLED, 1)),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (produce, (query_desc, key_desc, value_desc, rings, schedule, N, K, H, BLOCK_Q,
                           BLOCK_K, CONSUMERS, IS_CAUSAL)),
                (consume, (output_ptr, output_s, rings, turns, schedule, biases, N, H, BLOCK_Q,
                           BLOCK_K, CONSUMERS, IS_CAUSAL, MASKED, WEIGHTS, EARLY, ROLLED, 0)),
                (consume, (output_ptr, output_s, rings, turns, schedule, biases, N, H, BLOCK_Q,
                           BLOCK_K, CONSUMERS, IS_CAUSAL, MASKED, WEIGHTS, EARLY, ROLLED, 1)),
                (consume, (output_ptr, output_s, rings, turns, schedule, biases, N, H, BLOCK_Q,
                           BLOCK_K, CONSUMERS, IS_CAUSAL, MASKED, WEIGHTS, EARLY, ROLLED, 2)),
            ],
            [4, 4, 4],
            [REGISTERS, REGISTERS, REGISTERS],
        )  # fmt: skip


@gluon.jit
def produce(
    query_desc, key_desc, value_desc, rings, schedule, N: gl.constexpr, K: gl.constexpr,
    H: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, CONSUMERS: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):  # fmt: skip
    """Copies what every tile of this program needs, as buffers come free."""
    query, keys, values = rings
    ROWS: gl.constexpr = CONSUMERS * BLOCK_Q
    IS_RAGGED: gl.constexpr = schedule[2] is not None
    T, S = schedule[5], schedule[6]
    tiles = tiles_of(schedule, N, ROWS)
    program = gl.program_id(0)
    position = 0
    copied = 0  # key blocks
    done = 0  # tiles
    while program < tiles:
        position, batch, head, start, query_length, key_length = tile_of(
            program, position, schedule, N, ROWS, IS_CAUSAL
        )
        if key_length > 0:
            query.wait_free(done)
            mbarrier.expect(query.full.index(0), CONSUMERS * query_desc.nbytes_per_cta)
            for i in gl.static_range(CONSUMERS):
                copy_rows(
                    query_desc, batch, start + i * BLOCK_Q, query_length, T, head * H,
                    query.full.index(0), query.buffers.index(i), BLOCK_Q, H, IS_RAGGED,
                )  # fmt: skip
            column = head // (N // K) * H
            inner, end = key_range(start, key_length, ROWS, BLOCK_K, IS_CAUSAL)
            for first in range(0, end, BLOCK_K):
                stage = copied % keys.stages
                keys.wait_free(copied)
                mbarrier.expect(keys.full.index(stage), key_desc.nbytes_per_cta)
                copy_rows(
                    key_desc, batch, first, key_length, S, column, keys.full.index(stage),
                    keys.buffer(copied), BLOCK_K, H, IS_RAGGED,
                )  # fmt: skip
                values.wait_free(copied)
                mbarrier.expect(values.full.index(stage), value_desc.nbytes_per_cta)
                copy_rows(
                    value_desc, batch, first, key_length, S, column, values.full.index(stage),
                    values.buffer(copied), BLOCK_K, H, IS_RAGGED,
                )  # fmt: skip
                copied += 1
            done += 1
        program += gl.num_programs(0)


@gluon.jit
def consume(
    output_ptr, output_s, rings, turns, schedule, biases, N: gl.constexpr, H: gl.constexpr,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, CONSUMERS: gl.constexpr,
    IS_CAUSAL: gl.constexpr, MASKED: gl.constexpr, WEIGHTS: gl.constexpr, EARLY: gl.constexpr,
    ROLLED: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Computes BLOCK_Q rows of every tile of this program."""
    query, keys, values = rings
    sigmoid_bias_ptr, key_bias_ptr, scale = biases
    T, S = schedule[5], schedule[6]
    dtype: gl.constexpr = output_s.dtype
    ROWS: gl.constexpr = CONSUMERS * BLOCK_Q
    scores_layout: gl.constexpr = accumulator_layout(BLOCK_K)
    output_layout: gl.constexpr = accumulator_layout(H)
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, output_layout, 2)
    factor = -scale * LOG2_E
    tiles = tiles_of(schedule, N, ROWS)
    program = gl.program_id(0)
    used = 0  # key blocks
    done = 0  # tiles
    turn = 0
    position = 0
    if WEIGHTS != PAIR:
        program = declare_adaptive(program, CONSUMER)
    position, batch, head, start, query_length, key_length = tile_of(
        program, position, schedule, N, ROWS, IS_CAUSAL
    )
    while program < tiles:
        row = start + CONSUMER * BLOCK_Q
        result_ptr = output_ptr + ((batch.to(gl.int64) * T + row) * N + head) * H
        # The next tile is looked up while this one's last product runs.
        next_program = program + gl.num_programs(0)
        lookup = gl.minimum(next_program, tiles - 1)
        if key_length > 0:
            offset = head_offset(sigmoid_bias_ptr, batch * N + head, key_length)
            inner, end = key_range(start, key_length, ROWS, BLOCK_K, IS_CAUSAL)
            if not MASKED:
                inner = end
            if WEIGHTS != PAIR:
                inner = begin_adaptive(inner, CONSUMER)
            query.wait_full(done)
            rows = query.buffers.index(CONSUMER)
            keys.wait_full(used)
            take_turn(turns, turn, CONSUMER)
            scores = gl.zeros([BLOCK_Q, BLOCK_K], gl.float32, layout=scores_layout)
            scores = warpgroup_mma(
                rows, keys.buffer(used).permute((1, 0)), scores, use_acc=False, is_async=True
            )
            scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))
            pass_turn(turns, CONSUMER, CONSUMERS)
            turn += 1
            keys.release(used)
            if ROLLED:
                total = gl.zeros([BLOCK_Q, H], gl.float32, layout=output_layout)
                for first in range(0, end, BLOCK_K):
                    t = logits(scores, first, batch, key_length, factor, offset, key_bias_ptr, S)
                    if MASKED:
                        if first + BLOCK_K > inner:
                            t = masked(t, first, row, key_length, IS_CAUSAL)
                    weights = as_operand_of(t, operand_layout, dtype, WEIGHTS, CONSUMER)
                    if first + BLOCK_K < end:
                        scores, total = multiply(
                            rows, weights, total, keys, values, turns, used, turn, CONSUMER,
                            CONSUMERS,
                        )  # fmt: skip
                    else:
                        total = multiply_last(
                            weights, total, values, turns, used, turn, CONSUMER, CONSUMERS
                        )
                    used += 1
                    turn += 1
                query.release(done)
                next_position, next_batch, next_head, next_start, next_queries, next_keys = tile_of(
                    lookup, position, schedule, N, ROWS, IS_CAUSAL
                )
            else:
                t = logits(scores, 0, batch, key_length, factor, offset, key_bias_ptr, S)
                if MASKED:
                    if inner < BLOCK_K:
                        t = masked(t, 0, row, key_length, IS_CAUSAL)
                weights = as_operand_of(t, operand_layout, dtype, WEIGHTS, CONSUMER)
                total = gl.zeros([BLOCK_Q, H], gl.float32, layout=output_layout)
                for first in range(BLOCK_K, inner, BLOCK_K):
                    if EARLY:
                        scores, total = begin_multiply(
                            rows,
                            weights,
                            total,
                            keys,
                            values,
                            turns,
                            used,
                            turn,
                            CONSUMER,
                            CONSUMERS,
                        )
                    else:
                        scores, total = multiply(
                            rows,
                            weights,
                            total,
                            keys,
                            values,
                            turns,
                            used,
                            turn,
                            CONSUMER,
                            CONSUMERS,
                        )
                    t = logits(scores, first, batch, key_length, factor, offset, key_bias_ptr, S)
                    following = as_operand_of(t, operand_layout, dtype, WEIGHTS, CONSUMER)
                    if EARLY:
                        # A wait ends a basic block: ptxas would move the next one up.
                        take_turn(turns, turn + 1, CONSUMER)
                        total, weights = warpgroup_mma_wait(
                            num_outstanding=0, deps=(total, following)
                        )
                        values.release(used)
                    else:
                        weights = following
                    used += 1
                    turn += 1
                if MASKED:
                    for first in range(gl.maximum(inner, BLOCK_K), end, BLOCK_K):
                        scores, total = multiply(
                            rows,
                            weights,
                            total,
                            keys,
                            values,
                            turns,
                            used,
                            turn,
                            CONSUMER,
                            CONSUMERS,
                        )
                        t = logits(
                            scores, first, batch, key_length, factor, offset, key_bias_ptr, S
                        )
                        t = masked(t, first, row, key_length, IS_CAUSAL)
                        weights = as_operand_of(t, operand_layout, dtype, WEIGHTS, CONSUMER)
                        used += 1
                        turn += 1
                query.release(done)
                next_position, next_batch, next_head, next_start, next_queries, next_keys = tile_of(
                    lookup, position, schedule, N, ROWS, IS_CAUSAL
                )
                values.wait_full(used)
                take_turn(turns, turn, CONSUMER)
                total = warpgroup_mma(weights, values.buffer(used), total, is_async=True)
                pass_turn(turns, CONSUMER, CONSUMERS)
                turn += 1
                total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
                values.release(used)
                used += 1
            done += 1
            output_s.index(CONSUMER).store(unscale(total, dtype).to(dtype))
            store_rows(result_ptr, output_s.index(CONSUMER), row, T, query_length, N * H)
        else:
            next_position, next_batch, next_head, next_start, next_queries, next_keys = tile_of(
                lookup, position, schedule, N, ROWS, IS_CAUSAL
            )
            store_zeros(result_ptr, row, T, dtype, N * H, BLOCK_Q, H)
        position, batch, head = next_position, next_batch, next_head
        start, query_length, key_length = next_start, next_queries, next_keys
        program = next_program


@gluon.jit
def as_operand_of(
    t, layout: gl.constexpr, dtype: gl.constexpr, WEIGHTS: gl.constexpr, CONSUMER: gl.constexpr
):
    """The weights of t in the registers of a product."""
    if WEIGHTS == PAIR:
        return gl.convert_layout(weights_as_operand(t, dtype), layout)
    else:
        return gl.convert_layout(adaptive_weights(t, CONSUMER), layout)


@gluon.jit
def multiply(
    rows, weights, total, keys, values, turns, used, turn,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """In one turn: the scores of key block used + 1, and total + weights · value block used."""
    scores_layout: gl.constexpr = accumulator_layout(keys.buffers.shape[1])
    keys.wait_full(used + 1)
    values.wait_full(used)
    take_turn(turns, turn, CONSUMER)
    scores = gl.zeros([rows.shape[0], keys.buffers.shape[1]], gl.float32, layout=scores_layout)
    scores = warpgroup_mma(
        rows, keys.buffer(used + 1).permute((1, 0)), scores, use_acc=False, is_async=True
    )
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
    rows, weights, total, keys, values, turns, used, turn,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """As multiply, but the total is still being added to."""
    scores_layout: gl.constexpr = accumulator_layout(keys.buffers.shape[1])
    keys.wait_full(used + 1)
    take_turn(turns, turn, CONSUMER)
    scores = gl.zeros([rows.shape[0], keys.buffers.shape[1]], gl.float32, layout=scores_layout)
    scores = warpgroup_mma(
        rows, keys.buffer(used + 1).permute((1, 0)), scores, use_acc=False, is_async=True
    )
    values.wait_full(used)
    total = warpgroup_mma(weights, values.buffer(used), total, is_async=True)
    scores = warpgroup_mma_wait(num_outstanding=1, deps=(scores,))
    pass_turn(turns, CONSUMER, CONSUMERS)
    keys.release(used + 1)
    return scores, total


@gluon.jit
def logits(scores, first, batch, key_length, factor, offset, key_bias_ptr, S):
    """Scores [BLOCK_Q, BLOCK_K] to t = -log2(exp(logit))."""
    t = gl.fma(scores, factor, offset)
    if key_bias_ptr is not None:
        layout: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
        keys = first + gl.arange(0, scores.shape[1], layout=layout)
        bias = gl.load(
            key_bias_ptr + batch.to(gl.int64) * S + keys, mask=keys < key_length, other=0.0
        )
        t -= (bias * LOG2_E)[None, :]
    return t


@gluon.jit
def masked(t, first, row, key_length, IS_CAUSAL: gl.constexpr):
    """T with inf, a weight of 0, where a pair takes no part."""
    columns = gl.arange(0, t.shape[1], layout=gl.SliceLayout(0, t.type.layout))
    limit = key_length - first
    if IS_CAUSAL:
        # One comparison an element: how many keys of the block each row may see.
        rows = gl.arange(0, t.shape[0], layout=gl.SliceLayout(1, t.type.layout))
        limit = gl.minimum(limit, row - first + 1 + rows)
        return gl.where(columns[None, :] < limit[:, None], t, float("inf"))
    else:
        return gl.where((columns < limit)[None, :], t, float("inf"))


@gluon.jit
def take_turn(turns, turn, CONSUMER: gl.constexpr):
    """Waits for the tensor cores; consumer 0 begins."""
    begins: gl.constexpr = 1 if CONSUMER == 0 else 0
    mbarrier.wait(turns.index(CONSUMER), (turn & 1) ^ begins)


@gluon.jit
def pass_turn(turns, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """Lets the next consumer have the tensor cores."""
    mbarrier.arrive(turns.index((CONSUMER + 1) % CONSUMERS), count=1)


@gluon.jit
def key_range(
    start, key_length, ROWS: gl.constexpr, BLOCK_K: gl.constexpr, IS_CAUSAL: gl.constexpr
):
    """(inner, end): key blocks below inner need no mask, those from inner to end do."""
    inner = key_length // BLOCK_K * BLOCK_K
    end = key_length
    if IS_CAUSAL:
        inner = gl.minimum(inner, (start + 1) // BLOCK_K * BLOCK_K)
        end = gl.minimum(end, start + ROWS)
    return inner, end


@gluon.jit
def tiles_of(schedule, N: gl.constexpr, ROWS: gl.constexpr):
    """Number of tiles of all heads and sequences."""
    return gl.cdiv(schedule[5], ROWS) * N * schedule[4]


@gluon.jit
def tile_of(
    program, position, schedule, N: gl.constexpr, ROWS: gl.constexpr, IS_CAUSAL: gl.constexpr
):
    """(position, batch, head, first query, query length, key length) of one tile.

    The key length of a tile of padding is 0. Without lengths a head's tiles are neighbours, to
    share L2; with lengths the longest sequences come first, see schedule.py, and position is
    where in the order to look from on.
    """
    query_lengths_ptr, key_lengths_ptr, order_ptr, ends_ptr, B, T, S = schedule
    per_head = gl.cdiv(T, ROWS)
    if order_ptr is None:
        tile = program % per_head
        head = program // per_head
        batch = head // N
        head = head % N
        query_length = gl.to_tensor(T)
        key_length = gl.to_tensor(S)
        used = gl.to_tensor(per_head)
        first = tile * 0
    else:
        end = gl.load(ends_ptr + position + 1)
        while program >= end:
            position += 1
            end = gl.load(ends_ptr + position + 1)
        tile = program - gl.load(ends_ptr + position)
        batch = uniform(gl.load(order_ptr + position))
        query_length = uniform(gl.load(query_lengths_ptr + batch))
        key_length = uniform(gl.load(key_lengths_ptr + batch))
        used = gl.cdiv(query_length, ROWS)
        if key_length <= 0:
            used = used * 0
        first = used * 0
        if position >= B:
            first = used
            used = per_head - used
            key_length = key_length * 0
        head = tile // used
        tile = tile - head * used
    if IS_CAUSAL:
        # Every other head from the end, so that a program gets long and short tiles.
        if head % 2 == 0:
            tile = used - 1 - tile
    start = uniform((first + tile) * ROWS)
    return uniform(position), uniform(batch), uniform(head), start, query_length, key_length
