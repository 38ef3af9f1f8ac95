"""Several short cells in one row: less padding with fewer shapes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sigjax.buckets import LengthBuckets

# Static, because a batch holds so many embeddings a row; the ten sets of the README need 7.
CELLS_A_ROW = 16
# Shorter rows than an eighth of the longest hold too few cells to fill up.
MOST_LENGTHS = 4


@dataclass
class Row:
    """A packed row.

    Attributes:
        members: which of the given cells it holds, in the order they were put in.
        length: tokens in it.
        bucket: the smallest that holds it.
    """

    members: list[int] = field(default_factory=list)
    length: int = 0
    bucket: int = 0


def first_fit(lengths: Sequence[int], buckets: LengthBuckets) -> list[Row]:
    """Packs cells into rows, the longest first, each into the first row with room.

    A cell that fits nowhere begins a row of the smallest bucket that holds it. At the
    end each row takes the smallest bucket that holds what came into it. Rows are
    ordered by the first of their cells, so that their lengths come shuffled as the
    cells did.

    Args:
        lengths: tokens of each cell, the cell token included; none above the last edge.
        buckets: lengths of rows.

    Example:
        >>> rows = first_fit([30, 90, 20, 60], LengthBuckets((64, 128)))
        >>> [(row.members, row.length, row.bucket) for row in rows]
        [([1, 0], 120, 1), ([2], 20, 0), ([3], 60, 0)]
    """
    begins = buckets.assign(list(lengths)).tolist()
    rows: list[Row] = []
    for cell in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = _first_with_room(rows, lengths[cell], buckets)
        if row is None:
            row = Row(bucket=begins[cell])
            rows.append(row)
        row.members.append(cell)
        row.length += lengths[cell]
    for row, bucket in zip(rows, buckets.assign([row.length for row in rows]), strict=True):
        row.bucket = int(bucket)
    return sorted(rows, key=lambda row: min(row.members))


def packed_buckets(longest: int, count: int, multiple: int) -> LengthBuckets:
    """Lengths of rows that cells are packed into: the longest cell's, halved again and again.

    Rows fill up whatever the lengths of cells are, as long as most are much shorter
    than the row: halving keeps a row to at most twice its longest cell.

    Args:
        longest: tokens of the longest cell.
        count: the most lengths; no more than MOST_LENGTHS, whatever it is.
        multiple: every length is a multiple of it.

    Example:
        >>> packed_buckets(1000, 3, 128).edges
        (256, 512, 1024)
    """
    halves = (-(-longest // (multiple * 2**i)) * multiple for i in range(min(count, MOST_LENGTHS)))
    return LengthBuckets(tuple(sorted(set(halves))))


def _first_with_room(rows: list[Row], length: int, buckets: LengthBuckets) -> Row | None:
    for row in rows:
        fits = row.length + length <= buckets.edges[row.bucket]
        if fits and len(row.members) < CELLS_A_ROW:
            return row
    return None
