"""What the Hopper kernels share (Gluon device code): rings, layouts, copies and stores."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

from sigjax.kernels.tile_math import LOG2_E

# Row offset and length of the ragged view of a [B * S, W] array, launch.ragged_rows.
RAGGED = gl.constexpr(1 << 30)
_LOAD_QUADS = gl.constexpr("ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];")
CLEARED_AT_ONCE = gl.constexpr(16)  # rows; the producers have few registers


@gluon.aggregate
class Ring:
    """Buffers in shared memory that one side fills and the other frees, stage by stage."""

    buffers: gl.shared_memory_descriptor  # [buffers, ROWS, H]
    full: gl.shared_memory_descriptor  # [stages, 1] mbarriers
    free: gl.shared_memory_descriptor  # [stages, 1] mbarriers
    stages: gl.constexpr
    by_mask: gl.constexpr  # see stage_of

    @gluon.jit
    def buffer(self, count):
        """The buffer of the count-th use."""
        return self.buffers.index(stage_of(count, self.stages, self.by_mask))

    @gluon.jit
    def wait_full(self, count, pred=True):
        """Waits until the count-th use is filled."""
        mbarrier.wait(
            self.full.index(stage_of(count, self.stages, self.by_mask)),
            (count // self.stages) & 1,
            pred=pred,
        )

    @gluon.jit
    def wait_free(self, count):
        """Waits until the buffer of the count-th use may be filled."""
        mbarrier.wait(
            self.free.index(stage_of(count, self.stages, self.by_mask)),
            ((count // self.stages) & 1) ^ 1,
        )

    @gluon.jit
    def release(self, count):
        """One of those who read the count-th use is done with it."""
        mbarrier.arrive(self.free.index(stage_of(count, self.stages, self.by_mask)), count=1)


@gluon.jit
def stage_of(count, STAGES: gl.constexpr, BY_MASK: gl.constexpr):
    """The stage of the count-th use; count is not negative.

    With BY_MASK without the sign that the compiler heeds in a remainder; where a loop is short of
    uniform registers it may do better with more to compute.
    """
    if BY_MASK and is_power_of_2(STAGES):
        return count & (STAGES - 1)
    else:
        return count % STAGES


@gluon.constexpr_function
def is_power_of_2(number):
    """Whether a number is a power of two."""
    return number & (number - 1) == 0


@gluon.jit
def new_ring(
    dtype: gl.constexpr, BUFFERS: gl.constexpr, ROWS: gl.constexpr, H: gl.constexpr,
    layout: gl.constexpr, STAGES: gl.constexpr, READERS: gl.constexpr,
    BY_MASK: gl.constexpr = True,
):  # fmt: skip
    """A ring of BUFFERS tiles [ROWS, H] in STAGES, each stage freed by READERS arrivals."""
    buffers = gl.allocate_shared_memory(dtype, [BUFFERS, ROWS, H], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=READERS)
    return Ring(buffers, full, free, STAGES, BY_MASK)


@gluon.jit
def copy_rows(
    desc, batch, first, length, full_length, column, barrier, buffer,
    ROWS: gl.constexpr, H: gl.constexpr, IS_RAGGED: gl.constexpr,
):  # fmt: skip
    """Starts the copy of rows first.. of one head; rows at or past length arrive as zeros.

    A plain descriptor is [B, full_length, W] and knows no length but the full one.
    """
    if IS_RAGGED:
        coordinates = [RAGGED, batch * full_length + length, RAGGED - length + first, column]
        tma.async_load(desc, coordinates, barrier, buffer.reshape([1, 1, ROWS, H]))
    else:
        tma.async_load(desc, [batch, first, column], barrier, buffer.reshape([1, ROWS, H]))


@gluon.jit
def fill(
    ring, count, desc, batch, first, length, full_length, column, ROWS: gl.constexpr,
    H: gl.constexpr, IS_RAGGED: gl.constexpr,
):  # fmt: skip
    """Starts the copy of the count-th use of a ring, once its buffer is free; see copy_rows."""
    ring.wait_free(count)
    full = ring.full.index(count % ring.stages)
    mbarrier.expect(full, desc.nbytes_per_cta)
    copy_rows(
        desc, batch, first, length, full_length, column, full, ring.buffer(count), ROWS, H,
        IS_RAGGED,
    )  # fmt: skip


@gluon.jit
def clear_padding(buffer, ids_ptr, layout: gl.constexpr, count=None):
    """Makes the rows of a buffer in shared memory zeros where they are in no segment.

    Only the first count have an id; None is all. layout is that of CLEARED_AT_ONCE rows.
    """
    rows = gl.arange(0, CLEARED_AT_ONCE, layout=gl.SliceLayout(1, layout))
    for part in gl.static_range(buffer.shape[0] // CLEARED_AT_ONCE):
        pointers = ids_ptr + part * CLEARED_AT_ONCE + rows
        if count is None:
            ids = gl.load(pointers)
        else:
            ids = gl.load(pointers, mask=rows < count - part * CLEARED_AT_ONCE, other=0)
        tile = buffer.slice(part * CLEARED_AT_ONCE, CLEARED_AT_ONCE)
        values = tile.load(layout)
        tile.store(gl.where((ids > 0)[:, None], values, gl.zeros_like(values)))


@gluon.jit
def head_offset(sigmoid_bias_ptr, batch_head, key_length):
    """What a head adds to every t: the caller's bias, or log2 of the number of keys."""
    if sigmoid_bias_ptr is None:
        return gl.log2(gl.maximum(key_length, 1).to(gl.float32))
    else:
        return gl.load(sigmoid_bias_ptr + batch_head) * -LOG2_E


@gluon.jit
def key_bias_row(batch, head, N: gl.constexpr, AXES: gl.constexpr):
    """The row of a head in a bias [B or 1, N or 1, keys]; AXES tells which axes it has."""
    if AXES is None:
        return head * 0
    elif AXES[0] and AXES[1]:
        return batch * N + head
    elif AXES[0]:
        return batch
    elif AXES[1]:
        return head
    else:
        return head * 0


@gluon.jit
def of_keys(key_bias_ptr, row, first, S, BLOCK_K: gl.constexpr, layout: gl.constexpr):
    """What the keys of a block add, [BLOCK_K], from a row of whole blocks."""
    # The compiler has to see that a block's first is a multiple: it loads neighbours together then.
    start = row.to(gl.int64) * (gl.cdiv(S, BLOCK_K) * BLOCK_K) + first // BLOCK_K * BLOCK_K
    return gl.load(key_bias_ptr + start + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout)))


@gluon.jit
def begun_with_keys(ptr, row, first, S, ROWS: gl.constexpr, BLOCK_K: gl.constexpr):
    """What the keys of a block add, in an accumulator [ROWS, BLOCK_K]; of a row of whole blocks.

    There each pair of keys comes twice, see load_quads: hopper_launch._for_scores.
    """
    layout: gl.constexpr = accumulator_layout(BLOCK_K)
    start = row.to(gl.int64) * (gl.cdiv(S, BLOCK_K) * BLOCK_K) + first
    columns = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))
    offsets = gl.zeros([ROWS, BLOCK_K], gl.int32, layout=layout) + (columns // 2 * 4)[None, :]
    return load_quads(ptr + start * 2 + offsets)


@gluon.jit
def load_quads(pointers):
    """Floats of an accumulator, four at each pointer: two columns of a row, and 8 rows below.

    So they come to the registers of a product by one load of 16 bytes each and no move.
    """
    return gl.inline_asm_elementwise(
        _LOAD_QUADS, "=f,=f,=f,=f,l,l,l,l", [pointers], dtype=gl.float32, is_pure=True, pack=4
    )


@gluon.jit
def uniform(x):
    """Tells ptxas that a loaded scalar is the same in all threads of a warp."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 0x1f, -1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def computed_here(x):
    """Gives x back; what follows from it is not computed before the loop, to wait in registers."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.constexpr_function
def accumulator_layout(columns):
    """Of a product [64, columns] in the registers of a warpgroup."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16]
    )


@gluon.jit
def begin_scores(rows, columns, initial=None):
    """Starts rows [64, H] · columns [L, H] transposed, float32 [64, L]; added to initial."""
    layout: gl.constexpr = accumulator_layout(columns.shape[0])
    if initial is None:
        scores = gl.zeros([rows.shape[0], columns.shape[0]], gl.float32, layout=layout)
        return warpgroup_mma(rows, columns.permute((1, 0)), scores, use_acc=False, is_async=True)
    else:
        return warpgroup_mma(rows, columns.permute((1, 0)), initial, is_async=True)


@gluon.constexpr_function
def row_layout(columns):
    """Of a tile whose rows are stored 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@gluon.jit
def store_rows(ptr, buffer, row, end, valid, stride: gl.constexpr):
    """Stores a buffer's rows below end; those at or past valid become 0."""
    layout: gl.constexpr = row_layout(buffer.shape[1])
    rows = gl.arange(0, buffer.shape[0], layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, buffer.shape[1], layout=gl.SliceLayout(0, layout))
    tile = buffer.load(layout)
    tile = gl.where((row + rows < valid)[:, None], tile, gl.zeros_like(tile))
    offsets = rows[:, None] * stride + columns[None, :]
    gl.store(ptr + offsets, tile, mask=(row + rows < end)[:, None])


@gluon.jit
def store_rows_apart(ptr, buffer, row, end, valid, stride: gl.constexpr):
    """As store_rows; padding is stored apart, so that no tile without it pays for it."""
    layout: gl.constexpr = row_layout(buffer.shape[1])
    rows = gl.arange(0, buffer.shape[0], layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, buffer.shape[1], layout=gl.SliceLayout(0, layout))
    tile = buffer.load(layout)
    pointers = ptr + rows[:, None] * stride + columns[None, :]
    gl.store(pointers, tile, mask=(row + rows < gl.minimum(valid, end))[:, None])
    if row + buffer.shape[0] > valid:
        padding = (row + rows >= valid) & (row + rows < end)
        gl.store(pointers, gl.zeros_like(tile), mask=padding[:, None])


@gluon.jit
def store_accumulator(ptr, tile, row, end, valid, stride: gl.constexpr):
    """Stores rows below end from registers; those at or past valid become 0."""
    layout: gl.constexpr = tile.type.layout
    rows = gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, layout))
    tile = gl.where((row + rows < valid)[:, None], tile, gl.zeros_like(tile))
    offsets = rows[:, None] * stride + columns[None, :]
    gl.store(ptr + offsets, tile, mask=(row + rows < end)[:, None])


@gluon.jit
def store_zeros(
    ptr, row, end, dtype: gl.constexpr, stride: gl.constexpr, ROWS: gl.constexpr, H: gl.constexpr
):
    """Stores zeros into a tile's rows below end."""
    layout: gl.constexpr = row_layout(H)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, H, layout=gl.SliceLayout(0, layout))
    zeros = gl.zeros([ROWS, H], dtype, layout=layout)
    gl.store(
        ptr + rows[:, None] * stride + columns[None, :], zeros, mask=(row + rows < end)[:, None]
    )
