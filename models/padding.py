"""What padding costs: shares of padding tokens with one length, with buckets, and packed."""

from typing import NamedTuple

import numpy as np

from sigjax.buckets import LengthBuckets
from sigjax.models.config import DataConfig
from sigjax.models.packing import first_fit, packed_buckets
from sigjax.models.plan import Shapes

# More cells than this are sampled before they are packed, which takes Python a while.
PACKED_CELLS = 20_000
# Cells packed together where the configuration packs none.
WINDOW = 256


class Padding(NamedTuple):
    """One way to bring cells to static shapes.

    Attributes:
        name: of the way.
        shapes: (rows of a batch, tokens of a row).
        cells: number of cells in rows of each shape.
        share: of padding among the tokens of rows, from 0 to 1.
    """

    name: str
    shapes: tuple[tuple[int, int], ...]
    cells: tuple[int, ...]
    share: float


def paddings(lengths: np.ndarray, config: DataConfig, seed: int = 0) -> list[Padding]:
    """One length, the configured number of lengths, and cells packed into as many.

    Args:
        lengths: tokens of each cell, the cell token included: int [C], C at least 1.
        config: number of shapes, their multiple, tokens of a batch and the packing window.
        seed: of the order in which cells are packed.

    Raises:
        InputError: the longest cell does not fit a batch.
    """
    one, several = (
        LengthBuckets.fit(lengths, count=count, multiple=config.multiple)
        for count in (1, config.buckets)
    )
    return [
        _alone("one length", lengths, one, config),
        _alone(f"{len(several.edges)} lengths", lengths, several, config),
        _packed(lengths, config, seed),
    ]


def _alone(name: str, lengths: np.ndarray, buckets: LengthBuckets, config: DataConfig) -> Padding:
    counts = np.bincount(buckets.assign(lengths), minlength=len(buckets.edges))
    return Padding(name, _shapes(buckets, config), tuple(counts.tolist()), buckets.waste(lengths))


def _packed(lengths: np.ndarray, config: DataConfig, seed: int) -> Padding:
    buckets = packed_buckets(int(lengths.max()), config.buckets, config.multiple)
    window = config.pack_window or WINDOW
    order = np.random.default_rng(seed).permutation(lengths)[:PACKED_CELLS]
    rows = [
        row
        for start in range(0, len(order), window)
        for row in first_fit(order[start : start + window].tolist(), buckets)
    ]
    held = np.array([len(row.members) for row in rows])
    chosen = np.array([row.bucket for row in rows])
    tokens = int(np.asarray(buckets.edges)[chosen].sum())
    return Padding(
        f"{len(buckets.edges)} lengths, packed",
        _shapes(buckets, config),
        tuple(np.bincount(chosen, held, len(buckets.edges)).astype(int).tolist()),
        1 - int(order.sum()) / tokens,
    )


def _shapes(buckets: LengthBuckets, config: DataConfig) -> tuple[tuple[int, int], ...]:
    rows = Shapes.of_budget(buckets, config.tokens_per_batch).rows
    return tuple(zip(rows, buckets.edges, strict=True))
