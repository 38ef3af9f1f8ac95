"""How parts of the query gradients get to the sums in global memory (Gluon device code).

By TMA from shared memory, or directly from the registers of a product.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

# Adds two neighbours of a row to global memory; or where the row is inside.
_ADD = gl.constexpr(
    "red.relaxed.gpu.global.add.v2.f32 [$2], {$4, $5}; mov.b32 $0, 0; mov.b32 $1, 0;"
)
_ADD_INSIDE = gl.constexpr(
    "{ .reg .pred inside; setp.ne.b32 inside, $6, 0; "
    "@inside red.relaxed.gpu.global.add.v2.f32 [$2], {$4, $5}; mov.b32 $0, 0; mov.b32 $1, 0; }"
)

# How parts are added: by TMA; directly; directly where T is no multiple of a part's rows.
STAGED = gl.constexpr(0)
DIRECT = gl.constexpr(1)
DIRECT_INSIDE = gl.constexpr(2)


@gluon.jit
def stage_part(sums, part):
    """Puts a part [BLOCK_Q, columns] where TMA reads it, once it has read the last one."""
    tma.store_wait(0)
    sums.store(part)
    fence_async_shared()


@gluon.jit
def add_staged(query_gradient_desc, sums, batch, start, column):
    """Adds the staged part to rows start.. and columns column.. of a sequence."""
    tma.async_atomic_add(
        query_gradient_desc,
        [batch, start, column],
        sums.reshape([1, sums.shape[0], sums.shape[1]]),
    )


@gluon.jit
def add_directly(
    query_gradient_ptr, part, batch, start, column, T, WIDTH: gl.constexpr, SUMS: gl.constexpr
):
    """Adds a part as add_staged does, to a sum [B, T, WIDTH] and without shared memory."""
    layout: gl.constexpr = part.type.layout
    rows = gl.arange(0, part.shape[0], layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, part.shape[1], layout=gl.SliceLayout(0, layout))
    first = query_gradient_ptr + (batch.to(gl.int64) * T + start) * WIDTH + column
    # Row by row first: what columns add is then part of the instruction.
    pointers = (first + rows * WIDTH)[:, None] + columns[None, :]
    if SUMS == DIRECT:
        gl.inline_asm_elementwise(
            _ADD, "=r,=r,l,l,f,f", [pointers, part], dtype=gl.int32, is_pure=False, pack=2
        )
    else:
        inside = (rows < T - start).to(gl.int32)[:, None] + gl.zeros_like(part).to(gl.int32)
        gl.inline_asm_elementwise(
            _ADD_INSIDE, "=r,=r,l,l,f,f,r,r", [pointers, part, inside], dtype=gl.int32,
            is_pure=False, pack=2,
        )  # fmt: skip
