"""Which pairs meet in the Hopper backward kernel: lengths, windows, packed segments (Gluon).

Every warpgroup of a program asks work_of and head_and_query for its steps: they must agree, or they
wait for each other without end.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from sigjax.kernels.hopper_biases import SIDE_KEYS
from sigjax.kernels.hopper_math import (
    accumulator_layout,
    clear_padding,
    copy_rows,
    fill,
    row_layout,
    uniform,
)
from sigjax.kernels.hopper_pairs import LANE_BITS
from sigjax.kernels.pairs import MIXED, UNIFORM
from sigjax.kernels.tile_math import LOG2_E

PROGRAM_KEYS = gl.constexpr(128)
ROW_BIT = gl.constexpr(8)  # by which the two rows of an accumulator that a thread has differ

# The signs of both numbers become a mask; both have one flip.
_ZERO_UNLESS_NEGATIVE = gl.constexpr(
    "{ .reg .b32 m; prmt.b32 m, $2, $3, 0xffbb; lop3.b32 $0, $1, m, $4, 0x60; }"
)
_ZERO_WHERE_ZERO = gl.constexpr(
    "{ .reg .b32 m, z; mov.b32 z, 0; set.neu.u32.bf16x2 m, $2, z; and.b32 $0, $1, m; }"
)


class Sequences(NamedTuple):
    """Lengths and packed segments of all sequences; pointers are None where there are none."""

    query_lengths_ptr: Any
    key_lengths_ptr: Any
    order_ptr: Any
    T: Any
    S: Any
    query_segments_ptr: Any
    key_segments_ptr: Any
    row_bias_ptr: Any  # None too where the heads have a bias
    ranges_ptr: Any


class Work(NamedTuple):
    """PROGRAM_KEYS keys of one key head, and the query blocks that they meet."""

    batch: Any
    kv_head: Any
    first: Any  # key
    begin: Any  # the first query
    blocks: Any  # of queries, of one query head
    steps: Any  # blocks of all query heads of the key head
    query_length: Any
    key_length: Any


class Range(NamedTuple):
    """The queries that a program's keys meet, segments.tile_ranges."""

    begin: Any
    end: Any
    kind: Any


class Span(NamedTuple):
    """Query blocks that start from begin to end, in which all pairs are of one segment."""

    begin: Any
    end: Any


class Signs(NamedTuple):
    """What a window excludes: numbers ^ flip, [SIDE_KEYS, BLOCK_Q], is negative within it."""

    numbers: Any
    flip: Any


class Ahead(NamedTuple):
    """What a block of queries has, one query a thread, for spread; 0 is nothing."""

    segments: Any
    row_offset: Any  # what rows add to t


@gluon.jit
def work_of(sequences, options):
    """What this program has to do."""
    K: gl.constexpr = options.K
    BLOCK_Q: gl.constexpr = options.BLOCK_Q
    LEFT: gl.constexpr = options.LEFT
    RIGHT: gl.constexpr = options.RIGHT
    tiles = gl.cdiv(sequences.S, PROGRAM_KEYS)
    program = gl.program_id(0)
    if options.NEIGHBOURS is None:
        first = program % tiles * PROGRAM_KEYS
        kv_head = program // tiles % K
        batch = program // (tiles * K)
    else:
        SEQUENCES: gl.constexpr = options.NEIGHBOURS[0]
        HEADS: gl.constexpr = options.NEIGHBOURS[1]
        group = program // (SEQUENCES * HEADS)
        first = group % tiles * PROGRAM_KEYS
        kv_head = group // tiles % (K // HEADS) * HEADS + program % HEADS
        batch = group // (tiles * (K // HEADS)) * SEQUENCES + program // HEADS % SEQUENCES
    query_length = gl.to_tensor(sequences.T)
    key_length = gl.to_tensor(sequences.S)
    if sequences.order_ptr is not None:
        batch = uniform(gl.load(sequences.order_ptr + batch))
        query_length = uniform(gl.load(sequences.query_lengths_ptr + batch))
        key_length = uniform(gl.load(sequences.key_lengths_ptr + batch))
    begin = first * 0
    end = query_length
    if RIGHT == 0:
        begin = first // BLOCK_Q * BLOCK_Q
    elif RIGHT is not None:
        begin = gl.maximum(first - RIGHT, 0)
    if LEFT is not None:
        end = gl.minimum(end, first + PROGRAM_KEYS + LEFT)
    if sequences.ranges_ptr is not None:
        met = range_of(sequences, batch, first)
        begin = gl.maximum(begin, met.begin)
        end = gl.minimum(end, met.end)
    if (RIGHT is not None and RIGHT != 0) or sequences.ranges_ptr is not None:
        # Not even the block in which both are.
        end = gl.where(begin < end, end, 0)
        begin = begin // BLOCK_Q * BLOCK_Q
    if may_have_no_work(sequences, options):
        blocks = gl.cdiv(gl.maximum(end - begin, 0), BLOCK_Q)
        if first >= key_length:
            blocks = blocks * 0
        blocks = uniform(blocks)
        # What is read of the first queries, though nobody uses it, is in the array.
        begin = gl.where(blocks > 0, begin, 0)
    else:
        blocks = gl.cdiv(query_length, BLOCK_Q)
    steps = blocks * (options.N // K)
    return Work(batch, kv_head, first, begin, blocks, steps, query_length, key_length)


@gluon.jit
def may_have_no_work(sequences, options):
    """Whether some program may have no query; known when compiling."""
    return (
        options.LEFT is not None or options.RIGHT is not None
        or sequences.order_ptr is not None or sequences.ranges_ptr is not None
    )  # fmt: skip


@gluon.jit
def has_work(work, sequences, options):
    """Whether there are steps; known when compiling where every program has some.

    Not for a branch around the loop over them: within one ptxas keeps the loop's counter, and the
    addresses that follow from it, out of the uniform registers (40 R2UR a step at 64).
    """
    if may_have_no_work(sequences, options):
        return work.steps > 0
    else:
        return True


@gluon.jit
def head_and_query(step, work, options):
    """The query head and first query of a step: one head of the group after the other."""
    HEADS: gl.constexpr = options.N // options.K
    BLOCK_Q: gl.constexpr = options.BLOCK_Q
    if HEADS == 1:
        return work.kv_head, work.begin + step * BLOCK_Q
    else:
        group = step // gl.maximum(work.blocks, 1)
        head = work.kv_head * HEADS + group
        return head, work.begin + (step - group * work.blocks) * BLOCK_Q


@gluon.jit
def range_of(sequences, batch, first):
    """The range of the program whose keys start at first."""
    tile = batch * gl.cdiv(sequences.S, PROGRAM_KEYS) + first // PROGRAM_KEYS
    range_ptr = sequences.ranges_ptr + tile * 3
    begin = uniform(gl.load(range_ptr))
    end = uniform(gl.load(range_ptr + 1))
    kind = uniform(gl.load(range_ptr + 2))
    return Range(begin, end, kind)


@gluon.jit
def inner_of(row, options):
    """The first query block in which no key of a side is behind its query's window."""
    if options.RIGHT is None:
        return row * 0
    else:
        # Rows and blocks start at multiples of BLOCK_Q.
        BLOCK_Q: gl.constexpr = options.BLOCK_Q
        return row + (SIDE_KEYS - (options.RIGHT + 1) // BLOCK_Q * BLOCK_Q)


@gluon.jit
def signs_of(sequences, row, start, options):
    """Signs of the pairs of a side and a query block; 0 where nobody asks for them.

    Every step masks its operands by them. A branch for the steps that need no mask costs more:
    beside it ptxas keeps what the loop counts out of the uniform registers at 128.
    """
    if not by_signs(sequences, options):
        return Signs(0, 0)
    else:
        BLOCK_Q: gl.constexpr = options.BLOCK_Q
        LEFT: gl.constexpr = options.LEFT
        RIGHT: gl.constexpr = options.RIGHT
        layout: gl.constexpr = accumulator_layout(BLOCK_Q)
        keys = gl.arange(0, SIDE_KEYS, layout=gl.SliceLayout(1, layout))
        queries = gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(0, layout))
        # A pair's key - query is one number of the thread and a constant.
        thread = (row - start + (keys & ~ROW_BIT))[:, None] - (queries & LANE_BITS)[None, :]
        constant = (keys & ROW_BIT)[:, None] - (queries & ~LANE_BITS)[None, :]
        # -LEFT <= x is the sign of ~(x + LEFT), x <= RIGHT is that of x - (RIGHT + 1).
        if LEFT is None:
            return Signs(thread - (RIGHT + 1) + constant, 0)
        elif RIGHT is None:
            return Signs(thread + LEFT + constant, -1)
        elif LEFT + RIGHT < SIDE_KEYS + BLOCK_Q - 3:
            return Signs((thread - (RIGHT + 1) + constant) & ~(thread + LEFT + constant), 0)
        else:
            # No block has pairs past both ends of the window.
            is_late = start - row > LEFT + 1 - BLOCK_Q
            flip = gl.where(is_late, -1, 0)
            return Signs(thread + gl.where(is_late, LEFT, -(RIGHT + 1)) + constant, flip)


@gluon.jit
def by_signs(sequences, options):
    """Whether signs_of tells what a window excludes; known when compiling."""
    return options.LEFT is not None or (
        options.RIGHT is not None and sequences.ranges_ptr is not None
    )


@gluon.jit
def where_negative(x, signs, sequences, options):
    """An operand [SIDE_KEYS, BLOCK_Q] of two bytes, exactly 0 where signs_of tells so."""
    if by_signs(sequences, options):
        flip = signs.flip + gl.zeros_like(signs.numbers)
        return zero_unless_negative(x, signs.numbers, flip)
    else:
        return x


@gluon.jit
def zero_unless_negative(x, numbers, flip):
    """Neighbours of two bytes, each 0 unless its number ^ flip, of one shape, is negative."""
    return gl.inline_asm_elementwise(
        _ZERO_UNLESS_NEGATIVE, "=r,r,r,r,r,r", [x, numbers, flip], dtype=x.dtype, is_pure=True,
        pack=2,
    )  # fmt: skip


@gluon.jit
def has_edges(sequences, options):
    """Whether a branch masks the steps at a window's right end alone; known when compiling."""
    return options.RIGHT is not None and not by_signs(sequences, options)


@gluon.jit
def one_segment(sequences, work, options):
    """The span of a program; 0, 0 is that of none."""
    if sequences.ranges_ptr is None:
        return Span(0, 0)
    else:
        met = range_of(sequences, work.batch, work.first)
        end = gl.where(met.kind == UNIFORM, met.end + 1 - options.BLOCK_Q, 0)
        return Span(met.begin, end)


@gluon.jit
def is_mixed(start, span):
    """Whether a query block may have pairs of two segments; always where span is None.

    At 64 a branch is worth it; at 128 ptxas keeps what the loop counts out of the uniform registers
    beside one.
    """
    if span is None:
        return True
    else:
        return (start < span.begin) | (start >= span.end)


@gluon.jit
def without_excluded_weights(
    weights, key_ids, query_ids, span, sequences, work, row, start, options
):
    """Weights [SIDE_KEYS, BLOCK_Q] of a step, exactly 0 where a pair takes no part.

    query_ids are of queries_ahead, or None where they are loaded here. span is one_segment, or
    None. What a window excludes by_signs is for where_negative.
    """
    if sequences.ranges_ptr is not None:
        if is_mixed(start, span):
            if query_ids is None:
                layout: gl.constexpr = gl.SliceLayout(0, weights.type.layout)
                segments_ptr = sequences.query_segments_ptr
                ids = of_queries(segments_ptr, sequences, work, start, layout, options)
            else:
                ids = spread(query_ids, sequences.ranges_ptr, options)
            weights = gl.where(key_ids[:, None] == ids[None, :], weights, 0.0)
    elif has_edges(sequences, options):
        # Where inner_of is computed decides on ptxas's registers.
        if start < inner_of(row, options):
            weights = gl.where(in_window(weights, row, start, options.RIGHT), weights, 0.0)
    return weights


@gluon.jit
def without_excluded_gradients(
    gradient, weights, signs, span, sequences, outputs, row, start, options, dtype: gl.constexpr
):
    """The logits' gradients [SIDE_KEYS, BLOCK_Q], exactly 0 where a pair takes no part.

    Its weight is 0, but 0 times an infinite neighbour would be NaN. What only goes to the products
    is for where_negative and where_weighted.
    """
    if has_edges(sequences, options):
        if start < inner_of(row, options):
            gradient = gl.where(in_window(weights, row, start, options.RIGHT), gradient, 0.0)
    elif by_signs(sequences, options) and outputs.logit_sums_ptr is not None:
        gradient = gl.where((signs.numbers ^ signs.flip) < 0, gradient, 0.0)
    if sequences.ranges_ptr is not None and not by_rounded(sequences, outputs, dtype):
        if is_mixed(start, span):
            # Only excluded pairs have a weight of 0, see weights_float32.
            gradient = gl.where(weights == 0.0, 0.0, gradient)
    return gradient


@gluon.jit
def where_weighted(x, weights, span, start, sequences, outputs):
    """An operand [SIDE_KEYS, BLOCK_Q] of two bytes, exactly 0 where segments exclude a pair."""
    if by_rounded(sequences, outputs, x.dtype):
        if is_mixed(start, span):
            x = zero_where_zero(x, weights.to(x.dtype))
    return x


@gluon.jit
def by_rounded(sequences, outputs, dtype: gl.constexpr):
    """Whether rounded weights tell what segments exclude: no other is 0 in bfloat16."""
    return (
        sequences.ranges_ptr is not None and outputs.logit_sums_ptr is None and dtype != gl.float16
    )


@gluon.jit
def zero_where_zero(x, weights):
    """Neighbours of two bytes, each 0 where its weight, a bfloat16, is."""
    return gl.inline_asm_elementwise(
        _ZERO_WHERE_ZERO, "=r,r,r", [x, weights], dtype=x.dtype, is_pure=True, pack=2
    )


@gluon.jit
def in_window(weights, row, start, RIGHT: gl.constexpr):
    """Which keys are in their query's window, [SIDE_KEYS, BLOCK_Q], of one with a right end."""
    keys = gl.arange(0, weights.shape[0], layout=gl.SliceLayout(1, weights.type.layout))
    queries = gl.arange(0, weights.shape[1], layout=gl.SliceLayout(0, weights.type.layout))
    # As in hopper_pairs.exclude_pairs, so that no query's number needs a register.
    first = (row - start + keys)[:, None] - (queries & LANE_BITS)[None, :]
    return first - RIGHT <= (queries & ~LANE_BITS)[None, :]


@gluon.jit
def key_ids_of(sequences, work, row, options):
    """The segments of a side's keys, [SIDE_KEYS]; 0 without segments."""
    if sequences.key_segments_ptr is None:
        return 0
    else:
        layout: gl.constexpr = gl.SliceLayout(1, accumulator_layout(options.BLOCK_Q))
        return gl.load(key_ids_at(sequences, work, row) + gl.arange(0, SIDE_KEYS, layout=layout))


@gluon.jit
def key_ids_at(sequences, work, row):
    """Where the segments of keys row.. are."""
    before = work.batch.to(gl.int64) * (gl.cdiv(sequences.S, PROGRAM_KEYS) * PROGRAM_KEYS)
    return sequences.key_segments_ptr + before + row


@gluon.jit
def queries_ahead(sequences, work, start, options):
    """Ahead of a block that comes later.

    Each thread loads what one query has: of its columns it would wait, or hold 32 registers.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    ids = 0
    added = 0
    if sequences.ranges_ptr is not None:
        ids = of_queries(sequences.query_segments_ptr, sequences, work, start, layout, options)
    if sequences.row_bias_ptr is not None:
        row_bias = of_queries(sequences.row_bias_ptr, sequences, work, start, layout, options)
        added = row_bias * -LOG2_E
    return Ahead(ids, added)


@gluon.jit
def row_offset_of(sequences, work, start, options):
    """What rows add to t of a block, [BLOCK_Q], of a thread's columns; 0 without segments."""
    if sequences.row_bias_ptr is None:
        return 0
    else:
        layout: gl.constexpr = gl.SliceLayout(0, accumulator_layout(options.BLOCK_Q))
        row_bias = of_queries(sequences.row_bias_ptr, sequences, work, start, layout, options)
        return row_bias * -LOG2_E


@gluon.jit
def spread(x, there, options):
    """What a thread needs of queries_ahead for its columns, [BLOCK_Q]; x where nothing is."""
    if there is None:
        return x
    else:
        return gl.convert_layout(x, gl.SliceLayout(0, accumulator_layout(options.BLOCK_Q)))


@gluon.jit
def queries_of_step(sequences, work, step, options):
    """queries_ahead of a step; of one that does not come the last's."""
    if sequences.ranges_ptr is None:
        return Ahead(0, 0)
    else:
        head, start = head_and_query(gl.minimum(step, work.steps - 1), work, options)
        return queries_ahead(sequences, work, start, options)


@gluon.jit
def of_queries(ptr, sequences, work, start, layout: gl.constexpr, options):
    """What an array with rows of whole blocks has for a block of queries, [BLOCK_Q]."""
    pointers = at_query(ptr, sequences, work, start, options)
    return gl.load(pointers + gl.arange(0, options.BLOCK_Q, layout=layout))


@gluon.jit
def at_query(ptr, sequences, work, start, options):
    """Where an array with rows of whole blocks has what it has for queries start.."""
    BLOCK_Q: gl.constexpr = options.BLOCK_Q
    return ptr + work.batch.to(gl.int64) * (gl.cdiv(sequences.T, BLOCK_Q) * BLOCK_Q) + start


@gluon.jit
def clear_keys(keys, sequences, work, row):
    """Makes a side's keys that are padding zeros, in shared memory, before any other reads them.

    In the query gradients they meet logit gradients of 0, and 0 times NaN would be NaN.
    """
    if sequences.ranges_ptr is not None:
        met = range_of(sequences, work.batch, work.first)
        if met.kind != UNIFORM:
            clear_padding(keys, key_ids_at(sequences, work, row), row_layout(keys.shape[1]))
            fence_async_shared()


@gluon.jit
def own_range(sequences, work):
    """The range of this program; 0 without segments."""
    if sequences.ranges_ptr is None:
        return 0
    else:
        return range_of(sequences, work.batch, work.first)


@gluon.jit
def has_padding(met, sequences, work, start, options):
    """Whether a block has queries within the length that are in no segment; met is own_range."""
    if sequences.ranges_ptr is None:
        return False
    else:
        BLOCK_Q: gl.constexpr = options.BLOCK_Q
        found = met.kind < 0
        if (met.kind == MIXED) | (start < met.begin) | (start + BLOCK_Q > met.end):
            # Every warp has all of the block: they agree without shared memory.
            layout: gl.constexpr = gl.BlockedLayout([BLOCK_Q // 32], [32], [4], [0])
            segments_ptr = sequences.query_segments_ptr
            ids = of_queries(segments_ptr, sequences, work, start, layout, options)
            found = gl.min(ids, 0) < 0
        return found


@gluon.jit
def fill_step(descs, tiles, cleared, phase, step, met, sequences, work, head, start, options):
    """Starts the copies of a step's queries and output gradients; gives the next phase back.

    Padding meets weights of 0, and 0 times NaN would be NaN: a block with such rows is waited for,
    at the barrier cleared, and they become zeros, before anyone is told that it is there.
    """
    BLOCK_Q: gl.constexpr = options.BLOCK_Q
    H: gl.constexpr = options.H
    IS_RAGGED: gl.constexpr = sequences.order_ptr is not None
    queries, gradients = tiles.query_ring, tiles.gradient_ring
    batch, query_length, T = work.batch, work.query_length, sequences.T
    column = head * H
    if has_padding(met, sequences, work, start, options):
        queries.wait_free(step)
        gradients.wait_free(step)
        mbarrier.expect(cleared, descs.query.nbytes_per_cta + descs.output_gradient.nbytes_per_cta)
        copy_rows(
            descs.query, batch, start, query_length, T, column, cleared, queries.buffer(step),
            BLOCK_Q, H, IS_RAGGED,
        )  # fmt: skip
        copy_rows(
            descs.output_gradient, batch, start, query_length, T, column, cleared,
            gradients.buffer(step), BLOCK_Q, H, IS_RAGGED,
        )  # fmt: skip
        mbarrier.wait(cleared, phase)
        phase ^= 1
        ids_ptr = at_query(sequences.query_segments_ptr, sequences, work, start, options)
        clear_padding(queries.buffer(step), ids_ptr, row_layout(H))
        clear_padding(gradients.buffer(step), ids_ptr, row_layout(H))
        fence_async_shared()
        mbarrier.arrive(queries.full.index(step % queries.stages), count=1)
        mbarrier.arrive(gradients.full.index(step % gradients.stages), count=1)
    else:
        fill(
            queries, step, descs.query, batch, start, query_length, T, column, BLOCK_Q, H, IS_RAGGED
        )
        fill(
            gradients, step, descs.output_gradient, batch, start, query_length, T, column, BLOCK_Q,
            H, IS_RAGGED,
        )  # fmt: skip
    return phase
