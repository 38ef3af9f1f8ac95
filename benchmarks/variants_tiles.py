"""How many tiles the kernels visit: what their loops run over, counted on the host.

Mirrors key_range and query_range of sigjax.kernels.pairs, and what hopper_pairs and
hopper_backward_pairs make of them. A tile is one block of queries by one
block of keys of one head; the loop over its other side visits whole blocks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np

from sigjax.kernels.segments import tile_ranges
from sigjax.kernels.tiles import (
    Kernel,
    Pairs,
    Tile,
    choose_tile,
    hopper_backward_tile,
    hopper_bias_tile,
    hopper_forward_tile,
)
from sigjax.testing import Direction, Workload

type HopperKernel = Literal["hopper_forward", "hopper_backward", "hopper_bias_gradient"]

# Matrix products of a visited tile, two FLOP a multiply-add.
PRODUCTS: dict["Kernel | HopperKernel", int] = {
    "forward": 2,
    "query_gradient": 3,
    "key_value_gradient": 4,
    "bias_gradient": 2,
    "hopper_forward": 2,
    "hopper_backward": 5,
    "hopper_bias_gradient": 2,
}
PROGRAM_KEYS = 128  # of the Hopper backward kernel, and of a tile of the bias gradient's
BIAS_QUERIES = 128  # of a tile of the Hopper bias gradient kernel
MULTIPROCESSORS = 132  # an H100 SXM's, each with one program of the Hopper forward kernel


@dataclass(frozen=True)
class Sparsity:
    """What keeps a kernel from visiting tiles, and which bias it differentiates.

    A bias and a mask skip nothing: every tile of theirs is visited.

    Attributes:
        window: (left, right) as in Settings; or None.
        segments: [B, T], the segment of each query and key; or None.
        bias_shape: of the bias whose gradient is asked for, four axes; or None.
        matrix: what has a number for each query and key, a bias or a mask; or None.
    """

    window: tuple[int, int] | None = None
    segments: np.ndarray | None = None
    bias_shape: tuple[int, ...] | None = None
    matrix: Literal["bias", "mask"] | None = None

    @property
    def pairs(self) -> Pairs | None:
        """What asks for tiles of its own, as choose_tile takes it."""
        return self.matrix or (None if self.segments is None else "segments")


@dataclass(frozen=True)
class Visits:
    """The work of one kernel.

    Attributes:
        kernel: its name.
        tile: how it cuts its work.
        tiles: tiles visited, over all sequences and heads.
        programs: programs launched; what fills the card.
    """

    kernel: Kernel | HopperKernel
    tile: Tile
    tiles: int
    programs: int

    def flops(self, head_size: int) -> float:
        """Floating-point operations of the matrix products over all visited tiles."""
        area = self.tile.block_q * self.tile.block_k
        return 2.0 * PRODUCTS[self.kernel] * area * head_size * self.tiles


def visits(
    workload: Workload, direction: Direction, sparsity: Sparsity, capability: int
) -> tuple[Visits, ...]:
    """What each kernel of a forward or a backward pass visits, self-attention of full rows."""
    kernels: list[Kernel] = ["forward"]
    if direction == "backward":
        kernels = ["query_gradient", "key_value_gradient"]
        # Of a bias without queries the key and value gradient kernel knows the gradient.
        if sparsity.bias_shape is not None and sparsity.bias_shape[2] > 1:
            kernels.append("bias_gradient")
    return tuple(_visits_of(kernel, workload, sparsity, capability) for kernel in kernels)


def hopper_visits(
    workload: Workload, direction: Direction, sparsity: Sparsity
) -> tuple[Visits, ...]:
    """As visits, of the Hopper kernels."""
    rows = workload.batch if sparsity.segments is None else 1  # segments have their own rows
    sequences = workload.heads * workload.batch
    if direction == "forward":
        own = hopper_forward_tile(workload.head_size, pairs=sparsity.pairs)
        # Each consumer visits the blocks of its own rows.
        kernel, tile = "hopper_forward", Tile(own.block_q, own.block_k, 4, own.stages)
        tiles = -(-workload.length // (own.consumers * own.block_q))
        programs = min(tiles * sequences, MULTIPROCESSORS)
    else:
        steps = hopper_backward_tile(workload.head_size)
        kernel, tile = "hopper_backward", Tile(steps.block_q, PROGRAM_KEYS, 4, steps.stages)
        programs = -(-workload.length // PROGRAM_KEYS) * sequences
    visited = visited_tiles(kernel, tile, workload.length, sparsity) * rows * workload.heads
    own_visits = Visits(kernel, tile, visited, programs)
    # Of a bias without queries the backward kernel has the gradient.
    shape = sparsity.bias_shape
    if direction == "backward" and shape is not None and shape[2] > 1:
        return own_visits, _bias_visits(workload, sparsity, shape)
    return (own_visits,)


def _bias_visits(workload: Workload, sparsity: Sparsity, shape: tuple[int, ...]) -> Visits:
    """What the Hopper kernel for the gradient of a bias of this shape visits; without segments."""
    own = hopper_bias_tile(workload.head_size)
    tile = Tile(BIAS_QUERIES, PROGRAM_KEYS, 4, own.key_stages)
    sequences = workload.heads * workload.batch
    visited = visited_tiles("hopper_bias_gradient", tile, workload.length, sparsity) * sequences
    blocks = (1, 1, tile.block_q, tile.block_k)
    tiles = math.prod(-(-size // block) for size, block in zip(shape, blocks, strict=True))
    return Visits("hopper_bias_gradient", tile, visited, min(tiles, MULTIPROCESSORS))


def helpers(direction: Direction, sparsity: Sparsity) -> int:
    """Kernels of a pass that visit no tile: those that look segments up, once for each side."""
    if sparsity.segments is None:
        return 0
    return 1 if direction == "forward" else 2


def visited_blocks(
    start: int,
    block: int,
    other_block: int,
    other_length: int,
    *,
    before: int | None = None,
    after: int | None = None,
    span: tuple[int, int] | None = None,
) -> int:
    """Blocks of the other side that a tile from start on visits.

    Args:
        start: first position of the tile.
        block: positions of the tile.
        other_block: positions of a block on the other side.
        other_length: positions on the other side.
        before: how far before a position its partners begin; None is no bound.
        after: how far behind it they end; None is no bound.
        span: first position and end of the tile's segments on the other side; or None.

    Example:
        >>> visited_blocks(128, 64, 64, 4096, before=64, after=64)
        3
    """
    begin, end = 0, other_length
    if before is not None:
        begin = max(start - before, 0) // other_block * other_block
    if after is not None:
        end = min(end, start + block + after)
    if span is not None:
        begin, end = max(begin, span[0] // other_block * other_block), min(end, span[1])
    return max(-(-(end - begin) // other_block), 0)


def visited_tiles(
    kernel: Kernel | HopperKernel, tile: Tile, length: int, sparsity: Sparsity
) -> int:
    """Tiles that a kernel visits for one head, in all rows of the segments or in one row."""
    of_keys = kernel in ("key_value_gradient", "hopper_backward")
    block, other_block = (tile.block_k, tile.block_q) if of_keys else (tile.block_q, tile.block_k)
    left, right = sparsity.window or (None, None)
    # A key sees queries the other way round.
    before, after = (right, left) if of_keys else (left, right)
    starts = range(0, length, block)
    return sum(
        visited_blocks(start, block, other_block, length, before=before, after=after, span=span)
        for spans in _spans(sparsity.segments, block, len(starts))
        for start, span in zip(starts, spans, strict=True)
    )


def _spans(
    segments: np.ndarray | None, block: int, tiles: int
) -> Sequence[Sequence[tuple[int, int] | None]]:
    if segments is None:
        return [[None] * tiles]
    ids = jnp.asarray(segments, jnp.int32)
    ranges = np.asarray(tile_ranges(ids, ids, block))
    return [[(int(first), int(end)) for first, end, _ in row] for row in ranges]


def _visits_of(kernel: Kernel, workload: Workload, sparsity: Sparsity, capability: int) -> Visits:
    itemsize = jnp.dtype(workload.dtype).itemsize
    tile = choose_tile(kernel, workload.head_size, itemsize, capability, sparsity.pairs)
    rows = workload.batch if sparsity.segments is None else 1  # segments have their own rows
    tiles = visited_tiles(kernel, tile, workload.length, sparsity) * rows * workload.heads
    block = tile.block_k if kernel == "key_value_gradient" else tile.block_q
    programs = -(-workload.length // block) * workload.heads * workload.batch
    if kernel == "bias_gradient" and sparsity.bias_shape is not None:
        blocks = (1, 1, tile.block_q, tile.block_k)
        programs = math.prod(
            -(-size // block) for size, block in zip(sparsity.bias_shape, blocks, strict=True)
        )
    return Visits(kernel, tile, tiles, programs)
