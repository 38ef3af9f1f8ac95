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
    query_lengths: Array,
    key_lengths: Array,
    heads: int,
    length: int,
    rows: int,
    joined: int | None = None,
) -> tuple[Array, Array]:
    """Order of the sequences and where the tiles of each end, for tile_of of hopper_tiles.

    First come the tiles with work, sequences with most keys first, all heads of one after the
    other; then, in the same order, the tiles of padding, which only store zeros. Comparisons
    instead of sorts: XLA makes one small kernel of it.

    Args:
        query_lengths: [B] int32.
        key_lengths: [B] int32.
        heads: N.
        length: T, the padded length.
        rows: queries of a tile.
        joined: queries of the blocks that heads' tiles share where they do, see hopper_joint.

    Returns:
        order [2 B] int32: sequences, twice; ends [2 B + 1] int32: the tiles before each entry.

    Example:
        >>> import jax.numpy as jnp
        >>> order, ends = longest_first(jnp.array([100, 300]), jnp.array([5, 9]), 1, 384, 128)
        >>> order.tolist(), ends.tolist()
        ([1, 0, 1, 0], [0, 3, 4, 4, 6])
    """
    batch = query_lengths.shape[0]
    rank, order = _ranked(key_lengths)
    queries = jnp.where(key_lengths > 0, query_lengths, 0)
    if joined is None:
        used = -(-queries // rows)
        works, pads = used * heads, (-(-length // rows) - used) * heads
    else:
        blocks, consumers = -(-queries // joined), rows // joined
        works = blocks // consumers * heads + -(-(blocks % consumers * heads) // consumers)
        pads = -(-jnp.maximum(length - blocks * joined, 0) // rows) * heads
    before = rank[None, :] < jnp.arange(batch + 1, dtype=jnp.int32)[:, None]
    work = jnp.where(before, works[None, :], 0).sum(1, dtype=jnp.int32)
    padding = jnp.where(before, pads[None, :], 0).sum(1, dtype=jnp.int32)
    ends = jnp.concatenate([work[:batch], work[batch] + padding])
    return jnp.concatenate([order, order]), ends


def _ranked(lengths: Array) -> tuple[Array, Array]:
    """Place of each sequence by falling length, and the sequence of each place."""
    index = jnp.arange(lengths.shape[0], dtype=jnp.int32)
    longer = lengths[None, :] > lengths[:, None]
    earlier = (lengths[None, :] == lengths[:, None]) & (index[None, :] < index[:, None])
    rank = (longer | earlier).sum(1, dtype=jnp.int32)
    order = jnp.where(rank[None, :] == index[:, None], index[None, :], 0).sum(1, dtype=jnp.int32)
    return rank, order
