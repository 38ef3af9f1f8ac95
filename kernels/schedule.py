"""The order in which a persistent kernel takes the tiles of sequences of unequal length."""

import jax.numpy as jnp
from jax import Array


def order_of(lengths: Array) -> Array:
    """Sequences by falling length, [B] int32; equal ones in their order.

    Example:
        >>> import jax.numpy as jnp
        >>> order_of(jnp.array([3, 9, 9])).tolist()
        [1, 2, 0]
    """
    return _ranked(lengths)[1]


def longest_first(
    query_lengths: Array, key_lengths: Array, heads: int, tiles: int, rows: int
) -> tuple[Array, Array]:
    """Order of the sequences and where the tiles of each end, for tile_of of hopper_forward.

    First come the tiles with work, sequences with most keys first, all heads of one after the
    other; then, in the same order, the tiles of padding, which only store zeros. Comparisons
    instead of sorts: XLA makes one small kernel of it.

    Args:
        query_lengths: [B] int32.
        key_lengths: [B] int32.
        heads: N.
        tiles: tiles a head has in the padded length.
        rows: queries of a tile.

    Returns:
        order [2 B] int32: sequences, twice; ends [2 B + 1] int32: the tiles before each entry.

    Example:
        >>> import jax.numpy as jnp
        >>> order, ends = longest_first(jnp.array([100, 300]), jnp.array([5, 9]), 1, 3, 128)
        >>> order.tolist(), ends.tolist()
        ([1, 0, 1, 0], [0, 3, 4, 4, 6])
    """
    batch = query_lengths.shape[0]
    rank, order = _ranked(key_lengths)
    used = jnp.where(key_lengths > 0, -(-query_lengths // rows), 0)
    before = rank[None, :] < jnp.arange(batch + 1, dtype=jnp.int32)[:, None]
    work = jnp.where(before, used[None, :], 0).sum(1, dtype=jnp.int32)
    padding = jnp.where(before, tiles - used[None, :], 0).sum(1, dtype=jnp.int32)
    ends = jnp.concatenate([work[:batch], work[batch] + padding])
    return jnp.concatenate([order, order]), ends * heads


def _ranked(lengths: Array) -> tuple[Array, Array]:
    """Place of each sequence by falling length, and the sequence of each place."""
    index = jnp.arange(lengths.shape[0], dtype=jnp.int32)
    longer = lengths[None, :] > lengths[:, None]
    earlier = (lengths[None, :] == lengths[:, None]) & (index[None, :] < index[:, None])
    rank = (longer | earlier).sum(1, dtype=jnp.int32)
    order = jnp.where(rank[None, :] == index[:, None], index[None, :], 0).sum(1, dtype=jnp.int32)
    return rank, order
