"""The forward kernel for Hopper, sm_90 (Gluon device code).

One program a multiprocessor takes tile after tile. A warpgroup copies queries, keys and values
by TMA; CONSUMERS warpgroups, BLOCK_Q queries each, take turns at the tensor cores, so that the
weights of one are computed while another multiplies; or, with EARLY, its own last ones are.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from sigjax.kernels.hopper_keys import Shared, add_keys, pass_blocks, skip_keys
from sigjax.kernels.hopper_math import (
    copy_rows,
    fill,
    new_ring,
)
from sigjax.kernels.hopper_matrix import Initial, bias_factor, fill_pairs, new_matrix_ring
from sigjax.kernels.hopper_outputs import (
    BY_TMA,
    FROM_REGISTERS,
    Outputs,
    store_no_outputs,
    store_outputs,
)
from sigjax.kernels.hopper_pairs import fill_values
from sigjax.kernels.hopper_queue import ask, new_queue
from sigjax.kernels.hopper_tiles import (
    Schedule,
    Upcoming,
    own_keys,
    tile_after,
    tile_keys,
    tile_of,
    tiles_of,
)
from sigjax.kernels.hopper_turns import Agreement, decide, new_turns, turns_of_all
from sigjax.kernels.hopper_weights import ADAPTIVE, declare_adaptive, declare_kept, unscale


class Options(NamedTuple):
    """The constants of a launch; hopper_forward_kernel says what they are."""

    N: Any
    K: Any
    H: Any
    BLOCK_Q: Any
    BLOCK_K: Any
    CONSUMERS: Any
    IS_CAUSAL: Any
    LEFT: Any
    RIGHT: Any
    MASKED: Any
    WEIGHTS: Any
    EARLY: Any
    FEW: Any
    DEVIATIONS: Any
    KEY_AXES: Any
    OUTPUT: Any
    MATRIX_AXES: Any
    SHARERS: Any


class Rings(NamedTuple):
    """Buffers in shared memory that the producer fills."""

    query: Any
    key: Any
    value: Any
    matrix: Any  # of a bias or mask, or None


class Descs(NamedTuple):
    """From where the producer copies."""

    query: Any
    key: Any
    value: Any
    matrix: Any


class Biases(NamedTuple):
    """The scale of the logits, and pointers to what is added besides a matrix of pairs, or None."""

    sigmoid_bias_ptr: Any
    row_bias_ptr: Any
    key_bias_ptr: Any
    score_bias_ptr: Any
    scale: Any


class Segments(NamedTuple):
    """Packed rows, or None."""

    query_ptr: Any
    key_ptr: Any
    ranges_ptr: Any


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
    key_bias_ptr,  # [.., .., blocks, BLOCK_K] float32: hopper_launch._key_bias_of_blocks; or None
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
    DEVIATIONS: gl.constexpr,  # how it is chosen elsewhere, of few and of many keys: has_large
    KEY_AXES: gl.constexpr,  # whether a bias per key has axes (B, N); None without it
    OUTPUT: gl.constexpr,  # how outputs are stored, see hopper_outputs
    MATRIX: gl.constexpr,  # where the bias or mask comes in: hopper_matrix.IN_LOGITS..
    MATRIX_AXES: gl.constexpr,  # whether the matrices have axes (B, N)
    SHARERS: gl.constexpr,  # see hopper_tiles.tile_of
):
    """One program: tiles of CONSUMERS * BLOCK_Q queries of one head over all their keys."""
    # Constants stay so in a constexpr and as arguments, not in a variable's tuple.
    options: gl.constexpr = Options(
        N, K, H, BLOCK_Q, BLOCK_K, CONSUMERS, IS_CAUSAL, LEFT, RIGHT, MASKED, WEIGHTS, EARLY, FEW,
        DEVIATIONS, KEY_AXES, OUTPUT, MATRIX_AXES, SHARERS,
    )  # fmt: skip
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
    outputs = Outputs(output_desc, output_ptr, output_s)
    turns = new_turns(TURNS, QUERY_STAGES, CONSUMERS)
    if counter_ptr is None:
        queue: gl.constexpr = None
    else:
        queue = new_queue(counter_ptr, CONSUMERS)
    schedule = Schedule(query_lengths_ptr, key_lengths_ptr, order_ptr, ends_ptr, B, T, S)
    rings = Rings(query, keys, values, matrix)
    descs = Descs(query_desc, key_desc, value_desc, matrix_desc)
    biases = Biases(sigmoid_bias_ptr, row_bias_ptr, key_bias_ptr, score_bias_ptr, scale)
    segments = Segments(query_segments_ptr, key_segments_ptr, ranges_ptr)
    if key_segments_ptr is None:
        cleared: gl.constexpr = None
    else:
        # Of the producer alone: value blocks with padding.
        cleared = mbarrier.allocate_mbarrier()
        mbarrier.init(cleared, count=1)
    common = (rings, queue, schedule, segments)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (produce, (descs, cleared, common, options)),
                (consume, (outputs, turns, biases, common, options, 0)),
                (consume, (outputs, turns, biases, common, options, 1)),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (produce, (descs, cleared, common, options)),
                (consume, (outputs, turns, biases, common, options, 0)),
                (consume, (outputs, turns, biases, common, options, 1)),
                (consume, (outputs, turns, biases, common, options, 2)),
            ],
            [4, 4, 4],
            [REGISTERS, REGISTERS, REGISTERS],
        )


@gluon.jit
def produce(descs, cleared, common, options):
    """Copies what every tile of this program needs, as buffers come free."""
    rings, queue, schedule, segments = common
    query, keys, values, matrix = rings
    H: gl.constexpr = options.H
    BLOCK_Q: gl.constexpr = options.BLOCK_Q
    BLOCK_K: gl.constexpr = options.BLOCK_K
    CONSUMERS: gl.constexpr = options.CONSUMERS
    IS_RAGGED: gl.constexpr = schedule.order_ptr is not None
    T, S = schedule.T, schedule.S
    tiles = tiles_of(schedule, options)
    program = gl.program_id(0)
    position = 0
    copied = 0  # key blocks
    done = 0  # tiles with keys
    taken = 0  # tiles
    phase = 0  # of cleared
    while program < tiles:
        following = ask(queue, program, taken)
        taken += 1
        tile = tile_of(program, position, schedule, options)
        position, batch, key_length = tile.position, tile.batch, tile.key_length
        some, begin, end = tile_keys(tile, schedule, segments.ranges_ptr, options)
        if some:
            query.wait_free(done)
            stage = done % query.stages
            mbarrier.expect(query.full.index(stage), CONSUMERS * descs.query.nbytes_per_cta)
            for i in gl.static_range(CONSUMERS):
                copy_rows(
                    descs.query, batch, tile.start + i * BLOCK_Q, tile.query_length, T,
                    tile.head * H, query.full.index(stage),
                    query.buffers.index(stage * CONSUMERS + i), BLOCK_Q, H, IS_RAGGED,
                )  # fmt: skip
            column = tile.head // (options.N // options.K) * H
            for first in range(begin, end, BLOCK_K):
                fill(
                    keys, copied, descs.key, batch, first, key_length, S, column, BLOCK_K, H,
                    IS_RAGGED,
                )  # fmt: skip
                if matrix is not None:
                    fill_pairs(matrix, copied, descs.matrix, tile, first, options)
                if segments.key_ptr is None:
                    fill(
                        values, copied, descs.value, batch, first, key_length, S, column, BLOCK_K,
                        H, IS_RAGGED,
                    )  # fmt: skip
                else:
                    phase = fill_values(
                        values, copied, segments.key_ptr, cleared, phase, descs.value, batch,
                        first, key_length, S, column, BLOCK_K, H, IS_RAGGED,
                    )  # fmt: skip
                copied += 1
            done += 1
        program = following


@gluon.jit
def consume(outputs, turns, biases, common, options, CONSUMER: gl.constexpr):
    """Computes BLOCK_Q rows of every tile of this program."""
    rings, queue, schedule, segments = common
    query, keys, values, matrix = rings
    CONSUMERS: gl.constexpr = options.CONSUMERS
    T = schedule.T
    SPARSE: gl.constexpr = options.LEFT is not None or segments.ranges_ptr is not None
    initial = Initial(bias_factor(matrix, biases.scale), biases.score_bias_ptr, None, None)
    shared = Shared(keys, values, turns_of_all(turns), matrix, initial)
    tiles = tiles_of(schedule, options)
    program = gl.program_id(0)
    used = 0  # key blocks
    done = 0  # tiles with keys
    taken = 0  # tiles
    turn = 0
    position = 0
    if options.WEIGHTS == ADAPTIVE:
        program = declare_adaptive(program, CONSUMER)
        if options.EARLY:
            program = declare_kept(program, CONSUMER)
    # The first tile is the program's own, with a queue too.
    following = tile_after(Upcoming(None, 0, program, position, tiles, schedule), options)
    while program < tiles:
        tile = following[0]
        if queue is None:
            program += gl.num_programs(0)
        position = tile.position
        upcoming = Upcoming(queue, taken, program, position, tiles, schedule)
        row = tile.start + CONSUMER * options.BLOCK_Q
        some, begin, end = tile_keys(tile, schedule, segments.ranges_ptr, options)
        own = own_keys(tile, row, begin, end, schedule, segments.ranges_ptr, options)
        computes = some & (row < tile.query_length)
        if SPARSE:
            computes = own.end > 0
        if computes:
            query.wait_full(done)
            if SPARSE:
                # Each block of the tile costs every consumer a turn and two releases.
                used, turn = pass_blocks(shared, used, turn, begin, own.begin, options, CONSUMER)
            total, used, turn, following = add_keys(
                query.buffers.index(done % query.stages * CONSUMERS + CONSUMER), shared,
                Agreement(turns, done), used, turn, biases, segments, tile, row, own, upcoming,
                options, CONSUMER,
            )  # fmt: skip
            if SPARSE:
                after = gl.cdiv(own.end, options.BLOCK_K) * options.BLOCK_K
                used, turn = pass_blocks(shared, used, turn, after, end, options, CONSUMER)
            query.release(done)
            done += 1
            total = unscale(total, query.buffers.dtype)
            store_outputs(outputs, total, tile, row, T, options, CONSUMER)
        else:
            if some:
                # A release counts for the tile that the buffer holds.
                query.wait_full(done)
                decide(Agreement(turns, done), False, CONSUMER, CONSUMERS)
                query.release(done)
                done += 1
                used, turn = skip_keys(shared, used, turn, begin, end, options, CONSUMER)
            store_no_outputs(outputs, tile, row, T, options, CONSUMER)
            following = tile_after(upcoming, options)
        program = following[1]
        taken += 1
    if options.OUTPUT == BY_TMA:
        tma.store_wait(0)
