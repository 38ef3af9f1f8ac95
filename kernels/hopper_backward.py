"""The backward kernel for Hopper, sm_90 (Gluon device code): all three gradients in one pass.

One program takes 128 keys of one head over all their queries. A warpgroup copies tiles by TMA,
two more take 64 keys each and keep their key and value gradients in registers. The logits'
gradients go through shared memory to whoever multiplies them by the keys, and each part of a
query gradient is added to the float32 sum in global memory by TMA. The order of those additions
is not fixed: query gradients may differ in their last bits from run to run.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sigjax.kernels.hopper_backward_matrix import (
    allowed_at,
    allowed_of,
    bias_of,
    fill_with_biases,
    operand_of,
    weights_of_pairs,
    without_masked,
    zero_unless_allowed,
)
from sigjax.kernels.hopper_backward_pairs import (
    clear_keys,
    fill_step,
    has_work,
    head_and_query,
    key_ids_of,
    one_segment,
    queries_ahead,
    queries_of_step,
    row_offset_of,
    signs_of,
    span_of,
    spread,
    where_negative,
    where_weighted,
    without_excluded_gradients,
    without_excluded_weights,
    work_of,
)
from sigjax.kernels.hopper_biases import (
    SIDE_KEYS,
    common_offset,
    key_offset_of,
    no_sums,
    offset_of,
    range_scale_at,
    scaled,
    store_sums,
    with_sums,
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
    computed_here,
    copy_rows,
    fill,
    new_ring,
    store_accumulator,
    store_rows,
)
from sigjax.kernels.hopper_sums import add_staged, stage_part
from sigjax.kernels.hopper_weights import unscale
from sigjax.kernels.tile_math import LOG2_E


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
    query_segments_ptr,  # [B, T] int32, or None as the next three: hopper_launch._packing
    key_segments_ptr,  # [B, S] int32; this, the last and the next have rows of whole blocks
    row_bias_ptr,  # [B, T] float32, added to the logits of a row; None beside sigmoid_bias
    ranges_ptr,  # [B, key tiles, 3] int32: the queries of PROGRAM_KEYS keys' segments
    range_scale_ptr,  # [B, K] float32, powers of two: launch.range_scale; or None
    bias_desc,  # [B' * N', T, S], blocks of BLOCK_Q by SIDE_KEYS; or None
    mask_ptr,  # [B', N', query blocks * 2, S] int32, hopper_matrices.mask_bits; or None
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
    cleared = loaded
    if query_segments_ptr is not None:
        cleared = mbarrier.allocate_mbarrier()
        mbarrier.init(cleared, count=1)
    PARTS: gl.constexpr = 1 if HELPER else 2
    sums_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(
        [BLOCK_Q, H // PARTS], gl.float32
    )
    sums = gl.allocate_shared_memory(gl.float32, [PARTS, BLOCK_Q, H // PARTS], sums_layout)
    inputs = (query_desc, key_desc, value_desc, output_gradient_desc)
    tiles = (queries, gradients, exchange, keys, values, loaded)
    outputs = (key_gradient_ptr, value_gradient_ptr, logit_sums_ptr)
    work = (
        query_lengths_ptr, key_lengths_ptr, order_ptr, T, S, query_segments_ptr, key_segments_ptr,
        row_bias_ptr, ranges_ptr, NEIGHBOURS,
    )  # fmt: skip
    matrix = (bias_desc, bias_desc, mask_ptr, BIAS_AXES, MASK_AXES)
    if bias_desc is not None:
        biases = gl.allocate_shared_memory(
            bias_desc.dtype, [2 * STAGES, BLOCK_Q, SIDE_KEYS], layout
        )
        matrix = (bias_desc, biases, mask_ptr, BIAS_AXES, MASK_AXES)
    factors = (sigmoid_bias_ptr, range_scale_ptr, scale, key_bias_ptr, KEY_AXES)
    if HELPER:
        gl.warp_specialize(
            [
                (produce, (inputs, tiles, cleared, matrix, work, N, K, H, BLOCK_Q, LEFT,
                           RIGHT, HELPER)),
                (differentiate, (outputs, tiles, matrix, work, factors, N, K, H, BLOCK_Q, LEFT,
                                 RIGHT, 0)),
                (differentiate, (outputs, tiles, matrix, work, factors, N, K, H, BLOCK_Q, LEFT,
                                 RIGHT, 1)),
                (help_queries, (query_gradient, sums, tiles, work, N, K, H, BLOCK_Q, LEFT, RIGHT)),
            ],
            [4, 4, 4],
            [200, 200, 88],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (produce, (inputs, tiles, cleared, matrix, work, N, K, H, BLOCK_Q, LEFT,
                           RIGHT, HELPER)),
                (differentiate_all, (outputs, query_gradient, sums, tiles, matrix, work, factors, N,
                                     K, H, BLOCK_Q, LEFT, RIGHT, 0)),
                (differentiate_all, (outputs, query_gradient, sums, tiles, matrix, work, factors, N,
                                     K, H, BLOCK_Q, LEFT, RIGHT, 1)),
            ],
            [4, 4],
            [240, 240],
        )  # fmt: skip


@gluon.jit
def produce(
    inputs, tiles, cleared, matrix, work, N: gl.constexpr, K: gl.constexpr, H: gl.constexpr,
    BLOCK_Q: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, HELPER: gl.constexpr,
):  # fmt: skip
    """Copies the keys and values once, then queries and output gradients step by step."""
    query_desc, key_desc, value_desc, output_gradient_desc = inputs
    queries, gradients, exchange, keys, values, loaded = tiles
    IS_RAGGED: gl.constexpr = work[2] is not None
    T, S = work[3], work[4]
    batch, kv_head, first, begin, blocks, query_length, key_length = work_of(
        work, K, BLOCK_Q, LEFT, RIGHT
    )
    steps = blocks * (N // K)
    if has_work(steps, work, LEFT, RIGHT):
        mbarrier.expect(loaded, 4 * key_desc.nbytes_per_cta)
        for side in gl.static_range(2):
            row = first + side * SIDE_KEYS
            copy_rows(
                key_desc, batch, row, key_length, S, kv_head * H, loaded, keys.index(side),
                SIDE_KEYS, H, IS_RAGGED,
            )  # fmt: skip
            copy_rows(
                value_desc, batch, row, key_length, S, kv_head * H, loaded, values.index(side),
                SIDE_KEYS, H, IS_RAGGED,
            )  # fmt: skip
        span = span_of(work, batch, first)
        phase = 0
        for step in range(steps):
            head, start = head_and_query(step, kv_head, begin, blocks, N, K, BLOCK_Q)
            if matrix[0] is not None:
                fill_with_biases(
                    inputs, queries, gradients, matrix, step, work, batch, head, first, start,
                    query_length, N, H, BLOCK_Q,
                )  # fmt: skip
            else:
                phase = fill_step(
                    inputs, queries, gradients, cleared, phase, step, work, span, batch, start,
                    query_length, head * H, H, BLOCK_Q,
                )  # fmt: skip
        # The sides begin the products of a step that does not come: any rows do.
        column = kv_head * (N // K) * H
        fill(
            queries, steps, query_desc, batch, begin, query_length, T, column, BLOCK_Q, H, IS_RAGGED
        )
        if HELPER:
            fill(
                gradients, steps, output_gradient_desc, batch, begin, query_length, T, column,
                BLOCK_Q, H, IS_RAGGED,
            )  # fmt: skip


@gluon.jit
def differentiate(
    outputs, tiles, matrix, work, factors, N: gl.constexpr, K: gl.constexpr, H: gl.constexpr,
    BLOCK_Q: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, SIDE: gl.constexpr,
):  # fmt: skip
    """Gradients of SIDE_KEYS keys and values; hands the logits' gradients to the helper."""
    queries, gradients, exchange, keys, values, loaded = tiles
    batch, kv_head, first, begin, blocks, query_length, key_length = work_of(
        work, K, BLOCK_Q, LEFT, RIGHT
    )
    steps = blocks * (N // K)
    row = first + SIDE * SIDE_KEYS
    works = has_work(steps, work, LEFT, RIGHT)
    range_scale, offset, key_offset, key_ids = of_all_steps(
        factors, work, batch, kv_head, row, key_length, N, K, BLOCK_Q
    )
    logit_sums = no_sums(outputs, BLOCK_Q)
    key_total = gl.zeros([SIDE_KEYS, H], gl.float32, layout=accumulator_layout(H))
    value_total = gl.zeros([SIDE_KEYS, H], gl.float32, layout=accumulator_layout(H))
    mbarrier.wait(loaded, 0, pred=works)
    clear_keys(keys.index(SIDE), work, batch, first, row)
    queries.wait_full(0, works)
    gradients.wait_full(0, works)
    scores = begin_scores(keys.index(SIDE), queries.buffer(0))
    weight_gradient = begin_scores(values.index(SIDE), gradients.buffer(0))
    scores, weight_gradient = warpgroup_mma_wait(num_outstanding=0, deps=(scores, weight_gradient))
    span = one_segment(work, batch, first, BLOCK_Q)
    row_offset = row_offset_of(work, batch, begin, BLOCK_Q)
    allowed = allowed_at(matrix, work, batch, row, 0, steps, kv_head, begin, blocks, N, K, BLOCK_Q)
    for step in range(steps):
        head, start = head_and_query(step, kv_head, begin, blocks, N, K, BLOCK_Q)
        bias = bias_of(
            matrix, queries, step, work, row, start, query_length, key_length, BLOCK_Q, SIDE
        )
        weights = weights_of(
            scores, factors, offset_of(factors, batch * N + head, offset, N, K), key_offset,
            row_offset, work, bias, allowed, matrix,
        )  # fmt: skip
        weights = without_excluded_weights(
            weights, key_ids, None, span, work, batch, row, start, LEFT, RIGHT
        )
        signs = signs_of(work, row, start, BLOCK_Q, LEFT, RIGHT)
        gradient = without_excluded_gradients(
            logit_gradient(weights, weight_gradient), weights, signs, span, work, outputs, row,
            start, LEFT, RIGHT, keys.dtype,
        )  # fmt: skip
        gradient = without_masked(gradient, allowed, matrix, outputs)
        logit_sums = with_sums(logit_sums, gradient, outputs)
        operand = zero_unless_allowed(
            scaled(gradient, factors, range_scale).to(keys.dtype), allowed, matrix
        )
        operand = where_negative(operand, signs, work, LEFT, RIGHT)
        operand = where_weighted(operand, weights, span, start, work, outputs)
        hand_over(exchange, step, SIDE, operand, PLACED=True)
        # The next step's, which arrive while this one's products are computed.
        following = gl.minimum(step + 1, steps - 1)
        head, start = head_and_query(following, kv_head, begin, blocks, N, K, BLOCK_Q)
        row_offset = row_offset_of(work, batch, start, BLOCK_Q)
        following_allowed = allowed_of(matrix, work, batch, head, row, start, N, BLOCK_Q)
        queries.wait_full(step + 1)
        gradients.wait_full(step + 1)
        # All products between two steps' weights, one after the other.
        rounded = operand_of(weights, keys.dtype, allowed, matrix)
        value_total = warpgroup_mma(
            as_left_operand(where_negative(rounded, signs, work, LEFT, RIGHT), H),
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
    exchange_free(exchange, steps - 1, SIDE)
    factor = factors[2] / range_scale
    store_sums(outputs, logit_sums, batch * N + kv_head, row, key_length, work[4])
    store_gradients(
        outputs, keys.index(SIDE), values.index(SIDE), key_total * factor, value_total, work,
        batch, kv_head, row, key_length, K, H,
    )  # fmt: skip


@gluon.jit
def help_queries(
    query_gradient, sums, tiles, work, N: gl.constexpr, K: gl.constexpr, H: gl.constexpr,
    BLOCK_Q: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """Adds what this program's keys contribute to the query gradients."""
    queries, gradients, exchange, keys, values, loaded = tiles
    batch, kv_head, first, begin, blocks, query_length, key_length = work_of(
        work, K, BLOCK_Q, LEFT, RIGHT
    )
    steps = blocks * (N // K)
    works = has_work(steps, work, LEFT, RIGHT)
    mbarrier.wait(loaded, 0, pred=works)
    for step in range(steps):
        head, start = head_and_query(step, kv_head, begin, blocks, N, K, BLOCK_Q)
        total = gl.zeros([BLOCK_Q, H], gl.float32, layout=accumulator_layout(H))
        for side in gl.static_range(2):
            exchange_full(exchange, step, side)
            total = warpgroup_mma(
                exchanged(exchange, step, side), keys.index(side), total, use_acc=side > 0,
                is_async=True,
            )  # fmt: skip
        total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        for side in gl.static_range(2):
            exchange_release(exchange, step, side)
        stage_part(sums.index(0), total, PLACED=True)
        add_staged(query_gradient, sums.index(0), batch, start, head * H)
    tma.store_wait(0)


@gluon.jit
def differentiate_all(
    outputs, query_gradient, sums, tiles, matrix, work, factors, N: gl.constexpr, K: gl.constexpr,
    H: gl.constexpr, BLOCK_Q: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    SIDE: gl.constexpr,
):  # fmt: skip
    """Gradients of SIDE_KEYS keys and values, and one half of the query gradients' columns.

    A step's query gradients are computed one step late, when both sides' logit gradients have
    long been there: no side waits for the other.
    """
    queries, gradients, exchange, keys, values, loaded = tiles
    HALF: gl.constexpr = H // 2
    PLACED: gl.constexpr = is_plain(work, matrix, LEFT, RIGHT)
    batch, kv_head, first, begin, blocks, query_length, key_length = work_of(
        work, K, BLOCK_Q, LEFT, RIGHT
    )
    steps = blocks * (N // K)
    row = first + SIDE * SIDE_KEYS
    works = has_work(steps, work, LEFT, RIGHT)
    range_scale, offset, key_offset, key_ids = of_all_steps(
        factors, work, batch, kv_head, row, key_length, N, K, BLOCK_Q
    )
    logit_sums = no_sums(outputs, BLOCK_Q)
    key_total = gl.zeros([SIDE_KEYS, H], gl.float32, layout=accumulator_layout(H))
    value_total = gl.zeros([SIDE_KEYS, H], gl.float32, layout=accumulator_layout(H))
    mbarrier.wait(loaded, 0, pred=works)
    clear_keys(keys.index(SIDE), work, batch, first, row)
    queries.wait_full(0, works)
    scores = begin_scores(keys.index(SIDE), queries.buffer(0))
    scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))
    ahead = queries_ahead(work, batch, begin, BLOCK_Q)
    late_head, late_start = head_and_query(0, kv_head, begin, blocks, N, K, BLOCK_Q)
    allowed = allowed_at(matrix, work, batch, row, 0, steps, kv_head, begin, blocks, N, K, BLOCK_Q)
    for step in range(steps):
        head, start = head_and_query(step, kv_head, begin, blocks, N, K, BLOCK_Q)
        row_offset = spread(ahead[1], work[7], BLOCK_Q)
        gradients.wait_full(step)
        weight_gradient = begin_scores(values.index(SIDE), gradients.buffer(step))
        bias = bias_of(
            matrix, queries, step, work, row, start, query_length, key_length, BLOCK_Q, SIDE
        )
        weights = weights_of(
            scores, factors, offset_of(factors, batch * N + head, offset, N, K), key_offset,
            row_offset, work, bias, allowed, matrix,
        )  # fmt: skip
        weights = without_excluded_weights(
            weights, key_ids, ahead[0], None, work, batch, row, start, LEFT, RIGHT
        )
        signs = signs_of(work, row, start, BLOCK_Q, LEFT, RIGHT)
        rounded = operand_of(weights, keys.dtype, allowed, matrix)
        value_total = warpgroup_mma(
            as_left_operand(where_negative(rounded, signs, work, LEFT, RIGHT), H),
            gradients.buffer(step), value_total, is_async=True,
        )  # fmt: skip
        weight_gradient = warpgroup_mma_wait(num_outstanding=1, deps=(weight_gradient,))
        gradient = without_excluded_gradients(
            logit_gradient(weights, weight_gradient), weights, signs, None, work, outputs, row,
            start, LEFT, RIGHT, keys.dtype,
        )  # fmt: skip
        gradient = without_masked(gradient, allowed, matrix, outputs)
        logit_sums = with_sums(logit_sums, gradient, outputs)
        operand = zero_unless_allowed(
            scaled(gradient, factors, range_scale).to(keys.dtype), allowed, matrix
        )
        operand = where_negative(operand, signs, work, LEFT, RIGHT)
        operand = where_weighted(operand, weights, None, start, work, outputs)
        hand_over(exchange, step, SIDE, operand, PLACED)
        # Before the first step there is nothing late: what is multiplied then is not added.
        exchange_full(exchange, step - 1, 0, step > 0)
        exchange_full(exchange, step - 1, 1, step > 0)
        total = begin_query_gradient(
            exchange, step - 1, keys, BLOCK_Q, HALF, SIDE, PLACED,
            in_step(0, work, outputs, LEFT),
        )  # fmt: skip
        key_total = warpgroup_mma(
            as_left_operand(operand, H), queries.buffer(step), key_total, is_async=True
        )
        value_total, total = warpgroup_mma_wait(num_outstanding=1, deps=(value_total, total))
        gradients.release(step)
        exchange_release(exchange, step - 1, 0, step > 0)
        exchange_release(exchange, step - 1, 1, step > 0)
        column = late_head * H + SIDE * HALF
        stage_part(sums.index(SIDE), total, PLACED)
        ahead = queries_of_step(work, batch, step + 1, steps, kv_head, begin, blocks, N, K, BLOCK_Q)
        queries.wait_full(step + 1)
        following = begin_scores(keys.index(SIDE), queries.buffer(step + 1))
        allowed = allowed_at(
            matrix, work, batch, row, step + 1, steps, kv_head, begin, blocks, N, K, BLOCK_Q
        )
        if step > 0:
            add_staged(query_gradient, sums.index(SIDE), batch, late_start, column)
        key_total, scores = warpgroup_mma_wait(num_outstanding=0, deps=(key_total, following))
        queries.release(step)
        late_head = head
        late_start = start
    exchange_full(exchange, steps - 1, 0, works)
    exchange_full(exchange, steps - 1, 1, works)
    total = begin_query_gradient(exchange, steps - 1, keys, BLOCK_Q, HALF, SIDE, PLACED, 0)
    total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
    exchange_release(exchange, steps - 1, 0, works)
    exchange_release(exchange, steps - 1, 1, works)
    column = late_head * H + SIDE * HALF
    stage_part(sums.index(SIDE), total, PLACED)
    if works:
        add_staged(query_gradient, sums.index(SIDE), batch, late_start, column)
    # The keys are overwritten below: the other side must be done with them.
    exchange_free(exchange, steps - 1, 0)
    exchange_free(exchange, steps - 1, 1)
    factor = factors[2] / range_scale
    store_sums(outputs, logit_sums, batch * N + kv_head, row, key_length, work[4])
    store_gradients(
        outputs, keys.index(SIDE), values.index(SIDE), key_total * factor, value_total, work,
        batch, kv_head, row, key_length, K, H,
    )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def is_plain(work, matrix, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """Whether nothing says which pairs take part; known when compiling."""
    return (
        work[2] is None and work[8] is None and LEFT is None and RIGHT is None
        and matrix[0] is None and matrix[2] is None
    )  # fmt: skip


@gluon.jit
def in_step(x, work, outputs, LEFT: gl.constexpr):
    """X; what follows from it is computed in the step where registers are short, not held in them.

    That is with segments, and with a window whose logits' gradients are summed up.
    """
    if work[8] is not None or (LEFT is not None and outputs[2] is not None):
        return computed_here(gl.to_tensor(x))
    else:
        return x


@gluon.jit
def of_all_steps(
    factors, work, batch, kv_head, row, key_length, N: gl.constexpr, K: gl.constexpr,
    BLOCK_Q: gl.constexpr,
):  # fmt: skip
    """(range_scale, offset, key_offset, key_ids) of a side: a step would wait for these loads."""
    range_scale = range_scale_at(factors, batch * K + kv_head)
    offset = common_offset(factors, batch * N + kv_head, key_length, N, K)
    key_ids = key_ids_of(work, batch, row, BLOCK_Q)
    key_offset = key_offset_of(factors, batch, kv_head, row, key_length, key_ids, work, K, BLOCK_Q)
    return range_scale, offset, key_offset, key_ids


@gluon.jit
def weights_of(scores, factors, offset, key_offset, row_offset, work, bias, allowed, matrix):
    """Weights [SIDE_KEYS, BLOCK_Q] of all pairs, float32; row_offset is of spread.

    bias is bias_of and allowed is allowed_of a matrix.
    """
    sigmoid_bias_ptr, range_scale_ptr, scale, key_bias_ptr, KEY_AXES = factors
    if work[7] is not None:
        added = row_offset[None, :]
        if key_bias_ptr is not None:
            added = added + key_offset[:, None]
        t = gl.fma(scores, -scale * LOG2_E, added)
    elif key_bias_ptr is not None:
        t = gl.fma(scores, -scale * LOG2_E, (offset + key_offset)[:, None])
    else:
        t = gl.fma(scores, -scale * LOG2_E, offset)
    return weights_of_pairs(t, bias, allowed, matrix)


@gluon.jit
def logit_gradient(weights, weight_gradient):
    """The logits' gradients [SIDE_KEYS, BLOCK_Q], from the weights' gradients."""
    product = weights * weight_gradient
    return gl.fma(-weights, product, product)


@gluon.jit
def as_left_operand(x, H: gl.constexpr):
    """X [SIDE_KEYS, BLOCK_Q] in the registers of a product [SIDE_KEYS, H]."""
    return gl.convert_layout(x, gl.DotOperandLayout(0, accumulator_layout(H), 2))


@gluon.jit
def begin_query_gradient(
    exchange, step, keys, BLOCK_Q: gl.constexpr, HALF: gl.constexpr, SIDE: gl.constexpr,
    PLACED: gl.constexpr, zero,
):  # fmt: skip
    """Starts logit gradients · keys, HALF columns of it, over both sides' keys; zero is 0.

    PLACED it is [BLOCK_Q, HALF], else transposed, see hopper_exchange.
    """
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
def store_gradients(
    outputs, keys, values, key_total, value_total, work, batch, kv_head, row, key_length,
    K: gl.constexpr, H: gl.constexpr,
):  # fmt: skip
    """Stores SIDE_KEYS gradients through the buffers of the keys and values."""
    key_gradient_ptr, value_gradient_ptr, logit_sums_ptr = outputs
    S = work[4]
    dtype: gl.constexpr = keys.dtype
    offset = ((batch.to(gl.int64) * S + row) * K + kv_head) * H
    value_total = unscale(value_total, dtype)
    if key_gradient_ptr.dtype.element_ty == dtype:
        values.store(value_total.to(dtype))
        keys.store(key_total.to(dtype))
        store_rows(value_gradient_ptr + offset, values, row, S, key_length, K * H)
        store_rows(key_gradient_ptr + offset, keys, row, S, key_length, K * H)
    else:
        store_accumulator(value_gradient_ptr + offset, value_total, row, S, key_length, K * H)
        store_accumulator(key_gradient_ptr + offset, key_total, row, S, key_length, K * H)
