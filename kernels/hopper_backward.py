"""The backward kernel for Hopper, sm_90 (Gluon device code): all three gradients in one pass.

One program takes 128 keys of one head over all their queries. A warpgroup copies tiles by TMA,
two more take 64 keys each and keep their key and value gradients in registers. The logits'
gradients go through shared memory to whoever multiplies them by the keys, and each part of a
query gradient is added to the float32 sum in global memory by TMA. The order of those additions
is not fixed: query gradients may differ in their last bits from run to run.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sigjax.kernels.hopper_backward_matrix import (
    Matrix,
    allowed_at,
    allowed_of,
    fill_with_biases,
    operand_of,
)
from sigjax.kernels.hopper_backward_pairs import (
    Sequences,
    clear_keys,
    fill_step,
    has_work,
    head_and_query,
    one_segment,
    own_range,
    queries_ahead,
    queries_of_step,
    row_offset_of,
    signs_of,
    spread,
    where_negative,
    work_of,
)
from sigjax.kernels.hopper_backward_step import (
    gradients_of_step,
    in_step,
    is_plain,
    side_of,
    weights_of_step,
)
from sigjax.kernels.hopper_biases import (
    SIDE_KEYS,
    Factors,
    no_sums,
    store_sums,
)
from sigjax.kernels.hopper_exchange import (
    exchange_free,
    exchange_full,
    exchange_release,
    exchanged,
    hand_over,
)
from sigjax.kernels.hopper_math import (
    accumulator_layout,
    begin_scores,
    copy_rows,
    fill,
    new_ring,
    store_accumulator,
    store_rows,
)
from sigjax.kernels.hopper_sums import (
    add_staged,
    stage_part,
)
from sigjax.kernels.hopper_weights import unscale


class Options(NamedTuple):
    """The constants of a launch; hopper_backward_kernel says what they are."""

    N: Any
    K: Any
    H: Any
    BLOCK_Q: Any
    LEFT: Any
    RIGHT: Any
    HELPER: Any
    KEY_AXES: Any
    BIAS_AXES: Any
    MASK_AXES: Any
    NEIGHBOURS: Any


class Descs(NamedTuple):
    """From where the producer copies, besides the bias of a Matrix."""

    query: Any
    key: Any
    value: Any
    output_gradient: Any


class Tiles(NamedTuple):
    """What is in shared memory, besides the bias of a Matrix."""

    query_ring: Any
    gradient_ring: Any  # of the outputs' gradients
    exchange: Any  # see hopper_exchange
    key_sides: Any  # [2, SIDE_KEYS, H], until the gradients take their place
    value_sides: Any
    loaded: Any  # mbarrier of the keys and values
    sums: Any  # [1 or 2, BLOCK_Q, columns]: parts of query gradients on their way out


class Outputs(NamedTuple):
    """Where the gradients go."""

    query_desc: Any
    key_ptr: Any
    value_ptr: Any
    logit_sums_ptr: Any  # or None


@gluon.jit
def hopper_backward_kernel(
    query_desc,  # [B, T, N * H], blocks of BLOCK_Q rows of a head; ragged with lengths
    key_desc,  # [B, S, K * H], blocks of SIDE_KEYS rows of a head; ragged with lengths
    value_desc,  # as key_desc
    output_gradient_desc,  # as query_desc
    query_gradient,  # [B, T, N * H] float32, zeros at first; not yet times scale
    query_lengths_ptr,  # [B] int32, or None as the next two
    key_lengths_ptr,  # [B] int32
    order_ptr,  # [B] int32: sequences, those with most queries first
    sigmoid_bias_ptr,  # [B, N] float32, or None: -log(number of keys)
    key_bias_ptr,  # [B or 1, N or 1, S] float32, or None
    query_segments_ptr,  # [B, T] int32, or None as the next three: hopper_backward_launch._packing
    key_segments_ptr,  # [B, S] int32; this, the last and the next have rows of whole blocks
    row_bias_ptr,  # [B, T] float32, added to the logits of a row; None beside sigmoid_bias
    ranges_ptr,  # [B, key tiles, 3] int32: the queries of PROGRAM_KEYS keys' segments
    range_scale_ptr,  # [B, K] float32, powers of two: launch.range_scale; or None
    bias_desc,  # [B' * N', T, S], blocks of BLOCK_Q by SIDE_KEYS; or None
    mask_ptr,  # [B', N', query blocks * 2, whole PROGRAM_KEYS] int32, mask_bits; or None
    T,
    S,
    scale,  # factor of the logits
    key_gradient_ptr,  # [B, S, K, H]
    value_gradient_ptr,  # [B, S, K, H]
    logit_sums_ptr,  # [B, N, S] float32, the logits' gradients over all queries; None where N != K
    N: gl.constexpr,
    K: gl.constexpr,
    H: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    STAGES: gl.constexpr,
    LEFT: gl.constexpr,  # window: query - LEFT <= key <= query + RIGHT; None is no bound
    RIGHT: gl.constexpr,
    HELPER: gl.constexpr,  # whether a fourth warpgroup computes the query gradients
    KEY_AXES: gl.constexpr,  # whether key_bias has an axis of B, and of N (then N == K); or None
    BIAS_AXES: gl.constexpr,  # whether the bias has an axis B, and N; or None
    MASK_AXES: gl.constexpr,
    NEIGHBOURS: gl.constexpr,  # sequences and key heads that follow one another; or None
):
    """One program: PROGRAM_KEYS keys of one key head."""
    # Constants stay so in a constexpr and as arguments, not in a variable's tuple.
    options: gl.constexpr = Options(
        N, K, H, BLOCK_Q, LEFT, RIGHT, HELPER, KEY_AXES, BIAS_AXES, MASK_AXES, NEIGHBOURS
    )
    dtype: gl.constexpr = query_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    queries = new_ring(dtype, STAGES, BLOCK_Q, H, layout, STAGES, 2)
    gradients = new_ring(dtype, STAGES, BLOCK_Q, H, layout, STAGES, 2)
    # Two steps of logit gradients, one buffer a side and step; the reader of a buffer is the
    # helper, or each of the two sides.
    exchange = new_ring(dtype, 4, BLOCK_Q, SIDE_KEYS, layout, 4, 1 if HELPER else 2)
    keys = gl.allocate_shared_memory(dtype, [2, SIDE_KEYS, H], layout)
    values = gl.allocate_shared_memory(dtype, [2, SIDE_KEYS, H], layout)
    loaded = mbarrier.allocate_mbarrier()
    mbarrier.init(loaded, count=1)
    if query_segments_ptr is None:
        cleared: gl.constexpr = None
    else:
        # Of the producer alone: queries with padding.
        cleared = mbarrier.allocate_mbarrier()
        mbarrier.init(cleared, count=1)
    PARTS: gl.constexpr = 1 if HELPER else 2
    sums_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(
        [BLOCK_Q, H // PARTS], gl.float32
    )
    sums = gl.allocate_shared_memory(gl.float32, [PARTS, BLOCK_Q, H // PARTS], sums_layout)
    descs = Descs(query_desc, key_desc, value_desc, output_gradient_desc)
    tiles = Tiles(queries, gradients, exchange, keys, values, loaded, sums)
    outputs = Outputs(query_gradient, key_gradient_ptr, value_gradient_ptr, logit_sums_ptr)
    sequences = Sequences(
        query_lengths_ptr, key_lengths_ptr, order_ptr, T, S, query_segments_ptr, key_segments_ptr,
        row_bias_ptr, ranges_ptr,
    )  # fmt: skip
    if bias_desc is None:
        biases: gl.constexpr = None
    else:
        biases = gl.allocate_shared_memory(
            bias_desc.dtype, [2 * STAGES, BLOCK_Q, SIDE_KEYS], layout
        )
    matrix = Matrix(bias_desc, biases, mask_ptr)
    factors = Factors(sigmoid_bias_ptr, range_scale_ptr, scale, key_bias_ptr)
    common = (tiles, sequences, matrix)
    if HELPER:
        gl.warp_specialize(
            [
                (produce, (descs, cleared, common, options)),
                (differentiate, (outputs, factors, common, options, 0)),
                (differentiate, (outputs, factors, common, options, 1)),
                (help_queries, (outputs, common, options)),
            ],
            [4, 4, 4],
            [200, 200, 88],
        )
    else:
        gl.warp_specialize(
            [
                (produce, (descs, cleared, common, options)),
                (differentiate_all, (outputs, factors, common, options, 0)),
                (differentiate_all, (outputs, factors, common, options, 1)),
            ],
            [4, 4],
            [240, 240],
        )


@gluon.jit
def produce(descs, cleared, common, options):
    """Copies the keys and values once, then queries and output gradients step by step."""
    tiles, sequences, matrix = common
    BLOCK_Q: gl.constexpr = options.BLOCK_Q
    H: gl.constexpr = options.H
    IS_RAGGED: gl.constexpr = sequences.order_ptr is not None
    T, S = sequences.T, sequences.S
    work = work_of(sequences, options)
    if has_work(work, sequences, options):
        mbarrier.expect(tiles.loaded, 4 * descs.key.nbytes_per_cta)
        for side in gl.static_range(2):
            row = work.first + side * SIDE_KEYS
            copy_rows(
                descs.key, work.batch, row, work.key_length, S, work.kv_head * H, tiles.loaded,
                tiles.key_sides.index(side), SIDE_KEYS, H, IS_RAGGED,
            )  # fmt: skip
            copy_rows(
                descs.value, work.batch, row, work.key_length, S, work.kv_head * H, tiles.loaded,
                tiles.value_sides.index(side), SIDE_KEYS, H, IS_RAGGED,
            )  # fmt: skip
        met = own_range(sequences, work)
        phase = 0  # of cleared
        for step in range(work.steps):
            head, start = head_and_query(step, work, options)
            if matrix.bias_desc is not None:
                fill_with_biases(descs, tiles, matrix, step, sequences, work, head, start, options)
            else:
                phase = fill_step(
                    descs, tiles, cleared, phase, step, met, sequences, work, head, start, options
                )
        # The sides begin the products of a step that does not come: any rows do.
        column = work.kv_head * (options.N // options.K) * H
        fill(
            tiles.query_ring, work.steps, descs.query, work.batch, work.begin, work.query_length, T,
            column, BLOCK_Q, H, IS_RAGGED,
        )  # fmt: skip
        if options.HELPER:
            fill(
                tiles.gradient_ring, work.steps, descs.output_gradient, work.batch, work.begin,
                work.query_length, T, column, BLOCK_Q, H, IS_RAGGED,
            )  # fmt: skip


@gluon.jit
def differentiate(outputs, factors, common, options, SIDE: gl.constexpr):
    """Gradients of SIDE_KEYS keys and values; hands the logits' gradients to the helper."""
    tiles, sequences, matrix = common
    queries, gradients, exchange = tiles.query_ring, tiles.gradient_ring, tiles.exchange
    keys, values = tiles.key_sides, tiles.value_sides
    H: gl.constexpr = options.H
    work = work_of(sequences, options)
    row = work.first + SIDE * SIDE_KEYS
    works = has_work(work, sequences, options)
    side = side_of(factors, sequences, work, row, options)
    logit_sums = no_sums(outputs, options)
    key_total = gl.zeros([SIDE_KEYS, H], gl.float32, layout=accumulator_layout(H))
    value_total = gl.zeros([SIDE_KEYS, H], gl.float32, layout=accumulator_layout(H))
    mbarrier.wait(tiles.loaded, 0, pred=works)
    clear_keys(keys.index(SIDE), sequences, work, row)
    queries.wait_full(0, works)
    gradients.wait_full(0, works)
    scores = begin_scores(keys.index(SIDE), queries.buffer(0))
    weight_gradient = begin_scores(values.index(SIDE), gradients.buffer(0))
    scores, weight_gradient = warpgroup_mma_wait(num_outstanding=0, deps=(scores, weight_gradient))
    span = one_segment(sequences, work, options)
    row_offset = row_offset_of(sequences, work, work.begin, options)
    allowed = allowed_at(matrix, sequences, work, row, 0, options)
    for step in range(work.steps):
        head, start = head_and_query(step, work, options)
        weights = weights_of_step(
            scores, step, head, start, side, row_offset, None, span, allowed, factors, work, common,
            options, SIDE,
        )  # fmt: skip
        signs = signs_of(sequences, row, start, options)
        operand, logit_sums = gradients_of_step(
            weights, weight_gradient, logit_sums, signs, span, start, side, allowed, factors,
            outputs, common, options,
        )  # fmt: skip
        hand_over(exchange, step, SIDE, operand, PLACED=True)
        # The next step's, which arrive while this one's products are computed.
        following = gl.minimum(step + 1, work.steps - 1)
        head, start = head_and_query(following, work, options)
        row_offset = row_offset_of(sequences, work, start, options)
        following_allowed = allowed_of(matrix, sequences, work, head, row, start, options)
        queries.wait_full(step + 1)
        gradients.wait_full(step + 1)
        # All products between two steps' weights, one after the other.
        rounded = operand_of(weights, keys.dtype, allowed, matrix)
        value_total = warpgroup_mma(
            as_left_operand(where_negative(rounded, signs, sequences, options), H),
            gradients.buffer(step), value_total, is_async=True,
        )  # fmt: skip
        key_total = warpgroup_mma(
            as_left_operand(operand, H), queries.buffer(step), key_total, is_async=True
        )
        scores = begin_scores(keys.index(SIDE), queries.buffer(step + 1))
        weight_gradient = begin_scores(values.index(SIDE), gradients.buffer(step + 1))
        value_total, key_total, scores, weight_gradient = warpgroup_mma_wait(
            num_outstanding=0, deps=(value_total, key_total, scores, weight_gradient)
        )
        gradients.release(step)
        queries.release(step)
        allowed = following_allowed
    # The keys are overwritten below: the helper must be done with them.
    exchange_free(exchange, work.steps - 1, SIDE)
    factor = factors.scale / side.range_scale
    store_sums(outputs, logit_sums, sequences, work, row, options)
    store_gradients(
        outputs, keys.index(SIDE), values.index(SIDE), key_total * factor, value_total, sequences,
        work, row, options,
    )  # fmt: skip


@gluon.jit
def help_queries(outputs, common, options):
    """Adds what this program's keys contribute to the query gradients."""
    tiles, sequences, _matrix = common
    H: gl.constexpr = options.H
    exchange, sums = tiles.exchange, tiles.sums.index(0)
    work = work_of(sequences, options)
    works = has_work(work, sequences, options)
    mbarrier.wait(tiles.loaded, 0, pred=works)
    for step in range(work.steps):
        head, start = head_and_query(step, work, options)
        total = gl.zeros([options.BLOCK_Q, H], gl.float32, layout=accumulator_layout(H))
        for side in gl.static_range(2):
            exchange_full(exchange, step, side)
            total = warpgroup_mma(
                exchanged(exchange, step, side), tiles.key_sides.index(side), total,
                use_acc=side > 0, is_async=True,
            )  # fmt: skip
        total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        for side in gl.static_range(2):
            exchange_release(exchange, step, side)
        stage_part(sums, total, PLACED=True)
        add_staged(outputs.query_desc, sums, work.batch, start, head * H)
    tma.store_wait(0)


@gluon.jit
def differentiate_all(outputs, factors, common, options, SIDE: gl.constexpr):
    """Gradients of SIDE_KEYS keys and values, and one half of the query gradients' columns.

    A step's query gradients are computed one step late, when both sides' logit gradients have
    long been there: no side waits for the other.
    """
    tiles, sequences, matrix = common
    queries, gradients, exchange = tiles.query_ring, tiles.gradient_ring, tiles.exchange
    # A side's buffers are indexed where they are used: indexed once, other addresses are computed.
    keys, values = tiles.key_sides, tiles.value_sides
    sums = tiles.sums.index(SIDE)
    H: gl.constexpr = options.H
    HALF: gl.constexpr = H // 2
    PLACED: gl.constexpr = is_plain(sequences, matrix, options)
    work = work_of(sequences, options)
    row = work.first + SIDE * SIDE_KEYS
    works = has_work(work, sequences, options)
    side = side_of(factors, sequences, work, row, options)
    logit_sums = no_sums(outputs, options)
    key_total = gl.zeros([SIDE_KEYS, H], gl.float32, layout=accumulator_layout(H))
    value_total = gl.zeros([SIDE_KEYS, H], gl.float32, layout=accumulator_layout(H))
    mbarrier.wait(tiles.loaded, 0, pred=works)
    clear_keys(keys.index(SIDE), sequences, work, row)
    queries.wait_full(0, works)
    scores = begin_scores(keys.index(SIDE), queries.buffer(0))
    scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))
    ahead = queries_ahead(sequences, work, work.begin, options)
    late_head, late_start = head_and_query(0, work, options)
    allowed = allowed_at(matrix, sequences, work, row, 0, options)
    for step in range(work.steps):
        head, start = head_and_query(step, work, options)
        row_offset = spread(ahead.row_offset, sequences.row_bias_ptr, options)
        gradients.wait_full(step)
        weight_gradient = begin_scores(values.index(SIDE), gradients.buffer(step))
        weights = weights_of_step(
            scores, step, head, start, side, row_offset, ahead.segments, None, allowed, factors,
            work, common, options, SIDE,
        )  # fmt: skip
        signs = signs_of(sequences, row, start, options)
        rounded = operand_of(weights, keys.dtype, allowed, matrix)
        value_total = warpgroup_mma(
            as_left_operand(where_negative(rounded, signs, sequences, options), H),
            gradients.buffer(step), value_total, is_async=True,
        )  # fmt: skip
        weight_gradient = warpgroup_mma_wait(num_outstanding=1, deps=(weight_gradient,))
        operand, logit_sums = gradients_of_step(
            weights, weight_gradient, logit_sums, signs, None, start, side, allowed, factors,
            outputs, common, options,
        )  # fmt: skip
        hand_over(exchange, step, SIDE, operand, PLACED)
        # Before the first step there is nothing late: what is multiplied then is not added.
        exchange_full(exchange, step - 1, 0, step > 0)
        exchange_full(exchange, step - 1, 1, step > 0)
        zero = in_step(0, sequences, outputs, options)
        total = begin_query_gradient(tiles, step - 1, zero, options, SIDE, PLACED)
        key_total = warpgroup_mma(
            as_left_operand(operand, H), queries.buffer(step), key_total, is_async=True
        )
        value_total, total = warpgroup_mma_wait(num_outstanding=1, deps=(value_total, total))
        gradients.release(step)
        exchange_release(exchange, step - 1, 0, step > 0)
        exchange_release(exchange, step - 1, 1, step > 0)
        column = late_head * H + SIDE * HALF
        stage_part(sums, total, PLACED)
        ahead = queries_of_step(sequences, work, step + 1, options)
        queries.wait_full(step + 1)
        following = begin_scores(keys.index(SIDE), queries.buffer(step + 1))
        allowed = allowed_at(matrix, sequences, work, row, step + 1, options)
        if step > 0:
            add_staged(outputs.query_desc, sums, work.batch, late_start, column)
        key_total, scores = warpgroup_mma_wait(num_outstanding=0, deps=(key_total, following))
        queries.release(step)
        late_head = head
        late_start = start
    exchange_full(exchange, work.steps - 1, 0, works)
    exchange_full(exchange, work.steps - 1, 1, works)
    total = begin_query_gradient(tiles, work.steps - 1, 0, options, SIDE, PLACED)
    total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
    exchange_release(exchange, work.steps - 1, 0, works)
    exchange_release(exchange, work.steps - 1, 1, works)
    column = late_head * H + SIDE * HALF
    stage_part(sums, total, PLACED)
    if works:
        add_staged(outputs.query_desc, sums, work.batch, late_start, column)
    # The keys are overwritten below: the other side must be done with them.
    exchange_free(exchange, work.steps - 1, 0)
    exchange_free(exchange, work.steps - 1, 1)
    factor = factors.scale / side.range_scale
    store_sums(outputs, logit_sums, sequences, work, row, options)
    store_gradients(
        outputs, keys.index(SIDE), values.index(SIDE), key_total * factor, value_total, sequences,
        work, row, options,
    )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def as_left_operand(x, H: gl.constexpr):
    """X [SIDE_KEYS, BLOCK_Q] in the registers of a product [SIDE_KEYS, H]."""
    return gl.convert_layout(x, gl.DotOperandLayout(0, accumulator_layout(H), 2))


@gluon.jit
def begin_query_gradient(tiles, step, zero, options, SIDE: gl.constexpr, PLACED: gl.constexpr):
    """Starts logit gradients · keys, half the columns of it, over both sides' keys; zero is 0.

    PLACED it is [BLOCK_Q, H // 2], else transposed, see hopper_exchange.
    """
    keys, exchange = tiles.key_sides, tiles.exchange
    BLOCK_Q: gl.constexpr = options.BLOCK_Q
    HALF: gl.constexpr = options.H // 2
    if PLACED:
        total = gl.zeros([BLOCK_Q, HALF], gl.float32, layout=accumulator_layout(HALF))
        for side in gl.static_range(2):
            total = warpgroup_mma(
                exchanged(exchange, step, side),
                keys.index(side + zero).slice(SIDE * HALF, HALF, dim=1), total,
                use_acc=side > 0, is_async=True,
            )  # fmt: skip
    else:
        total = gl.zeros([HALF, BLOCK_Q], gl.float32, layout=accumulator_layout(BLOCK_Q))
        for side in gl.static_range(2):
            total = warpgroup_mma(
                keys.index(side + zero).slice(SIDE * HALF, HALF, dim=1).permute((1, 0)),
                exchanged(exchange, step, side), total, use_acc=side > 0, is_async=True,
            )  # fmt: skip
    return total


@gluon.jit
def store_gradients(outputs, keys, values, key_total, value_total, sequences, work, row, options):
    """Stores SIDE_KEYS gradients through the buffers of the keys and values."""
    H: gl.constexpr = options.H
    STRIDE: gl.constexpr = options.K * H
    S, key_length = sequences.S, work.key_length
    dtype: gl.constexpr = keys.dtype
    offset = ((work.batch.to(gl.int64) * S + row) * options.K + work.kv_head) * H
    value_total = unscale(value_total, dtype)
    if outputs.key_ptr.dtype.element_ty == dtype:
        values.store(value_total.to(dtype))
        keys.store(key_total.to(dtype))
        store_rows(outputs.value_ptr + offset, values, row, S, key_length, STRIDE)
        store_rows(outputs.key_ptr + offset, keys, row, S, key_length, STRIDE)
    else:
        store_accumulator(outputs.value_ptr + offset, value_total, row, S, key_length, STRIDE)
        store_accumulator(outputs.key_ptr + offset, key_total, row, S, key_length, STRIDE)
