"""Which tiles of packed rows may share a segment (host side, jnp)."""

import jax.numpy as jnp
from jax import Array


def segment_ranges(segments: Array, others: Array, block: int, other_block: int) -> Array:
    """The positions on the other side that the segments of each tile may meet.

    Exact where segments lie one after the other in falling or rising order; otherwise the range
    may hold tiles without a common segment, which add nothing.

    Args:
        segments: [B, L] int32, 0 and below is padding.
        others: [B, M] int32, likewise.
        block: positions of a tile.
        other_block: positions of a tile on the other side.

    Returns:
        [B, tiles, 2] int32: first position and end, multiples of other_block; both 0 where a
        tile meets nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> packed = jnp.array([[1, 1, 1, 2, 2, 0, 0, 0]])
        >>> segment_ranges(packed, packed, 2, 2).tolist()
        [[[0, 4], [0, 6], [2, 6], [0, 0]]]
    """
    low, high = _bounds(segments, block)
    other_low, other_high = _bounds(others, other_block)
    meets = (low[:, :, None] <= other_high[:, None]) & (other_low[:, None] <= high[:, :, None])
    tiles = meets.shape[2]
    first = jnp.argmax(meets, 2)
    end = tiles - jnp.argmax(meets[:, :, ::-1], 2)
    found = meets.any(2)[..., None]
    return (jnp.where(found, jnp.stack([first, end], 2), 0) * other_block).astype(jnp.int32)


def _bounds(segments: Array, block: int) -> tuple[Array, Array]:
    """Lowest and highest segment of each tile, [B, tiles]; of padding none is."""
    batch, length = segments.shape
    padded = jnp.pad(segments, ((0, 0), (0, -length % block))).reshape(batch, -1, block)
    lowest = jnp.where(padded > 0, padded, jnp.iinfo(jnp.int32).max).min(2)
    return lowest, jnp.where(padded > 0, padded, 0).max(2)
