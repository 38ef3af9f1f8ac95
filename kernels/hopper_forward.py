"""The forward kernel for Hopper, sm_90 (Gluon device code).

One program a multiprocessor takes tile after tile. A warpgroup copies queries, keys and values
by TMA; CONSUMERS warpgroups, BLOCK_Q queries each, take turns at the tensor cores, so that the
weights of one are computed while another multiplies; or, with EARLY, its own last ones are.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from sigjax.kernels.hopper_keys import add_keys, pass_blocks, skip_keys
from sigjax.kernels.hopper_math import (
    copy_rows,
    fill,
    new_ring,
)
from sigjax.kernels.hopper_matrix import bias_factor, fill_pairs, new_matrix_ring
from sigjax.kernels.hopper_outputs import BY_TMA, FROM_REGISTERS, store_no_outputs, store_outputs
from sigjax.kernels.hopper_pairs import fill_values
from sigjax.kernels.hopper_queue import ask, new_queue
from sigjax.kernels.hopper_tiles import (
    own_keys,
    tile_after,
    tile_keys,
    tile_of,
    tiles_of,
)
from sigjax.kernels.hopper_turns import decide, new_turns, turns_of_all
from sigjax.kernels.hopper_weights import ADAPTIVE, declare_adaptive, declare_kept, unscale


@gluon.jit
def hopper_forward_kernel(
    query_desc,  # [B, T, N * H], a block of BLOCK_Q rows of a head; ragged where there are lengths
    key_desc,  # [B, S, K * H], a block of BLOCK_K rows of a head; ragged likewise
    value_desc,  # as key_desc
    counter_ptr,  # [1] int32, 0: counts tiles but the programs' first ones; or None
    output_desc,  # [B, T, N * H], blocks as the query's: where OUTPUT is BY_TMA, or None
    matrix_desc,  # [matrices, T, S] bias or mask, a block of BLOCK_Q rows, BLOCK_K keys; or None
    query_lengths_ptr,  # [B] int32, or None as the next three
    key_lengths_ptr,  # [B] int32
    order_ptr,  # [2 B] int32: schedule.py
    ends_ptr,  # [2 B + 1] int32
    sigmoid_bias_ptr,  # [B, N] float32, or None: -log(number of keys)
    key_bias_ptr,  # [.., .., blocks, BLOCK_K] float32: hopper_launch._key_bias; or None
    score_bias_ptr,  # scores begin with it: [.., .., blocks, 2 BLOCK_K], _for_scores; or None
    query_segments_ptr,  # [B, T] int32, 0 and below is padding; or None as the next three
    key_segments_ptr,  # [B, S] int32
    row_bias_ptr,  # [B, T] float32, in the place of sigmoid_bias
    ranges_ptr,  # [B, blocks of BLOCK_Q queries, 3] int32: segments.tile_ranges
    B,
    T,
    S,
    scale,  # factor of the logits
    output_ptr,  # [B, T, N, H]; None where OUTPUT is BY_TMA
    N: gl.constexpr,
    K: gl.constexpr,
    H: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    QUERY_STAGES: gl.constexpr,  # with 2 the next tile's queries arrive early
    MATRIX_STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    REGISTERS: gl.constexpr,  # of a consumer's thread
    IS_CAUSAL: gl.constexpr,
    LEFT: gl.constexpr,  # window: query - LEFT <= key <= query + RIGHT; None is no bound
    RIGHT: gl.constexpr,  # 0 where IS_CAUSAL
    MASKED: gl.constexpr,  # whether any key block needs a mask
    WEIGHTS: gl.constexpr,  # how they are computed, see hopper_weights
    TURNS: gl.constexpr,  # when consumers take turns at the tensor cores, see hopper_turns
    EARLY: gl.constexpr,  # whether weights are computed while the last ones are multiplied
    FEW: gl.constexpr,  # keys of a sequence below which ADAPTIVE is PAIR
    DEVIATIONS: gl.constexpr,  # how it is chosen elsewhere, see hopper_weights.exceeds_ptx
    KEY_AXES: gl.constexpr,  # whether a bias per key has axes (B, N); None without it
    OUTPUT: gl.constexpr,  # how outputs are stored, see hopper_outputs
    MATRIX: gl.constexpr,  # where the bias or mask comes in: hopper_matrix.IN_LOGITS..
    MATRIX_AXES: gl.constexpr,  # whether the matrices have axes (B, N)
    SHARERS: gl.constexpr,  # see hopper_tiles.tile_of
):
    """One program: tiles of CONSUMERS * BLOCK_Q queries of one head over all their keys."""
    dtype: gl.constexpr = query_desc.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=16, rank=2
    )
    # At 128 without: 873 instructions a block for 880, + 1 %.
    BY_MASK: gl.constexpr = STAGES > 2
    query = new_ring(
        dtype, QUERY_STAGES * CONSUMERS, BLOCK_Q, H, tile_layout, QUERY_STAGES, CONSUMERS, BY_MASK
    )
    keys = new_ring(dtype, STAGES, BLOCK_K, H, tile_layout, STAGES, CONSUMERS, BY_MASK)
    values = new_ring(dtype, STAGES, BLOCK_K, H, tile_layout, STAGES, CONSUMERS, BY_MASK)
    if matrix_desc is None:
        matrix: gl.constexpr = None
    else:
        matrix = new_matrix_ring(
            matrix_desc.dtype, BLOCK_Q, BLOCK_K, MATRIX_STAGES, CONSUMERS, MATRIX
        )
    if OUTPUT == FROM_REGISTERS:
        output_s: gl.constexpr = None
    else:
        output_s = gl.allocate_shared_memory(dtype, [CONSUMERS, BLOCK_Q, H], tile_layout)
    outputs = (output_desc, output_ptr, output_s)
    turns = new_turns(TURNS, QUERY_STAGES, CONSUMERS)
    if counter_ptr is None:
        queue: gl.constexpr = None
    else:
        queue = new_queue(counter_ptr, CONSUMERS)
    schedule = (query_lengths_ptr, key_lengths_ptr, order_ptr, ends_ptr, B, T, S)
    rings = (query, keys, values, matrix)
    descs = (query_desc, key_desc, value_desc, matrix_desc)
    biases = (sigmoid_bias_ptr, row_bias_ptr, key_bias_ptr, score_bias_ptr, scale)
    segments = (query_segments_ptr, key_segments_ptr, ranges_ptr)
    if key_segments_ptr is None:
        cleared: gl.constexpr = None
    else:
        # Of the producer alone: value blocks with padding.
        cleared = mbarrier.allocate_mbarrier()
        mbarrier.init(cleared, count=1)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (produce, (descs, rings, queue, schedule, segments, cleared, N, K, H, BLOCK_Q,
                           BLOCK_K, CONSUMERS, IS_CAUSAL, LEFT, RIGHT, MATRIX_AXES, SHARERS)),
                (consume, (outputs, rings, turns, queue, schedule, biases, segments, N, H,
                           BLOCK_Q, BLOCK_K, CONSUMERS, IS_CAUSAL, LEFT, RIGHT, MASKED, WEIGHTS,
                           EARLY, FEW, DEVIATIONS, KEY_AXES, OUTPUT, SHARERS, 0)),
                (consume, (outputs, rings, turns, queue, schedule, biases, segments, N, H,
                           BLOCK_Q, BLOCK_K, CONSUMERS, IS_CAUSAL, LEFT, RIGHT, MASKED, WEIGHTS,
                           EARLY, FEW, DEVIATIONS, KEY_AXES, OUTPUT, SHARERS, 1)),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (produce, (descs, rings, queue, schedule, segments, cleared, N, K, H, BLOCK_Q,
                           BLOCK_K, CONSUMERS, IS_CAUSAL, LEFT, RIGHT, MATRIX_AXES, SHARERS)),
                (consume, (outputs, rings, turns, queue, schedule, biases, segments, N, H,
                           BLOCK_Q, BLOCK_K, CONSUMERS, IS_CAUSAL, LEFT, RIGHT, MASKED, WEIGHTS,
                           EARLY, FEW, DEVIATIONS, KEY_AXES, OUTPUT, SHARERS, 0)),
                (consume, (outputs, rings, turns, queue, schedule, biases, segments, N, H,
                           BLOCK_Q, BLOCK_K, CONSUMERS, IS_CAUSAL, LEFT, RIGHT, MASKED, WEIGHTS,
                           EARLY, FEW, DEVIATIONS, KEY_AXES, OUTPUT, SHARERS, 1)),
                (consume, (outputs, rings, turns, queue, schedule, biases, segments, N, H,
                           BLOCK_Q, BLOCK_K, CONSUMERS, IS_CAUSAL, LEFT, RIGHT, MASKED, WEIGHTS,
                           EARLY, FEW, DEVIATIONS, KEY_AXES, OUTPUT, SHARERS, 2)),
            ],
            [4, 4, 4],
            [REGISTERS, REGISTERS, REGISTERS],
        )  # fmt: skip


@gluon.jit
def produce(
    descs, rings, queue, schedule, segments, cleared, N: gl.constexpr, K: gl.constexpr,
    H: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, CONSUMERS: gl.constexpr,
    IS_CAUSAL: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, MATRIX_AXES: gl.constexpr,
    SHARERS: gl.constexpr,
):  # fmt: skip
    """Copies what every tile of this program needs, as buffers come free."""
    query_segments_ptr, key_segments_ptr, ranges_ptr = segments
    query, keys, values, matrix = rings
    query_desc, key_desc, value_desc, matrix_desc = descs
    ROWS: gl.constexpr = CONSUMERS * BLOCK_Q
    IS_RAGGED: gl.constexpr = schedule[2] is not None
    T, S = schedule[5], schedule[6]
    tiles = tiles_of(schedule, N, ROWS)
    program = gl.program_id(0)
    position = 0
    copied = 0  # key blocks
    done = 0  # tiles with keys
    taken = 0  # tiles
    phase = 0  # of cleared
    while program < tiles:
        following = ask(queue, program, taken)
        taken += 1
        position, batch, head, start, query_length, key_length = tile_of(
            program, position, schedule, N, ROWS, IS_CAUSAL, SHARERS
        )
        some, begin, end = tile_keys(
            (batch, start, query_length, key_length), schedule, ranges_ptr, BLOCK_Q, BLOCK_K,
            CONSUMERS, LEFT, RIGHT,
        )  # fmt: skip
        if some:
            query.wait_free(done)
            stage = done % query.stages
            mbarrier.expect(query.full.index(stage), CONSUMERS * query_desc.nbytes_per_cta)
            for i in gl.static_range(CONSUMERS):
                copy_rows(
                    query_desc, batch, start + i * BLOCK_Q, query_length, T, head * H,
                    query.full.index(stage), query.buffers.index(stage * CONSUMERS + i), BLOCK_Q,
                    H, IS_RAGGED,
                )  # fmt: skip
            column = head // (N // K) * H
            for first in range(begin, end, BLOCK_K):
                fill(
                    keys, copied, key_desc, batch, first, key_length, S, column, BLOCK_K, H,
                    IS_RAGGED,
                )  # fmt: skip
                if matrix is not None:
                    fill_pairs(
                        matrix, copied, matrix_desc, batch, head, start, first, N, BLOCK_Q,
                        CONSUMERS, MATRIX_AXES,
                    )  # fmt: skip
                if key_segments_ptr is None:
                    fill(
                        values, copied, value_desc, batch, first, key_length, S, column, BLOCK_K,
                        H, IS_RAGGED,
                    )  # fmt: skip
                else:
                    phase = fill_values(
                        values, copied, key_segments_ptr, cleared, phase, value_desc, batch,
                        first, key_length, S, column, BLOCK_K, H, IS_RAGGED,
                    )  # fmt: skip
                copied += 1
            done += 1
        program = following


@gluon.jit
def consume(
    outputs, rings, turns, queue, schedule, biases, segments, N: gl.constexpr,
    H: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, CONSUMERS: gl.constexpr,
    IS_CAUSAL: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, MASKED: gl.constexpr,
    WEIGHTS: gl.constexpr, EARLY: gl.constexpr, FEW: gl.constexpr, DEVIATIONS: gl.constexpr,
    KEY_AXES: gl.constexpr, OUTPUT: gl.constexpr, SHARERS: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Computes BLOCK_Q rows of every tile of this program."""
    query, keys, values, matrix = rings
    T, S = schedule[5], schedule[6]
    dtype: gl.constexpr = query.buffers.dtype
    ROWS: gl.constexpr = CONSUMERS * BLOCK_Q
    SPARSE: gl.constexpr = LEFT is not None or segments[2] is not None
    shared = (keys, values, turns_of_all(turns), matrix, bias_factor(matrix, biases[4]))
    tiles = tiles_of(schedule, N, ROWS)
    program = gl.program_id(0)
    used = 0  # key blocks
    done = 0  # tiles with keys
    taken = 0  # tiles
    turn = 0
    position = 0
    if WEIGHTS == ADAPTIVE:
        program = declare_adaptive(program, CONSUMER)
        if EARLY:
            program = declare_kept(program, CONSUMER)
    work = (schedule, N, ROWS, IS_CAUSAL, SHARERS)
    following = tile_after(None, 0, program, position, tiles, work)
    while program < tiles:
        position, batch, head, start, query_length, key_length = following[0]
        if queue is None:
            program += gl.num_programs(0)
        upcoming = (queue, taken, program, position, tiles, work)
        row = start + CONSUMER * BLOCK_Q
        tile = (batch, start, query_length, key_length)
        some, begin, end = tile_keys(
            tile, schedule, segments[2], BLOCK_Q, BLOCK_K, CONSUMERS, LEFT, RIGHT
        )
        own = own_keys(tile, row, begin, end, schedule, segments[2], BLOCK_Q, BLOCK_K, LEFT, RIGHT)
        computes = some & (row < query_length)
        if SPARSE:
            computes = own[3] > 0
        if computes:
            query.wait_full(done)
            if SPARSE:
                # Each block of the tile costs every consumer a turn and two releases.
                used, turn = pass_blocks(shared, used, turn, begin, own[0], CONSUMER, CONSUMERS)
            total, used, turn, following = add_keys(
                query.buffers.index(done % query.stages * CONSUMERS + CONSUMER), shared,
                (turns, done), used, turn, biases, segments,
                (batch, head, row, query_length, key_length, own, T, S), upcoming, N, H, MASKED,
                LEFT, RIGHT, WEIGHTS, EARLY, FEW, DEVIATIONS, KEY_AXES, CONSUMER, CONSUMERS,
            )  # fmt: skip
            if SPARSE:
                after = gl.cdiv(own[3], BLOCK_K) * BLOCK_K
                used, turn = pass_blocks(shared, used, turn, after, end, CONSUMER, CONSUMERS)
            query.release(done)
            done += 1
            total = unscale(total, dtype)
            store_outputs(outputs, total, batch, row, query_length, head, T, N, OUTPUT, CONSUMER)
        else:
            if some:
                # A release counts for the tile that the buffer holds.
                query.wait_full(done)
                decide((turns, done), False, CONSUMER, CONSUMERS)
                query.release(done)
                done += 1
                used, turn = skip_keys(shared, used, turn, begin, end, CONSUMER, CONSUMERS)
            store_no_outputs(outputs, batch, row, head, T, N, H, BLOCK_Q, OUTPUT, CONSUMER)
            following = tile_after(queue, taken, program, position, tiles, work)
        program = following[1]
        taken += 1
    if OUTPUT == BY_TMA:
        tma.store_wait(0)
