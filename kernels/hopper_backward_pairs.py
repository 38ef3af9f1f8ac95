"""Which pairs meet in the Hopper backward kernel: lengths, windows, packed segments (Gluon).

work is (query lengths, key lengths, order, T, S, query segments, key segments, row bias, ranges,
NEIGHBOURS) of the kernel, all but T and S pointers or None, and the last a pair of numbers or None.
Every warpgroup of a program asks work_of and head_and_query for its steps: they must agree, or they
wait for each other without end.
"""

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


@gluon.jit
def work_of(work, K: gl.constexpr, BLOCK_Q: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """(batch, key head, first key, first query, query blocks, query length, key length)."""
    tiles = gl.cdiv(work[4], PROGRAM_KEYS)
    program = gl.program_id(0)
    if work[9] is None:
        first = program % tiles * PROGRAM_KEYS
        kv_head = program // tiles % K
        batch = program // (tiles * K)
    else:
        SEQUENCES: gl.constexpr = work[9][0]
        HEADS: gl.constexpr = work[9][1]
        group = program // (SEQUENCES * HEADS)
        first = group % tiles * PROGRAM_KEYS
        kv_head = group // tiles % (K // HEADS) * HEADS + program % HEADS
        batch = group // (tiles * (K // HEADS)) * SEQUENCES + program // HEADS % SEQUENCES
    query_length = gl.to_tensor(work[3])
    key_length = gl.to_tensor(work[4])
    if work[2] is not None:
        batch = uniform(gl.load(work[2] + batch))
        query_length = uniform(gl.load(work[0] + batch))
        key_length = uniform(gl.load(work[1] + batch))
    begin = first * 0
    end = query_length
    if RIGHT == 0:
        begin = first // BLOCK_Q * BLOCK_Q
    elif RIGHT is not None:
        begin = gl.maximum(first - RIGHT, 0)
    if LEFT is not None:
        end = gl.minimum(end, first + PROGRAM_KEYS + LEFT)
    if work[8] is not None:
        least, range_end, kind = range_of(work, batch, first)
        begin = gl.maximum(begin, least)
        end = gl.minimum(end, range_end)
    if (RIGHT is not None and RIGHT != 0) or work[8] is not None:
        # Not even the block in which both are.
        end = gl.where(begin < end, end, 0)
        begin = begin // BLOCK_Q * BLOCK_Q
    if may_have_no_work(work, LEFT, RIGHT):
        blocks = gl.cdiv(gl.maximum(end - begin, 0), BLOCK_Q)
        if first >= key_length:
            blocks = blocks * 0
        blocks = uniform(blocks)
        # What is read of the first queries, though nobody uses it, is in the array.
        begin = gl.where(blocks > 0, begin, 0)
    else:
        blocks = gl.cdiv(query_length, BLOCK_Q)
    return batch, kv_head, first, begin, blocks, query_length, key_length


@gluon.jit
def may_have_no_work(work, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """Whether some program may have no query; known when compiling."""
    return LEFT is not None or RIGHT is not None or work[2] is not None or work[8] is not None


@gluon.jit
def has_work(steps, work, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """Whether there are steps; known when compiling where every program has some.

    Not for a branch around the loop over them: within one ptxas keeps the loop's counter, and the
    addresses that follow from it, out of the uniform registers (40 R2UR a step at 64).
    """
    if may_have_no_work(work, LEFT, RIGHT):
        return steps > 0
    else:
        return True


@gluon.jit
def head_and_query(
    step, kv_head, begin, blocks, N: gl.constexpr, K: gl.constexpr, BLOCK_Q: gl.constexpr
):
    """The query head and first query of a step: one head of the group after the other."""
    if N == K:
        return kv_head, begin + step * BLOCK_Q
    else:
        group = step // gl.maximum(blocks, 1)
        return kv_head * (N // K) + group, begin + (step - group * blocks) * BLOCK_Q


@gluon.jit
def range_of(work, batch, first):
    """(first query, end, kind) of the queries that a program's keys meet, segments.tile_ranges."""
    range_ptr = work[8] + (batch * gl.cdiv(work[4], PROGRAM_KEYS) + first // PROGRAM_KEYS) * 3
    least = uniform(gl.load(range_ptr))
    end = uniform(gl.load(range_ptr + 1))
    kind = uniform(gl.load(range_ptr + 2))
    return least, end, kind


@gluon.jit
def inner_of(row, BLOCK_Q: gl.constexpr, RIGHT: gl.constexpr):
    """The first query block in which no key of a side is behind its query's window."""
    if RIGHT is None:
        return row * 0
    else:
        # Rows and blocks start at multiples of BLOCK_Q.
        return row + (SIDE_KEYS - (RIGHT + 1) // BLOCK_Q * BLOCK_Q)


@gluon.jit
def signs_of(
    work, row, start, BLOCK_Q: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr
):  # fmt: skip
    """(numbers, flip): numbers ^ flip, [SIDE_KEYS, BLOCK_Q], is negative in the window.

    Every step masks its operands by them. A branch for the steps that need no mask costs more:
    beside it ptxas keeps what the loop counts out of the uniform registers at 128.
    """
    if not by_signs(work, LEFT, RIGHT):
        return 0, 0
    else:
        layout: gl.constexpr = accumulator_layout(BLOCK_Q)
        keys = gl.arange(0, SIDE_KEYS, layout=gl.SliceLayout(1, layout))
        queries = gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(0, layout))
        # A pair's key - query is one number of the thread and a constant.
        thread = (row - start + (keys & ~ROW_BIT))[:, None] - (queries & LANE_BITS)[None, :]
        constant = (keys & ROW_BIT)[:, None] - (queries & ~LANE_BITS)[None, :]
        # -LEFT <= x is the sign of ~(x + LEFT), x <= RIGHT is that of x - (RIGHT + 1).
        if LEFT is None:
            return thread - (RIGHT + 1) + constant, 0
        elif RIGHT is None:
            return thread + LEFT + constant, -1
        elif LEFT + RIGHT < SIDE_KEYS + BLOCK_Q - 3:
            return (thread - (RIGHT + 1) + constant) & ~(thread + LEFT + constant), 0
        else:
            # No block has pairs past both ends of the window.
            is_late = start - row > LEFT + 1 - BLOCK_Q
            flip = gl.where(is_late, -1, 0)
            return thread + gl.where(is_late, LEFT, -(RIGHT + 1)) + constant, flip


@gluon.jit
def by_signs(work, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """Whether signs_of tells what a window excludes; known when compiling."""
    return LEFT is not None or (RIGHT is not None and work[8] is not None)


@gluon.jit
def where_negative(x, signs, work, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """An operand [SIDE_KEYS, BLOCK_Q] of two bytes, exactly 0 where signs_of tells so."""
    if by_signs(work, LEFT, RIGHT):
        numbers, flip = signs
        return zero_unless_negative(x, numbers, flip + gl.zeros_like(numbers))
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
def has_edges(work, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """Whether a branch masks the steps at a window's right end alone; known when compiling."""
    return RIGHT is not None and not by_signs(work, LEFT, RIGHT)


@gluon.jit
def one_segment(work, batch, first, BLOCK_Q: gl.constexpr):
    """(begin, end): in query blocks that start there all pairs are of one segment; 0, 0 of none."""
    if work[8] is None:
        return 0, 0
    else:
        least, end, kind = range_of(work, batch, first)
        return least, gl.where(kind == UNIFORM, end + 1 - BLOCK_Q, 0)


@gluon.jit
def is_mixed(start, span):
    """Whether a query block may have pairs of two segments; always where span is None.

    At 64 a branch is worth it; at 128 ptxas keeps what the loop counts out of the uniform registers
    beside one.
    """
    if span is None:
        return True
    else:
        return (start < span[0]) | (start >= span[1])


@gluon.jit
def without_excluded_weights(
    weights, key_ids, query_ids, span, work, batch, row, start, LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
):  # fmt: skip
    """Weights [SIDE_KEYS, BLOCK_Q] of a step, exactly 0 where a pair takes no part.

    query_ids are of queries_ahead, or None where they are loaded here. span is one_segment, or
    None. What a window excludes by_signs is for where_negative.
    """
    if work[8] is not None:
        if is_mixed(start, span):
            if query_ids is None:
                layout: gl.constexpr = gl.SliceLayout(0, weights.type.layout)
                ids = of_queries(work[5], work, batch, start, layout, weights.shape[1])
            else:
                ids = spread(query_ids, work[8], weights.shape[1])
            weights = gl.where(key_ids[:, None] == ids[None, :], weights, 0.0)
    elif has_edges(work, LEFT, RIGHT):
        # Where inner_of is computed decides on ptxas's registers.
        if start < inner_of(row, weights.shape[1], RIGHT):
            weights = gl.where(in_window(weights, row, start, RIGHT), weights, 0.0)
    return weights


@gluon.jit
def without_excluded_gradients(
    gradient, weights, signs, span, work, outputs, row, start, LEFT: gl.constexpr,
    RIGHT: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """The logits' gradients [SIDE_KEYS, BLOCK_Q], exactly 0 where a pair takes no part.

    Its weight is 0, but 0 times an infinite neighbour would be NaN. What only goes to the products
    is for where_negative and where_weighted.
    """
    if has_edges(work, LEFT, RIGHT):
        if start < inner_of(row, weights.shape[1], RIGHT):
            gradient = gl.where(in_window(weights, row, start, RIGHT), gradient, 0.0)
    elif by_signs(work, LEFT, RIGHT) and outputs[2] is not None:
        numbers, flip = signs
        gradient = gl.where((numbers ^ flip) < 0, gradient, 0.0)
    if work[8] is not None and not by_rounded(work, outputs, dtype):
        if is_mixed(start, span):
            # Only excluded pairs have a weight of 0, see weights_float32.
            gradient = gl.where(weights == 0.0, 0.0, gradient)
    return gradient


@gluon.jit
def where_weighted(x, weights, span, start, work, outputs):
    """An operand [SIDE_KEYS, BLOCK_Q] of two bytes, exactly 0 where segments exclude a pair."""
    if by_rounded(work, outputs, x.dtype):
        if is_mixed(start, span):
            x = zero_where_zero(x, weights.to(x.dtype))
    return x


@gluon.jit
def by_rounded(work, outputs, dtype: gl.constexpr):
    """Whether rounded weights tell what segments exclude: no other is 0 in bfloat16."""
    return work[8] is not None and outputs[2] is None and dtype != gl.float16


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
def key_ids_of(work, batch, row, BLOCK_Q: gl.constexpr):
    """The segments of a side's keys, [SIDE_KEYS]; 0 without segments."""
    if work[6] is None:
        return 0
    else:
        layout: gl.constexpr = gl.SliceLayout(1, accumulator_layout(BLOCK_Q))
        return gl.load(key_ids_at(work, batch, row) + gl.arange(0, SIDE_KEYS, layout=layout))


@gluon.jit
def key_ids_at(work, batch, row):
    """Where the segments of keys row.. are."""
    return work[6] + batch.to(gl.int64) * (gl.cdiv(work[4], PROGRAM_KEYS) * PROGRAM_KEYS) + row


@gluon.jit
def queries_ahead(work, batch, start, BLOCK_Q: gl.constexpr):
    """(segments, what rows add to t) of a block that comes later, for spread; 0 if there are none.

    Each thread loads what one query has: of its columns it would wait, or hold 32 registers.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    ids = 0
    added = 0
    if work[8] is not None:
        ids = of_queries(work[5], work, batch, start, layout, BLOCK_Q)
    if work[7] is not None:
        added = of_queries(work[7], work, batch, start, layout, BLOCK_Q) * -LOG2_E
    return ids, added


@gluon.jit
def row_offset_of(work, batch, start, BLOCK_Q: gl.constexpr):
    """What rows add to t of a block, [BLOCK_Q], of a thread's columns; 0 without segments."""
    if work[7] is None:
        return 0
    else:
        layout: gl.constexpr = gl.SliceLayout(0, accumulator_layout(BLOCK_Q))
        return of_queries(work[7], work, batch, start, layout, BLOCK_Q) * -LOG2_E


@gluon.jit
def spread(x, there, BLOCK_Q: gl.constexpr):
    """What a thread needs of queries_ahead for its columns, [BLOCK_Q]; x where nothing is."""
    if there is None:
        return x
    else:
        return gl.convert_layout(x, gl.SliceLayout(0, accumulator_layout(BLOCK_Q)))


@gluon.jit
def queries_of_step(
    work, batch, step, steps, kv_head, begin, blocks, N: gl.constexpr, K: gl.constexpr,
    BLOCK_Q: gl.constexpr,
):  # fmt: skip
    """queries_ahead of a step; of one that does not come the last's."""
    if work[8] is None:
        return 0, 0
    else:
        head, start = head_and_query(
            gl.minimum(step, steps - 1), kv_head, begin, blocks, N, K, BLOCK_Q
        )
        return queries_ahead(work, batch, start, BLOCK_Q)


@gluon.jit
def of_queries(ptr, work, batch, start, layout: gl.constexpr, BLOCK_Q: gl.constexpr):
    """What an array with rows of whole blocks has for a block of queries, [BLOCK_Q]."""
    pointers = ptr + batch.to(gl.int64) * (gl.cdiv(work[3], BLOCK_Q) * BLOCK_Q) + start
    return gl.load(pointers + gl.arange(0, BLOCK_Q, layout=layout))


@gluon.jit
def clear_keys(keys, work, batch, first, row):
    """Makes a side's keys that are padding zeros, in shared memory, before any other reads them.

    In the query gradients they meet logit gradients of 0, and 0 times NaN would be NaN.
    """
    if work[8] is not None:
        least, end, kind = range_of(work, batch, first)
        if kind != UNIFORM:
            clear_padding(keys, key_ids_at(work, batch, row), row_layout(keys.shape[1]))
            fence_async_shared()


@gluon.jit
def span_of(work, batch, first):
    """range_of a program; 0 without segments."""
    if work[8] is None:
        return 0
    else:
        return range_of(work, batch, first)


@gluon.jit
def has_padding(span, work, batch, start, BLOCK_Q: gl.constexpr):
    """Whether a block has queries within the length that are in no segment; span is span_of."""
    if work[8] is None:
        return False
    else:
        least, end, kind = span
        found = kind < 0
        if (kind == MIXED) | (start < least) | (start + BLOCK_Q > end):
            # Every warp has all of the block: they agree without shared memory.
            layout: gl.constexpr = gl.BlockedLayout([BLOCK_Q // 32], [32], [4], [0])
            found = gl.min(of_queries(work[5], work, batch, start, layout, BLOCK_Q), 0) < 0
        return found


@gluon.jit
def fill_step(
    inputs, queries, gradients, cleared, phase, step, work, span, batch, start, query_length,
    column, H: gl.constexpr, BLOCK_Q: gl.constexpr,
):  # fmt: skip
    """Starts the copies of a step's queries and output gradients; gives the next phase back.

    Padding meets weights of 0, and 0 times NaN would be NaN: a block with such rows is waited for,
    and they become zeros, before anyone is told that it is there.
    """
    query_desc, key_desc, value_desc, output_gradient_desc = inputs
    IS_RAGGED: gl.constexpr = work[2] is not None
    T = work[3]
    if has_padding(span, work, batch, start, BLOCK_Q):
        queries.wait_free(step)
        gradients.wait_free(step)
        mbarrier.expect(cleared, query_desc.nbytes_per_cta + output_gradient_desc.nbytes_per_cta)
        copy_rows(
            query_desc, batch, start, query_length, T, column, cleared, queries.buffer(step),
            BLOCK_Q, H, IS_RAGGED,
        )  # fmt: skip
        copy_rows(
            output_gradient_desc, batch, start, query_length, T, column, cleared,
            gradients.buffer(step), BLOCK_Q, H, IS_RAGGED,
        )  # fmt: skip
        mbarrier.wait(cleared, phase)
        phase ^= 1
        ids_ptr = work[5] + batch.to(gl.int64) * (gl.cdiv(T, BLOCK_Q) * BLOCK_Q) + start
        clear_padding(queries.buffer(step), ids_ptr, row_layout(H))
        clear_padding(gradients.buffer(step), ids_ptr, row_layout(H))
        fence_async_shared()
        mbarrier.arrive(queries.full.index(step % queries.stages), count=1)
        mbarrier.arrive(gradients.full.index(step % gradients.stages), count=1)
    else:
        fill(
            queries, step, query_desc, batch, start, query_length, T, column, BLOCK_Q, H, IS_RAGGED
        )
        fill(
            gradients, step, output_gradient_desc, batch, start, query_length, T, column, BLOCK_Q,
            H, IS_RAGGED,
        )  # fmt: skip
    return phase
