"""Which tiles of packed rows share a segment, and how many keys a query has.

One small kernel (device code); tile_ranges is what it computes, in jnp, for tests and benchmarks.
"""

import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from sigjax.kernels.pairs import MIXED, PACKED, UNIFORM
from sigjax.kernels.tile_math import length_at

# Positions of the other side that are looked at at once, and in parts where they may match.
CHUNK = tl.constexpr(1024)
PART = tl.constexpr(128)


@triton.jit
def segment_kernel(
    segments_ptr,  # [B, L] int32, 0 and below is padding
    others_ptr,  # [B, M] int32, likewise
    lengths_ptr,  # [B] int32, or None
    other_lengths_ptr,  # [B] int32, or None
    L,
    M,
    ranges_ptr,  # [B, tiles, 3] int32: tile_ranges
    row_bias_ptr,  # [B, L] float32: -log(positions of the other side in the segment); or None
    BLOCK: tl.constexpr,
):
    """One program: a tile of BLOCK positions of one sequence, against all of the other side."""
    tiles = tl.cdiv(L, BLOCK)
    tile = tl.program_id(0) % tiles
    batch = tl.program_id(0) // tiles
    length = length_at(lengths_ptr, batch, L)
    other_length = length_at(other_lengths_ptr, batch, M)
    others_ptr += tl.cast(batch, tl.int64) * M
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    inside = rows < length
    ids = tl.load(segments_ptr + tl.cast(batch, tl.int64) * L + rows, mask=inside, other=0)
    low = tl.min(tl.where(ids > 0, ids, 2147483647))
    high = tl.max(ids)
    counts = tl.zeros([BLOCK], tl.int32)
    begin = other_length
    end = tl.cast(0, tl.int32)
    found = tl.cast(0, tl.int32)
    for chunk in tl.range(0, other_length, CHUNK):
        positions = chunk + tl.arange(0, CHUNK)
        others = tl.load(others_ptr + positions, mask=positions < other_length, other=0)
        meets = (others >= low) & (others <= high) & (others > 0)
        meeting = tl.sum(meets.to(tl.int32))
        if meeting != 0:
            found += meeting
            first = tl.min(tl.where(meets, positions, other_length))
            last = tl.max(tl.where(meets, positions + 1, 0))
            begin = tl.minimum(begin, first)
            end = tl.maximum(end, last)
            if row_bias_ptr is not None:
                for part in tl.range(first // PART * PART, last, PART, num_stages=3):
                    at = part + tl.arange(0, PART)
                    part_of_others = tl.load(others_ptr + at, mask=at < other_length, other=0)
                    same = ids[:, None] == part_of_others[None, :]
                    counts += tl.sum(same.to(tl.int32), 1)
    kind = tl.where(found == end - begin, PACKED, MIXED)
    single = tl.sum((inside & (ids != high)).to(tl.int32)) == 0
    kind = tl.where((kind == PACKED) & single, UNIFORM, kind)
    range_ptr = ranges_ptr + tl.program_id(0) * 3
    tl.store(range_ptr, tl.where(found > 0, begin, 0))
    tl.store(range_ptr + 1, end)
    tl.store(range_ptr + 2, tl.where(found > 0, kind, MIXED))
    if row_bias_ptr is not None:
        # Padding is equal to padding, but has no keys.
        counts = tl.maximum(tl.where(ids > 0, counts, 1), 1)
        row_bias_ptr += tl.cast(batch, tl.int64) * L
        tl.store(row_bias_ptr + rows, -tl.log(counts.to(tl.float32)), mask=rows < L)


def tile_ranges(
    segments: Array,
    others: Array,
    block: int,
    lengths: Array | None = None,
    other_lengths: Array | None = None,
) -> Array:
    """The positions on the other side that the segments of each tile may meet.

    Exact where segments lie one after the other in falling or rising order; otherwise the range
    may hold positions that match none of the tile's, which add nothing.

    Args:
        segments: [B, L] int32, 0 and below is padding.
        others: [B, M] int32, likewise.
        block: positions of a tile.
        lengths: [B] int32: what is behind is padding too; or None.
        other_lengths: likewise.

    Returns:
        [B, tiles, 3] int32: first position, end, and what lies between: MIXED, PACKED or UNIFORM
        of sigjax.kernels.pairs. All 0 where a tile meets nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> packed = jnp.array([[1, 1, 1, 2, 2, 0, 0, 0]])
        >>> tile_ranges(packed, packed, 2).tolist()
        [[[0, 3, 2], [0, 5, 1], [3, 5, 1], [0, 0, 0]]]
    """
    batch, length = segments.shape
    inside, others_inside = _inside(segments, lengths), _inside(others, other_lengths)
    pad = ((0, 0), (0, -length % block))
    ids = jnp.pad(jnp.where(inside, segments, 0), pad).reshape(batch, -1, block)
    inside = jnp.pad(inside, pad).reshape(batch, -1, block)
    low = jnp.where(ids > 0, ids, jnp.iinfo(jnp.int32).max).min(2)[..., None]
    high = ids.max(2)[..., None]
    others = jnp.where(others_inside, others, 0)[:, None]
    meets = (low <= others) & (others <= high) & (others > 0)
    found = meets.sum(2)
    first = jnp.argmax(meets, 2)
    end = meets.shape[2] - jnp.argmax(meets[..., ::-1], 2)
    single = (~inside | (ids == high)).all(2)
    kind = jnp.where(single, UNIFORM.value, PACKED.value)
    kind = jnp.where(found == end - first, kind, MIXED.value)
    return jnp.where(found[..., None] > 0, jnp.stack([first, end, kind], 2), 0).astype(jnp.int32)


def _inside(segments: Array, lengths: Array | None) -> Array:
    positions = jnp.arange(segments.shape[1])[None]
    return jnp.ones(segments.shape, bool) if lengths is None else positions < lengths[:, None]
