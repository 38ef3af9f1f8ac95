"""Sums of query gradients before and after the backward kernel adds to them (Gluon device code).

They are cleared, and what was added is scaled and rounded; what lies past a length is never read.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# A program's part of a sequence: rows, and columns of all heads side by side.
ROWS = gl.constexpr(32)
COLUMNS = gl.constexpr(128)


@gluon.jit
def query_sums_kernel(
    sums_ptr,  # [B, T, N * H] float32; None: the result are zeros
    range_scale_ptr,  # [B, K] float32, what sums are divided by; or None
    query_lengths_ptr,  # [B] int32, or None
    T,
    scale,  # factor of the sums
    result_ptr,  # [B, T, N * H]: sums, of which those past a length are left; or the gradients
    N: gl.constexpr,
    K: gl.constexpr,
    H: gl.constexpr,
):
    """One program: ROWS rows and COLUMNS columns of one sequence."""
    WIDTH: gl.constexpr = N * H
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    parts = gl.cdiv(WIDTH, COLUMNS)
    blocks = gl.cdiv(T, ROWS)
    program = gl.program_id(0)
    column = program % parts * COLUMNS
    row = program // parts % blocks * ROWS
    batch = program // parts // blocks
    length = T
    if query_lengths_ptr is not None:
        length = gl.load(query_lengths_ptr + batch)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    place = (batch.to(gl.int64) * T + row) * WIDTH + column
    offsets = rows[:, None] * WIDTH + columns[None, :]
    there = (columns < WIDTH - column)[None, :]
    inside = (rows < length - row)[:, None] & there
    total = gl.zeros([ROWS, COLUMNS], gl.float32, layout=layout)
    if sums_ptr is None:
        gl.store(result_ptr + place + offsets, total, mask=inside)
    else:
        if row < length:
            total = gl.load(sums_ptr + place + offsets, mask=inside, other=0.0)
            if range_scale_ptr is None:
                total = total * scale
            else:
                heads = (column + columns) // (H * (N // K))
                divisors = gl.load(
                    range_scale_ptr + batch * K + heads, mask=columns < WIDTH - column, other=1.0
                )
                total = total * (scale / divisors)[None, :]
        rows_of_array = (rows < T - row)[:, None] & there
        total = total.to(result_ptr.dtype.element_ty)
        gl.store(result_ptr + place + offsets, total, mask=rows_of_array)
