"""The kernel for the gradient of a bias of pairs on Hopper, sm_90 (Gluon device code).

One program a multiprocessor takes tile after tile of the bias. It goes over all sequences and heads
that share the tile in their order and sums the logits' gradients in registers: no atomics, the same
bits in every run. A warpgroup copies by TMA; CONSUMERS more have SIDE queries each. What they work
on at a time is a piece, SIDE queries by SIDE keys.

work is (query lengths, key lengths, B, T, S), factors (sigmoid_bias, key_bias, scale), both of the
kernel.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from sigjax.kernels.hopper_backward_matrix import as_float32
from sigjax.kernels.hopper_math import (
    accumulator_layout,
    begin_scores,
    computed_here,
    copy_rows,
    head_offset,
    new_ring,
    of_keys,
    row_layout,
    uniform,
)
from sigjax.kernels.hopper_weights import sigmoid_slopes
from sigjax.kernels.tile_math import LOG2_E

SIDE = gl.constexpr(64)  # queries, and keys, of a piece
TILE_KEYS = gl.constexpr(128)
CONSUMERS = gl.constexpr(2)  # warpgroups that compute


@gluon.jit
def hopper_bias_gradient_kernel(
    query_desc,  # [B, T, N * H], blocks of SIDE rows of a head; ragged with lengths
    key_desc,  # [B, S, K * H], blocks of SIDE rows of a head; ragged with lengths
    value_desc,  # as key_desc
    output_gradient_desc,  # as query_desc
    bias_desc,  # [(B or 1) * (N or 1), T, S], blocks of SIDE rows and columns
    query_lengths_ptr,  # [B] int32, or None
    key_lengths_ptr,  # [B] int32; given where query_lengths is
    sigmoid_bias_ptr,  # [B, N] float32, or None: -log(number of keys)
    key_bias_ptr,  # [B, blocks, SIDE] float32 times -log2(e), or None
    B,
    T,
    S,  # a multiple of 8
    scale,  # factor of the logits
    bias_gradient_ptr,  # shape of the bias
    N: gl.constexpr,
    K: gl.constexpr,
    H: gl.constexpr,
    QUERY_STAGES: gl.constexpr,  # blocks of queries in shared memory, of each warpgroup
    KEY_STAGES: gl.constexpr,
    HELD: gl.constexpr,  # whether warpgroups hold a tile's bias in registers
    LEFT: gl.constexpr,  # window: query - LEFT <= key <= query + RIGHT; None is no bound
    RIGHT: gl.constexpr,
    AXES: gl.constexpr,  # whether the bias has an axis of B, and of N
):
    """One program: every so many-th tile of CONSUMERS * SIDE queries by TILE_KEYS keys."""
    dtype: gl.constexpr = query_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    # Of queries and output gradients, or keys and values, a stage has two buffers.
    queries_0 = new_ring(dtype, 2 * QUERY_STAGES, SIDE, H, layout, QUERY_STAGES, 1)
    queries_1 = new_ring(dtype, 2 * QUERY_STAGES, SIDE, H, layout, QUERY_STAGES, 1)
    keys = new_ring(dtype, 2 * KEY_STAGES, SIDE, H, layout, KEY_STAGES, CONSUMERS)
    # The two pieces of a warpgroup's part of the tile.
    bias_0 = new_ring(bias_desc.dtype, 2, SIDE, SIDE, layout, 2, 1)
    bias_1 = new_ring(bias_desc.dtype, 2, SIDE, SIDE, layout, 2, 1)
    # Gradients on their way out; where the bias is not held, its buffers are free for them.
    staged = bias_0.buffers
    if HELD:
        staged = gl.allocate_shared_memory(bias_desc.dtype, [CONSUMERS, SIDE, SIDE], layout)
    inputs = (query_desc, key_desc, value_desc, output_gradient_desc, bias_desc)
    work = (query_lengths_ptr, key_lengths_ptr, B, T, S)
    factors = (sigmoid_bias_ptr, key_bias_ptr, scale)
    gl.warp_specialize(
        [
            (produce, (inputs, (queries_0, queries_1), keys, (bias_0, bias_1), work, N, K, H, LEFT,
                       RIGHT, AXES)),
            (differentiate, (bias_gradient_ptr, queries_0, keys, bias_0, staged, work, factors, N,
                             HELD, LEFT, RIGHT, AXES, 0)),
            (differentiate, (bias_gradient_ptr, queries_1, keys, bias_1, staged, work, factors, N,
                             HELD, LEFT, RIGHT, AXES, 1)),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip


@gluon.jit
def produce(
    inputs, queries, keys, biases, work, N: gl.constexpr, K: gl.constexpr, H: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, AXES: gl.constexpr,
):  # fmt: skip
    """Copies what every tile of this program needs, as buffers come free."""
    query_desc, key_desc, value_desc, output_gradient_desc, bias_desc = inputs
    HEADS: gl.constexpr = 1 if AXES[1] else N
    IS_RAGGED: gl.constexpr = work[0] is not None
    T, S = work[3], work[4]
    tiles = tiles_of(work, N, AXES)
    program = gl.program_id(0)
    filled = 0  # repeats
    done = 0  # tiles
    while program < tiles:
        start, first, plane, begin, end = tile_of(program, work, N, AXES)
        steps = 0
        if has_pairs(start, first, LEFT, RIGHT):
            for repeat in range(begin, end):
                batch = repeat // HEADS
                head = head_of(repeat, plane, N, AXES)
                query_length, key_length = lengths_of(work, batch)
                if meets(work, start, first, query_length, key_length):
                    for side in gl.static_range(2):
                        fill_pair(
                            keys, 2 * filled + side, key_desc, value_desc, batch,
                            first + side * SIDE, key_length, S, head // (N // K) * H, H, IS_RAGGED,
                        )  # fmt: skip
                    for consumer in gl.static_range(CONSUMERS):
                        fill_pair(
                            queries[consumer], filled, query_desc, output_gradient_desc, batch,
                            start + consumer * SIDE, query_length, T, head * H, H, IS_RAGGED,
                        )  # fmt: skip
                    # The tile's bias is waited for with the next operands on their way.
                    if steps == 0:
                        for consumer in gl.static_range(CONSUMERS):
                            fill_bias(
                                biases[consumer], 2 * done, bias_desc, plane,
                                start + consumer * SIDE, first,
                            )  # fmt: skip
                    steps += 1
                    filled += 1
        if steps > 0:
            done += 1
        program += gl.num_programs(0)


@gluon.jit
def fill_pair(
    ring, count, desc, other_desc, batch, row, length, full_length, column, H: gl.constexpr,
    IS_RAGGED: gl.constexpr,
):  # fmt: skip
    """Starts the copies of the count-th use of a ring of two buffers a stage, once it is free."""
    ring.wait_free(count)
    stage = count % ring.stages
    full = ring.full.index(stage)
    mbarrier.expect(full, desc.nbytes_per_cta + other_desc.nbytes_per_cta)
    copy_rows(
        desc, batch, row, length, full_length, column, full, ring.buffers.index(2 * stage), SIDE, H,
        IS_RAGGED,
    )  # fmt: skip
    copy_rows(
        other_desc, batch, row, length, full_length, column, full,
        ring.buffers.index(2 * stage + 1), SIDE, H, IS_RAGGED,
    )  # fmt: skip


@gluon.jit
def fill_bias(ring, count, desc, plane, row, first):
    """Starts the copies of two pieces of the bias, side by side, once their buffers are free."""
    for side in gl.static_range(2):
        ring.wait_free(count + side)
        full = ring.full.index((count + side) % ring.stages)
        mbarrier.expect(full, desc.nbytes_per_cta)
        tma.async_load(
            desc, [plane, row, first + side * SIDE], full,
            ring.buffer(count + side).reshape([1, SIDE, SIDE]),
        )  # fmt: skip


@gluon.jit
def differentiate(
    bias_gradient_ptr, queries, keys, biases, staged, work, factors, N: gl.constexpr,
    HELD: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    AXES: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Sums the logits' gradients of SIDE queries of every tile of this program."""
    HEADS: gl.constexpr = 1 if AXES[1] else N
    layout: gl.constexpr = accumulator_layout(SIDE)
    tiles = tiles_of(work, N, AXES)
    program = gl.program_id(0)
    used = 0  # repeats
    done = 0  # tiles
    while program < tiles:
        start, first, plane, begin, end = tile_of(program, work, N, AXES)
        row = start + CONSUMER * SIDE
        last = last_repeat(work, start, first, begin, end, HEADS, LEFT, RIGHT)
        if last >= begin:
            left = gl.zeros([SIDE, SIDE], gl.float32, layout=layout)
            right = gl.zeros([SIDE, SIDE], gl.float32, layout=layout)
            held = (biases.buffers.index(0), biases.buffers.index(1))
            out = staged
            if HELD:
                # The next tile's bias arrives while this one's repeats are computed.
                held = (taken(biases, 2 * done, layout), taken(biases, 2 * done + 1, layout))
                out = staged.index(CONSUMER)
            for repeat in range(begin, last + 1):
                batch = repeat // HEADS
                head = head_of(repeat, plane, N, AXES)
                query_length, key_length = lengths_of(work, batch)
                if meets(work, start, first, query_length, key_length):
                    offset = head_offset(factors[0], batch * N + head, key_length)
                    place = (bias_gradient_ptr, plane, first, repeat == last)
                    span = (batch, query_length, key_length)
                    left, right = add_pieces(
                        left, right, queries, keys, biases, held, out, (used, done), work, factors,
                        offset, span, place, row, HELD, LEFT, RIGHT,
                    )  # fmt: skip
                    used += 1
            done += 1
        else:
            store_no_gradient(bias_gradient_ptr, plane, row, first, work)
        program += gl.num_programs(0)


@gluon.jit
def add_pieces(
    left, right, queries, keys, biases, held, out, counts, work, factors, offset, span, place, row,
    HELD: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """The sums of two pieces side by side with one head's; stores them after the last one's."""
    used, done = counts
    queries.wait_full(used)
    keys.wait_full(2 * used)
    scores, weight_gradient = begin_products(queries, used, keys, 2 * used)
    scores, weight_gradient = warpgroup_mma_wait(num_outstanding=0, deps=(scores, weight_gradient))
    keys.release(2 * used)
    if not HELD:
        biases.wait_full(2 * done)
    left = with_gradients(
        left, scores, weight_gradient, held[0], work, factors, offset, span, row, place[2], HELD,
        LEFT, RIGHT,
    )  # fmt: skip
    if place[3]:
        finish_piece(place, left, biases, out, 2 * done, row, place[2], work, HELD)
    keys.wait_full(2 * used + 1)
    scores, weight_gradient = begin_products(queries, used, keys, 2 * used + 1)
    scores, weight_gradient = warpgroup_mma_wait(num_outstanding=0, deps=(scores, weight_gradient))
    queries.release(used)
    keys.release(2 * used + 1)
    if not HELD:
        biases.wait_full(2 * done + 1)
    right = with_gradients(
        right, scores, weight_gradient, held[1], work, factors, offset, span, row, place[2] + SIDE,
        HELD, LEFT, RIGHT,
    )  # fmt: skip
    if place[3]:
        finish_piece(place, right, biases, out, 2 * done + 1, row, place[2] + SIDE, work, HELD)
    return left, right


@gluon.jit
def begin_products(queries, query_count, keys, key_count):
    """Starts the scores and the weights' gradients of a piece, [SIDE, SIDE] float32."""
    stage = query_count % queries.stages
    key_stage = key_count % keys.stages
    scores = begin_scores(queries.buffers.index(2 * stage), keys.buffers.index(2 * key_stage))
    weight_gradient = begin_scores(
        queries.buffers.index(2 * stage + 1), keys.buffers.index(2 * key_stage + 1)
    )
    return scores, weight_gradient


@gluon.jit
def with_gradients(
    total, scores, weight_gradient, bias, work, factors, offset, span, row, first,
    HELD: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """A piece's sum with the logits' gradients of one head, 0 where a pair takes no part."""
    layout: gl.constexpr = scores.type.layout
    sigmoid_bias_ptr, key_bias_ptr, scale = factors
    batch, query_length, key_length = span
    if key_bias_ptr is not None:
        offset = offset + of_keys(key_bias_ptr, batch, first, work[4], SIDE, layout)[None, :]
    # t = -log2(exp(logit)).
    if not HELD:
        bias = as_float32(bias.load(layout))
    t = gl.fma(bias, -LOG2_E, offset)
    t = gl.fma(scores, -scale * LOG2_E, t)
    if work[0] is not None or LEFT is not None or RIGHT is not None:
        if is_edge(row, first, query_length, key_length, LEFT, RIGHT):
            allowed = takes_part(row, first, query_length, key_length, layout, LEFT, RIGHT)
            # A NaN would reach the neighbour, and times infinity no slope is 0.
            t = gl.where(allowed, t, 0.0)
            weight_gradient = gl.where(allowed, weight_gradient, 0.0)
    return gl.fma(sigmoid_slopes(t), weight_gradient, total)


@gluon.jit
def is_edge(row, first, query_length, key_length, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """Whether lengths or window may exclude pairs of a piece."""
    edge = (row + SIDE > query_length) | (first + SIDE > key_length)
    if RIGHT is not None:
        edge = edge | (first + (SIDE - 1) > row + RIGHT)
    if LEFT is not None:
        edge = edge | (first + LEFT < row + (SIDE - 1))
    return edge


@gluon.jit
def takes_part(
    row, first, query_length, key_length, layout: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
):  # fmt: skip
    """Which pairs of a piece take part, [SIDE, SIDE]."""
    rows = gl.arange(0, SIDE, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, SIDE, layout=gl.SliceLayout(0, layout))
    # One comparison an element: of how many keys from the first on each query sees.
    limit = gl.where(rows < query_length - row, key_length - first, 0)
    if RIGHT is not None:
        limit = gl.minimum(limit, rows + (row - first + 1 + RIGHT))
    allowed = columns[None, :] < limit[:, None]
    if LEFT is not None:
        allowed = allowed & (columns[None, :] >= (rows + (row - first - LEFT))[:, None])
    return allowed


@gluon.jit
def taken(biases, count, layout: gl.constexpr):
    """The count-th piece of the bias in float32; its buffer may be filled anew."""
    biases.wait_full(count)
    bias = as_float32(biases.buffer(count).load(layout))
    fence_async_shared()  # TMA overwrites what was read
    biases.release(count)
    return bias


@gluon.jit
def finish_piece(place, total, biases, out, count, row, first, work, HELD: gl.constexpr):
    """Stores a piece's gradient; gives its part of the bias, if not held, back to be filled anew.

    A gradient in the dtype of the bias takes the way through shared memory: out, or the buffer of
    the bias that is no longer needed.
    """
    T, S = work[3], computed_here(work[4])
    result_ptr = piece_at(place[0], place[1], row, first, T, S)
    dtype: gl.constexpr = biases.buffers.dtype
    if not HELD:
        out = biases.buffer(count)
    if place[0].dtype.element_ty == dtype:
        out.store(total.to(dtype))
        store_piece(result_ptr, out.load(row_layout(SIDE)), T - row, S - first, S)
    else:
        store_piece(result_ptr, total, T - row, S - first, S)
    if not HELD:
        fence_async_shared()  # TMA overwrites what was read and written here
        biases.release(count)


@gluon.jit
def store_piece(ptr, tile, rows_left, columns_left, S):
    """Stores as many rows and columns of a piece as are left; ptr points to its first element."""
    layout: gl.constexpr = tile.type.layout
    rows = gl.arange(0, SIDE, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, SIDE, layout=gl.SliceLayout(0, layout))
    inside = (rows < rows_left)[:, None] & (columns < columns_left // 8 * 8)[None, :]
    gl.store(ptr + (rows[:, None] * row_size(S) + columns[None, :]), tile, mask=inside)


@gluon.jit
def store_no_gradient(bias_gradient_ptr, plane, row, first, work):
    """Stores zeros where no pair takes part."""
    T, S = work[3], work[4]
    layout: gl.constexpr = row_layout(SIDE)
    zeros = gl.zeros([SIDE, SIDE], bias_gradient_ptr.dtype.element_ty, layout=layout)
    for side in gl.static_range(2):
        before = first + side * SIDE
        ptr = piece_at(bias_gradient_ptr, plane, row, before, T, S)
        store_piece(ptr, zeros, T - row, S - before, S)


@gluon.jit
def piece_at(ptr, plane, row, first, T, S):
    """Where a piece begins."""
    return ptr + ((plane.to(gl.int64) * T + row) * row_size(S) + first)


@gluon.jit
def row_size(S):
    """S, as a multiple of 8 that the compiler sees: it stores 16 bytes a thread then."""
    return S // 8 * 8


@gluon.jit
def tiles_of(work, N: gl.constexpr, AXES: gl.constexpr):
    """Number of tiles of the bias."""
    tiles = gl.cdiv(work[4], TILE_KEYS) * gl.cdiv(work[3], CONSUMERS * SIDE)
    if AXES[0]:
        tiles = tiles * work[2]
    if AXES[1]:
        tiles = tiles * N
    return tiles


@gluon.jit
def tile_of(program, work, N: gl.constexpr, AXES: gl.constexpr):
    """(first query, first key, plane, begin, end) of a tile.

    A plane is a sequence and head of the bias; the repeats from begin to end are the sequences, and
    the heads of each, that share it.
    """
    key_tiles = gl.cdiv(work[4], TILE_KEYS)
    query_tiles = gl.cdiv(work[3], CONSUMERS * SIDE)
    first = program % key_tiles * TILE_KEYS
    start = program // key_tiles % query_tiles * (CONSUMERS * SIDE)
    plane = program // (key_tiles * query_tiles)
    HEADS: gl.constexpr = 1 if AXES[1] else N
    if AXES[0]:
        batch = plane
        if AXES[1]:
            batch = plane // N
        begin = batch * HEADS
        end = begin + HEADS
    else:
        begin = plane * 0
        end = work[2] * HEADS
    return start, first, plane, begin, end


@gluon.jit
def head_of(repeat, plane, N: gl.constexpr, AXES: gl.constexpr):
    """The head of a repeat of a plane's tile."""
    if AXES[1]:
        return plane % N
    else:
        return repeat % N


@gluon.jit
def lengths_of(work, batch):
    """(query length, key length) of a sequence."""
    if work[0] is None:
        return work[3], work[4]
    else:
        return uniform(gl.load(work[0] + batch)), uniform(gl.load(work[1] + batch))


@gluon.jit
def meets(work, start, first, query_length, key_length):
    """Whether a tile has pairs within the lengths; known when compiling where there are none."""
    if work[0] is None:
        return True
    else:
        return (start < query_length) & (first < key_length)


@gluon.jit
def has_pairs(start, first, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """Whether a tile has pairs within the window."""
    found = first >= 0
    if RIGHT is not None:
        found = found & (first <= start + (CONSUMERS * SIDE - 1) + RIGHT)
    if LEFT is not None:
        found = found & (first + (TILE_KEYS - 1) + LEFT >= start)
    return found


@gluon.jit
def last_repeat(
    work, start, first, begin, end, HEADS: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """The last repeat with pairs in a tile; one before begin where none has."""
    last = end - 1
    if work[0] is not None:
        last = begin - 1
        for batch in range(begin // HEADS, end // HEADS):
            query_length, key_length = lengths_of(work, batch)
            found = meets(work, start, first, query_length, key_length)
            last = gl.where(found, batch * HEADS + (HEADS - 1), last)
    return gl.where(has_pairs(start, first, LEFT, RIGHT), last, begin - 1)
