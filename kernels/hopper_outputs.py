"""How the Hopper forward kernel stores outputs (Gluon device code)."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from sigjax.kernels.hopper_math import row_layout, store_accumulator, store_rows_apart, store_zeros

BY_ROWS = gl.constexpr(0)  # by threads, whole rows from shared memory
BY_TMA = gl.constexpr(1)  # from shared memory, while the next tile is begun
FROM_REGISTERS = gl.constexpr(2)  # by threads, without shared memory: for another dtype


class Outputs(NamedTuple):
    """Where outputs go; OUTPUT says which of these there are."""

    desc: Any
    ptr: Any
    buffers: Any  # one for each consumer


@gluon.jit
def store_outputs(outputs, total, tile, row, T, options, CONSUMER: gl.constexpr):
    """Stores a consumer's outputs [BLOCK_Q, H] of the rows below T, 0 past the length."""
    H: gl.constexpr = options.H
    batch, head, query_length = tile.batch, tile.head, tile.query_length
    if options.OUTPUT == BY_TMA:
        if row + total.shape[0] > query_length:
            rows = row + gl.arange(0, total.shape[0], layout=gl.SliceLayout(1, total.type.layout))
            total = gl.where((rows < query_length)[:, None], total, 0.0)
        store_by_tma(outputs.desc, outputs.buffers.index(CONSUMER), total, batch, row, head)
    else:
        ptr = pointer_of(outputs.ptr, batch, row, head, T, options.N, H)
        if options.OUTPUT == BY_ROWS:
            outputs.buffers.index(CONSUMER).store(total.to(outputs.buffers.dtype))
            store_rows_apart(
                ptr, outputs.buffers.index(CONSUMER), row, T, query_length, options.N * H
            )
        else:
            total = total.to(outputs.ptr.dtype.element_ty)
            store_accumulator(ptr, total, row, T, query_length, options.N * H)


@gluon.jit
def store_no_outputs(outputs, tile, row, T, options, CONSUMER: gl.constexpr):
    """Stores zeros into a consumer's rows below T."""
    BLOCK_Q: gl.constexpr = options.BLOCK_Q
    N: gl.constexpr = options.N
    H: gl.constexpr = options.H
    batch, head = tile.batch, tile.head
    if options.OUTPUT == BY_TMA:
        if row < T:
            zeros = gl.zeros([BLOCK_Q, H], gl.float32, layout=row_layout(H))
            store_by_tma(outputs.desc, outputs.buffers.index(CONSUMER), zeros, batch, row, head)
    else:
        ptr = pointer_of(outputs.ptr, batch, row, head, T, N, H)
        store_zeros(ptr, row, T, outputs.ptr.dtype.element_ty, N * H, BLOCK_Q, H)


@gluon.jit
def store_by_tma(output_desc, buffer, tile, batch, row, head):
    """Starts the store of a tile, once the last one has left the buffer; rows from T on are not."""
    tma.store_wait(0)
    buffer.store(tile.to(buffer.dtype))
    fence_async_shared()
    tma.async_store(
        output_desc,
        [batch, row, head * buffer.shape[1]],
        buffer.reshape([1, buffer.shape[0], buffer.shape[1]]),
    )


@gluon.jit
def pointer_of(ptr, batch, row, head, T, N: gl.constexpr, H: gl.constexpr):
    """Where a head's row of [B, T, N, H] begins."""
    return ptr + ((batch.to(gl.int64) * T + row) * N + head) * H
